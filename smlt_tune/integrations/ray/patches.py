"""Every place of Ray that is replaced, with the reason; and what is relied on beyond that.

Tune has no hook for another kind of trial: it turns resources into a placement group, and every
trial into an actor. Five small replacements are all that is needed. They concern trials that ask
for ``"smlt"`` only, :func:`uninstall` takes them back, and :func:`install` refuses a Ray in which
one of them would not fit. Developed against Ray 2.60.
"""

import inspect
import threading
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from ray.air.execution._internal import RayActorManager
from ray.train._internal.session import _FutureTrainingResult
from ray.tune.execution import tune_controller
from ray.tune.execution.placement_groups import resource_dict_to_pg_factory
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import trial as trial_module
from ray.tune.experiment.trial import Trial
from ray.tune.trainable import function_trainable
from ray.tune.trainable import util as trainable_util

from smlt_tune.errors import InvalidInput
from smlt_tune.integrations.ray.actor_manager import VirtualActorManager
from smlt_tune.integrations.ray.virtual_actor import FutureTrainingResult

#: Oldest Ray that is supported.
OLDEST = (2, 60)

#: Parameters that have to be there under these names.
_SIGNATURES: list[tuple[Callable[..., Any], set[str]]] = [
    (RayActorManager.__init__, {"resource_manager"}),
    (RayActorManager.add_actor, {"cls", "kwargs", "resource_request", "on_start", "on_error"}),
    (RayActorManager.remove_actor, {"tracked_actor", "kill", "stop_future"}),
    (RayActorManager.schedule_actor_task, {"tracked_actor", "method_name", "_return_future"}),
    (RayActorManager.clear_actor_task_futures, {"tracked_actor"}),
    (RayActorManager.next, {"timeout"}),
    (_FutureTrainingResult.__init__, {"future"}),
    (_FutureTrainingResult.resolve, {"block"}),
    (TuneController.get_trial, {"tid"}),
    (Trial.update_resources, {"resources"}),
    (trainable_util.with_resources, {"trainable", "resources"}),
    (resource_dict_to_pg_factory, {"spec"}),
]
#: Local variables that closures made by these functions hold on to.
_CLOSURES: list[tuple[Callable[..., Any], set[str]]] = [
    (function_trainable.wrap_function, {"train_func"}),
    (trainable_util.with_parameters, {"parameter_registry", "prefix", "keys", "trainable"}),
]

#: Gives the resources that a string stands for, and anything else back as it is.
Resolve = Callable[[Any], Any]

_lock = threading.Lock()
_undo: list[Callable[[], None]] = []


def install(resolve: Resolve) -> None:
    """Makes Tune understand ``"smlt"``. Does nothing if it does already.

    Args:
        resolve: Gives the resources that a string stands for, and anything else back as it is.

    Raises:
        InvalidInput: This Ray is not supported.
    """
    with _lock:
        if _undo:
            return
        if missing := _missing():
            raise InvalidInput(missing)
        _replace(trial_module, "resource_dict_to_pg_factory", partial(_resolving, resolve))
        _replace(Trial, "update_resources", partial(_resolving_method, resolve))
        _replace_code_of_with_resources(resolve)
        _replace(tune_controller, "RayActorManager", lambda _: VirtualActorManager)
        _replace(tune_controller, "_FutureTrainingResult", lambda _: FutureTrainingResult)


def uninstall() -> None:
    """Leaves Ray as it was."""
    with _lock:
        while _undo:
            _undo.pop()()


def _missing() -> list[str]:
    """What keeps this Ray from being supported, one sentence each."""
    version = tuple(int(part) for part in ray.__version__.split(".")[:2])
    if version < OLDEST:
        return [f"Ray {ray.__version__} is too old: Ray 2.60 or later is needed"]
    says = f"Ray {ray.__version__} is not supported by this version of smlt_tune: "
    missing = [
        f"{says}{function.__qualname__} has no {name}"
        for table, has in ((_SIGNATURES, _parameters), (_CLOSURES, _kept))
        for function, names in table
        for name in sorted(names - has(function))
    ]
    missing += [
        f"{says}its controller knows no {name}"
        for name in ("RayActorManager", "_FutureTrainingResult")
        if not hasattr(tune_controller, name)
    ]
    return missing


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _kept(function: Callable[..., Any]) -> set[str]:
    return set(function.__code__.co_cellvars)


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    _undo.append(lambda: setattr(owner, name, original))
    setattr(owner, name, make(original))


def _resolving(resolve: Resolve, original: Callable[..., Any]) -> Callable[..., Any]:
    """Where a trial turns what is no placement group factory into one.

    ``tune.run``, ``Experiment``, ``run_experiments``, ``default_resource_request`` and functions
    of the configuration all come by here.
    """

    def resource_dict_to_pg_factory(spec: Any = None) -> Any:
        resolved = resolve(spec)
        return original(spec) if resolved is spec else resolved

    return resource_dict_to_pg_factory


def _resolving_method(resolve: Resolve, original: Callable[..., None]) -> Callable[..., None]:
    """Where ``tune.run(resume=...)`` and schedulers give a trial other resources."""

    def update_resources(trial: Trial, resources: Any) -> None:
        original(trial, resolve(resources))

    return update_resources


def _replace_code_of_with_resources(resolve: Resolve) -> None:
    """``tune.with_resources`` accepts no strings.

    Its code is exchanged, not the function, because users have imported that by name before.
    """
    function = trainable_util.with_resources
    code = function.__code__
    original = types.FunctionType(code, function.__globals__, function.__name__)

    # Runs with the globals of Ray's module, where only the name below is ours, and no type is.
    def with_resources(trainable, resources):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        return _smlt_with_resources(trainable, resources)  # type: ignore[name-defined] # noqa: F821

    function.__globals__["_smlt_with_resources"] = lambda trainable, resources: original(
        trainable, resolve(resources)
    )
    _undo.append(lambda: function.__globals__.pop("_smlt_with_resources"))
    _undo.append(lambda: setattr(function, "__code__", code))
    function.__code__ = with_resources.__code__
