"""Successive halving on fleets: nothing is trained, held or paid beyond the end of a stage."""

import random

import pytest

from smlt_tune.backend.goals import Cheapest, Fastest
from smlt_tune.backend.platforms.simulated import (
    SimulatedPlatform,
    SimulatedTraining,
    SimulationOptions,
)
from smlt_tune.backend.resource_manager.observations import Allocation, Option, Workload
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from smlt_tune.backend.simulated_fleet import SimulatedFleet
from smlt_tune.backend.sweeps.halving import run_halving
from smlt_tune.backend.sweeps.halving_rules import Schedule
from smlt_tune.backend.sweeps.stage_allocations import StageAllocations, options_of_workloads
from smlt_tune.errors import InvalidInput, UsageError
from smlt_tune.runtime.features import ModelFeatures

SCHEDULE = Schedule("score", maximize=True, rungs=(1, 2, 4), factor=2)
PINS = {"workers": 1, "memory_mb": 1024}
ITERATIONS = 10
#: How many epochs each of eight trials trains: the scores fall to both sides of trial 5.
EPOCHS = [1, 1, 1, 2, 4, 4, 2, 1]
GB_SECOND_USD = 0.0000166667
FEATURES = ModelFeatures(1_000_000, 4_000_000, 6e6, 1e4)


def describe(config):
    """Ten seconds an epoch on one function."""
    if config.get("broken"):
        raise ValueError("no such luck")
    return SimulatedTraining(
        epochs=config.get("epochs", 4),
        iterations=ITERATIONS,
        iteration_s=lambda workers, memory_mb, batch: config.get("slow", 1.0) / workers,
        metrics=lambda epoch: {"score": -abs(config["trial"] - 5) + 0.01 * epoch},
        batch=256,
        features=FEATURES,
    )


def configs(count=8, **changes):
    """``trial_3={...}`` changes one of them."""
    return [{"trial": i, **changes.get(f"trial_{i}", {})} for i in range(count)]


def fleet_on(options=None, **settings):
    given = {"policy": PinnedOrDefault(), "tick_s": 1.0, "hang_timeout_s": 60.0, **settings}
    return SimulatedFleet(SimulatedPlatform(options or SimulationOptions(progress_s=5.0)), **given)


def epochs_of(result):
    return [len(job.reported) for job in result.jobs]


def test_every_trial_trains_as_far_as_the_stages_it_was_in_and_rests_between_them():
    begun = []
    with fleet_on() as fleet:

        def stage_begins(stage):
            begun.append((stage.stage, stage.trials))
            assert fleet.ledger.totals().reserved == 0, "nobody runs between two stages"

        result = run_halving(
            fleet, describe, configs(), schedule=SCHEDULE, on_stage=stage_begins, **PINS
        )
        fleet.run_until_idle()
    assert (result.best, result.complete, result.notes) == (5, True, ())
    assert epochs_of(result) == EPOCHS
    assert begun == [(0, tuple(range(8))), (1, (5, 4, 6, 3)), (2, (5, 4))]
    ends = {job.job_id: (job.status, job.reason) for job in result.jobs}
    assert ends["trial-5"] == ends["trial-4"] == ("finished", "")
    assert ends["trial-6"] == ("stopped", "not among the best of stage 2")
    assert ends["trial-0"] == ("stopped", "not among the best of stage 1")
    trained_s = sum(job.cost_usd for job in result.jobs) / GB_SECOND_USD
    assert 10 * sum(EPOCHS) < trained_s < 11 * sum(EPOCHS) + 14 * 5, "and nothing besides"


def test_what_the_stages_took_adds_up_to_the_bill():
    with fleet_on(SimulationOptions(progress_s=5.0, concurrency=2)) as fleet:
        result = run_halving(fleet, describe, configs(), schedule=SCHEDULE, **PINS)
        fleet.run_until_idle()
        assert sum(stage.cost_usd for stage in result.stages) == pytest.approx(
            fleet.ledger.settled_usd, rel=1e-3
        )
        assert sum(stage.time_s for stage in result.stages) == pytest.approx(fleet.now_s, rel=0.1)
    assert [len(stage.trials) for stage in result.stages] == [8, 4, 2]
    # Four waves, then two of one epoch, then one of two epochs; and starts.
    for stage, least_s in zip(result.stages, (40, 20, 20), strict=True):
        assert least_s < stage.time_s < 1.2 * least_s


def test_a_training_that_is_longer_than_the_stages_ends_with_them():
    schedule = Schedule("score", maximize=True, rungs=(1, 2), factor=2, reports=4)
    with fleet_on() as fleet:
        result = run_halving(fleet, describe, configs(4), schedule=schedule, **PINS)
        fleet.run_until_idle()
    assert epochs_of(result) == [1, 1, 2, 2]
    assert {job.status for job in result.jobs} == {"stopped"}
    assert (result.best, result.complete) == (3, True)


def test_trials_that_fail_lose_their_place_and_shorter_ones_keep_it():
    changed = configs(trial_5={"broken": True}, trial_6={"epochs": 1}, trial_0={"broken": True})
    with fleet_on() as fleet:
        result = run_halving(fleet, describe, changed, schedule=SCHEDULE, **PINS)
    assert [stage.trials for stage in result.stages] == [tuple(range(8)), (4, 6, 3, 7), (4, 6)]
    assert (result.best, result.complete) == (4, True)
    assert result.notes == ("2 of 8 trials failed",)


def test_when_the_money_is_gone_there_is_still_a_best_trial():
    with fleet_on(SimulationOptions(progress_s=5.0, concurrency=4), budget_usd=0.0025) as fleet:
        result = run_halving(fleet, describe, configs(), schedule=SCHEDULE, **PINS)
        fleet.run_until_idle()
        assert fleet.ledger.settled_usd <= 0.0025
    assert (result.best, result.complete) == (5, False)
    assert any("stopped: budget" in note for note in result.notes)


def test_nothing_works_and_that_is_said():
    broken = [{"trial": i, "broken": True} for i in range(3)]
    with fleet_on() as fleet:
        result = run_halving(fleet, describe, broken, schedule=SCHEDULE, **PINS)
    assert (result.best, result.complete) == (None, False)
    assert result.notes == ("3 of 3 trials failed",)


# --- clients that die -----------------------------------------------------------------------------


class Death(Exception):
    """Of the client."""


def dies_after(changes):
    count = iter(range(changes))

    def on_change(trial, change):
        if next(count, None) is None:
            raise Death

    return on_change


@pytest.mark.parametrize("planned", [False, True])
def test_whoever_goes_on_for_a_dead_client_comes_to_the_same_end(planned):
    given = {"schedule": SCHEDULE, **({} if planned else PINS)}
    for moment in (0, 1, 7, 8, 9, 16, 17, 23, 24, 30, 31, 40):
        with fleet_on(SimulationOptions(progress_s=5.0, concurrency=3)) as fleet:
            plan = {"allocations": allocations(Cheapest())} if planned else {}
            with pytest.raises(Death):
                run_halving(
                    fleet, describe, configs(), on_change=dies_after(moment), **given, **plan
                )
            chance = random.Random(moment)
            until_s = fleet.now_s + chance.uniform(0, 60)
            fleet.run_until(lambda until_s=until_s: fleet.now_s >= until_s)
            plan = {"allocations": allocations(Cheapest())} if planned else {}
            result = run_halving(fleet, describe, configs(), **given, **plan)
        assert epochs_of(result) == EPOCHS, moment
        assert (result.best, result.complete, result.notes) == (5, True, ()), moment


def test_on_a_platform_that_cannot_be_relied_on_the_same_trials_go_on():
    unreliable = SimulationOptions(
        seed=2,
        concurrency=5,
        crashes_per_hour=30,
        hangs_per_hour=20,
        throttles=0.2,
        duplicates=0.2,
        pace_spread=0.3,
        progress_s=5.0,
    )
    with fleet_on(unreliable) as fleet:
        result = run_halving(fleet, describe, configs(), schedule=SCHEDULE, **PINS)
    assert epochs_of(result) == EPOCHS
    assert result.best == 5


# --- plans ----------------------------------------------------------------------------------------


def options(share, wrong=1.0):
    """As the trials are: 40 s of one function in all; ``wrong`` by this factor."""
    return [
        Option(
            Allocation(n, 1024),
            wrong * (2.2 + 40 * share / n),
            wrong * GB_SECOND_USD * n * (2.2 + 40 * share / n),
        )
        for n in (1, 2, 4, 8)
    ]


def allocations(goal, of=options):
    return StageAllocations(of, goal)


def ran_on(result):
    return [stage.allocation.workers for stage in result.stages]


def test_a_plan_gives_the_money_to_the_stages_where_it_buys_most_time():
    budget_usd = 1.15 * planned_least().cost_usd
    spent = {}
    for name, goal in {"cheapest": Cheapest(), "fastest": Fastest(budget_usd)}.items():
        with fleet_on(SimulationOptions(progress_s=5.0, concurrency=8)) as fleet:
            result = run_halving(
                fleet, describe, configs(), schedule=SCHEDULE, allocations=allocations(goal)
            )
            fleet.run_until_idle()
            spent[name] = (fleet.ledger.settled_usd, fleet.now_s, ran_on(result))
        assert epochs_of(result) == EPOCHS
    assert spent["cheapest"][2] == [1, 1, 1]
    assert spent["fastest"][2][-1] > spent["fastest"][2][0]
    assert spent["fastest"][1] < 0.8 * spent["cheapest"][1]
    assert spent["fastest"][0] <= budget_usd


def planned_least(functions=8):
    return allocations(Cheapest()).plan(SCHEDULE, 8, functions)


def test_the_stages_to_come_are_planned_again_from_what_the_others_took():
    """Training takes 2.5 times as long as predicted."""
    budget_usd = 3.5 * planned_least().cost_usd
    plans = []
    with fleet_on(SimulationOptions(progress_s=5.0, concurrency=8)) as fleet:
        result = run_halving(
            fleet,
            lambda config: describe({**config, "slow": 2.5}),
            configs(),
            schedule=SCHEDULE,
            allocations=allocations(Fastest(budget_usd)),
            on_stage=lambda stage: plans.append(stage.plan),
        )
        fleet.run_until_idle()
        assert fleet.ledger.settled_usd <= budget_usd
    assert result.complete
    assert [len(plan.stages) for plan in plans] == [3, 2, 1]
    assert plans[1].stages[0].dearer > 1.5
    took_usd = sum(stage.cost_usd for stage in result.stages[1:])
    before_usd = sum(stage.cost_usd for stage in plans[0].stages[1:])
    assert abs(plans[1].cost_usd - took_usd) < 0.7 * abs(before_usd - took_usd)


def test_the_resource_manager_plans_and_learns_from_the_stages():
    pytest.importorskip("scipy")
    work = Workload(FEATURES, 256, 4 * ITERATIONS)
    plans = []
    with fleet_on(SimulationOptions(progress_s=2.0, concurrency=16), policy=None) as fleet:
        of = options_of_workloads(fleet.options, [work])
        budget_usd = 3 * allocations(Cheapest(), of).plan(SCHEDULE, 8, 16).cost_usd
        result = run_halving(
            fleet,
            describe,
            configs(),
            schedule=SCHEDULE,
            allocations=allocations(Fastest(budget_usd), of),
            on_stage=lambda stage: plans.append(stage.plan),
        )
    assert epochs_of(result) == EPOCHS
    slower = [plan.stages[0].slower for plan in plans]
    # It has never seen such slow iterations; then it knows them.
    assert 0.5 < slower[2] < 2.0


def test_without_a_resource_manager_nothing_is_planned():
    with fleet_on() as fleet, pytest.raises(UsageError, match="policy=None"):
        fleet.options(Workload(FEATURES, 256, 100))


@pytest.mark.parametrize(
    ("works", "message"),
    [([], "at least one trial"), ([Workload(FEATURES, 256)], r"session\.epochs")],
)
def test_options_need_to_know_what_is_computed(works, message):
    with pytest.raises(InvalidInput, match=message):
        options_of_workloads(lambda work: [], works)


def test_options_of_different_trials_stand_for_all():
    def predict(work):
        seconds = work.iterations * work.batch
        places = (1, 2, 4) if work.batch == 1 else (1, 2)
        return [Option(Allocation(n, 1024), seconds / n, 1e-3 * seconds) for n in places]

    works = [Workload(FEATURES, batch, 100) for batch in (1, 3)]
    assert options_of_workloads(predict, works)(0.5) == [
        Option(Allocation(1, 1024), 150.0, 0.1),
        Option(Allocation(2, 1024), 75.0, 0.1),
    ]


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (Fastest(1e-5), r"Fastest\(budget_usd=1e-05\) cannot be reached.*would do"),
        (Cheapest(1.0), r"Cheapest\(deadline_s=1\) cannot be reached.*would do"),
    ],
)
def test_a_goal_out_of_reach_is_refused_before_anything_is_spent(goal, message):
    with fleet_on() as fleet:
        with pytest.raises(InvalidInput, match=message):
            run_halving(
                fleet, describe, configs(), schedule=SCHEDULE, allocations=allocations(goal)
            )
        assert fleet.jobs() == []


def test_arguments_that_contradict_the_method_are_refused_all_at_once():
    with fleet_on() as fleet, pytest.raises(InvalidInput) as caught:
        run_halving(
            fleet,
            describe,
            [],
            schedule=SCHEDULE,
            allocations=allocations(Cheapest()),
            workers=1,
            lockstep=True,
        )
    assert len(caught.value.mistakes) == 3
