"""What is known of a sweep while it runs and afterwards: one row a trial."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from smlt_tune.backend.sweeps.sweep import Sweep
from smlt_tune.runtime.clock import SYSTEM_CLOCK, Clock

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet
    from smlt_tune.backend.job import Job, Report

#: States of a row. Those before ``finished`` may still change.
STATES = ("waiting", "running", "finished", "pruned", "stopped", "failed")


@dataclass(frozen=True)
class Point:
    """One report.

    Attributes:
        elapsed_s: Since the sweep began, seconds.
        time_s: Since the job began, seconds.
        cost_usd: Of the job up to here.
        value: Of the metric; None if the report lacks it.
    """

    elapsed_s: float
    time_s: float
    cost_usd: float
    value: float | None


@dataclass(frozen=True)
class Spending:
    """The money at one moment.

    Attributes:
        elapsed_s: Since the sweep began, seconds.
        settled_usd: By the ledger.
        reserved_usd: By the ledger.
        spent_usd: Settled, or used by running functions.
    """

    elapsed_s: float
    settled_usd: float
    reserved_usd: float
    spent_usd: float

    @property
    def held_usd(self) -> float:
        """Reserved and not used yet."""
        return max(0.0, self.settled_usd + self.reserved_usd - self.spent_usd)


@dataclass
class Row:
    """One trial.

    Attributes:
        trial: Its number.
        params: What the sampler chose.
        state: One of :data:`STATES`.
        why: For people: why it did not run to its end.
        workers: Of the last generation.
        memory_mb: Of each function of it.
        seconds: How long the job ran.
        cost_usd: What it cost so far.
        points: Its reports.
        metrics: The last report's.
        began_s: When it began, seconds since the sweep began.
    """

    trial: int
    params: dict[str, Any]
    state: str = "waiting"
    why: str = ""
    workers: int = 0
    memory_mb: int = 0
    seconds: float = 0.0
    cost_usd: float = 0.0
    points: list[Point] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    began_s: float = 0.0

    @property
    def value(self) -> float | None:
        """The metric as last reported."""
        return next((one.value for one in reversed(self.points) if one.value is not None), None)

    @property
    def over(self) -> bool:
        """Whether the state is final."""
        return self.state not in ("waiting", "running")


@dataclass(frozen=True)
class Past:
    """What earlier clients have left of a sweep.

    Attributes:
        elapsed_s: Since the sweep began, seconds.
        spending: The ledger up to now.
        jobs: What is known of each job, by its name, as the row of its trial.
    """

    elapsed_s: float
    spending: Sequence[Spending]
    jobs: Mapping[str, Row]


Listener = Callable[[str, Row], None]


class Board:
    """All rows of a sweep. Safe to use from several threads.

    Args:
        sweep: What runs.
        fleet: Where.
        clock: Time.
        past: What earlier clients have left of a sweep that is continued; None for a new one.

    Attributes:
        sweep: What runs.
        rows: By number of the trial. Read them through :meth:`snapshot`.
        spending: The ledger over time.
    """

    def __init__(
        self,
        sweep: Sweep,
        fleet: "Fleet",
        clock: Clock = SYSTEM_CLOCK,
        *,
        past: Past | None = None,
    ) -> None:
        self.sweep = sweep
        self.rows: dict[int, Row] = {}
        self.spending: list[Spending] = []
        self.logs: dict[int, dict[str, str]] = {}
        self._fleet, self._clock = fleet, clock
        self._begin = clock.monotonic()
        self._past = {} if past is None else past.jobs
        if past is not None:
            self._begin -= past.elapsed_s
            self.spending += past.spending
        self._lock = threading.RLock()
        self._jobs: dict[int, Job] = {}
        self._listeners: list[Listener] = []
        self._elapsed_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the sweep began, until it ended."""
        if self._elapsed_s is not None:
            return self._elapsed_s
        return self._clock.monotonic() - self._begin

    def listen(self, listener: Listener) -> None:
        """``listener(event, row)`` hears of ``began``, ``reported`` and ``ended``."""
        self._listeners.append(listener)

    def begin(self, trial: int, params: Mapping[str, Any]) -> None:
        """A trial has its configuration and asks for functions."""
        with self._lock:
            row = self.rows[trial] = Row(trial, dict(params), began_s=self.elapsed_s)
            self._tell("began", row)

    def watch(self, trial: int, job: "Job", report: "Report | None") -> None:
        """The trial's job was submitted, or has reported."""
        with self._lock:
            row = self.rows[trial]
            self._jobs[trial] = job
            if report is None:
                return
            row.state, row.metrics = "running", dict(report.metrics)
            row.workers, row.memory_mb = report.workers, report.memory_mb
            row.seconds, row.cost_usd = report.time_s, report.cost_usd
            past = self._past.get(job.job_id)
            if past is not None and report.index < len(past.points):  # told to an earlier client
                row.points.append(past.points[report.index])
                return
            value = report.metrics.get(self.sweep.metric)
            number = float(value) if isinstance(value, int | float) else None
            row.points.append(Point(self.elapsed_s, report.time_s, report.cost_usd, number))
            self._tell("reported", row)

    def restore(
        self, trial: int, params: Mapping[str, Any], state: str, why: str, job_id: str
    ) -> None:
        """A trial was over before this client began.

        Args:
            trial: Its number.
            params: What the sampler chose.
            state: How it ended.
            why: For people.
            job_id: Of its job; one that never began leaves the row empty.
        """
        known = self._past.get(job_id) or Row(trial, {})
        with self._lock:
            self.rows[trial] = replace(
                known, trial=trial, params=dict(params), state=state, why=why
            )
            if state == "failed":
                found = (job.logs() for job in self._fleet.jobs() if job.job_id == job_id)
                self.logs[trial] = next(found, {})

    def end(self, trial: int, state: str, why: str = "", seconds: float | None = None) -> None:
        """The trial is over."""
        with self._lock:
            row = self.rows[trial]
            self._refresh(row)
            row.state, row.why = state, why
            row.seconds = row.seconds if seconds is None else seconds
            job = self._jobs.pop(trial, None)
            if state == "failed" and job is not None:
                self.logs[trial] = job.logs()
            self._tell("ended", row)

    def close(self, why: str = "interrupted") -> None:
        """The sweep is over; ``why`` says what happened to trials that are not."""
        with self._lock:
            for trial, row in self.rows.items():
                if not row.over:
                    self.end(trial, "stopped", why)
            self._sample()
            self._elapsed_s = self.elapsed_s

    def snapshot(self) -> list[Row]:
        """All rows with what they cost by now, in the order of the trials."""
        with self._lock:
            for row in self.rows.values():
                if not row.over:
                    self._refresh(row)
            return [self.rows[trial] for trial in sorted(self.rows)]

    def seconds_of(self, row: Row) -> float:
        """How long the trial took; until it is over, how long it has been under way."""
        return row.seconds if row.over else self.elapsed_s - row.began_s

    def _refresh(self, row: Row) -> None:
        job = self._jobs.get(row.trial)
        if job is None:
            return
        row.cost_usd = job.cost_usd
        if not row.over and job.status in ("running", "paused"):
            row.state = "running" if job.status == "running" else "waiting"
        if job.allocation is not None:
            row.workers, row.memory_mb = job.allocation.workers, job.allocation.memory_mb

    def _tell(self, event: str, row: Row) -> None:
        self._sample()
        for listener in self._listeners:
            listener(event, row)

    def _sample(self) -> None:
        self.spending.append(self.money())

    def money(self) -> Spending:
        """The ledger, and what the jobs have cost, now."""
        with self._lock:
            for row in self.rows.values():
                self._refresh(row)
            used = sum(row.cost_usd for row in self.rows.values())
        settled, reserved = self._fleet.settled_usd, self._fleet.reserved_usd
        return Spending(self.elapsed_s, settled, reserved, max(settled, used))


def ranked(rows: Sequence[Row], *, maximize: bool) -> list[Row]:
    """Best first: what finished by its value, then what was cut short, then what failed."""

    def place(row: Row) -> tuple[int, float, int]:
        group = 0 if row.state == "finished" else 2 if row.state == "failed" else 1
        value = row.value
        if value is None or not math.isfinite(value):
            return (max(group, 1), float("inf"), row.trial)
        return (group, -value if maximize else value, row.trial)

    return sorted(rows, key=place)


def best(rows: Sequence[Row], *, maximize: bool) -> Row | None:
    """The best trial that ran to its end."""
    first = next(iter(ranked(rows, maximize=maximize)), None)
    if first is None or first.state != "finished":
        return None
    return first if first.value is not None and math.isfinite(first.value) else None
