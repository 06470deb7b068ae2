"""Sweeps that were planned, in virtual time."""

import pytest

from smlt_tune.backend.goals import Cheapest
from smlt_tune.backend.planning import JobPlan
from smlt_tune.backend.platforms.base import PlatformLimits
from smlt_tune.backend.resource_manager.observations import (
    Allocation,
    Interval,
    Option,
    Plan,
    Prediction,
    Workload,
)
from smlt_tune.backend.sweeps.plan import Sample, SweepPlan, outcome
from smlt_tune.backend.sweeps.simulate import simulate_sweep
from smlt_tune.backend.sweeps.sweep import load
from smlt_tune.errors import InvalidInput
from smlt_tune.runtime.features import ModelFeatures

SWEEP = """\
train: code.py:train
metric: accuracy
trials: 8
parallel: 4
sampler: random
space:
  x: {float: [0, 1]}
"""
LIMITS = PlatformLimits(128, 10_240, 900.0, concurrency=8)
ITERATIONS = 100
GB_SECOND_USD = 0.0000166667


class Policy:
    """An iteration takes a second on one function of any size."""

    def predict(self, facts, allocation):
        return prediction(allocation.workers, facts.workload.iterations)

    def options(self, facts):
        found = [prediction(n, facts.workload.iterations) for n in (1, 2, 4)]
        return [Option(one.allocation, one.time_s.mid, one.cost_usd.mid) for one in found]


def prediction(workers, iterations):
    seconds = iterations / workers + 2.0
    exactly = [
        Interval(value, value, value)
        for value in (1.0 / workers, seconds, workers * seconds * GB_SECOND_USD)
    ]
    return Prediction(Allocation(workers, 1024), *exactly, fits=1.0)


def planned(sweep, iterations=ITERATIONS):
    chosen = prediction(1, ITERATIONS)
    work = Workload(ModelFeatures(1000, 4000, 6e3, 10.0), 32, iterations)
    plan = Plan(chosen, (chosen,), True, (), 0, 0)
    samples = tuple(Sample(f"drawn {i}", {}, JobPlan(work, Cheapest(), plan)) for i in (1, 2))
    expected = outcome([chosen, chosen], sweep, LIMITS)
    return SweepPlan(samples, expected, (expected,), None, None, True, ())


@pytest.fixture
def sweep(tmp_path):
    (tmp_path / "code.py").write_text("def train(config):\n    pass\n")

    def make(**given):
        (tmp_path / "sweep.yaml").write_text(SWEEP)
        return load(tmp_path / "sweep.yaml", **given)

    return make


def simulated(made, plan=None):
    plan = plan or planned(made)
    return simulate_sweep(made, plan, policy=Policy(), limits=LIMITS, start_s=1.0)


def test_all_trials_are_trained_so_many_at_once(sweep):
    made = sweep()
    found, plan = simulated(made), planned(made)
    assert (found.finished, found.cut, found.notes) == (8, {}, ())
    assert found.time_s == pytest.approx(plan.chosen.time_s.mid, rel=0.15)
    assert found.cost_usd == pytest.approx(plan.chosen.cost_usd.mid, rel=0.15)
    assert simulated(made) == found


def test_what_the_budget_does_not_pay_for_is_cut(sweep):
    budget_usd = 4.5 * ITERATIONS * GB_SECOND_USD
    found = simulated(sweep(budget_usd=budget_usd))
    assert found.cost_usd <= budget_usd
    assert found.finished < 5
    assert found.finished + sum(found.cut.values()) == 8
    assert "budget" in found.cut


def test_what_the_deadline_leaves_no_time_for_is_cut(sweep):
    found = simulated(sweep(deadline="2m"))
    assert found.finished == 4
    assert found.cut == {"deadline": 4}
    assert found.time_s == pytest.approx(120, abs=5)


def test_stages_are_planned_for_the_budget(sweep):
    stages = {"first": 1, "factor": 2, "count": 3}
    slow = simulated(sweep(stages=stages))
    least_usd = slow.cost_usd
    fast = simulated(sweep(stages=stages, budget_usd=1.2 * least_usd))
    assert slow.finished == fast.finished == 2
    assert (
        slow.cut
        == fast.cut
        == {
            "not among the best of stage 1": 4,
            "not among the best of stage 2": 2,
        }
    )
    assert fast.time_s < 0.9 * slow.time_s
    assert fast.cost_usd <= 1.2 * least_usd


def test_a_budget_out_of_reach_is_said(sweep):
    stages = {"first": 1, "factor": 2, "count": 3}
    with pytest.raises(InvalidInput, match=r"Fastest\(.*would do"):
        simulated(sweep(stages=stages, budget_usd=1e-5))


def test_a_training_of_unknown_length_cannot_be_simulated(sweep):
    made = sweep()
    with pytest.raises(InvalidInput, match=r"session\.epochs"):
        simulated(made, planned(made, iterations=None))
