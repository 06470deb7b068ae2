"""Allocations for the stages of successive halving, under one budget or one deadline.

| symbol | meaning | unit |
|---|---|---|
| q_i | trials of stage i | 1 |
| n, t, c | workers of an option; what one trial of the stage takes and costs with it | 1, s, USD |
| L | functions that may run at once | 1 |
| h | between two stages: comparing the trials, saving and handing over their state | s |

All trials of a stage have the same allocation, and the next stage begins when the last of them has
ended. Where they do not all fit at once they run in waves (CE-scaling eq. 7 leaves these out)::

    waves_i = ceil(q_i / floor(L / n)),   time = sum_i (waves_i t_i + h),   cost = sum_i q_i c_i

Every stage starts its functions anew, whatever ran before: a trial that has ended waits for all
others of its stage, and functions that wait are billed. So t and c hold a start, which is short
where warm instances or functions started ahead are to be had, and stages depend on each other
through the limit alone: that makes the choice a knapsack (``knapsack.py``).

Nothing here reads a clock or starts anything.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from smlt_tune.backend.goals import Fastest, Goal, goal_mistakes
from smlt_tune.backend.resource_manager.observations import Option, not_counts
from smlt_tune.backend.sweeps.knapsack import choose, total
from smlt_tune.errors import InvalidInput


@dataclass(frozen=True)
class Stage:
    """One rung of successive halving.

    Attributes:
        trials: How many run in it.
        options: What one trial takes in this stage, to choose from for all of them alike; those
            with more workers than there are functions are left out. Nothing is gained by thinning
            them to the front of one trial in time and cost, and something is lost: where functions
            are scarce, fewer workers for each trial can end the stage sooner than an allocation
            that is faster and cheaper.
    """

    trials: int
    options: tuple[Option, ...]


@dataclass(frozen=True)
class PlannedStage:
    """One stage with what was chosen for it.

    Attributes:
        trials: How many run in it.
        option: For each of them.
        waves: One after the other, because of the limit of functions.
        time_s: Expected of the stage and the hand-over after it, seconds.
        cost_usd: Expected of all its trials, USD.
        slower: Factor by which measurements have corrected the time.
        dearer: The same of the cost.
    """

    trials: int
    option: Option
    waves: int
    time_s: float
    cost_usd: float
    slower: float
    dearer: float


@dataclass(frozen=True)
class StagePlan:
    """Allocations of all stages.

    Attributes:
        stages: In their order.
        time_s: To the end of the last one, seconds.
        cost_usd: Of all of them, USD.
        gap: By how much it may be slower (dearer) than the optimum, relative to that.
        feasible: Whether the goal's limit is kept. If not, this is the plan that comes nearest.
        notes: What the user should know, one sentence each: an infeasible goal with the nearest
            feasible one.
    """

    stages: tuple[PlannedStage, ...]
    time_s: float
    cost_usd: float
    gap: float
    feasible: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class StageResult:
    """A stage that is over.

    Attributes:
        planned: As it was planned.
        time_s: What it took, hand-over included, seconds.
        cost_usd: What all its trials cost, USD.
    """

    planned: PlannedStage
    time_s: float
    cost_usd: float


def plan_stages(
    stages: Sequence[Stage], goal: Goal, *, functions: int, between_s: float = 0.0
) -> StagePlan:
    """The fastest plan within a budget, or the cheapest one by a deadline.

    Args:
        stages: In their order.
        goal: For all of them together.
        functions: How many may run at once.
        between_s: Between two stages, seconds.

    Returns:
        A plan within 0.5 % of the optimum, never worse than the best that has the same allocation
        in all stages.

    Raises:
        InvalidInput: Lists all mistakes.
    """
    return replan(stages, goal, (), functions=functions, between_s=between_s)


def replan(
    stages: Sequence[Stage],
    goal: Goal,
    over: Sequence[StageResult],
    *,
    functions: int,
    between_s: float = 0.0,
) -> StagePlan:
    """Plans the stages that are left again, after what the others took.

    What is left of the goal's limit is divided anew. What the options say is corrected by the
    geometric mean of what stages took over what their options said, for time and for cost.

    Args:
        stages: Those that are left, with options as they were before the first plan.
        goal: For the whole sweep.
        over: Stages that are over.
        functions: How many may run at once.
        between_s: Between two stages, seconds.

    Returns:
        A plan of the stages that are left, as of :func:`plan_stages`.

    Raises:
        InvalidInput: Lists all mistakes.
    """
    mistakes = [
        *goal_mistakes(goal),
        *_stage_mistakes(stages),
        *_result_mistakes(over),
        *not_counts({"functions": functions}),
        *_not_amounts({"between_s": between_s}),
    ]
    mistakes = mistakes or _too_large(stages, functions)
    if mistakes:
        raise InvalidInput(mistakes)
    slower = _mean_ratio([(one.time_s, one.planned.time_s, one.planned.slower) for one in over])
    dearer = _mean_ratio([(one.cost_usd, one.planned.cost_usd, one.planned.dearer) for one in over])
    options = [
        [
            expected(
                stage.trials,
                option,
                functions=functions,
                between_s=between_s,
                slower=slower,
                dearer=dearer,
            )
            for option in stage.options
            if option.allocation.workers <= functions
        ]
        for stage in stages
    ]
    return _best(options, goal, over)


def expected(
    trials: int,
    option: Option,
    *,
    functions: int,
    between_s: float = 0.0,
    slower: float = 1.0,
    dearer: float = 1.0,
) -> PlannedStage:
    """What a stage takes with an option.

    Args:
        trials: How many run in it.
        option: For each of them.
        functions: How many may run at once; enough for one trial.
        between_s: Between this stage and the next, seconds.
        slower: Factor by which the time is corrected.
        dearer: Factor by which the cost is corrected.
    """
    waves = math.ceil(trials / (functions // option.allocation.workers))
    time_s = slower * (waves * option.time_s + between_s)
    cost_usd = dearer * trials * option.cost_usd
    return PlannedStage(trials, option, waves, time_s, cost_usd, slower, dearer)


def _mean_ratio(results: Sequence[tuple[float, float, float]]) -> float:
    """Geometric mean of measured / expected x what that was corrected by; 1 if nothing is known."""
    logs = [math.log(took / of * factor) for took, of, factor in results if took and of]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


def _best(
    options: Sequence[Sequence[PlannedStage]], goal: Goal, over: Sequence[StageResult]
) -> StagePlan:
    """The plan for what is left of the goal."""
    times = [np.array([one.time_s for one in stage]) for stage in options]
    costs = [np.array([one.cost_usd for one in stage]) for stage in options]
    if isinstance(goal, Fastest):
        objective, limited, limit = times, costs, goal.budget_usd
        used = total([one.cost_usd for one in over])
    else:
        objective, limited, limit = costs, times, goal.deadline_s
        used = total([one.time_s for one in over])
    left = math.inf if limit is None else limit - used
    choice = choose(objective, limited, left, _static_choices(options))
    feasible = choice is not None
    if choice is None:  # then as little as possible of what is limited
        choice = choose(limited, objective)
        assert choice is not None
    chosen = tuple(stage[j] for stage, j in zip(options, choice.options, strict=True))
    plan = StagePlan(
        stages=chosen,
        time_s=total([one.time_s for one in chosen]),
        cost_usd=total([one.cost_usd for one in chosen]),
        gap=choice.gap,
        feasible=feasible,
        notes=(),
    )
    return plan if feasible else replace(plan, notes=(_nearest(plan, goal, used),))


def _static_choices(options: Sequence[Sequence[PlannedStage]]) -> list[tuple[int, ...]]:
    """Those with one allocation for all stages."""
    places = [{one.option.allocation: j for j, one in enumerate(stage)} for stage in options]
    common = [each for each in places[0] if all(each in place for place in places)]
    return [tuple(place[each] for place in places) for each in common]


def _nearest(plan: StagePlan, goal: Goal, used: float) -> str:
    """That the goal cannot be reached, and which one could be."""
    if isinstance(goal, Fastest):
        least = used + plan.cost_usd
        return (
            f"Fastest(budget_usd={goal.budget_usd:g}) cannot be reached: the cheapest plan is "
            f"expected to cost {least:.6f} USD; Fastest(budget_usd={_up(least)}) would do"
        )
    least = used + plan.time_s
    return (
        f"Cheapest(deadline_s={goal.deadline_s:g}) cannot be reached: the fastest plan is "
        f"expected to take {least:.1f} s; Cheapest(deadline_s={_up(least)}) would do"
    )


def _up(value: float) -> str:
    """Rounded up to four digits."""
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    steps = math.ceil(value / step)
    text = f"{steps * step:.10g}"
    # The division may have rounded down to a whole number.
    return text if float(text) >= value else f"{(steps + 1) * step:.10g}"


def _stage_mistakes(stages: Sequence[Stage]) -> list[str]:
    if not stages:
        return ["there are no stages"]
    mistakes = []
    for i, stage in enumerate(stages, 1):
        mistakes += [f"stage {i}: {mistake}" for mistake in not_counts({"trials": stage.trials})]
        if not stage.options:
            mistakes.append(f"stage {i}: there are no options")
        for j, option in enumerate(stage.options, 1):
            wrong = _not_amounts({"time_s": option.time_s}, above=True)
            wrong += _not_amounts({"cost_usd": option.cost_usd})
            mistakes += [f"stage {i}, option {j}: {mistake}" for mistake in wrong]
    return mistakes


def _result_mistakes(over: Sequence[StageResult]) -> list[str]:
    return [
        f"stage {i} that is over: {mistake}"
        for i, one in enumerate(over, 1)
        for mistake in _not_amounts({"time_s": one.time_s, "cost_usd": one.cost_usd})
    ]


def _not_amounts(given: Mapping[str, object], *, above: bool = False) -> list[str]:
    """A sentence for each value that is no finite number of at least 0, or above it."""
    return [
        f"{name} must be a finite number {'above 0' if above else 'of at least 0'}, not {value!r}"
        for name, value in given.items()
        if isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (math.isfinite(value) and (value > 0 if above else value >= 0))
    ]


def _too_large(stages: Sequence[Stage], functions: int) -> list[str]:
    """A sentence for each stage none of whose options the functions are enough for."""
    fewest = [min(option.allocation.workers for option in stage.options) for stage in stages]
    return [
        f"stage {i}: every option has at least {workers} workers, and only {functions} functions "
        "may run at once"
        for i, workers in enumerate(fewest, 1)
        if workers > functions
    ]
