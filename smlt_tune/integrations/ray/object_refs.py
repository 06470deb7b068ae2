"""Refuses values that only Ray's object store could resolve."""

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray

from smlt_tune.errors import InvalidInput


def refuse_object_refs(
    trainable: Callable[..., Any], parameters: Mapping[str, Any], content: bytes
) -> None:
    """Raises if a function or class holds on to an ObjectRef.

    Args:
        trainable: What the user wrote.
        parameters: Values of ``tune.with_parameters``.
        content: The trainable, pickled.

    Raises:
        InvalidInput: Names every variable that is one, or holds one.
    """
    named = [*_names_in(trainable), *parameters.items()]
    mistakes = [mistake for name, value in named for mistake in object_refs(name, value)]
    if not mistakes and b"ray._raylet" in content and b"ObjectRef" in content:
        mistakes = [_mistake("something that the trainable holds on to")]
    if mistakes:
        raise InvalidInput(mistakes)


def object_refs(name: str, value: Any) -> list[str]:
    """One sentence for each ObjectRef in a value.

    Args:
        name: What the user calls the value.
        value: Anything; dictionaries and sequences are looked into.
    """
    if isinstance(value, ray.ObjectRef):
        return [_mistake(name)]
    parts: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        parts = [(f"{name}[{key!r}]", part) for key, part in value.items()]
    elif isinstance(value, list | tuple | set):
        parts = [(f"{name}[{place}]", part) for place, part in enumerate(value)]
    return [mistake for part in parts for mistake in object_refs(*part)]


def _mistake(name: str) -> str:
    return (
        f"{name} is an ObjectRef, and functions have no object store of Ray: pass the value itself "
        "with tune.with_parameters(train, ...), or upload it with Fleet.upload"
    )


def _names_in(trainable: Any) -> Iterator[tuple[str, Any]]:
    """What a function holds on to, by the names that its author knows."""
    if isinstance(trainable, functools.partial):
        yield from ((f"argument {place}", value) for place, value in enumerate(trainable.args))
        yield from trainable.keywords.items()
        yield from _names_in(trainable.func)
    elif isinstance(trainable, type):
        for name in ("setup", "step"):
            yield from _names_in(getattr(trainable, name))
    elif inspect.ismethod(trainable):
        yield from vars(trainable.__self__).items()
        yield from _names_in(trainable.__func__)
    elif isinstance(trainable, types.FunctionType):
        captured = inspect.getclosurevars(trainable)
        yield from captured.nonlocals.items()
        yield from captured.globals.items()
        defaults = inspect.signature(trainable).parameters.values()
        yield from ((parameter.name, parameter.default) for parameter in defaults)
