import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smlt_tune.backend.goals import Cheapest, Fastest
from smlt_tune.backend.resource_manager.observations import Allocation, Option
from smlt_tune.backend.sweeps.knapsack import total
from smlt_tune.backend.sweeps.stage_planner import (
    Stage,
    StageResult,
    plan_stages,
    replan,
)
from smlt_tune.errors import InvalidInput

ALLOCATIONS = [Allocation(n, m) for n in (1, 2, 3, 5) for m in (512, 1769)]


def option(workers, time_s, cost_usd, memory_mb=1769):
    return Option(Allocation(workers, memory_mb), time_s, cost_usd)


#: Twice the workers: a bit less than half of the time, for a bit more money.
OPTIONS = tuple(option(n, 60 / n**0.8, 0.01 * n**0.3) for n in (1, 2, 4, 8, 16, 32))
HALVING = [Stage(256 >> i, OPTIONS) for i in range(8)]


def totals(stages, choice, functions, between_s=0.0):
    """Seconds and USD of one option per stage: trials are started until all have run."""
    seconds = usd = 0.0
    for stage, one in zip(stages, choice, strict=True):
        waiting = stage.trials
        while waiting > 0:
            free = functions
            while waiting > 0 and free >= one.allocation.workers:
                free, waiting = free - one.allocation.workers, waiting - 1
            seconds += one.time_s
        seconds += between_s
        usd += stage.trials * one.cost_usd
    return seconds, usd


@st.composite
def instances(draw):
    """Stages, functions, time between stages and the totals of every plan there is."""
    amounts = st.floats(0.01, 100) | st.integers(1, 5).map(float)
    stages = []
    for _ in range(draw(st.integers(1, 4))):
        places = draw(st.lists(st.sampled_from(ALLOCATIONS), min_size=1, max_size=5, unique=True))
        options = [Option(place, draw(amounts), draw(st.just(0.0) | amounts)) for place in places]
        stages.append(Stage(draw(st.integers(1, 20)), tuple(options)))
    fewest = max(min(one.allocation.workers for one in stage.options) for stage in stages)
    functions = draw(st.integers(fewest, 12))
    between_s = draw(st.sampled_from([0.0, 2.5]))
    usable = [[o for o in s.options if o.allocation.workers <= functions] for s in stages]
    plans = {
        choice: totals(stages, choice, functions, between_s)
        for choice in itertools.product(*usable)
    }
    return stages, functions, between_s, plans


@settings(deadline=None)  # the machine may be busy
@given(instances(), st.sampled_from([Fastest, Cheapest]), st.data())
def test_a_plan_keeps_the_limit_and_is_the_best_there_is(instance, kind, data):
    stages, functions, between_s, plans = instance
    minimised, limited = (0, 1) if kind is Fastest else (1, 0)
    limits = sorted({both[limited] for both in plans.values() if both[limited] > 0}) or [1.0]
    limit = data.draw(st.sampled_from(limits)) * data.draw(st.sampled_from([0.999, 1.0, 1.001]))
    plan = plan_stages(stages, kind(limit), functions=functions, between_s=between_s)
    choice = tuple(one.option for one in plan.stages)
    assert (plan.time_s, plan.cost_usd) == pytest.approx(plans[choice])
    mine = (plan.time_s, plan.cost_usd)
    slack = 1 - 1e-9  # sums are rounded
    within = [both for both in plans.values() if both[limited] <= limit * slack]
    if plan.feasible:
        assert mine[limited] <= limit
        assert plan.notes == ()
        best = min((both[minimised] for both in within), default=mine[minimised])
        assert mine[minimised] <= 1.005 * best
        assert mine[minimised] <= (1 + plan.gap) * best + 1e-9
        static = [
            both[minimised]
            for choice, both in plans.items()
            if len({one.allocation for one in choice}) == 1 and both[limited] <= limit * slack
        ]
        assert mine[minimised] <= min(static, default=math.inf) * (1 + 1e-12)
    else:
        assert within == []
        least = min(both[limited] for both in plans.values())
        assert mine[limited] == pytest.approx(least)
        assert len(plan.notes) == 1
        advised = float(re.findall(r"=([^)]+)\) would do$", plan.notes[0])[0])
        assert advised == pytest.approx(least, rel=2e-3)
        assert plan_stages(stages, kind(advised), functions=functions, between_s=between_s).feasible


def test_the_nearest_goal_is_one_that_can_be_kept_however_sums_are_rounded():
    """0.06 + 0.5 + 0.01 is a little more than 0.57."""
    stages = [Stage(1, (option(1, seconds, 0.0),)) for seconds in (0.06, 0.5, 0.01)]
    plan = plan_stages(stages, Cheapest(0.5), functions=1)
    assert plan.time_s > 0.57
    advised = float(re.findall(r"=([^)]+)\) would do$", plan.notes[0])[0])
    assert plan_stages(stages, Cheapest(advised), functions=1).feasible


@pytest.mark.parametrize("goal", [Fastest, Cheapest])
@pytest.mark.parametrize("functions", [10**6, 3000, 1000])
def test_at_full_size_it_is_as_good_as_integer_programming(goal, functions):
    from scipy.optimize import LinearConstraint, milp

    rng = np.random.default_rng(functions)
    workers, memory = rng.integers(1, 200, 100).tolist(), rng.integers(128, 10_240, 100).tolist()
    options = []
    for n, m in zip(workers, memory, strict=True):
        time_s = (100 / n**0.8 / min(m / 1769, 6) ** 0.9 + 0.2 * n) * rng.uniform(0.9, 1.1)
        options.append(option(n, time_s, time_s * n * m / 1024 * 1.7e-5, m))
    stages = [Stage(16_384 >> i, tuple(options)) for i in range(14)]
    wave_s, usd = (np.zeros((14, 100)) for _ in range(2))
    for i, stage in enumerate(stages):
        for j, one in enumerate(options):
            at_once = functions // one.allocation.workers
            wave_s[i, j] = math.ceil(stage.trials / at_once) * one.time_s
            usd[i, j] = stage.trials * one.cost_usd
    if goal is Fastest:
        minimised, limited, limit = wave_s, usd, 1.3 * usd.min(axis=1).sum()
    else:
        minimised, limited, limit = usd, wave_s, 1.3 * wave_s.min(axis=1).sum()
    plan = plan_stages(stages, goal(limit), functions=functions)
    scale = minimised.max()
    exact = milp(
        minimised.ravel() / scale,
        integrality=1,
        bounds=(0, 1),
        constraints=[
            LinearConstraint(np.kron(np.eye(14), np.ones(100)), 1, 1),
            LinearConstraint(limited.reshape(1, -1) / limit, ub=1),
        ],
    )
    mine = plan.time_s if goal is Fastest else plan.cost_usd
    assert plan.feasible
    assert plan.gap <= 0.005
    assert mine <= 1.005 * scale * exact.fun
    assert mine >= scale * exact.fun / 1.001  # the solver stops 0.01 % above the optimum


@pytest.mark.parametrize(
    ("trials", "workers", "functions", "waves"),
    [(8, 1, 8, 1), (9, 1, 8, 2), (8, 3, 8, 4), (8, 5, 8, 8), (1, 8, 8, 1), (100, 1, 10**6, 1)],
)
def test_trials_that_do_not_fit_at_once_run_in_waves(trials, workers, functions, waves):
    stage = Stage(trials, (option(workers, 10.0, 0.5),))
    plan = plan_stages([stage], Fastest(), functions=functions, between_s=3.0)
    assert plan.stages[0].waves == waves
    assert plan.time_s == waves * 10.0 + 3.0
    assert plan.cost_usd == trials * 0.5


def test_where_functions_are_scarce_fewer_workers_win():
    large, small = option(4, 10.0, 1.0), option(1, 12.0, 1.1)  # one trial: faster and cheaper
    stage = Stage(8, (large, small))
    assert plan_stages([stage], Fastest(), functions=100).stages[0].option == large
    assert plan_stages([stage], Fastest(), functions=4).stages[0].option == small


def test_late_stages_get_more_workers_than_early_ones():
    static = plan_stages([Stage(256, OPTIONS[:1])] * 8, Fastest(), functions=10**4)
    budget = 1.2 * sum(one.trials for one in HALVING) * OPTIONS[0].cost_usd
    plan = plan_stages(HALVING, Fastest(budget), functions=10**4)
    workers = [one.option.allocation.workers for one in plan.stages]
    assert workers == sorted(workers)
    assert workers[0] < workers[-1] == 32
    assert plan.cost_usd <= budget
    assert plan.time_s < static.time_s / 2


def test_without_a_limit_every_stage_is_as_fast_or_as_cheap_as_it_can_be():
    fastest = plan_stages(HALVING, Fastest(), functions=10**4)
    cheapest = plan_stages(HALVING, Cheapest(), functions=10**4)
    assert {one.option for one in fastest.stages} == {OPTIONS[-1]}
    assert {one.option for one in cheapest.stages} == {OPTIONS[0]}
    same = Stage(1, (option(2, 5.0, 2.0), option(1, 5.0, 1.0), option(4, 9.0, 1.0)))
    for goal in (Fastest(), Cheapest()):
        assert plan_stages([same], goal, functions=9).stages[0].option == same.options[1]


# --- replanning -------------------------------------------------------------------------------


def run(stages, goal, factors, *, replanned):
    """Seconds and USD of a sweep whose stages take and cost so many times what was predicted."""
    plan, over = plan_stages(stages, goal, functions=1000), []
    for i, factor in enumerate(factors):
        planned = plan.stages[0 if replanned else i]
        predicted = totals(stages[i : i + 1], [planned.option], 1000)
        over.append(StageResult(planned, *(factor * each for each in predicted)))
        if replanned and stages[i + 1 :]:
            plan = replan(stages[i + 1 :], goal, over, functions=1000)
    return total([one.time_s for one in over]), total([one.cost_usd for one in over])


@pytest.mark.parametrize("goal", [Fastest(6.0), Cheapest(170.0)])
def test_what_early_stages_take_too_much_late_ones_save(goal):
    factors = [1.1] * len(HALVING)
    blind = run(HALVING, goal, factors, replanned=False)
    told = run(HALVING, goal, factors, replanned=True)
    if isinstance(goal, Fastest):
        assert told[1] <= goal.budget_usd < blind[1]
    else:
        assert told[0] <= goal.deadline_s < blind[0]


def test_what_early_stages_leave_late_ones_use():
    goal = Fastest(6.0)
    factors = [0.8] * len(HALVING)
    blind = run(HALVING, goal, factors, replanned=False)
    told = run(HALVING, goal, factors, replanned=True)
    assert told[0] < 0.9 * blind[0]
    assert blind[1] < told[1] <= goal.budget_usd


def test_corrections_are_means_over_the_stages_and_do_not_add_up():
    over = []
    for factor, mean in ((1.2, 1.2), (1.2, 1.2), (0.9, (1.2 * 1.2 * 0.9) ** (1 / 3))):
        plan = replan(HALVING[len(over) :], Fastest(), over, functions=100)
        one = plan.stages[0]
        predicted = totals([HALVING[len(over)]], [one.option], 100)
        over.append(StageResult(one, factor * predicted[0], predicted[1]))
        later = replan(HALVING[len(over) :], Fastest(), over, functions=100)
        assert [one.slower for one in later.stages] == pytest.approx([mean] * len(later.stages))
        assert [one.dearer for one in later.stages] == pytest.approx([1.0] * len(later.stages))


def test_a_limit_that_is_used_up_leaves_the_cheapest_plan_and_says_so():
    first = plan_stages(HALVING, Fastest(6.0), functions=1000).stages[0]
    plan = replan(HALVING[1:], Fastest(6.0), [StageResult(first, 30.0, 7.0)], functions=1000)
    assert not plan.feasible
    assert {one.option for one in plan.stages} == {OPTIONS[0]}
    (note,) = plan.notes
    assert note.startswith("Fastest(budget_usd=6) cannot be reached: the cheapest plan is expected")
    assert f"to cost {7.0 + plan.cost_usd:.6f} USD" in note


# --- bad input --------------------------------------------------------------------------------


def test_all_mistakes_are_told_at_once():
    good = plan_stages(HALVING, Fastest(), functions=1000).stages[0]
    stages = [
        Stage(0, (option(1, 0.0, -1.0), option(1, math.inf, math.nan))),
        Stage(True, ()),
        Stage(2, (option(1, "3 s", True),)),
    ]
    with pytest.raises(InvalidInput) as raised:
        replan(stages, "fast", [StageResult(good, -1.0, math.inf)], functions=1.5, between_s=-1)
    assert raised.value.mistakes == (
        "goal must be Cheapest(deadline_s=...) or Fastest(budget_usd=...), not 'fast'",
        "stage 1: trials must be a whole number of at least 1, not 0",
        "stage 1, option 1: time_s must be a finite number above 0, not 0.0",
        "stage 1, option 1: cost_usd must be a finite number of at least 0, not -1.0",
        "stage 1, option 2: time_s must be a finite number above 0, not inf",
        "stage 1, option 2: cost_usd must be a finite number of at least 0, not nan",
        "stage 2: trials must be a whole number of at least 1, not True",
        "stage 2: there are no options",
        "stage 3, option 1: time_s must be a finite number above 0, not '3 s'",
        "stage 3, option 1: cost_usd must be a finite number of at least 0, not True",
        "stage 1 that is over: time_s must be a finite number of at least 0, not -1.0",
        "stage 1 that is over: cost_usd must be a finite number of at least 0, not inf",
        "functions must be a whole number of at least 1, not 1.5",
        "between_s must be a finite number of at least 0, not -1",
    )


@pytest.mark.parametrize(
    ("stages", "mistake"),
    [
        ([], "there are no stages"),
        (
            [Stage(4, (option(1, 1, 1),)), Stage(2, (option(9, 1, 1), option(6, 1, 1)))],
            "stage 2: every option has at least 6 workers, and only 5 functions may run at once",
        ),
    ],
)
def test_what_cannot_run_at_all_is_refused(stages, mistake):
    with pytest.raises(InvalidInput, match=f"^{re.escape(mistake)}$"):
        plan_stages(stages, Cheapest(), functions=5)
