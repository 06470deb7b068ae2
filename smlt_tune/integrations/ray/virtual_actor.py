"""What stands for an actor: takes the tasks that Tune would send to one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from ray.air.execution._internal import TrackedActor
from ray.exceptions import RayTaskError
from ray.train._internal.session import _FutureTrainingResult, _TrainingResult
from ray.tune import TuneError

from smlt_tune.integrations.ray.experiment import Experiment
from smlt_tune.integrations.ray.inbox import Inbox
from smlt_tune.integrations.ray.trial_request import TrialRequest
from smlt_tune.integrations.ray.virtual_trial import VirtualTrial, explained

Callback = Callable[..., None] | None


@dataclass(frozen=True)
class Saved:
    """Stands for the future of a save, which is over when Tune gets it.

    Attributes:
        result: What it has given, or the error.
    """

    result: _TrainingResult | RayTaskError


class FutureTrainingResult(_FutureTrainingResult):
    """Where PBT and its like ask what a save has given.

    Ray's own fetches it from the object store, and to put it there after every report, for
    schedulers that never ask, would take longer than the save.
    """

    def resolve(self, block: bool = True) -> _TrainingResult | None:
        """What was saved; None if that has failed, which Tune is told by itself."""
        if not isinstance(self.future, Saved):
            return super().resolve(block)
        result = self.future.result
        return result if isinstance(result, _TrainingResult) else None


class VirtualActor:
    """One virtual actor. It serves one trial, or with ``reuse_actors`` several in turn.

    Args:
        experiment: Makes its trials.
        inbox: Takes its answers to Tune's thread.
        tracked: Tune's name for it.
        cls: Class that the actor would have.
        kwargs: Arguments of that class's constructor.
        request: What Tune asks for on its behalf.
    """

    def __init__(
        self,
        experiment: Experiment,
        inbox: Inbox,
        tracked: TrackedActor,
        cls: Any,
        kwargs: dict[str, Any],
        request: TrialRequest,
    ) -> None:
        self._experiment, self._inbox, self._tracked = experiment, inbox, tracked
        self._cls, self._request = cls, request
        self._tasks: set[object] = set()
        self.trial: VirtualTrial = experiment.trial(cls, kwargs, request)

    def handle(self) -> tuple[Any, Any]:
        """What Tune's controller looks at of an actor's handle, and of its acquired resources."""
        describe = SimpleNamespace(remote=lambda **_: self.trial.describe())
        return (
            SimpleNamespace(get_auto_filled_metrics=describe),
            SimpleNamespace(resource_request=self._request),
        )

    def schedule(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        on_result: Callback,
        on_error: Callback,
    ) -> Any:
        """Takes a task. Its callback comes through the inbox.

        Returns:
            What stands for the task's future; of a save what it has given, for PBT asks for it.

        Raises:
            TuneError: No trial on a fleet can do that.
        """
        task = object()
        answer = partial(self._answer, task, on_result, on_error)
        if method in ("train", "train_buffered"):
            self._tasks.add(task)
            self.trial.train(lambda value: self._inbox.put(partial(answer, value)))
            return task
        try:
            value = self._do(method, args, kwargs)
        except Exception as error:
            if isinstance(error, TuneError):
                raise
            value = explained(self.trial.trial.name, error)
        self._tasks.add(task)
        # A save must not wait for results: HyperBand and PBT decide about other trials with them.
        self._inbox.put(partial(answer, value), first=True)
        return Saved(value) if method == "save" else task

    def forget_tasks(self) -> None:
        """Tune waits for none of them any more."""
        self._tasks.clear()

    def _do(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if method == "save":
            return self.trial.save()
        if method == "restore":
            return self.trial.restore(*args)
        if method == "reset":  # with reuse_actors=True
            arguments = {"config": args[0], **kwargs}
            self.trial = self._experiment.trial(self._cls, arguments, self._request)
            return True
        if method == "stop":
            return None  # what there is to do is done when Tune has let the trial go
        raise TuneError(f"trial {self.trial.trial.name} runs on a fleet, which has no {method}()")

    def _answer(self, task: object, on_result: Callback, on_error: Callback, value: Any) -> None:
        if task not in self._tasks:
            return
        self._tasks.remove(task)
        callback = on_error if isinstance(value, RayTaskError) else on_result
        if callback:
            callback(self._tracked, value)
