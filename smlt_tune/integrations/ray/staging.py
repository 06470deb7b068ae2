"""From what Tune calls a trainable to the training function of a job.

A trainable is a class by the time an actor is made of it. What the user wrote is taken out of it
again, so that a function is not made to import Ray for a class that wraps it. Nothing is called and
nothing is unpickled here; the fleet stores the code by its content.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from ray.tune.trainable import FunctionTrainable, Trainable

from smlt_tune.backend.artifact_manager import pickled
from smlt_tune.integrations.ray.object_refs import refuse_object_refs
from smlt_tune.integrations.ray.programs import ClassProgram, FunctionProgram, Pickled, Program
from smlt_tune.integrations.ray.trial_request import sending_to_functions


@dataclass(frozen=True)
class Staged:
    """A trainable, ready to be sent.

    Attributes:
        program: The training function.
        keeps_files: Whether its state can only be in files of its own, and it trains on one worker:
            the user's code does not mention ``smlt_tune``, so it opens no session.
        is_class: Whether Tune says when it wants to see a checkpoint. The reports of a function do.
    """

    program: Program
    keeps_files: bool
    is_class: bool


_known: "WeakKeyDictionary[type, Staged]" = WeakKeyDictionary()


def stage(actor_class: Any) -> Staged:
    """The training function for a trainable.

    Args:
        actor_class: The trainable's class after ``ray.remote``.

    Raises:
        InvalidInput: It holds what cannot be sent.
    """
    trainable = actor_class.__ray_metadata__.modified_class.__ray_actor_class__
    if trainable not in _known:
        with sending_to_functions():
            _known[trainable] = _stage(trainable)
    return _known[trainable]


def _stage(trainable: type[Trainable]) -> Staged:
    if not issubclass(trainable, FunctionTrainable):
        users_class, parameters = _class_of(trainable)
        content = pickled(users_class, "the trainable")
        refuse_object_refs(users_class, parameters, content)
        program = _once(ClassProgram(users_class, parameters))
        return Staged(program, keeps_files=True, is_class=True)
    function, parameters = _function_of(trainable)
    content = pickled(function, "the training function")
    refuse_object_refs(function, parameters, content)
    keeps_files = b"smlt_tune" not in content
    call = functools.partial(function, **parameters) if parameters else function
    program = _once(FunctionProgram(call, keeps_files=keeps_files))
    return Staged(program, keeps_files=keeps_files, is_class=False)


def _once(program: Program) -> Program:
    """The program, pickled now for all its trials, as Ray does, and not again for each."""
    return Pickled(pickled(program, "the trainable"))


def _function_of(trainable: type[FunctionTrainable]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What ``wrap_function``, ``with_parameters`` and ``with_resources`` have wrapped."""
    function = _closure(trainable._trainable_func)["train_func"]
    parameters: dict[str, Any] = {}
    while True:
        held = _closure(function)
        if "parameter_registry" in held:
            parameters = _parameters(held) | parameters
            function = held["trainable"]
        elif getattr(function, "__qualname__", "").startswith("with_resources.<locals>"):
            function = held["trainable"]  # a method
        else:
            return function, parameters


def _class_of(trainable: type[Trainable]) -> tuple[type[Trainable], dict[str, Any]]:
    """What ``with_parameters`` and ``with_resources`` have derived from."""
    parameters: dict[str, Any] = {}
    while True:
        held = _closure(trainable.__dict__.get("setup"))
        if "parameter_registry" in held:
            parameters = _parameters(held) | parameters
        elif not trainable.__qualname__.startswith("with_resources.<locals>"):
            return trainable, parameters
        trainable = trainable.__bases__[0]


def _closure(function: Any) -> dict[str, Any]:
    """The variables of enclosing functions that a function holds on to."""
    if not isinstance(function, types.FunctionType):
        return {}
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _parameters(held: dict[str, Any]) -> dict[str, Any]:
    """The values that ``with_parameters`` has put into Ray's object store."""
    registry, prefix = held["parameter_registry"], held["prefix"]
    return {key: registry.get(prefix + key) for key in sorted(held["keys"])}
