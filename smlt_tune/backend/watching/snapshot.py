"""What is true of a fleet at one moment, by its journal: no I/O, no clock.

What the journal lacks (an older fleet, another policy) is left out, never guessed.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from smlt_tune.backend.explain import Explanation, Step, explain_all
from smlt_tune.backend.history import HistoryEvent
from smlt_tune.backend.job import FAILED, FINISHED, OVER, PAUSED, QUEUED, RUNNING, STOPPED
from smlt_tune.backend.ledger import Entry
from smlt_tune.backend.prices import nanos_to_usd, usd_to_nanos
from smlt_tune.backend.resource_manager.observations import Allocation, Interval

#: States of a fleet: a client has it open; nobody has, and nothing is left to do; nobody has, and
#: jobs or reservations are left, so its client died; this system cannot tell.
OPEN, CLOSED, CRASHED, UNKNOWN = "open", "closed", "crashed", "unknown"

#: A job that had not ended when its client died.
INTERRUPTED = "interrupted"

#: All states of a job, those that may still change first.
STATES = (RUNNING, QUEUED, PAUSED, INTERRUPTED, FINISHED, STOPPED, FAILED)


@dataclass(frozen=True)
class Client:
    """Who has a fleet open.

    Attributes:
        pid: Its process; None if nobody has it open, or it cannot be told.
        known: Whether that can be told.
    """

    pid: int | None = None
    known: bool = True


@dataclass(frozen=True)
class Reported:
    """One report of a job.

    Attributes:
        time_s: Since the job's first function started, seconds.
        cost_usd: Of the job by then.
        metrics: As they were reported.
    """

    time_s: float
    cost_usd: float
    metrics: Mapping[str, Any]

    def number(self, metric: str) -> float | None:
        """A metric if it is a finite number."""
        value = self.metrics.get(metric)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class JobView:
    """One job. Times without another word count from the beginning of the fleet, in seconds.

    Attributes:
        job_id: Which.
        status: One of :data:`STATES`.
        reason: Why it was stopped or what failed; empty otherwise.
        submitted_s: When it was submitted.
        started_s: When its first function started; None before.
        time_s: How long it has run, or did, seconds.
        cost_usd: What it has cost: settled, or what it reported if that is more.
        reserved_usd: Worst case of what is under way for it.
        allocation: What it runs on, or ran on last.
        reports: All of them, in order.
        steps: What happened to its allocation; see :mod:`smlt_tune.backend.explain`.
        expected_usd: What all of it was last expected to cost; None if nobody said so.
        end_s: When it is expected to end; None if that is not known.
        lost: How many of its functions ended otherwise than by returning or being cancelled.
        done: Share of its training iterations that was done when it was stopped; None if that is
            not known, or it was not.
        rest_usd: What it was expected to cost from there to its end; None likewise.
    """

    job_id: str
    status: str
    reason: str
    submitted_s: float
    started_s: float | None
    time_s: float
    cost_usd: float
    reserved_usd: float
    allocation: Allocation | None
    reports: tuple[Reported, ...]
    steps: tuple[Step, ...]
    expected_usd: Interval | None
    end_s: float | None
    lost: int
    done: float | None = None
    rest_usd: Interval | None = None

    @property
    def over(self) -> bool:
        """Whether the status is final."""
        return self.status in OVER

    def last(self, metric: str) -> float | None:
        """The metric as last reported."""
        numbers = (one.number(metric) for one in reversed(self.reports))
        return next((one for one in numbers if one is not None), None)


@dataclass(frozen=True)
class Money:
    """The ledger at one moment, and what it is expected to come to, USD.

    Attributes:
        budget: None if there is none, or none was recorded.
        settled: Booked.
        reserved: Worst case of what is under way; of a crashed fleet, what may have been spent.
        total: Expected at the end of all jobs, without those of which nothing is known.
        unknown: How many unfinished jobs these are.
    """

    budget: float | None
    settled: float
    reserved: float
    total: Interval
    unknown: int


@dataclass(frozen=True)
class Spent:
    """The ledger at ``time_s`` seconds, USD."""

    time_s: float
    settled: float
    reserved: float


@dataclass(frozen=True)
class Size:
    """What all jobs together ran on from ``time_s`` seconds on; memory is that of all workers."""

    time_s: float
    workers: int
    memory_mb: int


@dataclass(frozen=True)
class Failure:
    """A function that was lost, or a job that failed.

    Attributes:
        time_s: When, seconds since the fleet began.
        job_id: Whose.
        what: ``job`` or how the function ended.
        detail: For people.
    """

    time_s: float
    job_id: str
    what: str
    detail: str


@dataclass(frozen=True)
class Charge:
    """A line of the bill, USD."""

    what: str
    settled: float
    reserved: float


@dataclass(frozen=True)
class Snapshot:
    """A fleet at one moment. Times count from its beginning, in seconds.

    Attributes:
        name: Of the fleet; empty if nothing was recorded yet.
        state: ``open``, ``closed``, ``crashed`` or ``unknown``.
        pid: Process that has it open; None if none has.
        began_at: When it began, seconds since the Unix epoch; None if nothing was recorded yet.
        elapsed_s: How long ago that is, or until the last event of a fleet that is not open.
        deadline_s: When everything has to be over; None if there is none, or none was recorded.
        end_s: When the last running job is expected to end; None if that is not known.
        money: The ledger.
        jobs: In the order of their submission.
        spending: The ledger over time.
        sizes: Workers and memory over time.
        failures: In order.
        bill: What the money went for: jobs together, then what the fleet pays.
    """

    name: str
    state: str
    pid: int | None
    began_at: float | None
    elapsed_s: float
    deadline_s: float | None
    end_s: float | None
    money: Money
    jobs: tuple[JobView, ...]
    spending: tuple[Spent, ...]
    sizes: tuple[Size, ...]
    failures: tuple[Failure, ...]
    bill: tuple[Charge, ...]

    def count(self, status: str) -> int:
        """How many jobs have it."""
        return sum(job.status == status for job in self.jobs)

    def to_json(self) -> dict[str, Any]:
        """Everything, for JSON: what is no finite number is None there."""
        content: dict[str, Any] = _plain(asdict(self))
        return content


def take(events: Sequence[HistoryEvent], *, client: Client, now_at: float) -> Snapshot:
    """What is true of a fleet.

    Args:
        events: Its journal.
        client: Who has it open.
        now_at: Seconds since the Unix epoch; counts only while the fleet is open.
    """
    folded = _Fold(events[0].at if events else now_at)
    for event in events:
        folded.take(event)
    running = client.pid is not None
    end_at = now_at if running or not events else events[-1].at
    dead = client.known and not running
    views = [
        folded.jobs[one.job_id].view(one, max(0.0, end_at - folded.began_at), dead=dead)
        for one in explain_all(events)
    ]
    money = folded.money
    unfinished = [job for job in views if not job.over]
    state = CRASHED if unfinished or money.reserved else CLOSED
    return Snapshot(
        name=folded.name,
        state=OPEN if running else state if client.known else UNKNOWN,
        pid=client.pid,
        began_at=events[0].at if events else None,
        elapsed_s=max(0.0, end_at - folded.began_at),
        deadline_s=folded.deadline_s,
        end_s=max((job.end_s for job in unfinished if job.end_s is not None), default=None),
        money=Money(
            folded.budget_usd,
            nanos_to_usd(money.settled),
            nanos_to_usd(money.reserved),
            _total(views, nanos_to_usd(money.settled_of[""])),
            sum(job.expected_usd is None for job in unfinished),
        ),
        jobs=tuple(views),
        spending=tuple(folded.spending),
        sizes=tuple(folded.sizes),
        failures=tuple(folded.failures),
        bill=money.bill(),
    )


def _total(jobs: Iterable[JobView], fleet_usd: float) -> Interval:
    """Errors of one model go together: the ends of the intervals are added up."""
    low = mid = high = fleet_usd
    for job in jobs:
        known = None if job.over else job.expected_usd
        known = known or Interval(job.cost_usd, job.cost_usd, job.cost_usd)
        low, mid, high = low + known.low, mid + known.mid, high + known.high
    return Interval(low, mid, high)


class _Sums:
    """The ledger's entries as they stand, in nano-dollars."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[str, str, int, int]] = {}
        self.settled = self.reserved = 0
        self.settled_of: defaultdict[str, int] = defaultdict(int)
        self.reserved_of: defaultdict[str, int] = defaultdict(int)

    def book(self, entry: Entry) -> None:
        """Takes an entry, or what became of one."""
        settled = 0 if entry.settled_usd is None else usd_to_nanos(entry.settled_usd)
        reserved = usd_to_nanos(entry.reserved_usd) if entry.settled_usd is None else 0
        before = self._entries.get(entry.entry_id, ("", "", 0, 0))
        self._entries[entry.entry_id] = (entry.job, entry.what, settled, reserved)
        self.settled += settled - before[2]
        self.reserved += reserved - before[3]
        self.settled_of[entry.job] += settled - before[2]
        self.reserved_of[entry.job] += reserved - before[3]

    def bill(self) -> tuple[Charge, ...]:
        """What it went for: one line for all jobs, one for each thing that the fleet pays."""
        lines: dict[str, list[int]] = {}
        for job, what, settled, reserved in self._entries.values():
            line = lines.setdefault("functions of jobs" if job else what, [0, 0])
            line[0] += settled
            line[1] += reserved
        return tuple(
            Charge(what, nanos_to_usd(settled), nanos_to_usd(reserved))
            for what, (settled, reserved) in lines.items()
        )


@dataclass
class _JobFold:
    """A job while its events are read."""

    submitted_s: float
    status: str = QUEUED
    started_s: float | None = None
    allocation: Allocation | None = None
    reports: dict[int, Reported] = field(default_factory=dict)
    lost: int = 0
    settled_usd: float = 0.0
    reserved_usd: float = 0.0
    #: When the latest prediction was made, and what the job had cost then.
    predicted: tuple[float, float] | None = None
    iterations: int | None = None
    left: int | None = None
    needs_usd: float | None = None

    @property
    def cost_usd(self) -> float:
        last = max((one.cost_usd for one in self.reports.values()), default=0.0)
        return max(self.settled_usd, last)

    def view(self, explained: Explanation, now_s: float, *, dead: bool) -> JobView:
        over = explained.status != RUNNING
        status = explained.status if over else INTERRUPTED if dead else self.status
        cost = self.cost_usd if explained.cost_usd is None else explained.cost_usd
        started = self.started_s
        ran = explained.duration_s
        if ran is None:
            ran = 0.0 if started is None else max(0.0, now_s - started)
        total, end_s = self._expected(explained, cost)
        stopped = status == STOPPED
        return JobView(
            job_id=explained.job_id,
            status=status,
            reason=explained.reason,
            submitted_s=self.submitted_s,
            started_s=started,
            time_s=ran,
            cost_usd=cost,
            reserved_usd=self.reserved_usd,
            allocation=self.allocation,
            reports=tuple(self.reports[index] for index in sorted(self.reports)),
            steps=explained.steps,
            expected_usd=total,
            end_s=None if over or status != RUNNING else end_s,
            lost=self.lost,
            done=self._done() if stopped else None,
            rest_usd=self._rest(total, cost) if stopped else None,
        )

    def _done(self) -> float | None:
        if self.left is None or not self.iterations:
            return None
        return max(0.0, 1.0 - self.left / self.iterations)

    def _rest(self, total: Interval | None, cost: float) -> Interval | None:
        """By its last pace, as uncertain as the latest prediction; else by that."""
        expected = None
        if total is not None:
            expected = Interval(*(max(0.0, x - cost) for x in (total.low, total.mid, total.high)))
        if self.needs_usd is None:
            return expected
        if expected is None or not expected.mid:
            return Interval(self.needs_usd, self.needs_usd, self.needs_usd)
        scale = self.needs_usd / expected.mid
        return Interval(scale * expected.low, self.needs_usd, scale * expected.high)

    def _expected(self, job: Explanation, cost: float) -> tuple[Interval | None, float | None]:
        """Total cost and end, by the latest decision that said something about them."""
        decided = next((step for step in reversed(job.steps) if step.decided), None)
        if decided is None or self.predicted is None:
            return None, None
        at_s, spent = self.predicted
        usd, time_s = decided.predicted.cost_usd, decided.predicted.time_s
        total = usd and Interval(*(max(cost, spent + x) for x in (usd.low, usd.mid, usd.high)))
        return total, None if time_s is None else at_s + time_s.mid


class _Fold:
    """Puts the events of a fleet together."""

    def __init__(self, began_at: float) -> None:
        self.began_at = began_at
        self.name = ""
        self.budget_usd: float | None = None
        self.deadline_s: float | None = None
        self.jobs: dict[str, _JobFold] = {}
        self.money = _Sums()
        self.spending: list[Spent] = []
        self.sizes: list[Size] = []
        self.failures: list[Failure] = []
        self._active: dict[str, Allocation] = {}
        self._workers = self._memory_mb = 0

    def take(self, event: HistoryEvent) -> None:
        """The next event; kinds that are not shown are passed over."""
        handle = getattr(self, f"_on_{event.kind}", None)
        if handle is not None and (not event.job or event.kind == "job" or event.job in self.jobs):
            handle(event, max(0.0, event.at - self.began_at))

    def _on_fleet(self, event: HistoryEvent, now_s: float) -> None:
        """A client has opened the fleet: what it was given counts from then on."""
        self.name = str(event.body.get("name", ""))
        self.budget_usd = event.body.get("budget_usd")
        deadline_s = event.body.get("deadline_s")
        self.deadline_s = None if deadline_s is None else now_s + deadline_s

    def _on_job(self, event: HistoryEvent, now_s: float) -> None:
        self.jobs[event.job] = _JobFold(now_s)

    def _on_ledger(self, event: HistoryEvent, now_s: float) -> None:
        entry = Entry(**event.body)
        self.money.book(entry)
        if entry.job in self.jobs:
            job = self.jobs[entry.job]
            job.settled_usd = nanos_to_usd(self.money.settled_of[entry.job])
            job.reserved_usd = nanos_to_usd(self.money.reserved_of[entry.job])
        settled, reserved = nanos_to_usd(self.money.settled), nanos_to_usd(self.money.reserved)
        self.spending.append(Spent(now_s, settled, reserved))

    def _on_decision(self, event: HistoryEvent, now_s: float) -> None:
        job = self.jobs[event.job]
        job.predicted = (now_s, job.cost_usd)

    def _on_generation(self, event: HistoryEvent, now_s: float) -> None:
        job, body = self.jobs[event.job], event.body
        job.status = RUNNING
        job.allocation = Allocation(
            body["workers"], body["memory_mb"], body.get("store") or "default"
        )
        if job.started_s is None:
            job.started_s = now_s
        self._resize(event.job, job.allocation, now_s)

    def _on_workload(self, event: HistoryEvent, now_s: float) -> None:
        self.jobs[event.job].iterations = event.body.get("iterations")

    def _on_report(self, event: HistoryEvent, now_s: float) -> None:
        body = event.body
        self.jobs[event.job].reports[body["index"]] = Reported(
            body["time_s"], body["cost_usd"], body["metrics"]
        )

    def _on_invocation(self, event: HistoryEvent, now_s: float) -> None:
        ending = event.body.get("ending", "")
        if ending not in ("returned", "cancelled"):
            self.jobs[event.job].lost += 1
            detail = str(event.body.get("detail", ""))
            self.failures.append(Failure(now_s, event.job, ending.replace("_", " "), detail))

    def _on_paused(self, event: HistoryEvent, now_s: float) -> None:
        """It was told to; its functions are still handing over for some seconds."""
        self.jobs[event.job].status = PAUSED
        self._resize(event.job, None, now_s)

    def _on_resumed(self, event: HistoryEvent, now_s: float) -> None:
        self.jobs[event.job].status = QUEUED

    def _on_ended(self, event: HistoryEvent, now_s: float) -> None:
        self._resize(event.job, None, now_s)
        job = self.jobs[event.job]
        job.left, job.needs_usd = event.body.get("left"), event.body.get("needs_usd")
        if error := event.body.get("error"):
            self.failures.append(Failure(now_s, event.job, "job", ": ".join(map(str, error))))

    def _resize(self, job_id: str, to: Allocation | None, now_s: float) -> None:
        before = self._active.pop(job_id, None)
        for allocation, sign in ((before, -1), (to, 1)):
            if allocation is not None:
                self._workers += sign * allocation.workers
                self._memory_mb += sign * allocation.workers * allocation.memory_mb
        if to is not None:
            self._active[job_id] = to
        if before != to:
            self.sizes.append(Size(now_s, self._workers, self._memory_mb))


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
