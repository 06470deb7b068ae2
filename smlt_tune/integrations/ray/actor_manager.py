"""Tune's manager of actors, which serves the trials on a fleet by itself.

Everything that concerns other trials goes to Ray's own manager. A trial on a fleet is pending until
the fleet has functions for it.
"""

import uuid
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

from ray.air.execution._internal import RayActorManager, TrackedActor
from ray.air.execution.resources import ResourceManager

from smlt_tune.integrations.ray.entrance import Entrance
from smlt_tune.integrations.ray.experiment import Experiment
from smlt_tune.integrations.ray.inbox import Inbox
from smlt_tune.integrations.ray.trial_request import TrialRequest
from smlt_tune.integrations.ray.virtual_actor import Callback, VirtualActor
from smlt_tune.integrations.ray.virtual_trial import VirtualTrial
from smlt_tune.runtime.clock import SYSTEM_CLOCK

#: With actors of Ray about, or with trials that wait to be let in, look at both this often, s.
SLICE_S = 0.01
#: The same while the fleet is full: the first of them stands in the fleet's own queue already.
FULL_SLICE_S = 0.1


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
        self._entrance = Entrance()
        self._let_go: list[VirtualTrial] = []
        self._actors_first = False

    # --- what Tune asks for ----------------------------------------------------------------------

    @property
    def pending_actors(self) -> list[TrackedActor]:  # noqa: D102 - the contract stands in Ray
        return [*super().pending_actors, *self._waiting]

    def add_actor(  # noqa: D102
        self, cls: Any, kwargs: dict[str, Any], resource_request: Any, **callbacks: Any
    ) -> TrackedActor:
        if not isinstance(resource_request, TrialRequest):
            self._experiment.refuse_move(kwargs, resource_request)
            return super().add_actor(cls, kwargs, resource_request, **callbacks)
        self._experiment.controller = callbacks["on_start"].__self__
        tracked = TrackedActor(uuid.uuid4().int, **callbacks)
        self._virtual[tracked] = VirtualActor(
            self._experiment, self._inbox, tracked, cls, kwargs, resource_request
        )
        self._waiting.append(tracked)
        return tracked

    def schedule_actor_task(  # noqa: D102
        self,
        tracked_actor: TrackedActor,
        method_name: str,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        on_result: Callback = None,
        on_error: Callback = None,
        _return_future: bool = False,
    ) -> Any:
        actor = self._virtual.get(tracked_actor)
        if actor is not None:
            return actor.schedule(method_name, args or (), kwargs or {}, on_result, on_error)
        return super().schedule_actor_task(
            tracked_actor, method_name, args, kwargs, on_result, on_error, _return_future
        )

    def clear_actor_task_futures(self, tracked_actor: TrackedActor) -> None:  # noqa: D102
        actor = self._virtual.get(tracked_actor)
        if actor is None:
            super().clear_actor_task_futures(tracked_actor)
            return
        actor.forget_tasks()
        self._let_go.append(actor.trial)

    def remove_actor(  # noqa: D102
        self, tracked_actor: TrackedActor, kill: bool = False, stop_future: Any = None
    ) -> bool:
        if tracked_actor not in self._virtual:
            removed: bool = super().remove_actor(tracked_actor, kill, stop_future)
            return removed
        self.clear_actor_task_futures(tracked_actor)
        if tracked_actor in self._waiting:
            self._waiting.remove(tracked_actor)
            del self._virtual[tracked_actor]
            return False
        self._inbox.put(partial(self._stopped, tracked_actor))
        return True

    def cleanup(self) -> None:  # noqa: D102
        for tracked_actor in self._virtual:
            self._live_actors_to_ray_actors_resources.pop(tracked_actor, None)
        self._experiment.close()
        super().cleanup()  # type: ignore[no-untyped-call]

    # --- what happens ----------------------------------------------------------------------------

    def next(self, timeout: float | None = None) -> bool:
        """Lets one thing happen. Trials with and without actors take turns."""
        self._settle()
        ends_s = None if timeout is None else SYSTEM_CLOCK.monotonic() + timeout
        self._actors_first = not self._actors_first
        if self._actors_first and self._has_actors and super().next(timeout=0):
            return True
        while not self._let_in():
            left_s = None if ends_s is None else max(0.0, ends_s - SYSTEM_CLOCK.monotonic())
            actors, wait_s = self._has_actors, left_s
            if actors or self._waiting:
                full = self._entrance.queued and not actors
                slice_s = FULL_SLICE_S if full else SLICE_S
                wait_s = slice_s if left_s is None else min(slice_s, left_s)
            if event := self._inbox.get(0.0 if actors else wait_s):
                event()
                return True
            if actors and super().next(timeout=wait_s):
                return True
            if ends_s is not None and SYSTEM_CLOCK.monotonic() >= ends_s:
                return False
        return True

    @property
    def _has_actors(self) -> bool:
        virtual = len(self._virtual) - len(self._waiting)
        live = len(self._live_actors_to_ray_actors_resources) > virtual
        return live or bool(self._pending_actors_to_attrs)

    def _let_in(self) -> bool:
        """Starts the next trial, if there may be functions for it."""
        if not self._waiting or not self._entrance.open(self._inside()):
            return False
        tracked_actor = self._waiting.popleft()
        actor = self._virtual[tracked_actor]
        self._live_actors_to_ray_actors_resources[tracked_actor] = actor.handle()
        self._live_resource_cache = None
        self._entrance.enter(actor.trial)
        if tracked_actor._on_start:
            tracked_actor._on_start(tracked_actor)
        return True

    def _inside(self) -> Iterator[VirtualTrial]:
        """All that have been let in and not let go; worked out only for who wants to know."""
        waiting = set(self._waiting)
        yield from (actor.trial for key, actor in self._virtual.items() if key not in waiting)

    def _settle(self) -> None:
        """Only now it is known whether Tune has let a trial go for a while or for good."""
        while self._let_go:
            virtual = self._let_go.pop()
            controller = self._experiment.controller
            assert controller is not None
            trial = controller.get_trial(virtual.trial.trial_id)  # type: ignore[no-untyped-call]
            virtual.release(pause=trial is not None and not trial.is_finished())

    def _stopped(self, tracked_actor: TrackedActor) -> None:
        if self._virtual.pop(tracked_actor, None) is None:
            return
        self._live_actors_to_ray_actors_resources.pop(tracked_actor, None)
        self._live_resource_cache = None
        if tracked_actor._on_stop:
            tracked_actor._on_stop(tracked_actor)
