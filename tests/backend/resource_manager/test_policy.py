from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlt_tune.backend.goals import Fastest
from smlt_tune.backend.platforms.base import PlatformLimits
from smlt_tune.backend.resource_manager.observations import Allocation
from smlt_tune.backend.resource_manager.policy import (
    AllocationPolicy,
    Bounds,
    JobFacts,
    PinnedOrDefault,
    check,
    memory_range,
    most_workers,
)
from smlt_tune.errors import InvalidInput

LIMITS = PlatformLimits(128, 10240, 900, concurrency=100, max_workers=64)
NOT_OFFERED = "is not among what the platform offers (128 to 10240 MB)"
POLICY: AllocationPolicy = PinnedOrDefault()


def facts(limits=LIMITS, allocation=None, **bounds):
    stores = ("default", "large")
    return JobFacts("job-1", limits, bounds=Bounds(**bounds), allocation=allocation, stores=stores)


@pytest.mark.parametrize(
    ("known", "allocation"),
    [
        (facts(), Allocation(2, 1769)),
        (facts(max_workers=1), Allocation(1, 1769)),
        (facts(max_workers=16), Allocation(2, 1769)),
        (facts(min_workers=4), Allocation(4, 1769)),
        (facts(workers=7), Allocation(7, 1769)),
        (facts(memory_mb=3008), Allocation(2, 3008)),
        (facts(workers=1, memory_mb=128), Allocation(1, 128)),
        (facts(replace(LIMITS, concurrency=1)), Allocation(1, 1769)),
        (facts(replace(LIMITS, max_memory_mb=1024)), Allocation(2, 1024)),
        (facts(replace(LIMITS, min_memory_mb=2048)), Allocation(2, 2048)),
        (facts(max_memory_mb=1024), Allocation(2, 1024)),
        (facts(min_memory_mb=3008, max_memory_mb=4096), Allocation(2, 3008)),
        (facts(store="large"), Allocation(2, 1769, "large")),
    ],
)
def test_pins_win_and_the_rest_is_two_workers_of_one_vcpu(known, allocation):
    assert check(known) == []
    assert POLICY.first(known).allocation == allocation


@pytest.mark.parametrize(
    ("known", "allocation"),
    [
        (facts(allocation=Allocation(4, 1769, "redis")), Allocation(4, 3538, "redis")),
        (facts(allocation=Allocation(4, 8000)), Allocation(4, 10240)),
        (facts(), Allocation(2, 3538)),
        (facts(allocation=Allocation(4, 10240)), None),
        (facts(allocation=Allocation(4, 1769), memory_mb=1769), None),
        (facts(allocation=Allocation(4, 1769), workers=4), Allocation(4, 3538)),
        (facts(allocation=Allocation(4, 1769), max_memory_mb=2048), Allocation(4, 2048)),
        (facts(allocation=Allocation(4, 2048), max_memory_mb=2048), None),
    ],
)
def test_memory_doubles_until_it_is_pinned_or_there_is_no_more(known, allocation):
    decision = POLICY.after_out_of_memory(known, 1800.0)
    assert (decision and decision.allocation) == allocation


def test_a_running_job_stays_as_it_is():
    assert POLICY.review(facts(allocation=Allocation(2, 1769))) is None


@pytest.mark.parametrize(
    ("known", "mistakes"),
    [
        (facts(workers=64, memory_mb=10240, min_workers=64, max_workers=64), []),
        (facts(max_workers=5000), []),
        (facts(workers=65), ["workers=65 is more than the platform can run at once (64)"]),
        (
            facts(replace(LIMITS, concurrency=8), workers=9),
            ["workers=9 is more than the platform can run at once (8)"],
        ),
        (facts(workers=5, max_workers=4), ["workers=5 is more than max_workers=4"]),
        (facts(workers=2, min_workers=4), ["workers=2 is less than min_workers=4"]),
        (facts(min_workers=5, max_workers=4), ["min_workers=5 is more than max_workers=4"]),
        (facts(min_workers=65), ["min_workers=65 is more than the platform can run at once (64)"]),
        (facts(memory_mb=127), [f"memory_mb=127 {NOT_OFFERED}"]),
        (facts(memory_mb=10241), [f"memory_mb=10241 {NOT_OFFERED}"]),
        (facts(workers=0), ["workers must be a whole number of at least 1, not 0"]),
        (facts(workers=True), ["workers must be a whole number of at least 1, not True"]),
        (facts(profiles=-1), ["profiles must be a whole number of at least 1, not -1"]),
        (facts(min_workers=1.5), ["min_workers must be a whole number of at least 1, not 1.5"]),
        (facts(max_workers="9"), ["max_workers must be a whole number of at least 1, not '9'"]),
        (facts(min_memory_mb=64), [f"min_memory_mb=64 {NOT_OFFERED}"]),
        (facts(max_memory_mb=20000), [f"max_memory_mb=20000 {NOT_OFFERED}"]),
        (
            facts(min_memory_mb=2048, max_memory_mb=1024),
            ["min_memory_mb=2048 is more than max_memory_mb=1024"],
        ),
        (
            facts(memory_mb=1769, max_memory_mb=1024),
            ["memory_mb=1769 is more than max_memory_mb=1024"],
        ),
        (
            facts(memory_mb=512, min_memory_mb=1024),
            ["memory_mb=512 is less than min_memory_mb=1024"],
        ),
        (facts(min_memory_mb=0), ["min_memory_mb must be a whole number of at least 1, not 0"]),
        (
            facts(store="fast"),
            ["store='fast' is none of the fleet's parameter stores: default, large"],
        ),
        (facts(store="large", workers=0), ["workers must be a whole number of at least 1, not 0"]),
        (facts(memory_mb=-1), ["memory_mb must be a whole number of at least 1, not -1"]),
    ],
)  # fmt: skip
def test_what_cannot_be_placed_is_told(known, mistakes):
    assert check(known) == mistakes


def test_all_mistakes_are_told_at_once():
    known = replace(facts(workers=99, memory_mb=1, min_workers=80, max_workers=70), goal="fastest")
    assert check(known) == [
        "goal must be Cheapest(deadline_s=...) or Fastest(budget_usd=...), not 'fastest'",
        "min_workers=80 is more than max_workers=70",
        "min_workers=80 is more than the platform can run at once (64)",
        "workers=99 is more than the platform can run at once (64)",
        "workers=99 is more than max_workers=70",
        f"memory_mb=1 {NOT_OFFERED}",
    ]


@pytest.mark.parametrize(
    ("arguments", "mistakes"),
    [
        ((0, 128), ("Allocation: workers must be a whole number of at least 1, not 0",)),
        ((1, 1.5), ("Allocation: memory_mb must be a whole number of at least 1, not 1.5",)),
        (
            (-1, 0, ""),
            (
                "Allocation: workers must be a whole number of at least 1, not -1",
                "Allocation: memory_mb must be a whole number of at least 1, not 0",
                "Allocation: store must have a name",
            ),
        ),
    ],
)
def test_an_impossible_allocation_cannot_be_made(arguments, mistakes):
    with pytest.raises(InvalidInput) as error:
        Allocation(*arguments)
    assert error.value.mistakes == mistakes


maybe_count = st.none() | st.integers(1, 80)
maybe_mb = st.none() | st.integers(1, 12000)
any_bounds = st.builds(
    Bounds, maybe_count, maybe_mb, st.integers(1, 80), maybe_count, maybe_mb, maybe_mb
)
any_limits = st.builds(
    PlatformLimits,
    st.integers(1, 3000),
    st.integers(3000, 11000),
    st.just(900),
    concurrency=st.integers(1, 80),
    max_workers=st.integers(1, 80),
)


@given(any_bounds, any_limits)
def test_whatever_passes_the_check_gets_an_allocation_within_all_bounds(bounds, limits):
    known = JobFacts("job-1", limits, Fastest(), bounds)
    if check(known):
        return
    allocation = POLICY.first(known).allocation
    assert bounds.min_workers <= allocation.workers <= most_workers(known)
    low, high = memory_range(known)
    assert limits.min_memory_mb <= low <= allocation.memory_mb <= high <= limits.max_memory_mb
    assert bounds.workers in (None, allocation.workers)
    assert bounds.memory_mb in (None, allocation.memory_mb)
    steps = 0
    while (
        more := POLICY.after_out_of_memory(replace(known, allocation=allocation), 0)
    ) is not None:
        assert allocation.memory_mb < more.allocation.memory_mb <= high
        allocation, steps = more.allocation, steps + 1
    assert steps < 20
