"""What was cut when money or time ran out, and what it would have cost to finish."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles

from smlt_tune.backend.job import FINISHED, STOPPED
from smlt_tune.backend.rationing import BUDGET, DEADLINE
from smlt_tune.backend.resource_manager.observations import Interval
from smlt_tune.backend.sweeps import words
from smlt_tune.backend.watching.snapshot import JobView, Snapshot


@dataclass(frozen=True)
class Cut:
    """A job that did not run to its end because money or time ran out.

    Attributes:
        job: As it was left; ``job.started_s`` is None if it never began.
        rest_usd: What it was expected to cost from there to its end: by its own pace, or, if it had
            none, what the finished jobs did cost. None if nobody knows.
    """

    job: JobView
    rest_usd: Interval | None


@dataclass(frozen=True)
class HaltReport:
    """How a fleet ended.

    Attributes:
        jobs: How many it had.
        finished: How many of them ran to their end.
        cut: Those that did not because of the budget or the deadline.
        rest_usd: What all of these were expected to cost, without those of which nothing is known.
        unknown: How many these are.
    """

    jobs: int
    finished: int
    cut: tuple[Cut, ...]
    rest_usd: Interval
    unknown: int

    def lines(self) -> list[str]:
        """The same for people; empty if nothing was cut."""
        if not self.cut:
            return []
        begun = sum(cut.job.started_s is not None for cut in self.cut)
        reasons = [r for r in (BUDGET, DEADLINE) if any(cut.job.reason == r for cut in self.cut)]
        ways = [
            f"{number} {how}"
            for number, how in (
                (begun, "stopped on the way, with a checkpoint"),
                (len(self.cut) - begun, "never began"),
            )
            if number
        ]
        lines = [
            f"{self.finished} of {self.jobs} jobs finished; the {' and the '.join(reasons)} cut "
            f"{len(self.cut)}: {', '.join(ways)}"
        ]
        if self.unknown < len(self.cut):
            without = f", without {self.unknown} of which nothing is known" if self.unknown else ""
            lines.append(
                f"to finish them would have cost {words.within(self.rest_usd, words.usd)} more"
                f"{without}"
            )
        return lines


def halt_report(shot: Snapshot) -> HaltReport:
    """What was cut in a fleet."""
    typical = _typical([job.cost_usd for job in shot.jobs if job.status == FINISHED])
    cut = tuple(
        Cut(job, job.rest_usd or (typical if job.started_s is None else None))
        for job in shot.jobs
        if job.status == STOPPED and job.reason in (BUDGET, DEADLINE)
    )
    known = [one.rest_usd for one in cut if one.rest_usd is not None]
    return HaltReport(
        jobs=len(shot.jobs),
        finished=shot.count(FINISHED),
        cut=cut,
        rest_usd=Interval(
            sum(rest.low for rest in known),
            sum(rest.mid for rest in known),
            sum(rest.high for rest in known),
        ),
        unknown=len(cut) - len(known),
    )


def _typical(costs: Sequence[float]) -> Interval | None:
    """The mean, and the 90 % interval of single jobs."""
    if len(costs) < 2:
        return Interval(costs[0], costs[0], costs[0]) if costs else None
    ends, mean = quantiles(costs, n=20, method="inclusive"), fmean(costs)
    return Interval(min(ends[0], mean), mean, max(ends[-1], mean))
