"""Which allocation is best, given what is expected of each."""

import numpy as np

from smlt_tune.backend.goals import Cheapest, Fastest
from smlt_tune.backend.platforms.base import PlatformLimits
from smlt_tune.backend.prices import load_prices
from smlt_tune.backend.resource_manager.grid import Grid
from smlt_tune.backend.resource_manager.observations import Allocation, Workload
from smlt_tune.backend.resource_manager.outlook import Knowledge, Outlook
from smlt_tune.backend.resource_manager.physics import IterationTime
from smlt_tune.backend.resource_manager.policy import JobFacts
from smlt_tune.backend.resource_manager.tables import PlatformTable, StoreTable
from smlt_tune.runtime.features import ModelFeatures

TABLE = PlatformTable("t", (128, 1769), (0.1, 1.0), 2e10, 8e7, 1e-9, 2.0, 0.1)
LIMITS = PlatformLimits(128, 1769, 900.0, concurrency=8)
FEW, MANY = Allocation(1, 1769), Allocation(4, 1769)


def knowledge(facts):
    stores = {"default": StoreTable(1e-3, 1e9)}
    return Knowledge(TABLE, stores, load_prices(), IterationTime(TABLE), [], facts)


def outlook(goal, few, many, elapsed_s=0.0, start_s=0.0):
    """Of a job on MANY with 100 iterations left; what takes how long, and how sure that is."""
    work = Workload(ModelFeatures(10, 40, 1.0, 1.0), batch=8, iterations=200)
    facts = JobFacts(
        "a", LIMITS, goal, workload=work, allocation=MANY, iterations_left=100,
        elapsed_s=elapsed_s, start_s=start_s,
    )  # fmt: skip
    known = knowledge(facts)
    (few_s, few_sd), (many_s, many_sd) = few, many
    expected = np.array([np.log([few_s, many_s]), [few_sd, many_sd], [1.0, 1.0]])
    return Outlook(known, Grid.of([FEW, MANY], list(known.stores)), expected, MANY)


def chosen(*args, **options):
    found = outlook(*args, **options)
    return found.allocation(found.best())


def test_the_cheapest_that_keeps_the_deadline_is_best():
    assert chosen(Cheapest(200.0), (1.0, 0.05), (0.9, 0.05)) == FEW
    assert chosen(Cheapest(95.0), (1.0, 0.05), (0.9, 0.01)) == MANY


def test_if_nothing_keeps_it_what_exceeds_it_hardly_more_but_is_far_cheaper_will_do():
    assert chosen(Cheapest(80.0), (0.9, 0.02), (0.9, 0.02)) == FEW


def test_if_nothing_keeps_it_nobody_hopes_for_what_is_hardly_known():
    assert chosen(Cheapest(80.0), (0.9, 0.3), (0.9, 0.02)) == MANY


def test_the_surer_one_is_best_if_that_costs_less_than_breaking_the_limit_may():
    assert chosen(Cheapest(105.0), (0.95, 0.02), (0.3, 0.02)) == FEW
    assert chosen(Cheapest(105.0), (0.95, 0.4), (0.3, 0.02)) == MANY
    assert chosen(Cheapest(105.0), (0.95, 0.4), (0.9, 0.02)) == FEW  # four times as dear


def test_late_in_a_job_less_is_dared():
    few, many = (0.9, 0.2), (0.27, 0.02)
    assert chosen(Cheapest(105.0), few, many, 0.0) == FEW
    assert chosen(Cheapest(105.0 + 400.0), few, many, 400.0) == MANY  # as much is left


def test_what_leaves_no_time_to_win_anything_back_is_not_dared():
    # Of 15 s there are not many left once the pace of the few is known.
    for shorter, place in ((1.0, FEW), (8.0, MANY)):
        few, many = (0.9 / shorter, 0.2), (0.3 / shorter, 0.02)
        assert chosen(Cheapest(118.0 / shorter), few, many, start_s=0.02) == place


def test_what_nobody_is_sure_of_does_not_speak_for_the_slower_one():
    budget = Fastest(1.3 * 100 * 1769 / 1024 * 1.66667e-5)
    assert chosen(budget, (1.0, 0.5), (0.27, 0.5)) == MANY


def test_equal_models_are_known_whatever_part_of_the_batch_a_worker_had():
    def work(parameters=10, flops=300.0, kept=100.0, function="f"):
        return Workload(ModelFeatures(parameters, 40, flops, kept), 8, function=function)

    known = knowledge(JobFacts("a", LIMITS, workload=work()))
    alike = [work(kept=100.25), work(kept=112.0), work(flops=300.0001)]
    assert known.models(alike).tolist() == [0, 0, 0]
    others = [work(11), work(flops=330.0), work(function="g"), work(11, kept=101.0)]
    assert known.models(others).tolist() == [1, 2, 3, 1]
