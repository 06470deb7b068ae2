"""A job: the record that the scheduler keeps, and the handle that the user holds."""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from smlt_tune.backend.goals import Cheapest, Fastest, Goal, Target
from smlt_tune.backend.resource_manager.observations import DEFAULT_STORE, Allocation, Workload
from smlt_tune.backend.resource_manager.policy import Bounds
from smlt_tune.errors import (
    FunctionLost,
    InvalidInput,
    JobError,
    OutOfMemory,
    TrainingFunctionError,
)
from smlt_tune.runtime.features import ModelFeatures

#: A job's ``status`` is one of these.
QUEUED, RUNNING, PAUSED = "queued", "running", "paused"
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
#: Of a job that has ended and is paid for.
OVER = (FINISHED, STOPPED, FAILED)

_ERRORS: dict[str, type[JobError]] = {
    cls.__name__: cls for cls in (TrainingFunctionError, OutOfMemory, FunctionLost)
}


@dataclass(frozen=True)
class Report:
    """What a training function reported, and what it had cost by then.

    Attributes:
        index: How many reports came before.
        metrics: As given to ``session.report``.
        cost_usd: What the job had cost so far, USD.
        time_s: Time since the job's first function started, seconds.
        workers: Size of the job then.
        memory_mb: Memory of each function then, MB.
        generation: Number of the group of workers that reported.
        checkpoint: URL of the state at the boundary of this report, for a job in lockstep; None for
            any other, or if there was nothing to save.
    """

    index: int
    metrics: dict[str, Any]
    cost_usd: float
    time_s: float
    workers: int
    memory_mb: int
    generation: int
    checkpoint: str | None = None


@dataclass(frozen=True)
class AllocationRecord:
    """One generation of a job.

    Attributes:
        generation: Its number.
        workers: Its size.
        memory_mb: Memory of each function, MB.
        reason: Why it was started.
        time_s: When, seconds since the job's first function started.
        store: Parameter store that its gradients go through.
        decision: Why the policy chose this allocation; empty if it was not asked.
    """

    generation: int
    workers: int
    memory_mb: int
    reason: str
    time_s: float
    store: str = DEFAULT_STORE
    decision: str = ""


@dataclass(frozen=True)
class DecisionRecord:
    """What the allocation policy said of a job.

    Attributes:
        occasion: Why it was asked: ``first``, ``resumed``, ``out of memory``, or one of those in
            :mod:`smlt_tune.backend.adaptation`.
        allocation: What it chose.
        reason: Why, in one line.
        evidence: The facts behind it, as JSON.
        time_s: When, seconds since the job's first function started.
    """

    occasion: str
    allocation: Allocation
    reason: str
    evidence: Mapping[str, Any]
    time_s: float

    def to_json(self) -> dict[str, Any]:
        """For the fleet's history."""
        return {**vars(self), "allocation": vars(self.allocation)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "DecisionRecord":
        """What :meth:`to_json` gave."""
        return cls(**{**body, "allocation": Allocation(**body["allocation"])})


@dataclass(frozen=True)
class JobOutcome:
    """How a job ended.

    Attributes:
        job_id: Which job.
        status: ``finished`` if the training function returned, ``stopped`` otherwise.
        reason: Why it was stopped: ``budget``, ``deadline``, ``target``, or what ``stop`` was
            given.
        metrics: Of the last report.
        value: What the training function returned, if that can be JSON.
        reports: All reports.
        allocations: All generations.
        cost_usd: What the job did cost, USD.
        duration_s: From its first function's start to its end, seconds.
        checkpoint: URL of the newest checkpoint (safetensors); None if nothing was prepared.
    """

    job_id: str
    status: str
    reason: str
    metrics: dict[str, Any]
    value: Any
    reports: tuple[Report, ...]
    allocations: tuple[AllocationRecord, ...]
    cost_usd: float
    duration_s: float
    checkpoint: str | None


@dataclass(frozen=True)
class JobSpec:
    """What was submitted; enough to start the job again in another process.

    Attributes:
        job_id: Its name.
        function: SHA-256 of the pickled training function.
        config: SHA-256 of the pickled configuration.
        seed: Everything random derives from it.
        bounds: What the user fixed.
        goal: What to optimise.
        shards: Shards per synchronisation; 0 chooses.
        workload: What it will compute, if that was known.
        lockstep: Every report waits until the client has acknowledged it.
        start_from: Key of the checkpoint of another job that it begins with, copied to its own;
            empty for none.
        first_report: How many reports that other job had made by then.
        target: When it has trained long enough; None to let the function return.
    """

    job_id: str
    function: str
    config: str
    seed: int = 0
    bounds: Bounds = field(default_factory=Bounds)
    goal: Goal = field(default_factory=Cheapest)
    shards: int = 0
    workload: Workload | None = None
    lockstep: bool = False
    start_from: str = ""
    first_report: int = 0
    target: Target | None = None

    def to_json(self) -> dict[str, Any]:
        """For the fleet's history."""
        return {
            **vars(self),
            "bounds": vars(self.bounds),
            "goal": {"kind": type(self.goal).__name__, **vars(self.goal)},
            "workload": asdict(self.workload) if self.workload else None,
            "target": vars(self.target) if self.target else None,
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "JobSpec":
        """What :meth:`to_json` gave."""
        goal = dict(body["goal"])
        kind = {"Cheapest": Cheapest, "Fastest": Fastest}[goal.pop("kind")]
        workload, target = body.get("workload"), body.get("target")
        made = {
            "bounds": Bounds(**body["bounds"]),
            "goal": kind(**goal),
            "workload": workload_from_json(workload) if workload else None,
            "target": Target(**target) if target else None,
        }
        return cls(**{**body, **made})


def workload_from_json(body: Mapping[str, Any]) -> Workload:
    """From the fields of a workload."""
    return Workload(**{**body, "features": ModelFeatures(**body["features"])})


def train_mistakes(train: object) -> list[str]:
    """What is wrong with a training function, in one sentence; empty if nothing is."""
    if callable(train):
        return []
    return [f"the training function must be callable with a configuration, got {train!r}"]


def name_mistakes(name: object) -> list[str]:
    """What is wrong with the name of a job, in one sentence; empty if nothing is."""
    if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", name):
        return []
    return [f"name={name!r} must consist of 1 to 200 letters, digits, '.', '_' and '-'"]


def metric_mistakes(metric: object, mode: object) -> list[str]:
    """What is wrong with what jobs are to be compared by; empty if nothing is."""
    mistakes = []
    if metric is not None and not (isinstance(metric, str) and metric):
        mistakes.append(f"metric must be the name of a reported number, or None, not {metric!r}")
    if mode not in ("max", "min"):
        mistakes.append(f"mode must be 'max' or 'min', not {mode!r}")
    return mistakes


class JobState:
    """What is known of a job; written by the scheduler's thread, read by any.

    Args:
        spec: What was submitted.
        told: Called after every report, with it, and after every change of the status, with None.
    """

    def __init__(
        self,
        spec: JobSpec,
        told: Callable[["JobState", Report | None], None] = lambda state, report: None,
    ) -> None:
        self.spec = spec
        self.changed = threading.Condition()
        self._told = told
        self.status = QUEUED
        self.paused = False
        self.held_back = ""
        self.reports: list[Report] = []
        self.allocations: list[AllocationRecord] = []
        self.decisions: list[DecisionRecord] = []
        self.workload: Workload | None = None
        self.allocation: Allocation | None = None
        self.outcome: JobOutcome | None = None
        self.error: JobError | None = None

    def pin(self, asked: Mapping[str, Any]) -> None:
        """Fixes parts of the bounds: ``workers``, ``memory_mb``, ``store``, ``lease_s``."""
        self.spec = replace(self.spec, bounds=replace(self.spec.bounds, **asked))

    @property
    def over(self) -> bool:
        """Whether the job has ended and is paid for."""
        return self.status in OVER

    def restore_change(self, kind: str, body: Mapping[str, Any]) -> None:
        """Takes over what an earlier client has asked of the job."""
        if kind == "resize":
            self.pin(body)
        else:
            self.paused = kind == "paused"
            self.held_back = body.get("reason", "")

    def restore_end(self, body: Mapping[str, Any]) -> None:
        """Takes over how the job ended for an earlier client."""
        reports = tuple(self.reports)
        self.outcome = JobOutcome(
            job_id=self.spec.job_id,
            status=body["status"],
            reason=body["reason"],
            metrics=dict(reports[-1].metrics) if reports else {},
            value=body["value"],
            reports=reports,
            allocations=tuple(self.allocations),
            cost_usd=body["cost_usd"],
            duration_s=body["duration_s"],
            checkpoint=body["checkpoint"],
        )
        if body["error"]:
            kind, message = body["error"]
            self.error = _ERRORS.get(kind, JobError)(message, job_id=self.spec.job_id)
        self.status = body["status"]

    def add_report(self, report: Report) -> None:
        """Adds a report, or replaces one, and wakes up whoever waits for it."""
        with self.changed:
            place = report.index - self.spec.first_report
            self.reports[place : place + 1] = [report]
            self.changed.notify_all()
        self._told(self, report)

    def update(self, **values: Any) -> None:
        """Sets attributes and wakes up whoever waits for a change."""
        with self.changed:
            before = self.status
            for name, value in values.items():
                setattr(self, name, value)
            self.changed.notify_all()
        if self.status != before:
            self._told(self, None)


class Job:
    """The user's handle on one job of a fleet. May be used from several threads."""

    def __init__(
        self,
        state: JobState,
        *,
        stop: Callable[[str, str], None],
        resize: Callable[[str, Bounds], None],
        cost: Callable[[str], float],
        logs: Path,
        acknowledge: Callable[[str, int], None],
        pause: Callable[[str], None],
        resume: Callable[[str], None],
    ) -> None:
        self._state = state
        self._stop = stop
        self._resize = resize
        self._cost = cost
        self._logs = logs
        self._acknowledge = acknowledge
        self._pause = pause
        self._resume = resume

    def __repr__(self) -> str:
        return f"Job({self.job_id!r}, {self.status})"

    @property
    def job_id(self) -> str:
        """Its name, unique in the fleet."""
        return self._state.spec.job_id

    @property
    def status(self) -> str:
        """``queued``, ``running``, ``paused``, ``finished``, ``stopped`` or ``failed``.

        Paused by :meth:`pause`, or by a fleet with a metric because money or time runs short.
        """
        return self._state.status

    @property
    def reason(self) -> str:
        """Why it was stopped; empty if it was not, or not yet."""
        outcome = self._state.outcome
        return outcome.reason if outcome else ""

    @property
    def allocation(self) -> Allocation | None:
        """Workers and memory of the running generation; None before the first."""
        return self._state.allocation

    @property
    def allocations(self) -> tuple[AllocationRecord, ...]:
        """All generations up to now."""
        return tuple(self._state.allocations)

    @property
    def reported(self) -> tuple[Report, ...]:
        """All reports up to now; does not wait."""
        return tuple(self._state.reports)

    @property
    def decisions(self) -> tuple[DecisionRecord, ...]:
        """What the allocation policy has said of it, and why."""
        return tuple(self._state.decisions)

    @property
    def cost_usd(self) -> float:
        """What the job has cost up to now, running functions included, USD."""
        outcome = self._state.outcome
        return outcome.cost_usd if outcome else self._cost(self.job_id)

    def reports(self) -> Iterator[Report]:
        """All reports from the first on; waits for the next, ends with the job.

        Raises:
            JobError: The job failed. The reports up to then have been given.
        """
        state, given = self._state, 0
        while True:
            with state.changed:
                state.changed.wait_for(lambda n=given: len(state.reports) > n or state.over)  # type: ignore[misc]
                fresh = state.reports[given:]
                over = state.over
            yield from fresh
            given += len(fresh)
            if over and given == len(state.reports):
                if state.error:
                    raise state.error
                return

    def result(self, timeout_s: float | None = None) -> JobOutcome:
        """Waits for the end of the job.

        Args:
            timeout_s: How long to wait, seconds; None for as long as it takes.

        Raises:
            JobError: The job failed: TrainingFunctionError, OutOfMemory or FunctionLost.
            TimeoutError: It is still running after that time.
        """
        state = self._state
        with state.changed:
            if not state.changed.wait_for(lambda: state.over, timeout_s):
                raise TimeoutError(f"job {self.job_id} is still {state.status} after {timeout_s} s")
        if state.error:
            raise state.error
        assert state.outcome is not None
        return state.outcome

    def stop(self, reason: str = "stopped") -> None:
        """Ends the job at once: its functions are killed, what was reserved for it is freed.

        Returns without waiting; ``result`` tells when it is over. Does nothing to a job that is.
        """
        self._stop(self.job_id, reason)

    def resize(
        self,
        *,
        workers: int | None = None,
        memory_mb: int | None = None,
        store: str | None = None,
        lease_s: float | None = None,
    ) -> None:
        """Moves the job to another allocation while it trains.

        New functions start while the old still train; the old leave at an iteration's end. A job
        that is paused or queued starts with it. What is given is pinned from then on.

        Args:
            workers: New number of workers; None keeps it.
            memory_mb: New memory of a function, MB; None keeps it.
            store: New parameter store, by its name in the fleet; None keeps it.
            lease_s: Longest time for which money is reserved for a function at once, seconds, from
                the next function on; None keeps it.

        Raises:
            InvalidInput: The platform cannot do that.
        """
        bounds = Bounds(workers=workers, memory_mb=memory_mb, store=store, lease_s=lease_s)
        self._resize(self.job_id, bounds)

    def pause(self) -> None:
        """Takes the job off its functions until :meth:`resume`; a queued job is held back.

        It hands over to a checkpoint at the next boundary, also out of a report that waits to be
        acknowledged. One that comes to no boundary in time (10 s) is killed, and goes on from its
        last checkpoint. Returns without waiting: ``status`` becomes ``paused`` once nothing of it
        runs and nothing is reserved for it. Does nothing to a job that is over.
        """
        self._pause(self.job_id)

    def resume(self) -> None:
        """Queues a paused job again; it goes on from its checkpoint. Otherwise does nothing."""
        self._resume(self.job_id)

    def acknowledge(self, count: int) -> None:
        """Says that the first ``count`` reports were consumed: the job may go on after them.

        Only a job that was submitted with ``lockstep=True`` waits for that. The last report's
        ``index + 1`` is the count that lets it go on to the next one; a larger one lets it run
        ahead up to there; a smaller one than before changes nothing. The fleet's history does not
        hold it: after ``Fleet.open`` the job waits until it is acknowledged again.

        Args:
            count: How many; in a fork, those of the job that it began with count too.

        Raises:
            InvalidInput: It is no such number, or the job is not in lockstep.
        """
        mistakes = []
        if not _is_count(count):
            mistakes.append(f"acknowledge() needs a whole number of at least 0, not {count!r}")
        if not self._state.spec.lockstep:
            mistakes.append(
                f"job {self.job_id} does not wait for that: submit it with lockstep=True"
            )
        if mistakes:
            raise InvalidInput(mistakes)
        self._acknowledge(self.job_id, count)

    def logs(self) -> dict[str, str]:
        """What the workers printed, by the name of the invocation."""
        if not self._logs.is_dir():
            return {}
        files = sorted(self._logs.glob("*.log"))
        return {f.stem: f.read_text(encoding="utf-8", errors="replace") for f in files}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
