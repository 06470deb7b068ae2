"""The peers of the stage planner do what their descriptions say, and nobody beats the optimum."""

import numpy as np
import pytest
from stages import baselines, workloads

from smlt_tune.backend.goals import Cheapest, Fastest
from smlt_tune.backend.resource_manager.observations import Allocation, Option
from smlt_tune.backend.sweeps.stage_planner import Stage, plan_stages

TRIALS = np.array([64, 32, 16, 8, 4, 2])
GOALS = {"budget": Fastest, "deadline": Cheapest}


@pytest.fixture(scope="module", params=[10**9, 40], ids=["no limit", "40 functions"])
def sweep(request):
    # ResNet-50; every third option is enough to disagree about
    options = workloads.options_of(workloads.MODELS[2], epochs=2)[::3]
    return baselines.Sweep(TRIALS, options, request.param, between_s=1.0)


def limits(sweep, kind):
    _, limited = sweep.tables(kind)
    return [factor * float(limited.sum(axis=0).min()) for factor in (1.05, 1.5, 4.0)]


def test_options_of_a_model_follow_from_the_analytic_model():
    options = {one.allocation: one for one in workloads.options_of(workloads.MODELS[1], epochs=2)}
    alone, twice = options[Allocation(1, 1769, "s3")], options[Allocation(2, 1769, "redis")]
    assert twice.time_s < alone.time_s < 2.5 * twice.time_s
    assert alone.cost_usd == pytest.approx(alone.time_s * 1769 / 1024 * 1.66667e-5, rel=1e-3)
    four_epochs = {one.allocation: one for one in workloads.options_of(workloads.MODELS[1], 4)}
    longer = four_epochs[Allocation(1, 1769, "s3")]
    assert longer.time_s < 2 * alone.time_s  # the start and the data are paid once
    assert min(one.memory_mb for one in options) >= workloads.MODELS[1].least_mb


@pytest.mark.parametrize("kind", GOALS)
def test_nobody_is_better_than_the_optimum_and_we_are_within_half_a_percent(sweep, kind):
    clouds = baselines.fixed_shares(sweep), baselines.shrinking(sweep)
    stages = [Stage(int(q), tuple(sweep.options)) for q in TRIALS]
    mine, other = (0, 1) if kind == "budget" else (1, 0)
    for limit in limits(sweep, kind):
        optimum = baselines.integer_program(sweep, kind, limit)
        plan = plan_stages(
            stages, GOALS[kind](limit), functions=sweep.functions, between_s=sweep.between_s
        )
        assert (plan.time_s, plan.cost_usd)[mine] == pytest.approx(optimum, rel=0.005)
        for method in (baselines.static, baselines.repaired):
            totals = sweep.totals(method(sweep, kind, limit))
            assert totals[other] <= limit * (1 + 1e-12)
            assert totals[mine] >= optimum * (1 - 1e-5)
        for cloud in clouds:
            within = cloud[mine][cloud[other] <= limit]
            assert within.min(initial=np.inf) >= optimum * (1 - 1e-5)


@pytest.mark.parametrize("kind", GOALS)
def test_the_repaired_algorithm_starts_at_the_best_static_plan(sweep, kind):
    mine = 0 if kind == "budget" else 1
    for limit in limits(sweep, kind):
        start = sweep.totals(baselines.static(sweep, kind, limit))[mine]
        assert sweep.totals(baselines.repaired(sweep, kind, limit))[mine] <= start


def options_of_workers(*workers):
    return [Option(Allocation(n, 1769, "redis"), 64 / n, 1 + n / 8) for n in workers]


def test_the_printed_algorithm_exceeds_limits():
    options = options_of_workers(1, 2, 4, 8, 16)
    sweep = baselines.Sweep(TRIALS, options, 10**9, 0.0)
    budget = 1.5 * sweep.cost_usd.min(axis=1).sum()
    assert sweep.totals(baselines.printed(sweep, "budget", budget))[1] > 1.2 * budget
    assert sweep.totals(baselines.repaired(sweep, "budget", budget))[1] <= budget


def test_fixed_shares_divide_the_functions_among_the_trials():
    sweep = baselines.Sweep(np.array([8, 4, 2]), options_of_workers(1, 2, 4, 8), 8, 0.0)
    times, costs = baselines.fixed_shares(sweep)
    # 8 functions: 1, 2 and 4 for each trial, one wave each.
    fastest = int(np.argmin(times))
    assert times[fastest] == 64 + 32 + 16
    assert costs[fastest] == pytest.approx(8 * 1.125 + 4 * 1.25 + 2 * 1.5)
    # 1 function: every trial by itself.
    assert times.max() == (8 + 4 + 2) * 64


def test_a_shrinking_cluster_ends_with_one_function_for_each_trial():
    sweep = baselines.Sweep(np.array([8, 4, 2]), options_of_workers(1, 2, 4, 8), 10**9, 0.0)
    times, costs = baselines.shrinking(sweep)
    assert times.min() == 3 * 8
    assert costs.min() == pytest.approx(14 * 1.125)
    assert times[costs == costs.min()].min() == 3 * 64
