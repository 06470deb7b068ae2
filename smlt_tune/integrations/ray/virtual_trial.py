"""A trial without an actor: what Tune asks of an actor is asked of a job.

The job runs in lockstep: it goes on after a report once Tune has asked for the next result.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ray.exceptions import RayTaskError
from ray.train._internal.session import _TrainingResult
from ray.tune.result import RESULT_DUPLICATE, SHOULD_CHECKPOINT

from smlt_tune.backend.fleet import Fleet
from smlt_tune.backend.job import FINISHED, QUEUED, Job, Report
from smlt_tune.errors import BudgetExhausted, InvalidInput, JobError, TrainingFunctionError
from smlt_tune.integrations.ray.attachment import attach
from smlt_tune.integrations.ray.object_refs import object_refs
from smlt_tune.integrations.ray.results import Pointer, Results, write_checkpoint
from smlt_tune.integrations.ray.staging import Staged
from smlt_tune.integrations.ray.trial_request import sending_to_functions
from smlt_tune.integrations.ray.tune_session import Trial
from smlt_tune.runtime.clock import SYSTEM_CLOCK


class VirtualTrial:
    """One run of a trial, from when Tune starts it until Tune lets it go.

    Args:
        fleet: Where its job runs.
        trial: Whose run.
        storage: Where Tune keeps the trial's checkpoints.
        staged: Its program.
        options: Arguments of ``Fleet.submit``.
        donate: Keeps a checkpoint of its job, given by URL, for other trials to start from.
    """

    def __init__(
        self,
        fleet: Fleet,
        trial: Trial,
        storage: Any,
        staged: Staged,
        options: dict[str, Any],
        donate: Callable[[str], None],
    ) -> None:
        self.fleet, self.trial, self._staged, self._donate = fleet, trial, staged, donate
        self._storage = copy.copy(storage)  # it counts checkpoints; Tune counts in its own
        self._options = _on_one_worker(options) if staged.keeps_files else options
        self._results = Results(trial.trial_id, trial.config)
        self._start: Pointer | None = None
        self._newest: Pointer | None = None
        self._saved: Pointer | None = None
        self._job: Job | None = None
        self._reports: Iterator[Report] = iter(())
        self._cursor = 0
        self._let_go: Callable[[Job], None] | None = None
        self._failed = False
        self._lock = threading.Lock()

    @property
    def entering(self) -> bool:
        """Whether it has yet to get its first functions."""
        job = self._job
        asking = job is None or (job.status == QUEUED and not job.allocations)
        return asking and not self._failed and self._let_go is None

    @property
    def queued(self) -> bool:
        """Whether it has asked the fleet for its first functions, and waits for them."""
        return self._job is not None and self.entering

    @property
    def workers(self) -> int:
        """Number of its functions; at least one, before that is known."""
        at = self._job.allocation if self._job is not None else None
        return at.workers if at else 1

    def describe(self) -> dict[str, Any]:
        """What Tune asks for before there is a result."""
        return self._results.filled_in(debug_metrics_only=True)

    # --- what Tune asks for, on its thread -------------------------------------------------------

    def restore(self, checkpointed: _TrainingResult) -> None:
        """The next result is to be the one after this checkpoint."""
        self._start = Pointer.of(checkpointed)
        self._cursor = self._start.index + 1
        self._results.restore(checkpointed.metrics)

    def train(self, answer: Callable[[Any], None]) -> None:
        """Calls ``answer`` with the next result or an error, from another thread."""
        name = f"smlt-{self.trial.trial_id}"
        threading.Thread(target=self._train, args=(answer,), name=name, daemon=True).start()

    def save(self) -> _TrainingResult:
        """The checkpoint of the last result; None in it if the program has saved nothing."""
        newest = self._newest
        if newest is None:
            return _TrainingResult(None, self._results.last)
        # Asked twice for one report, or by a class, it may be a scheduler that asks, on behalf of
        # other trials.
        asked_for = newest == self._saved or self._staged.is_class
        self._saved = newest
        if asked_for and not self._results.last["done"]:
            self._donate(newest.uri)
        files = self.fleet.read_checkpoint(newest.uri) if self._staged.keeps_files else b""
        return _TrainingResult(write_checkpoint(self._storage, newest, files), self._results.last)

    def release(self, *, pause: bool) -> None:
        """Takes the job off its functions, for a while or for good. Returns without waiting."""
        with self._lock:
            self._let_go = Job.pause if pause else _stop
            if self._job is not None:
                self._let_go(self._job)

    # --- on a thread of its own ------------------------------------------------------------------

    def _train(self, answer: Callable[[Any], None]) -> None:
        try:
            answer(self._next_result())
        except Exception as error:  # noqa: BLE001 - the boundary of the thread: Tune is told
            self._failed = True
            answer(explained(self.trial.name, error))

    def _next_result(self) -> dict[str, Any]:
        begun_s = SYSTEM_CLOCK.monotonic()
        if self._job is None:
            self._begin()
        assert self._job is not None
        if self._cursor:
            self._job.acknowledge(self._cursor)
        report = next((r for r in self._reports if r.index >= self._cursor), None)
        if report is None:
            return self._over(self._job)
        self._cursor = report.index + 1
        result = self._results.make(self._job.job_id, report, SYSTEM_CLOCK.monotonic() - begun_s)
        if report.checkpoint and (not self._newest or self._newest.uri != report.checkpoint):
            self._newest = Pointer(report.checkpoint, self._job.job_id, report.index)
            if not self._staged.is_class:
                result[SHOULD_CHECKPOINT] = True
        return result

    def _begin(self) -> None:
        if mistakes := object_refs("config", self.trial.config):
            raise InvalidInput(mistakes)
        with sending_to_functions():
            job = attach(self.fleet, self.trial, self._staged, self._options, self._start)
        with self._lock:
            self._job = job
            if self._let_go is not None:  # Tune has changed its mind meanwhile
                self._let_go(job)
        self._reports = job.reports()

    def _over(self, job: Job) -> dict[str, Any]:
        """The last answer: Tune makes the last result the final one."""
        outcome = job.result()
        if outcome.status == FINISHED:
            return {RESULT_DUPLICATE: True}
        kind = BudgetExhausted if outcome.reason == "budget" else JobError
        raise kind(
            f"stopped after {len(outcome.reports)} reports: {outcome.reason}. What it had trained "
            "is kept: Tuner.restore(..., resume_errored=True) continues it"
        )


def explained(name: str, error: Exception) -> RayTaskError:
    """The error as Tune gets it from an actor.

    Args:
        name: Of the trial; the message begins with it.
        error: What has gone wrong.
    """
    text = f"trial {name}: {type(error).__name__}: {error}"
    if isinstance(error, TrainingFunctionError):
        text = f"{text}\n{error.worker_traceback}"
    return RayTaskError(name, text, error)  # type: ignore[no-untyped-call]


def _on_one_worker(options: dict[str, Any]) -> dict[str, Any]:
    """A function that opens no session trains on one worker, unless the user knows better."""
    if options["workers"] or options["max_workers"]:
        return options
    return {**options, "workers": 1}


def _stop(job: Job) -> None:
    job.stop("Tune has stopped the trial")
