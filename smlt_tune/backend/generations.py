"""What the scheduler remembers of jobs that are not over: generations, workers, invocations."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from smlt_tune.backend.job import JobState
from smlt_tune.backend.loss_curves import Forecast
from smlt_tune.backend.measurements import Measurement
from smlt_tune.backend.resource_manager.observations import Allocation, Decision, Workload
from smlt_tune.errors import JobError
from smlt_tune.runtime import wire


@dataclass
class Call:
    """One invocation under way."""

    invocation_id: str
    rank: int
    incarnation: int
    memory_mb: int
    started_s: float
    timeout_s: float
    requests: list[wire.Requests] = field(default_factory=list)
    alive_s: float | None = None
    hung: bool = False


@dataclass
class Worker:
    """One rank of a generation."""

    rank: int
    incarnation: int = -1
    joining: bool = False
    ready: bool = False
    begun: bool = False
    gone: bool = False
    sign_s: float = 0.0
    slowest_s: float = 0.0
    told: wire.Failed | None = None


@dataclass
class Generation:
    """One fixed group of workers of a job."""

    number: int
    allocation: Allocation
    start: wire.Start | None
    workers: list[Worker]
    lease_s: float
    calls: dict[str, Call] = field(default_factory=dict)
    to_invoke: list[int] = field(default_factory=list)
    reserved: dict[str, None] = field(default_factory=dict)  # a set that keeps its order
    invoke_after_s: float = 0.0
    started: bool = False
    asked_to_leave: bool = False
    left: bool = False
    closed: bool = False
    closed_s: float = 0.0
    start_s: float = 0.0
    began_s: float = 0.0
    gap_s: float = 0.0
    peak_mb: float = 0.0
    measured: int = 0
    measured_s: float = 0.0
    reviewed: bool = False

    @property
    def invoked_s(self) -> float:
        """When the first of its functions was, on the clock's ``monotonic``."""
        return self.began_s - self.start_s

    @property
    def stranded(self) -> bool:
        """Whether only replacements are left, which nobody can give the state any more."""
        return self.started and all(
            w.gone or (not w.begun and (w.joining or w.rank in self.to_invoke))
            for w in self.workers
        )

    @property
    def steady(self) -> bool:
        """Whether all of it trains, and is to go on."""
        over = self.asked_to_leave or self.left or self.closed
        return self.started and not over and all(w.begun for w in self.workers)

    def ends_s(self) -> float:
        """When the first of its functions reaches its time limit."""
        return min((c.started_s + c.timeout_s for c in self.calls.values()), default=float("inf"))


@dataclass(frozen=True)
class Seen:
    """A sign that a job trains.

    Attributes:
        generation: That gave it.
        at_s: When, on the clock's ``monotonic``.
        left: Training iterations still to do then.
        iteration_s: Time of one, as last told; 0 if it was not.
    """

    generation: Generation
    at_s: float
    left: int
    iteration_s: float


@dataclass
class Planned:
    """A generation that waits for free functions or money.

    Attributes:
        allocation: What it needs.
        reason: Why it is started.
        start: Where it begins; None while the one before it still trains.
        since_s: When it began to wait.
        held: How many functions the job has or had until now: so many are its own.
        decision: The policy's reason for the allocation, if it chose it.
    """

    allocation: Allocation
    reason: str
    start: wire.Start | None
    since_s: float
    held: int = 0
    decision: str = ""

    @property
    def grows(self) -> bool:
        """Whether it takes more functions than the job gives back."""
        return self.allocation.workers > self.held


@dataclass
class Record:
    """Everything about one job.

    Attributes:
        boot_s: Longest time from an invocation until its worker was ready, seconds.
        slowest_s: Longest time between two signs of life of a worker, seconds.
        step_s: The same, of those workers that can tell it.
        held_back: Why it is paused, if not by its user.
        beyond: How many of the training iterations that are left it is expected not to need, as it
            reaches its target before.
        left_sd: Standard deviation of the logarithm of those that are left then.
        forecast: When it is expected to.
        decided_forecast: By which its allocation was last decided.
        fruitless_s: Longest lease that has ended without any progress, seconds.
    """

    state: JobState
    submitted_s: float
    order: int = 0
    generations: list[Generation] = field(default_factory=list)
    plan: Planned | None = None
    resize_to: Decision | None = None
    next_number: int = 0
    acknowledged: int = 0
    paused: bool = False
    paused_s: float = 0.0
    held_back: str = ""
    begun_s: float | None = None
    position: str = ""
    strikes: int = 0
    strike_position: str = ""
    struck: frozenset[str] = frozenset()
    peak_mb: float = 0.0
    boot_s: float = 0.0
    slowest_s: float = 0.0
    step_s: float = 0.0
    fruitless_s: float = 0.0
    checkpoint: str | None = None
    ending: str = ""
    reason: str = ""
    error: JobError | None = None
    value: Any = None
    # What its workers have said of their work, and when its allocation was looked at last.
    workload: Workload | None = None
    workload_changed: bool = False
    left: int | None = None
    beyond: int = 0
    left_sd: float = 0.0
    forecast: Forecast | None = None
    decided_forecast: Forecast | None = None
    seen: Seen | None = None
    other_share: float | None = None
    iteration_s: float = 0.0
    measurements: dict[Any, Measurement] = field(default_factory=dict)
    milestones: int = 0
    reviewed_s: float = 0.0

    @property
    def job_id(self) -> str:
        """Its name."""
        return self.state.spec.job_id

    @property
    def current(self) -> Generation | None:
        """The generation that trains, or will first."""
        return next((g for g in self.generations if not g.closed and not g.left), None)

    @property
    def following(self) -> Generation | None:
        """The one that waits to take over."""
        live = [g for g in self.generations if not g.closed and not g.left]
        return live[1] if len(live) > 1 else None

    @property
    def waits(self) -> bool:
        """Whether it has no functions, and wants some."""
        return self.plan is not None and not self.generations and not self.paused

    @property
    def iterations_left(self) -> int | None:
        """Training iterations that it is expected to do yet; None if nobody knows."""
        return None if self.left is None else max(0, self.left - self.beyond)

    @property
    def held(self) -> bool:
        """Whether its last report, of a job in lockstep, waits for the client."""
        spec = self.state.spec
        return spec.lockstep and spec.first_report + len(self.state.reports) > self.acknowledged

    @property
    def heading_for(self) -> Allocation | None:
        """The allocation that the job is on its way to, or has; None before the first."""
        if self.resize_to is not None:
            return self.resize_to.allocation
        newest = self.plan or self.following or self.current
        return newest.allocation if newest else self.state.allocation

    @property
    def steady(self) -> bool:
        """Whether it trains, and nothing is about to change."""
        current = self.current
        if self.ending or self.paused or current is None:
            return False
        if self.plan or self.resize_to or self.following:
            return False
        return current.steady

    def calls(self) -> Iterable[tuple[Generation, Call]]:
        """May be read while the scheduler's thread goes on: works on copies."""
        for generation in list(self.generations):
            for call in list(generation.calls.values()):
                yield generation, call
