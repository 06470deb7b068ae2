"""Who goes on when money or time will not do for all jobs.

As it runs short, no new jobs begin; once half of the money is spent, the worst by the fleet's
metric are taken off their functions, at a checkpoint, so that the best can be finished. Two jobs
are compared at the last report that both have; nobody is judged before its first. Whoever is held
back has no function and no reservation. It goes on once there is enough again, because others came
out cheaper than was expected. What is left at the end goes to the best of those that it cannot
finish.

What a job still needs follows from the iterations that it has left and from its pace. Of one that
has not said anything yet it is what a typical job of the fleet takes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cmp_to_key, partial
from statistics import fmean

from smlt_tune.backend.generations import Record
from smlt_tune.backend.goals import is_number
from smlt_tune.backend.prices import Prices

#: Why jobs are held back, or stopped.
BUDGET, DEADLINE, TARGET = "budget", "deadline", "target"
#: Whoever is held back goes on if there is so much more than it needs, as a share of that: what is
#: needed is an estimate, and a job that comes and goes pays for every start.
SPARE = 0.1
#: Nobody that has begun is held back for money before this share of it is spent: first reports say
#: little. See benchmarks/bench_rationing.py.
EXPLORED = 0.5


@dataclass(frozen=True)
class Claim:
    """What a job needs to its end.

    Attributes:
        job_id: Which.
        values: Of the metric, as reported.
        order: Of submission.
        begun: Whether it has, or had, functions.
        has_functions: Whether it has some now.
        usd: Expected cost to its end, USD; None if nobody knows.
        seconds: Expected time to its end, seconds; None if nobody knows.
    """

    job_id: str
    values: Sequence[float]
    order: int
    begun: bool
    has_functions: bool
    usd: float | None
    seconds: float | None


def held_back(
    claims: Sequence[Claim],
    *,
    money_usd: float,
    time_s: float,
    maximize: bool,
    explores: bool = False,
) -> dict[str, str]:
    """Who has to wait, and what for.

    Args:
        claims: Of the jobs that want to go on.
        money_usd: What they may still spend together, USD; infinite without a budget.
        time_s: What is left to the deadline, seconds; infinite without one.
        maximize: Whether larger values are better.
        explores: It is too early to judge those that have begun by their values.

    Returns:
        :data:`BUDGET` or :data:`DEADLINE` by the names of the jobs.
    """
    judged = [claim for claim in claims if claim.values or not claim.begun]
    compared: Callable[[Claim, Claim], int] = partial(_compared, maximize=maximize)
    ranked = sorted(judged, key=cmp_to_key(compared))
    held = _too_late(ranked, time_s)
    wanted = [claim for claim in ranked if claim.job_id not in held]
    for claim in wanted:
        need = (claim.usd or 0.0) * (1.0 if claim.has_functions else 1.0 + SPARE)
        if need <= money_usd or (explores and claim.begun):
            money_usd -= need
        else:
            held[claim.job_id] = BUDGET
    if wanted and all(claim.job_id in held for claim in claims):
        del held[wanted[0].job_id]
    return held


def _compared(a: Claim, b: Claim, *, maximize: bool) -> int:
    """The better first; those that have reported nothing last, in the order of their submission."""
    common = min(len(a.values), len(b.values))
    if common and a.values[common - 1] != b.values[common - 1]:
        larger = a.values[common - 1] > b.values[common - 1]
        return -1 if larger == maximize else 1
    return (not a.values) - (not b.values) or a.order - b.order


def _too_late(claims: Sequence[Claim], time_s: float) -> dict[str, str]:
    """Those that would not end in time and have not begun, or are in the way of one that would.

    Others may use up their time: what they have reached by then may be the best there is.
    """
    late = {c.job_id for c in claims if c.seconds is not None and c.seconds > time_s}
    awaited = any(not c.has_functions and c.job_id not in late for c in claims)
    return {c.job_id: DEADLINE for c in claims if c.job_id in late and (awaited or not c.begun)}


class Rationing:
    """Knows what the jobs of one fleet need.

    Args:
        metric: That jobs are compared by.
        maximize: Whether larger is better.
        prices: What functions cost.
        cost_usd: What a job has cost up to now, USD.
    """

    def __init__(
        self, metric: str, maximize: bool, prices: Prices, cost_usd: Callable[[str], float]
    ) -> None:
        self._metric, self._maximize = metric, maximize
        self._prices, self._cost_usd = prices, cost_usd
        self._finished: list[tuple[float, float]] = []
        #: Whether anybody was held back when it was last looked at.
        self.short = False

    def finished(self, usd: float, seconds: float) -> None:
        """A job ran to its end: others may take as much."""
        self._finished.append((usd, seconds))

    def held_back(
        self,
        jobs: Sequence[Record],
        *,
        money_usd: float,
        spent_usd: float,
        time_s: float,
        start_s: float,
        now: float,
    ) -> dict[str, str]:
        """Who has to wait, and what for; see :func:`held_back`.

        Args:
            jobs: Those that want to go on.
            money_usd: What they may still spend together, USD.
            spent_usd: What was spent, USD.
            time_s: What is left to the deadline, seconds.
            start_s: What functions take to start, seconds.
            now: On the clock's ``monotonic``.
        """
        needs = {job.job_id: self.needs(job, start_s) for job in jobs}
        whole = [
            (self._cost_usd(job.job_id) + need[0], now - job.begun_s + need[1])
            for job in jobs
            if (need := needs[job.job_id]) is not None and job.begun_s is not None
        ]
        whole += self._finished
        typical = (fmean(usd for usd, _ in whole), fmean(s for _, s in whole)) if whole else None
        held = held_back(
            [self._claim(job, needs[job.job_id], typical) for job in jobs],
            money_usd=money_usd,
            time_s=time_s,
            maximize=self._maximize,
            explores=spent_usd < EXPLORED * (spent_usd + money_usd),
        )
        self.short = bool(held)
        return held

    def needs(self, job: Record, start_s: float) -> tuple[float, float] | None:
        """Expected cost, USD, and time, seconds, to the end of a job; None if nobody knows."""
        allocation = job.heading_for
        if job.iterations_left is None or not job.iteration_s or allocation is None:
            return None
        seconds = job.iterations_left * job.iteration_s + (0.0 if job.generations else start_s)
        function_usd = self._prices.invocation_usd(allocation.memory_mb, seconds)
        return allocation.workers * function_usd, seconds

    def _claim(
        self, job: Record, need: tuple[float, float] | None, typical: tuple[float, float] | None
    ) -> Claim:
        if need is None and typical is not None:
            usd, seconds = typical
            need = max(0.0, usd - self._cost_usd(job.job_id)), seconds
        return Claim(
            job_id=job.job_id,
            values=self._values(job),
            order=job.order,
            begun=job.next_number > 0,
            has_functions=bool(job.generations),
            usd=need and need[0],
            seconds=need and need[1],
        )

    def _values(self, job: Record) -> list[float]:
        reported = (report.metrics.get(self._metric) for report in job.state.reports)
        return [float(value) for value in reported if is_number(value)]
