"""From a URL to a store. The code of a kind of store is loaded when the first one is opened."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from smlt_tune.errors import InvalidInput
from smlt_tune.runtime.stores.base import ObjectStore, ParameterStore

_STORES = "smlt_tune.runtime.stores."
_PARAMETER_STORES = {
    "redis": _STORES + "redis_store:RedisStore",
    "rediss": _STORES + "redis_store:RedisStore",
    "unix": _STORES + "redis_store:RedisStore",
}
_OBJECT_STORES = {
    "file": _STORES + "directory:open_url",
    "s3": _STORES + "s3:open_url",
}


def open_parameter_store(url: str, *, retry_s: float = 30.0) -> ParameterStore:
    """The parameter store at a URL: ``redis://``, ``rediss://`` or ``unix://``.

    Args:
        url: Where; may hold a password.
        retry_s: How long its verbs keep trying to reach the server, seconds.

    Raises:
        InvalidInput: The URL is none of those.
    """
    opener = _opener(url, _PARAMETER_STORES, "parameter store")
    store: ParameterStore = opener(url, retry_s=retry_s)
    return store


def open_object_store(url: str, options: Mapping[str, str] | None = None) -> ObjectStore:
    """The object store at a URL: ``file:///directory`` or ``s3://bucket/prefix``.

    Args:
        url: Where; holds no secret.
        options: Further arguments of that kind of store, which may be secrets. For ``s3``:
            ``endpoint_url``, ``access_key``, ``secret_key``, ``session_token``, ``region``.

    Raises:
        InvalidInput: The URL is none of those, or it does not take such options.
    """
    store: ObjectStore = _opener(url, _OBJECT_STORES, "object store")(url, options or {})
    return store


def _opener(url: str, table: Mapping[str, str], kind: str) -> Any:
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in table:
        # The URL may hold a password: only what stands before :// is repeated.
        given = f"{scheme}://" if separator else "a URL without ://"
        known = ", ".join(f"{name}://" for name in table)
        raise InvalidInput(f"unknown kind of {kind} {given!r}: expected one of {known}")
    module, _, name = table[scheme].partition(":")
    return getattr(import_module(module), name)
