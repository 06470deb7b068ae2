"""Artifact Manager (paper 1a): the user's code and data, stored once per content.

Code travels by value: the training function is pickled with all it uses from modules that are
not installed packages, so that a function needs nothing but that and the packages of its image. Its
name in the object store is the SHA-256 of its content, which workers check before they unpickle it
(invariant 10).
"""

import hashlib
import site
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import numpy as np
from numpy.typing import NDArray

from smlt_tune.errors import InvalidInput
from smlt_tune.runtime import keys
from smlt_tune.runtime.data import DATA_SHARD_BYTES, DataIndex, encode_shard
from smlt_tune.runtime.stores.base import ObjectStore

_PICKLING = threading.Lock()  # cloudpickle's register of modules is global


class ArtifactManager:
    """Puts code and data into an object store. May be used from several threads.

    Args:
        store: Where to.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._stored: set[str] = set()
        self._datasets: dict[str, str] = {}

    @property
    def datasets(self) -> dict[str, str]:
        """SHA-256 of the uploaded data sets, by name."""
        return dict(self._datasets)

    def store_code(self, thing: Any, what: str) -> str:
        """Stores a function or configuration and returns its SHA-256.

        Args:
            thing: Anything that can be pickled.
            what: For the error message.

        Raises:
            InvalidInput: It cannot be pickled.
        """
        content = pickled(thing, what)
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._stored:
            self._store.put(keys.code(digest), content, if_absent=True)
            self._stored.add(digest)
        return digest

    def upload(self, name: str, data: Any) -> None:
        """Stores a data set, in shards of at most 250 MB, for ``session.batches(name)``.

        Args:
            name: What training functions call it.
            data: An array (or CPU tensor), or a tuple of arrays of equal length.

        Raises:
            InvalidInput: It is neither, or empty.
        """
        single = not isinstance(data, tuple | list)
        arrays = [_array(name, a) for a in ([data] if single else data)]
        mistakes = _mistakes(name, arrays)
        if mistakes:
            raise InvalidInput(mistakes)
        row_bytes = max(1, sum(a.nbytes for a in arrays) // len(arrays[0]))
        rows = max(1, DATA_SHARD_BYTES // row_bytes)
        index = DataIndex(len(arrays[0]), rows, len(arrays), single)
        shards = range(0, index.size, rows)
        digest = hashlib.sha256(index.encode())
        for start in shards:  # twice over the shards, so that only one is in memory at a time
            digest.update(encode_shard([a[start : start + rows] for a in arrays]))
        name_of = digest.hexdigest()
        for number, start in enumerate(shards):
            content = encode_shard([a[start : start + rows] for a in arrays])
            self._store.put(keys.data_shard(name_of, number), content, if_absent=True)
        self._store.put(keys.data_index(name_of), index.encode(), if_absent=True)
        self._datasets[name] = name_of

    def restore(self, datasets: dict[str, str]) -> None:
        """Takes over what an earlier client uploaded."""
        self._datasets.update(datasets)


def pickled(thing: Any, what: str) -> bytes:
    """A function or configuration with all it uses of the user's own modules.

    Args:
        thing: Anything that can be pickled.
        what: For the error message.

    Raises:
        InvalidInput: It cannot be pickled.
    """
    try:
        with _by_value():
            content: bytes = cloudpickle.dumps(thing)
    except Exception as error:
        raise InvalidInput(
            f"{what} cannot be sent to a worker: {type(error).__name__}: {error}; open files, "
            "locks, connections and generators must be made inside the training function"
        ) from error
    return content


def _array(name: str, value: Any) -> NDArray[Any]:
    try:
        array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
        encode_shard([array[:0]] if array.ndim else [])
    except Exception as error:
        raise InvalidInput(
            f"data set {name!r}: {type(value).__name__} is no array of numbers: {error}"
        ) from error
    if array.dtype.hasobject or array.ndim == 0:
        raise InvalidInput(
            f"data set {name!r}: {type(value).__name__} of dtype {array.dtype} is no array of "
            "numbers with a first axis of samples"
        )
    return array


def _mistakes(name: str, arrays: list[NDArray[Any]]) -> list[str]:
    mistakes = []
    if not name:
        mistakes.append("a data set needs a name")
    lengths = [len(a) for a in arrays]
    if not arrays or not min(lengths):
        mistakes.append(f"data set {name!r} is empty")
    elif len(set(lengths)) > 1:
        mistakes.append(f"data set {name!r}: its arrays differ in length: {lengths}")
    return mistakes


@contextmanager
def _by_value() -> Iterator[None]:
    """Within it, cloudpickle takes the user's own modules along instead of naming them."""
    with _PICKLING:
        modules = _users_modules.now()
        registered = cloudpickle.list_registry_pickle_by_value()
        fresh = [m for name, m in modules.items() if name not in registered]
        for module in fresh:
            cloudpickle.register_pickle_by_value(module)
        try:
            yield
        finally:
            for module in fresh:
                cloudpickle.unregister_pickle_by_value(module)


class _UsersModules:
    """The user's own modules by name; looked for again when others have been imported."""

    def __init__(self) -> None:
        self._of: list[Any] = []
        self._found: dict[str, ModuleType] = {}

    def now(self) -> dict[str, ModuleType]:
        modules = list(sys.modules.values())
        if modules != self._of:
            # By name: a module may stand in sys.modules more than once.
            self._found = {m.__name__: m for m in modules if _is_users(m)}
            self._of = modules
        return self._found


_users_modules = _UsersModules()  # guarded by _PICKLING


def _is_users(module: Any) -> bool:
    if not isinstance(module, ModuleType):
        return False
    facts = object.__getattribute__(module, "__dict__")  # wakes no lazy module up
    name, file = facts.get("__name__"), facts.get("__file__")
    if not isinstance(name, str) or not isinstance(file, str) or name == "__main__":
        return False
    if name.partition(".")[0] == "smlt_tune" or name not in sys.modules:
        return False
    return _outside_packages(file)


@cache
def _outside_packages(file: str) -> bool:
    path = Path(file)
    return path.suffix == ".py" and not any(path.is_relative_to(home) for home in _INSTALLED)


_INSTALLED = [
    Path(place)
    for place in {
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib"),
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        *site.getsitepackages(),
        site.getusersitepackages(),
    }
]
