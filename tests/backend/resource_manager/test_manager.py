"""The resource manager against a platform that its own model describes, with other constants."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from smlt_tune.backend.goals import Cheapest, Fastest
from smlt_tune.backend.platforms.base import PlatformLimits
from smlt_tune.backend.prices import load_prices
from smlt_tune.backend.resource_manager.manager import ResourceManager
from smlt_tune.backend.resource_manager.observations import Allocation, Profile, Workload
from smlt_tune.backend.resource_manager.physics import THETA_MEAN, IterationTime, Points
from smlt_tune.backend.resource_manager.policy import Bounds, JobFacts
from smlt_tune.backend.resource_manager.tables import PlatformTable, StoreTable
from smlt_tune.errors import InvalidInput
from smlt_tune.runtime.features import ModelFeatures

SIZES = (128, 512, 1769, 3538, 7076, 10240)
TABLE = PlatformTable("t", SIZES, tuple(m / 1769 for m in SIZES), 2e10, 8e7, 1e-9, 2.0, 0.1)
STORES = {"default": StoreTable(1e-3, 1e9)}
LIMITS = PlatformLimits(128, 10240, 900.0, concurrency=200, max_workers=64)
PRICES = load_prices()
CHEAPEST, ANY, TWO_WORKERS = Cheapest(), Bounds(), Allocation(2, 1769)
TRUE_THETA = THETA_MEAN + np.array([0.4, 0.3, 0.2, -0.3, -0.5, 0.2, -0.1, -0.2, 0.3, 0.2])


def workload(parameters=1_000_000, batch=256, iterations=2000, function="f"):
    features = ModelFeatures(parameters, 4 * parameters, 120.0 * parameters, 2.0 * parameters)
    return Workload(features, batch, iterations, function)


def true_s(work, allocation, stores=STORES):
    f, store = work.features, stores[allocation.store]
    values = (
        *(allocation.workers, allocation.memory_mb, f.parameters, f.gradient_bytes),
        *(f.flops_per_sample, work.batch, store.latency_s, store.bandwidth),
    )
    at = Points(*(np.array([float(value)]) for value in values))
    return float(np.exp(IterationTime(TABLE)(at, TRUE_THETA).ln_s[0]))


def true_peak_mb(work, workers):
    part = math.ceil(work.batch / workers)
    held = 5 * 4 * work.features.parameters + 1.2 * work.features.activation_bytes * part
    return 300 + held / 2**20


def profile(job="a", work=None, allocation=TWO_WORKERS, **changed):
    work = work or workload()
    given = {
        "iterations": 20,
        "iteration_s": true_s(work, allocation),
        "peak_mb": true_peak_mb(work, allocation.workers),
        "start_s": 2.0,
    }
    return Profile(job, work, allocation, **(given | changed))


def facts(job="a", goal=CHEAPEST, work=None, limits=LIMITS, bounds=ANY, **known):
    known.setdefault("stores", ("default", "small", "large"))
    return JobFacts(job, limits, goal, bounds, workload=work or workload(), **known)


def manager(profiles=(), stores=STORES, **options):
    return ResourceManager(TABLE, stores, PRICES, profiles, **options)


def siblings(count=12, each=2, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        work = workload(int(np.exp(rng.uniform(np.log(2e5), np.log(2e7)))))
        for _ in range(each):
            where = Allocation(int(rng.integers(1, 33)), int(rng.integers(1024, 8000)))
            found.append(profile(f"s{number}", work, where))
    return found


EXPERIENCED = manager(siblings())


def test_what_siblings_did_besides_and_at_their_end_is_expected_of_this_one():
    known = siblings()
    besides = [replace(p, other_share=0.5 if i % 2 else None) for i, p in enumerate(known)]
    plain, longer = (
        manager(profiles).predict(facts(work=workload(iterations=200)), TWO_WORKERS).time_s.mid
        for profiles in (known, besides)
    )
    assert longer == pytest.approx(1.5 * plain)


@pytest.mark.parametrize("split", [True, False])
def test_what_siblings_did_at_their_end_takes_as_much_longer_as_there_are_fewer_to_do_it(split):
    def end_s(at):
        return 120.0 / (at.workers if split else 1) / (at.memory_mb / 1769)

    known = siblings(40)
    ends = [replace(p, end_s=end_s(p.allocation) if i % 2 else None) for i, p in enumerate(known)]
    plain, told = manager(known), manager(ends)
    for at in (Allocation(1, 1769), TWO_WORKERS, Allocation(16, 3538)):
        without, later = (
            policy.predict(facts(work=workload(iterations=200)), at).time_s.mid
            for policy in (plain, told)
        )
        assert later - without == pytest.approx(end_s(at), rel=0.35)
    one = manager([replace(known[0], end_s=10.0)])  # alone, it is taken for one that was split
    at, more = known[0].allocation, replace(known[0].allocation, workers=64)
    ends = [one.predict(facts(), where).time_s.mid for where in (at, more)]
    without = [manager(known[:1]).predict(facts(), where).time_s.mid for where in (at, more)]
    assert ends[0] - without[0] == pytest.approx(10.0)
    assert ends[1] - without[1] == pytest.approx(10.0 * at.workers / 64)


def true_time_and_cost(work, allocation):
    time = 2.0 + work.iterations * true_s(work, allocation)
    return time, allocation.workers * allocation.memory_mb / 1024 * time * 1.66667e-5


def oracle(goal, work):
    """Best of a grid of all allocations, by the truth."""
    best = math.inf
    for n in [*range(1, 33), 36, 40, 48, 56, 64]:
        for m in (512, 768, 1024, 1400, 1769, 2500, 3538, 5000, 7076, 8500, 10240):
            if true_peak_mb(work, n) > m:
                continue
            time, cost = true_time_and_cost(work, Allocation(n, m))
            if isinstance(goal, Cheapest) and time <= (goal.deadline_s or math.inf):
                best = min(best, cost)
            if isinstance(goal, Fastest) and cost <= (goal.budget_usd or math.inf):
                best = min(best, time)
    return best


@pytest.mark.parametrize(
    "goal", [Cheapest(), Cheapest(600.0), Cheapest(300.0), Fastest(), Fastest(0.15)], ids=repr
)
@pytest.mark.parametrize("parameters", [300_000, 2_000_000, 10_000_000])
def test_after_some_siblings_the_first_choice_is_near_the_best_there_is(goal, parameters):
    work = workload(parameters, iterations=round(6e8 / parameters))
    chosen = EXPERIENCED.first(facts("new", goal, work)).allocation
    time, cost = true_time_and_cost(work, chosen)
    reached, limit, limited = (
        (cost, goal.deadline_s, time)
        if isinstance(goal, Cheapest)
        else (time, goal.budget_usd, cost)
    )
    assert limit is None or limited <= 1.02 * limit
    assert true_peak_mb(work, chosen.workers) <= chosen.memory_mb
    assert reached <= 1.35 * oracle(goal, work)


def test_own_measurements_bring_it_nearer():
    goal, work = Cheapest(400.0), workload(3_000_000, iterations=400)
    policy = manager(siblings(3))
    for _ in range(4):
        policy.observe(profile("new", work, policy.suggest(facts("new", goal, work))))
    time, cost = true_time_and_cost(work, policy.first(facts("new", goal, work)).allocation)
    assert time <= 1.02 * 400
    assert cost <= 1.12 * oracle(goal, work)


def test_profiles_that_are_asked_for_are_made_where_they_tell_most_and_then_no_more():
    goal, work = Cheapest(4000.0), workload(3_000_000)
    policy, bounds = manager(), Bounds(profiles=3)
    at, tried, reasons = policy.first(facts("new", goal, work, bounds=bounds)).allocation, [], []
    for left in range(1900, 1500, -100):
        tried.append(at)
        policy.observe(profile("new", work, at))
        decision = policy.review(
            facts("new", goal, work, bounds=bounds, allocation=at, iterations_left=left)
        )
        at, reasons = decision.allocation, [*reasons, decision.reason]
    assert len(set(tried[:3])) == 3
    assert [
        f"profile {n} of 3" in reason for n, reason in zip((2, 3), reasons[:2], strict=True)
    ] == [True, True]
    assert not any("profile" in reason for reason in reasons[2:])


@pytest.mark.parametrize(
    ("bounds", "holds"),
    [
        (Bounds(workers=5), lambda a: a.workers == 5),
        (Bounds(memory_mb=2345), lambda a: a.memory_mb == 2345),
        (Bounds(workers=5, memory_mb=2345), lambda a: a == Allocation(5, 2345)),
        (Bounds(max_workers=3), lambda a: a.workers <= 3),
        (Bounds(min_workers=50), lambda a: a.workers >= 50),
        (Bounds(min_memory_mb=4000), lambda a: a.memory_mb >= 4000),
        (Bounds(max_memory_mb=900), lambda a: a.memory_mb <= 900),
    ],
)
@pytest.mark.parametrize("goal", [Cheapest(), Fastest(), Cheapest(100.0)], ids=repr)
@pytest.mark.parametrize("policy", [manager(), EXPERIENCED], ids=["cold", "warm"])
def test_what_is_pinned_or_bounded_stays_so(policy, goal, bounds, holds):
    assert holds(policy.first(facts(goal=goal, bounds=bounds)).allocation)
    assert holds(policy.plan(facts(goal=goal, bounds=bounds)).chosen.allocation)
    assert holds(policy.suggest(facts(goal=goal, bounds=bounds)))


def test_no_more_workers_than_the_fleet_grants():
    alone = EXPERIENCED.first(facts("n", Fastest())).allocation.workers
    shared = EXPERIENCED.first(facts("n", Fastest(), functions=3)).allocation.workers
    assert shared <= 3 < alone


def test_without_a_workload_it_starts_like_a_typical_sibling_or_by_default():
    unknown = replace(facts("new"), workload=None)
    assert manager().first(unknown).allocation == Allocation(2, 1769)
    decision = EXPERIENCED.first(unknown)
    assert decision.evidence["siblings"] > 0
    assert "average trial" in decision.reason


# --- plans ----------------------------------------------------------------------------------------


def test_a_plan_shows_the_front_and_the_choice():
    plan = EXPERIENCED.plan(facts("new", Cheapest(1500.0)))
    times = [p.time_s.mid for p in plan.front]
    costs = [p.cost_usd.mid for p in plan.front]
    assert len(plan.front) >= 4
    assert times == sorted(times)
    assert costs == sorted(costs, reverse=True)
    for p in (plan.chosen, *plan.front):
        assert p.time_s.low < p.time_s.mid < p.time_s.high
        assert p.cost_usd.low < p.cost_usd.mid < p.cost_usd.high
        assert p.fits >= 0.95
    assert plan.feasible
    assert plan.notes == ()
    assert (plan.own, plan.siblings) == (0, 24)


@pytest.mark.parametrize("goal", [Cheapest(5.0), Fastest(0.0001)], ids=repr)
def test_an_infeasible_goal_is_said_with_the_nearest_feasible_one(goal):
    plan = EXPERIENCED.plan(facts("new", goal))
    assert not plan.feasible
    (note,) = plan.notes
    assert "cannot be reached" in note
    name = type(goal).__name__
    suggested = eval(note[note.rindex(name) :].removesuffix(" would do"))
    assert EXPERIENCED.plan(facts("new", suggested)).notes == ()


def test_a_plan_of_a_job_of_unknown_length_says_so():
    plan = manager().plan(facts(work=workload(iterations=None), goal=Cheapest(60.0)))
    assert plan.feasible
    assert "how many iterations" in plan.notes[0]


def test_the_length_is_taken_from_trials_of_the_same_function():
    plan = EXPERIENCED.plan(facts("new", work=workload(iterations=None)))
    assert plan.notes == ()


def test_a_plan_needs_a_workload():
    with pytest.raises(InvalidInput, match="workload"):
        manager().plan(replace(facts(), workload=None))


# --- jobs that run --------------------------------------------------------------------------------


def running(allocation, goal=CHEAPEST, left=1500, work=None, **known):
    return facts("a", goal, work, allocation=allocation, iterations_left=left, **known)


def watched(allocation, work=None):
    """A manager that has measured the job where it is."""
    policy = manager(siblings())
    policy.observe(profile("a", work or workload(), allocation, iterations=100))
    return policy


def stays(decision, at):
    return decision is None or decision.allocation == at


@pytest.mark.parametrize("goal", [Cheapest(), Fastest(), Cheapest(2000.0)], ids=repr)
def test_a_job_settles(goal):
    at, policy = EXPERIENCED.first(facts("a", goal)).allocation, manager(siblings())
    for _ in range(4):
        policy.observe(profile("a", workload(), at, iterations=100))
        decision = policy.review(running(at, goal))
        if stays(decision, at):
            return
        at = decision.allocation
    pytest.fail(f"still moving, to {at}")


def test_a_wasteful_job_moves_and_says_what_it_saves():
    wasteful = Allocation(40, 4000)
    decision = watched(wasteful).review(running(wasteful))
    assert decision is not None
    assert decision.evidence["gain"] > 0.3
    assert decision.evidence["own"] == 1
    assert (
        true_time_and_cost(workload(), decision.allocation)[1]
        < 0.6 * (true_time_and_cost(workload(), wasteful)[1])
    )


def test_nothing_moves_for_the_last_iterations():
    wasteful = Allocation(40, 4000)
    decision = watched(wasteful).review(running(wasteful, left=2))
    assert stays(decision, wasteful)
    assert decision.evidence["prediction"]["time_s"]  # what is expected is told all the same


def test_a_deadline_at_risk_moves_a_job_although_that_costs_more():
    slow = Allocation(1, 1769)
    policy = watched(slow)
    calm = running(slow, Cheapest(1e5), elapsed_s=100)
    late = running(slow, Cheapest(600.0), elapsed_s=100)
    assert stays(policy.review(calm), slow)
    decision = policy.review(late)
    assert decision is not None
    assert "at risk" in decision.reason
    assert 1500 * true_s(workload(), decision.allocation) < 500


def test_a_job_gives_functions_back_that_others_need():
    fast = Allocation(20, 1769)
    policy = watched(fast)
    decision = policy.review(running(fast, Fastest(), functions=6))
    assert decision is not None
    assert decision.allocation.workers <= 6
    assert "other jobs" in decision.reason
    pinned = running(fast, Fastest(), functions=6, bounds=Bounds(workers=20))
    assert policy.review(pinned).allocation.workers == 20
    ending = policy.review(running(fast, Fastest(), left=2, functions=6))
    assert stays(ending, fast)  # it ends before others could take over
    assert "ended before" in ending.reason


def test_a_budget_at_risk_makes_a_job_smaller():
    fast = Allocation(48, 3538)
    policy = watched(fast)
    decision = policy.review(running(fast, Fastest(0.5), spent_usd=0.3))
    assert decision is not None
    left = true_s(workload(), decision.allocation) * 1500
    a = decision.allocation
    assert a.workers * a.memory_mb / 1024 * left * 1.66667e-5 <= 0.2


@pytest.mark.parametrize("goal", [Cheapest(1200.0), Fastest(0.3)], ids=repr)
def test_of_what_may_be_more_than_is_forecast_less_is_dared(goal):
    policy = watched(TWO_WORKERS)
    sure, unsure = (policy.review(running(TWO_WORKERS, goal, left_sd=sd)) for sd in (0.0, 0.5))
    limited = 1 if isinstance(goal, Fastest) else 0
    uses = [true_time_and_cost(workload(), each.allocation)[limited] for each in (sure, unsure)]
    assert uses[1] < 0.95 * uses[0]
    for what in ("time_s", "cost_usd"):
        low, mid, high = unsure.evidence["prediction"][what]
        assert low < 0.6 * mid < 0.4 * high
    low, mid, high = unsure.evidence["prediction"]["iteration_s"]
    assert high < 1.5 * mid  # the pace is as sure as before


def test_a_larger_batch_calls_for_another_allocation():
    goal = Cheapest(900.0)
    small, large = workload(batch=128), workload(batch=2048)
    at = EXPERIENCED.first(facts("a", goal, small)).allocation
    policy = watched(at, small)
    decision = policy.review(running(at, goal, work=large, elapsed_s=50))
    assert decision is not None
    assert decision.allocation.workers > at.workers


# --- memory ---------------------------------------------------------------------------------------


def test_after_out_of_memory_there_is_more_of_it_and_it_is_enough():
    work = replace(workload(), features=replace(workload().features, activation_bytes=8e6))
    at, policy = Allocation(2, 512), manager()
    for _ in range(10):
        needed = true_peak_mb(work, at.workers)
        if needed <= at.memory_mb:
            return
        failed = profile("a", work, at, out_of_memory=True, peak_mb=float(at.memory_mb))
        policy.observe(failed)
        decision = policy.after_out_of_memory(facts("a", work=work, allocation=at), at.memory_mb)
        assert decision is not None
        assert decision.allocation.memory_mb >= at.memory_mb
        at = decision.allocation
    pytest.fail(f"still too small: {at}")


@pytest.mark.parametrize(
    ("bounds", "at", "expected"),
    [
        (Bounds(workers=2, memory_mb=512), Allocation(2, 512), None),
        (Bounds(workers=2), Allocation(2, 10240), None),
    ],
)
def test_without_a_way_out_of_memory_it_gives_up(bounds, at, expected):
    assert manager().after_out_of_memory(facts(bounds=bounds, allocation=at), 512.0) == expected


def test_pinned_memory_leaves_smaller_parts():
    at = Allocation(2, 512)
    decision = manager().after_out_of_memory(
        facts(bounds=Bounds(memory_mb=512), allocation=at), 512.0
    )
    assert decision is not None
    assert decision.allocation.memory_mb == 512
    assert decision.allocation.workers > 2


# --- stores ---------------------------------------------------------------------------------------

TWO = {
    "small": StoreTable(1e-3, 2e8),
    "large": StoreTable(1e-3, 2e10, usd_per_hour=2.0),
}


def test_the_store_is_chosen_with_the_rest():
    policy = manager(stores=TWO)
    cheap = policy.first(facts(goal=Cheapest())).allocation
    fast = policy.first(facts(goal=Fastest(), work=workload(20_000_000))).allocation
    assert cheap.store == "small"
    assert fast.store == "large"
    pinned = policy.first(facts(goal=Cheapest(), bounds=Bounds(store="large"))).allocation
    assert pinned.store == "large"


def test_a_store_that_does_not_answer_is_not_chosen():
    left = facts(goal=Fastest(), work=workload(20_000_000), stores=("small",))
    assert manager(stores=TWO).first(left).allocation.store == "small"


def test_a_store_that_others_keep_busy_is_shunned():
    free = {"small": StoreTable(1e-3, 2e8), "large": StoreTable(1e-3, 2e8)}
    busy = facts(goal=Fastest(), work=workload(20_000_000), store_load={"small": 1.8e8})
    assert manager(stores=free).first(busy).allocation.store == "large"


def test_a_manager_needs_a_store():
    with pytest.raises(InvalidInput, match="store"):
        manager(stores={})


# --- evidence -------------------------------------------------------------------------------------


def test_a_decision_tells_what_it_rests_on():
    evidence = EXPERIENCED.first(facts("new", Cheapest(600.0))).evidence
    assert json.loads(json.dumps(evidence)) == evidence
    assert evidence["goal"] == "cheapest in 600 s"
    assert evidence["siblings"] == 24
    low, mid, high = evidence["prediction"]["time_s"]
    assert low < mid < high
    assert evidence["alternatives"]
    assert evidence["workload"]["batch"] == 256


def test_a_later_profile_replaces_the_earlier_one_of_the_same_place():
    policy = manager()
    policy.observe(profile("a", iteration_s=5.0, iterations=1))
    policy.observe(profile("a", iteration_s=0.5, iterations=50))
    decision = policy.first(facts("a"))
    assert decision.evidence["own"] == 1
    predicted = policy.predict(facts("a"), Allocation(2, 1769)).iteration_s.mid
    assert predicted == pytest.approx(0.5, rel=0.1)
