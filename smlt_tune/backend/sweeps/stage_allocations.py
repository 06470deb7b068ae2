"""What the stages of successive halving run on: planned before the first, again before each other.

A plan is a function of what is predicted now and of what the trials have taken so far, as their
reports say. Nothing of earlier plans is remembered: before stage i, what the resource manager now
says of the stages before it (it has learnt from them) is held against what they took, and by what
is still wrong the stages to come are corrected.

| symbol | meaning |
|---|---|
| c_ij | what trial j cost from its report at the end of stage i-1 to that of stage i, USD |
| t_ij | time from the invocation of its functions in stage i to that report, s |

Cost of stage i is the sum of c_ij (all that a trial cost, in its last stage). Its time is that of
the t_ij one after the other on as many places as the functions suffice for, as the fleet admits
them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from smlt_tune.backend.goals import Cheapest, Fastest, Goal
from smlt_tune.backend.job import Job
from smlt_tune.backend.resource_manager.observations import Allocation, Option, Workload
from smlt_tune.backend.sweeps.halving_rules import Schedule
from smlt_tune.backend.sweeps.stage_planner import (
    PlannedStage,
    Stage,
    StagePlan,
    StageResult,
    expected,
    replan,
)
from smlt_tune.errors import InvalidInput

#: From the last report of a stage until the next one begins, seconds.
BETWEEN_S = 1.0
#: Share of the goal's limit that plans leave alone: predictions err, and there is nobody after the
#: last stage who could make up for it.
RESERVE = 0.03
#: Money for a function is reserved for so many times as long as it is expected to run, as far as
#: there is enough for all that run at once, ...
LEASE, SHORT_LEASE = 1.5, 1.1
#: ... and for a hand-over, seconds.
HAND_OVER_S = 15.0

#: Gives what a trial would take with each allocation for a share of its training.
OptionsOf = Callable[[float], Sequence[Option]]


def options_of_workloads(
    predict: Callable[[Workload], Sequence[Option]], workloads: Sequence[Workload]
) -> OptionsOf:
    """Options of a trial that stands for all.

    It costs as much as they do on average, and takes as long as the slowest: a stage waits for that
    one. What does not suffice for one of them is left out.

    Args:
        predict: ``options`` of a fleet.
        workloads: What some of the trials compute, with the iterations of a whole training.

    Raises:
        InvalidInput: There are none, or they do not say how many iterations they have.
    """
    if not workloads:
        raise InvalidInput("a plan needs the workload of at least one trial")
    if any(work.iterations is None for work in workloads):
        raise InvalidInput(
            "a plan needs to know how many iterations a training has: let the training function "
            "say how many epochs there are, with session.epochs(n)"
        )

    def options(share: float) -> list[Option]:
        tables = []
        for work in workloads:
            iterations = max(1, round(share * (work.iterations or 1)))
            found = predict(replace(work, iterations=iterations))
            tables.append({one.allocation: one for one in found})
        return [
            Option(
                place,
                max(table[place].time_s for table in tables),
                sum(table[place].cost_usd for table in tables) / len(tables),
            )
            for place in tables[0]
            if all(place in table for table in tables)
        ]

    return options


@dataclass(frozen=True)
class StageRun:
    """A stage that has begun.

    Attributes:
        trials: Those that began it.
        allocation: That most of them had; None if none had any.
        time_s: What it has taken, seconds.
        cost_usd: What all its trials cost in it, USD.
    """

    trials: tuple[int, ...]
    allocation: Allocation | None
    time_s: float
    cost_usd: float


def stage_run(
    schedule: Schedule,
    jobs: Sequence[Job],
    entered: Sequence[tuple[int, ...]],
    stage: int,
    functions: int,
) -> StageRun:
    """What a stage took, by the reports of its trials.

    Args:
        schedule: Of the stages.
        jobs: Of all trials.
        entered: Trials of each stage that has begun.
        stage: Which one.
        functions: How many may run at once.
    """
    later = set(entered[stage + 1]) if stage + 1 < len(entered) else set()
    rung, before = schedule.rungs[stage], schedule.rungs[stage - 1] if stage else 0
    places: Counter[Allocation] = Counter()
    times, usd = [], 0.0
    for i in entered[stage]:
        job, reported = jobs[i], jobs[i].reported
        ends = _cost_until(job, rung) if i in later else _cost(job)
        usd += max(0.0, ends - (_cost_until(job, before) if before else 0.0))
        last = max((one.generation for one in reported[:before]), default=-1)
        mine = [one for one in job.allocations if one.generation > last]
        if mine:
            place = mine[-1]
            places[Allocation(place.workers, place.memory_mb, place.store)] += 1
        # After a crash the times of a job begin anew; such a trial tells nothing.
        if mine and len(reported) >= rung and reported[rung - 1].time_s > mine[0].time_s:
            times.append(reported[rung - 1].time_s - mine[0].time_s)
    common = places.most_common(1)[0][0] if places else None
    side_by_side = functions // common.workers if common else 1
    return StageRun(entered[stage], common, _makespan(times, side_by_side), usd)


def _cost_until(job: Job, rung: int) -> float:
    """What a trial had cost at a rung, or at its end, USD."""
    reported = job.reported
    return reported[rung - 1].cost_usd if len(reported) >= rung else _cost(job)


def _cost(job: Job) -> float:
    """What a trial has cost, USD. Reports know of functions that are not billed yet."""
    return max([job.cost_usd, *(report.cost_usd for report in job.reported[-1:])])


def _makespan(times: Iterable[float], places: int) -> float:
    """How long trials take that begin in their order as soon as a place is free."""
    ends: list[float] = []
    for seconds in times:
        begins = heappop(ends) if len(ends) >= places else 0.0
        heappush(ends, begins + seconds)
    return max(ends, default=0.0)


def lease_of(stage: PlannedStage, functions: int, available_usd: float) -> float:
    """For how long money is reserved for each function of a stage, seconds.

    With the platform's time limit for everybody, a stage would wait for money that it does not
    need.

    Args:
        stage: As planned.
        functions: How many may run at once.
        available_usd: What may still be reserved, USD.
    """
    expected_s = stage.slower * stage.option.time_s
    at_once = min(stage.trials, functions // stage.option.allocation.workers)
    needed_usd = at_once * stage.dearer * stage.option.cost_usd
    enough = available_usd / needed_usd if needed_usd else LEASE
    return min(LEASE, max(SHORT_LEASE, enough)) * expected_s + HAND_OVER_S


def _less(goal: Goal, share: float) -> Goal:
    """The goal with a limit that is less by a share."""
    if isinstance(goal, Fastest):
        return Fastest(goal.budget_usd and (1.0 - share) * goal.budget_usd)
    return Cheapest(goal.deadline_s and (1.0 - share) * goal.deadline_s)


class StageAllocations:
    """Plans the stages of one run of successive halving.

    Args:
        options: What a trial would take.
        goal: For the whole run: ``Fastest(budget_usd)`` or ``Cheapest(deadline_s)``.
        between_s: Between two stages, seconds.
    """

    def __init__(self, options: OptionsOf, goal: Goal, *, between_s: float = BETWEEN_S) -> None:
        self._options = options
        self._goal = goal
        self._between_s = between_s

    def plan(
        self,
        schedule: Schedule,
        trials: int,
        functions: int,
        over: Sequence[StageRun] = (),
        current: StageRun | None = None,
    ) -> StagePlan:
        """Allocations for the stages that are left.

        Args:
            schedule: Of the stages.
            trials: How many began.
            functions: How many may run at once.
            over: What the stages so far have taken.
            current: The next one, as far as it has begun: it keeps its allocation.

        Returns:
            Of these stages. If the goal is out of reach, the nearest plan, with a note.
        """
        shares = [schedule.share(stage) for stage in range(len(schedule.rungs))]
        known = {share: tuple(self._options(share)) for share in set(shares)}
        counts = [schedule.trials(stage, trials) for stage in range(len(shares))]
        left = []
        for stage in range(len(over), len(shares)):
            options = known[shares[stage]]
            if current is not None and stage == len(over):
                counts[stage] = len(current.trials)
                same = tuple(one for one in options if one.allocation == current.allocation)
                options = same or options
            left.append(Stage(min(counts[: stage + 1]), options))
        results = [
            self._result(run, known[share], functions)
            for run, share in zip(over, shares, strict=False)
        ]
        for goal in (_less(self._goal, RESERVE), self._goal):
            plan = replan(left, goal, results, functions=functions, between_s=self._between_s)
            if plan.feasible:
                break
        return plan

    def _result(self, run: StageRun, options: Sequence[Option], functions: int) -> StageResult:
        """What a stage took beside what is now predicted for it."""
        time_s = run.time_s + self._between_s
        option = next((one for one in options if one.allocation == run.allocation), None)
        if option is None:  # somebody has moved the trials: nothing to compare
            spent = Option(Allocation(1, 1), time_s, run.cost_usd)
            planned = PlannedStage(len(run.trials), spent, 1, time_s, run.cost_usd, 1.0, 1.0)
        else:
            planned = expected(
                len(run.trials), option, functions=functions, between_s=self._between_s
            )
        return StageResult(planned, time_s, run.cost_usd)
