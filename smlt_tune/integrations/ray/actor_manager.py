"""Tune's manager of actors, which serves the trials on a fleet by itself.

Everything that concerns other trials goes to Ray's own manager. A trial on a fleet is pending until
the fleet has functions for it: one at a time is let in and asks for them.
"""

import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import ray
from ray.air.execution._internal import RayActorManager, TrackedActor
from ray.air.execution.resources import ResourceManager
from ray.exceptions import RayTaskError
from ray.tune import TuneError
from ray.tune.execution.tune_controller import TuneController

from smlt_tune.integrations.ray.experiment import Experiment
from smlt_tune.integrations.ray.inbox import Inbox
from smlt_tune.integrations.ray.trial_request import TrialRequest
from smlt_tune.integrations.ray.virtual_trial import VirtualTrial, explained
from smlt_tune.runtime.clock import SYSTEM_CLOCK

#: With actors of Ray about, or with trials that wait to be let in, look at both this often, s.
SLICE_S = 0.01

#: What a virtual actor can be asked for.
METHODS = ("train", "train_buffered", "save", "restore", "reset", "stop")


@dataclass
class VirtualActor:
    """What stands for an actor.

    Attributes:
        cls: Class that the actor would have.
        request: What it asked for.
        trial: The trial that it serves now.
        tasks: What it was asked to do, and Tune waits for.
    """

    cls: Any
    request: TrialRequest
    trial: VirtualTrial
    tasks: set[object] = field(default_factory=set)


class VirtualActorManager(RayActorManager):
    """Ray's manager, for trials with and without actors. The contract stands there.

    Args:
        resource_manager: For the trials with actors.
    """

    def __init__(self, resource_manager: ResourceManager) -> None:
        super().__init__(resource_manager)
        self._experiment = Experiment()
        self._inbox = Inbox()
        self._virtual: dict[TrackedActor, VirtualActor] = {}
        self._waiting: deque[TrackedActor] = deque()
        self._entering: VirtualTrial | None = None
        self._let_go: list[VirtualTrial] = []
        self._controller: TuneController | None = None
        self._actors_first = False

    @property
    def pending_actors(self) -> list[TrackedActor]:  # noqa: D102
        return [*super().pending_actors, *self._waiting]

    def add_actor(  # noqa: D102
        self, cls: Any, kwargs: dict[str, Any], resource_request: Any, **callbacks: Any
    ) -> TrackedActor:
        if not isinstance(resource_request, TrialRequest):
            self._experiment.refuse_move(kwargs, resource_request)
            return super().add_actor(cls, kwargs, resource_request, **callbacks)
        self._controller = callbacks["on_start"].__self__
        tracked = TrackedActor(uuid.uuid4().int, **callbacks)
        trial = self._experiment.trial(cls, kwargs, resource_request)
        self._virtual[tracked] = VirtualActor(cls, resource_request, trial)
        self._waiting.append(tracked)
        return tracked

    def remove_actor(  # noqa: D102
        self, tracked_actor: TrackedActor, kill: bool = False, stop_future: Any = None
    ) -> bool:
        actor = self._virtual.get(tracked_actor)
        if actor is None:
            removed: bool = super().remove_actor(tracked_actor, kill, stop_future)
            return removed
        self.clear_actor_task_futures(tracked_actor)
        if tracked_actor in self._waiting:
            self._waiting.remove(tracked_actor)
            del self._virtual[tracked_actor]
            return False
        self._inbox.put(partial(self._stopped, tracked_actor))
        return True

    def schedule_actor_task(  # noqa: D102
        self,
        tracked_actor: TrackedActor,
        method_name: str,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        on_result: Callable[..., None] | None = None,
        on_error: Callable[..., None] | None = None,
        _return_future: bool = False,
    ) -> Any:
        actor = self._virtual.get(tracked_actor)
        if actor is None:
            return super().schedule_actor_task(
                tracked_actor, method_name, args, kwargs, on_result, on_error, _return_future
            )
        if method_name not in METHODS:
            raise TuneError(f"trial {actor.trial.trial.name} runs on a fleet: no {method_name}()")
        task = object()
        actor.tasks.add(task)
        answer = partial(self._answer, tracked_actor, task, on_result, on_error)
        if method_name in ("train", "train_buffered"):
            actor.trial.train(lambda value: self._inbox.put(partial(answer, value)))
            return None
        try:
            value = self._call(actor, method_name, args or (), kwargs or {})
        except Exception as error:  # noqa: BLE001 - the boundary to what would be an actor
            value = explained(actor.trial.trial.name, error)
        # A save must not wait for results: HyperBand and PBT decide about other trials with them.
        self._inbox.put(partial(answer, value), first=True)
        return ray.put(value) if _return_future and method_name == "save" else task

    def clear_actor_task_futures(self, tracked_actor: TrackedActor) -> None:  # noqa: D102
        actor = self._virtual.get(tracked_actor)
        if actor is None:
            super().clear_actor_task_futures(tracked_actor)
            return
        actor.tasks.clear()
        self._let_go.append(actor.trial)

    def cleanup(self) -> None:  # noqa: D102
        for tracked_actor in self._virtual:
            self._live_actors_to_ray_actors_resources.pop(tracked_actor, None)
        self._experiment.close()
        super().cleanup()  # type: ignore[no-untyped-call]

    def next(self, timeout: float | None = None) -> bool:
        """Lets one thing happen. Trials with and without actors take turns."""
        self._settle()
        ends_s = None if timeout is None else SYSTEM_CLOCK.monotonic() + timeout
        self._actors_first = not self._actors_first
        if self._actors_first and self._has_actors and super().next(timeout=0):
            return True
        while True:
            if self._let_in():
                return True
            left_s = None if ends_s is None else max(0.0, ends_s - SYSTEM_CLOCK.monotonic())
            actors = self._has_actors
            wait_s = left_s
            if actors or self._waiting:
                wait_s = SLICE_S if left_s is None else min(SLICE_S, left_s)
            if event := self._inbox.get(0.0 if actors else wait_s):
                event()
                return True
            if actors and super().next(timeout=wait_s):
                return True
            if left_s == 0.0:
                return False

    @property
    def _has_actors(self) -> bool:
        virtual = len(self._virtual) - len(self._waiting)
        live = len(self._live_actors_to_ray_actors_resources) > virtual
        return live or bool(self._pending_actors_to_attrs)

    def _let_in(self) -> bool:
        """Starts the next trial, unless the one before still waits for functions."""
        if not self._waiting or (self._entering is not None and self._entering.queued):
            return False
        tracked_actor = self._waiting.popleft()
        actor = self._virtual[tracked_actor]
        handle = SimpleNamespace(
            get_auto_filled_metrics=SimpleNamespace(remote=lambda **_: actor.trial.describe())
        )
        stand_in: Any = handle, SimpleNamespace(resource_request=actor.request)
        self._live_actors_to_ray_actors_resources[tracked_actor] = stand_in
        self._live_resource_cache = None
        self._entering = actor.trial
        if tracked_actor._on_start:
            tracked_actor._on_start(tracked_actor)
        return True

    def _call(
        self, actor: VirtualActor, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What an actor would do at once."""
        if method == "save":
            return actor.trial.save()
        if method == "restore":
            return actor.trial.restore(*args)
        if method == "reset":  # with reuse_actors=True
            arguments = {"config": args[0], **kwargs}
            actor.trial = self._experiment.trial(actor.cls, arguments, actor.request)
            return True
        return None  # stop: what it has to do is done when Tune lets it go

    def _answer(
        self,
        tracked_actor: TrackedActor,
        task: object,
        on_result: Callable[..., None] | None,
        on_error: Callable[..., None] | None,
        value: Any,
    ) -> None:
        actor = self._virtual.get(tracked_actor)
        if actor is None or task not in actor.tasks:
            return  # Tune does not wait for it any more
        actor.tasks.remove(task)
        callback = on_error if isinstance(value, RayTaskError) else on_result
        if callback:
            callback(tracked_actor, value)

    def _settle(self) -> None:
        """Only now it is known whether Tune has let a trial go for a while or for good."""
        while self._let_go:
            virtual = self._let_go.pop()
            assert self._controller is not None
            trial = self._controller.get_trial(  # type: ignore[no-untyped-call]
                virtual.trial.trial_id
            )
            virtual.release(pause=trial is not None and not trial.is_finished())

    def _stopped(self, tracked_actor: TrackedActor) -> None:
        if self._virtual.pop(tracked_actor, None) is None:
            return
        self._live_actors_to_ray_actors_resources.pop(tracked_actor, None)
        self._live_resource_cache = None
        if tracked_actor._on_stop:
            tracked_actor._on_stop(tracked_actor)
