"""What the policy is told and asked, by a scheduler driven by hand."""

import pytest

from smlt_tune.backend.adaptation import (
    MILESTONES,
    PROGRESS_PAUSE_S,
    REVIEW_PAUSE_S,
    SHARE_JOBS,
    SHARE_PAUSE_S,
)
from smlt_tune.backend.measurements import CHUNKS, Measurement
from smlt_tune.backend.resource_manager.observations import Allocation, Decision, Workload
from smlt_tune.backend.resource_manager.policy import Bounds
from smlt_tune.errors import BudgetExhausted, StoreUnavailable
from smlt_tune.runtime import wire
from smlt_tune.runtime.features import ModelFeatures
from tests.backend.scheduler_world import LIMITS, World, names

FEATURES = ModelFeatures(1000, 4000, 6000.0, 100.0)
WORKLOAD = Workload(FEATURES, 64, 1000, "f")
SMALL, LARGE = Allocation(2, 1024), Allocation(4, 2048)


class Scripted:
    """Says what a test has put into it; remembers what it was told and asked."""

    def __init__(self, first=SMALL):
        self.choice = Decision(first, "a first guess", {"siblings": 3})
        self.answer = None
        self.observed, self.asked = [], []

    def observe(self, profile):
        self.observed.append(profile)

    def first(self, facts):
        self.asked.append(facts)
        return self.choice

    def after_out_of_memory(self, facts, peak_mb):
        return Decision(Allocation(facts.allocation.workers, 4096), "it needs more")

    def review(self, facts):
        self.asked.append(facts)
        return self.answer


@pytest.fixture
def policy():
    return Scripted()


@pytest.fixture
def world(tmp_path, policy):
    return World(tmp_path, policy=policy)


def submit(world, name="a", **options):
    return world.submit(name, None, None, **options)


def measured(world, chunk, iteration_s=0.1, **more):
    """Rank 0 tells of iterations that nothing has disturbed."""
    world.progress(chunk=chunk, iteration_s=iteration_s, **more)


def quiet(world, policy):
    """A job in a steady generation, after its first reviews."""
    state = submit(world)
    world.train(workers=2)
    world.workload()
    measured(world, 10, left=1000)
    look(world)
    look(world)
    policy.asked.clear()
    return state


def look(world):
    """Gives the scheduler time for one review."""
    world.after(REVIEW_PAUSE_S + 0.01)


def decisions(world, job="a"):
    return [body for kind, of, body in world.history if (kind, of) == ("decision", job)]


# --- profiles -------------------------------------------------------------------------------------


def test_chunks_become_one_profile_told_after_three_iterations_and_whenever_they_have_doubled(
    world, policy
):
    submit(world)
    world.train(workers=2)
    world.workload()
    for count in (1, 1, 1, 1, 1, 1, 1, 5):
        measured(world, count, 0.1, sync_s=0.04, other_share=0.25)
    assert [p.iterations for p in policy.observed] == [3, 6, 12]
    last = policy.observed[-1]
    assert (last.job_id, last.workload, last.allocation) == ("f/a", WORKLOAD, SMALL)
    assert (last.iteration_s, last.sync_s) == pytest.approx((0.1, 0.04))
    assert last.other_share == 0.25
    assert last.peak_mb == 100.0


def test_what_a_job_did_besides_is_kept_once_it_has_trained_to_its_end(world, policy):
    submit(world)
    world.train(workers=2)
    world.workload()
    measured(world, 10, 0.1)
    assert (policy.observed[-1].other_share, policy.observed[-1].end_s) == (None, None)
    world.finished(other_share=0.5, end_s=3.0)
    world.end_all()
    assert [(p.other_share, p.end_s) for p in world.profiles] == [(0.5, 3.0)]
    assert policy.observed[-1] == world.profiles[-1]


def test_slow_iterations_are_told_at_once(world, policy):
    submit(world)
    world.train(workers=2)
    world.workload()
    measured(world, 1, 0.4)
    assert policy.observed == []
    measured(world, 1, 0.4)
    assert [p.iterations for p in policy.observed] == [2]


def test_a_profile_is_the_mean_of_the_middle_half_of_the_iterations_that_are_new():
    measurement = Measurement("a", WORKLOAD, SMALL)
    for count, iteration_s in ((1, 9.0), (4, 0.2), (2, 0.1), (2, 0.3)):
        measurement.add(count, iteration_s, 2 * iteration_s)
    # 9 iterations, of which 2.25 at either end do not count: 3.75 of 0.2 s and 0.75 of 0.3 s.
    assert measurement.profile().iteration_s == pytest.approx((3.75 * 0.2 + 0.75 * 0.3) / 4.5)
    assert measurement.profile().sync_s == measurement.profile().iteration_s  # no more than it
    for _ in range(CHUNKS):
        measurement.add(1, 0.5, 0.1)
    assert measurement.profile().iteration_s == 0.5
    assert measurement.profile().iterations == 9 + CHUNKS


@pytest.mark.parametrize(
    "said",
    [
        {"chunk": 0, "iteration_s": 0.0},
        {"chunk": 50, "iteration_s": 0.1, "ranks": [1]},
        {"chunk": 50, "iteration_s": 0.1, "incarnation": 7},
        {"chunk": 50, "iteration_s": 0.0},
    ],
)
def test_what_is_no_undisturbed_measurement_of_rank_0_does_not_count(world, policy, said):
    submit(world)
    world.train(workers=2)
    world.workload()
    world.progress(**said)
    look(world)
    assert policy.observed == []


def test_times_of_an_unknown_workload_do_not_count(world, policy):
    submit(world)
    world.train(workers=2)
    measured(world, 50)
    assert policy.observed == []


def test_a_generation_ends_with_a_profile_for_the_siblings(world, policy):
    submit(world)
    world.clock.now += 3.0
    world.train(workers=2)
    world.workload()
    measured(world, 2)
    assert policy.observed == []
    world.finished()
    world.end(*names(0, [0]), peak_mb=321.0)
    world.end(*names(0, [1]), peak_mb=300.0)
    (profile,) = world.profiles
    assert policy.observed == [profile]
    assert (profile.iterations, profile.peak_mb, profile.start_s) == (2, 321.0, 3.0)
    (body,) = [body for kind, _, body in world.history if kind == "profile"]
    assert body["allocation"] == {"workers": 2, "memory_mb": 1024, "store": "default"}
    assert body["workload"]["features"]["parameters"] == 1000


def test_a_profile_tells_what_the_start_took(world, policy):
    submit(world)
    world.clock.now += 3.0
    world.train(workers=2)
    world.workload()
    measured(world, 10, iteration_s=0.1)
    (profile,) = policy.observed
    assert (profile.start_s, profile.hold_up_s) == (3.0, 0.0)


def test_a_start_lasts_until_the_others_have_left(world, policy):
    quiet(world, policy)
    policy.answer = Decision(LARGE, "better")
    world.workload(batch=128)
    measured(world, 0)
    look(world)
    world.clock.now += 2.0
    world.ready(generation=1, ranks=range(4))
    world.clock.now += 1.5
    world.hand_over(ranks=(0, 1))
    policy.observed.clear()
    world.progress(generation=1, ranks=range(4), at=6)
    world.workload(generation=1, batch=128)
    measured(world, 10, generation=1, at=16)
    assert policy.observed[-1].allocation == LARGE
    assert policy.observed[-1].start_s == pytest.approx(3.5)


def test_a_hand_over_tells_for_how_long_it_has_held_up_training(world, policy):
    submit(world)
    world.train(workers=2)
    world.workload()
    measured(world, 10, iteration_s=0.1, left=100, at=100)
    policy.answer = Decision(LARGE, "better")
    look(world)
    world.ready(generation=1, ranks=range(4))
    world.clock.now += 1.0 - REVIEW_PAUSE_S - 0.01
    world.hand_over(ranks=(0, 1))
    world.clock.now += 0.5
    world.progress(
        generation=1, ranks=range(4), at=104, left=96
    )  # three of the old, one of its own
    world.workload(generation=1)
    measured(world, 10, iteration_s=0.05, generation=1, at=114, left=86)
    assert policy.observed[-1].allocation == LARGE
    assert policy.observed[-1].hold_up_s == pytest.approx(1.5 - 3 * 0.1 - 0.05)


def test_waiting_for_functions_is_no_hold_up_of_a_hand_over(world, policy):
    submit(world)
    world.train(workers=2)
    world.workload()
    measured(world, 10, left=100, at=5)
    world.hand_over(ranks=[0, 1])
    world.end_all("a", 0)
    world.clock.now += 60.0
    world.train(workers=2, generation=1, at=6)
    world.workload(generation=1)
    measured(world, 4, generation=1, at=10, left=92)
    world.finished(generation=1)
    world.end_all()
    assert [p.hold_up_s for p in world.profiles] == [0.0, 0.0]


def test_no_review_between_another_batch_size_and_what_is_left_with_it(world, policy):
    quiet(world, policy)
    world.progress(left=200, chunk=10, iteration_s=0.3)  # a drift would be an occasion
    world.workload(batch=128)
    look(world)
    assert policy.asked == []
    world.progress(left=100)
    look(world)
    assert policy.asked[0].iterations_left == 100


def test_a_relaunch_goes_on_with_the_profile_of_its_allocation(world, policy):
    submit(world)
    world.train(workers=2)
    world.workload()
    measured(world, 10)
    world.hand_over(ranks=[0, 1])
    world.end_all("a", 0)
    world.train(workers=2, generation=1, at=6)
    world.workload(generation=1)
    measured(world, 4, generation=1, at=10)
    world.finished(generation=1)
    world.end_all()
    assert [p.iterations for p in world.profiles] == [10, 14]


def test_another_batch_or_model_is_another_profile_but_not_another_length(world, policy):
    submit(world)
    world.train(workers=2)
    for said in ({}, {"iterations": 900}, {"batch": 128}, {"batch": 128, "parameters": 5}):
        world.workload(**said)
        measured(world, 3)
    world.finished()
    world.end_all()
    assert [(p.workload.batch, p.workload.features.parameters) for p in world.profiles] == [
        (64, 1000),
        (128, 1000),
        (128, 5),
    ]
    assert [p.iterations for p in world.profiles] == [6, 3, 3]


def test_too_little_memory_is_a_bound_that_no_times_replace(world, policy):
    state = submit(world)
    world.train(workers=2)
    world.workload()
    measured(world, 10)
    world.end(*names(0, [0]), "out_of_memory", peak_mb=900.0)
    world.end_all("a", 0, "cancelled")
    (profile,) = world.profiles
    assert profile == policy.observed[-1]
    assert (profile.out_of_memory, profile.peak_mb, profile.iterations) == (True, 1024.0, 0)
    assert state.allocations[-1].memory_mb == 4096
    assert state.allocations[-1].decision == "it needs more"
    assert [d.occasion for d in state.decisions] == ["first", "out of memory"]


def test_a_project_folder_that_fails_disturbs_nobody(world, policy):
    def broken(profile):
        raise StoreUnavailable("no space")

    world.scheduler._adaptation._on_profile = broken
    submit(world)
    world.train(workers=2)
    world.workload()
    measured(world, 10)
    world.finished()
    world.end_all()
    assert world.over() == ["finished"]


# --- facts ----------------------------------------------------------------------------------------


def test_what_the_policy_is_asked_with(world, policy):
    submit(world, workload=WORKLOAD)
    (facts,) = policy.asked
    assert (facts.job_id, facts.workload, facts.iterations_left) == ("f/a", WORKLOAD, 1000)
    assert (facts.allocation, facts.functions, facts.stores) == (None, 8, ("default",))
    world.clock.now += 2.0
    world.train(workers=2)
    world.workload()
    world.clock.now += 10.0
    measured(world, 10, 0.1, left=400, other_share=0.5)
    look(world)
    facts = policy.asked[-1]
    assert facts.allocation == SMALL
    assert (facts.iterations_left, facts.other_share, facts.start_s) == (400, 0.5, 2.0)
    assert facts.elapsed_s == pytest.approx(12.0, abs=1.0)
    assert facts.spent_usd == pytest.approx(world.scheduler.cost_usd("a"), rel=0.1)
    assert facts.functions == 8


def test_a_job_of_an_earlier_client_is_as_old_as_it_is(world, policy):
    state = submit(world)
    world.scheduler.stop("a", "enough")
    world.end_all(ending="cancelled")
    state.update(status="queued")
    world.scheduler.submit(state, next_number=1, elapsed_s=50.0)
    assert policy.asked[-1].elapsed_s == 50.0
    assert decisions(world)[-1]["occasion"] == "resumed"


def test_functions_are_shared_fairly_and_nobody_takes_what_others_wait_for(world, policy):
    submit(world, "a")
    submit(world, "b")
    assert policy.asked[-1].functions == 6  # all that a does not have
    policy.choice = Decision(Allocation(6, 1024), "large")
    submit(world, "c")
    assert policy.asked[-1].functions == 4
    submit(world, "d")  # while c waits
    assert policy.asked[-1].functions == 8 // 4


def test_a_job_gives_back_no_more_functions_than_others_wait_for(world, policy):
    policy.choice = Decision(Allocation(5, 1024), "large")
    submit(world, "a")
    world.train("a", workers=5)
    policy.choice = Decision(Allocation(2, 1024), "small")
    submit(world, "b")
    world.train("b", workers=2)
    policy.asked.clear()
    submit(world, "c")  # of its two functions one is free
    look(world)
    world.after(SHARE_PAUSE_S)
    asked = {facts.job_id: facts.functions for facts in policy.asked}
    assert asked["f/c"] == 8 // 3
    assert asked["f/a"] == 4
    assert asked.get("f/b", 2) == 8 // 3  # its share, whatever the others want


def test_what_other_jobs_move_through_a_store(tmp_path, policy):
    world = World(tmp_path, policy=policy, gradient_stores=["fast"])
    policy.choice = Decision(Allocation(2, 1024, "fast"), "")
    submit(world, "a")
    world.train("a", workers=2)
    world.workload("a")
    world.progress("a", chunk=10, iteration_s=0.1)
    submit(world, "b")
    assert policy.asked[-1].stores == ("default", "fast")
    # Both workers send 4,000 bytes and fetch 2 * 4,000 * (1 - 1/2), ten times a second.
    assert policy.asked[-1].store_load == {"default": 0.0, "fast": pytest.approx(160_000.0)}


# --- decisions ------------------------------------------------------------------------------------


def test_decisions_are_recorded_with_their_reasons(world, policy):
    state = quiet(world, policy)
    policy.answer = Decision(LARGE, "twice as fast", {"gain": 0.5})
    world.workload(batch=128)
    measured(world, 0)
    look(world)
    assert [d.occasion for d in state.decisions] == ["first", "workload", "workload"]
    first, stay, move = decisions(world)
    assert first == {
        "occasion": "first",
        "allocation": {"workers": 2, "memory_mb": 1024, "store": "default"},
        "reason": "a first guess",
        "evidence": {"siblings": 3},
        "time_s": 0.0,
    }
    assert stay["allocation"] == first["allocation"]
    assert (move["allocation"]["workers"], move["reason"]) == (4, "twice as fast")
    assert move["time_s"] > stay["time_s"]
    # The new functions start while the old still train.
    assert world.running("a", 1) == names(1, range(4))
    assert world.key("leave") is None
    record = state.allocations[-1]
    assert (record.reason, record.decision, record.store) == ("resize", "twice as fast", "default")


def test_that_a_generation_stays_is_recorded_once(world, policy):
    quiet(world, policy)
    for left in (700, 500, 300):
        world.after(PROGRESS_PAUSE_S)
        measured(world, 20, left=left)
        look(world)
    assert len(policy.asked) == 3
    assert [d["occasion"] for d in decisions(world)] == ["first", "workload"]


def test_a_policy_that_fails_ends_no_job(world, policy, caplog):
    quiet(world, policy)

    def fail(*_):
        raise ZeroDivisionError

    policy.observe = policy.review = policy.first = fail
    measured(world, 50, left=500)
    look(world)
    state = submit(world, "b")
    assert state.decisions[0].reason == "pinned, or the default"
    world.finished()
    world.end_all("a")
    assert world.states["a"].status == "finished"
    assert caplog.text.count("ZeroDivisionError") >= 3


# --- when it is asked -----------------------------------------------------------------------------


def batch_doubles(world):
    world.workload(batch=128)
    measured(world, 0)


def model_grows(world):
    world.workload(parameters=10_000)
    measured(world, 0)


def milestone(world):
    world.after(PROGRESS_PAUSE_S)
    measured(world, 1, left=1000 - round(1000 * MILESTONES[1]))


def slower(world):
    for _ in range(5):
        measured(world, 5, 0.13, left=990)


def faster(world):
    for _ in range(5):
        measured(world, 5, 0.07, left=990)


def relaunched(world, iterations=10):
    world.hand_over(ranks=[0, 1])
    world.end_all("a", 0)
    world.train(workers=2, generation=1, at=6)
    world.progress(generation=1, at=7, chunk=iterations, iteration_s=0.1)


def near_the_time_limit(world):
    world.clock.now = 1000.0 + 97.0
    world.progress(ranks=[0, 1])


def another_ends(world):
    world.submit("b", 2)
    world.after(SHARE_PAUSE_S)
    world.scheduler.stop("b", "enough")
    world.end_all("b", ending="cancelled")


OCCASIONS = {
    batch_doubles: "workload",
    model_grows: "workload",
    milestone: "progress",
    slower: "drift",
    faster: "drift",
    relaunched: "measured",
    near_the_time_limit: "time limit",
    another_ends: "share",
}


def test_a_short_job_is_not_looked_at_for_every_tenth(world, policy):
    quiet(world, policy)
    for tenth in range(1, 5):
        measured(world, 1, left=1000 - 100 * tenth)
        look(world)
    assert not policy.asked
    world.after(PROGRESS_PAUSE_S)
    measured(world, 1, left=590)
    look(world)
    assert len(policy.asked) == 1


@pytest.mark.parametrize("what", OCCASIONS)
def test_occasions_to_look_again(world, policy, what):
    quiet(world, policy)
    policy.answer = Decision(LARGE, "better")
    what(world)
    look(world)
    assert decisions(world)[-1]["occasion"] == OCCASIONS[what]
    assert world.states["a"].allocations[-1].decision == "better"


def same_again(world):
    world.workload()
    measured(world, 1, left=989)


def too_few_iterations(world):
    relaunched(world, iterations=9)


def model_hardly_grows(world):
    world.workload(parameters=1050)
    measured(world, 0)


def a_little_slower(world):
    for _ in range(30):
        measured(world, 5, 0.115, left=989)


def one_outlier(world):
    measured(world, 5, 5.0, left=989)
    for _ in range(10):
        measured(world, 5, 0.1, left=989)


def other_batch_of_a_dead_worker(world):
    event = {"parameters": 1, "gradient_bytes": 4, "flops_per_sample": 1.0}
    event |= {"activation_bytes": 1.0, "batch": 2, "iterations": None}
    world.say(wire.Workload, "a", 0, 0, 5, **event)
    measured(world, 0)


@pytest.mark.parametrize(
    "what",
    [
        *(same_again, too_few_iterations, model_hardly_grows),
        *(a_little_slower, one_outlier, other_batch_of_a_dead_worker),
    ],
)
def test_no_occasion_to_look_again(world, policy, what):
    quiet(world, policy)
    what(world)
    for _ in range(5):
        look(world)
    assert policy.asked == []


def test_nothing_is_decided_while_a_hand_over_is_under_way(world, policy):
    quiet(world, policy)
    world.scheduler.resize("a", Bounds(3))
    batch_doubles(world)
    for _ in range(5):
        look(world)
    assert policy.asked == []
    world.ready(generation=1, ranks=range(3))
    world.hand_over(ranks=[0, 1])
    world.end_all("a", 0)
    world.train(workers=3, generation=1, at=6)
    look(world)
    assert policy.asked[-1].workload.batch == 128
    assert policy.asked[-1].allocation.workers == 3


def test_whoever_has_pinned_everything_is_left_alone(world, policy):
    world.submit(workers=2, memory_mb=1024)
    world.train(workers=2)
    policy.asked.clear()
    world.workload()
    measured(world, 50, left=100)
    batch_doubles(world)
    near_the_time_limit(world)
    for _ in range(5):
        look(world)
    assert policy.asked == []
    assert policy.observed  # but others learn from it


def test_a_resize_by_the_user_pins_what_it_names(world, policy):
    quiet(world, policy)
    world.scheduler.resize("a", Bounds(3))
    world.ready(generation=1, ranks=range(3))
    world.hand_over(ranks=[0, 1])
    world.end_all("a", 0)
    world.train(workers=3, generation=1, at=6)
    batch_doubles(world)
    world.workload(generation=1, batch=128)
    world.progress(generation=1, at=7)
    look(world)
    bounds = policy.asked[-1].bounds
    assert (bounds.workers, bounds.memory_mb) == (3, None)


def test_reviews_are_rationed_and_changes_of_the_workload_are_first(tmp_path, policy):
    limits = LIMITS.__class__(128, 8192, 1000.0, concurrency=1000, max_workers=8)
    world = World(tmp_path, policy=policy, limits=limits)
    jobs = [f"j{number}" for number in range(60)]
    for job in jobs:
        submit(world, job)
        world.train(job, workers=2)
        world.workload(job)
        world.progress(job, chunk=10, iteration_s=0.1)
    policy.asked.clear()
    seconds = 0.0
    while len(policy.asked) < 20:
        world.after(0.1)
        seconds += 0.1
    assert seconds >= 19 * REVIEW_PAUSE_S
    world.workload("j59", batch=128)
    world.progress("j59")
    look(world)
    assert policy.asked[-1].job_id == "f/j59"
    for _ in range(1000):
        world.after(REVIEW_PAUSE_S)
    assert {facts.job_id for facts in policy.asked} == {f"f/{job}" for job in jobs}
    assert len(policy.asked) == 61  # and then there is peace


def test_free_functions_are_offered_to_a_few_jobs_at_a_time(tmp_path, policy):
    limits = LIMITS.__class__(128, 8192, 1000.0, concurrency=1000, max_workers=8)
    world = World(tmp_path, policy=policy, limits=limits)
    for number in range(20):
        submit(world, f"j{number}")
        world.train(f"j{number}", workers=2)
    submit(world, "a")
    policy.asked.clear()
    world.scheduler.stop("a", "enough")
    world.end_all("a", ending="cancelled")
    for _ in range(100):
        look(world)
    assert len({facts.job_id for facts in policy.asked}) == len(policy.asked) == SHARE_JOBS


# --- whose turn it is -----------------------------------------------------------------------------


def test_a_job_that_grows_behind_a_larger_one_trains_on_and_is_relaunched_in_time(world, policy):
    state = quiet(world, policy)
    policy.choice = Decision(Allocation(7, 1024), "large")
    submit(world, "b")  # waits for the two that a has
    policy.answer = Decision(LARGE, "more")
    batch_doubles(world)
    look(world)
    assert not world.running("a", 1)
    assert world.key("leave") is None
    world.clock.now = 1000.0 + 97.0
    world.progress(ranks=[0, 1])
    world.after(0.1)
    assert len(world.running("a", 1)) == 2
    assert (state.allocations[-1].workers, state.allocations[-1].memory_mb) == (2, 2048)
    assert not world.running("b")


def test_a_job_that_grows_gives_nothing_up_while_others_wait(world, policy):
    quiet(world, policy)
    policy.choice = Decision(Allocation(7, 1024), "large")
    submit(world, "b")
    world.scheduler.resize("a", Bounds(8))  # more than is free: its two have to go first
    world.after(1.0)
    assert world.key("leave") is None
    world.scheduler.stop("b", "enough")
    world.after(0.1)
    assert world.key("leave") is not None
    world.hand_over(ranks=[0, 1])
    world.end_all("a", 0)
    assert len(world.running("a", 1)) == 8


def test_a_job_that_takes_no_more_functions_than_it_has_need_not_wait(world, policy):
    quiet(world, policy)
    policy.choice = Decision(Allocation(7, 1024), "large")
    submit(world, "b")
    policy.answer = Decision(Allocation(1, 2048), "less")
    batch_doubles(world)
    look(world)
    assert len(world.running("a", 1)) == 1
    world.ready(generation=1)
    world.hand_over(ranks=[0, 1])
    world.end_all("a", 0)
    assert len(world.running("b")) == 7


# --- parameter stores -----------------------------------------------------------------------------


@pytest.fixture
def stores(tmp_path, policy):
    rented = []

    def rent(name):
        rented.append(name)
        if name == "dear":
            raise BudgetExhausted("it costs too much")

    world = World(tmp_path, policy=policy, gradient_stores=["fast", "dear"], rent=rent)
    world.rented = rented
    return world


def on(world, policy, store, job="a"):
    policy.choice = Decision(Allocation(2, 1024, store), "")
    return submit(world, job)


def test_gradients_go_through_the_store_of_the_allocation(stores, policy):
    state = on(stores, policy, "fast")
    on(stores, policy, "default", "b")
    assert stores.rented == ["fast", "default"]
    specs = {spec.job: spec for _, spec in stores.platform.calls.values()}
    assert specs["a"].gradient_store == "redis://fast"
    assert specs["b"].gradient_store == ""
    assert state.allocations[0].store == "fast"
    assert "redis://fast" not in repr(specs["a"])
    stores.gradient_stores["fast"].values = {"smlt:f:a:g0:s1:0": b"", "smlt:f:b:g0:s1:0": b""}
    stores.train("a", workers=2)  # everything else is where it always was
    stores.finished("a")
    stores.end_all("a")
    assert list(stores.gradient_stores["fast"].values) == ["smlt:f:b:g0:s1:0"]


def test_a_move_of_the_store_is_a_hand_over(stores, policy):
    on(stores, policy, "default")
    stores.train(workers=2)
    stores.workload()
    policy.answer = Decision(Allocation(2, 1024, "fast"), "it is nearer")
    measured(stores, 10)
    look(stores)
    specs = [spec for _, spec in stores.platform.calls.values() if spec.generation == 1]
    assert [spec.gradient_store for spec in specs] == ["redis://fast"] * 2
    assert stores.states["a"].allocations[-1].reason == "resize"


def test_a_lost_store_rolls_those_back_who_use_it(stores, policy):
    on(stores, policy, "fast")
    on(stores, policy, "default", "b")
    for job in "ab":
        stores.train(job, workers=2)
    key = stores.save("a")
    stores.scheduler.store_lost("fast")
    stores.end_all("a", 0, "cancelled")
    stores.ready("a", 1, range(2))
    assert stores.start("a", 1) == key
    assert len(stores.states["b"].allocations) == 1


def test_a_store_that_does_not_answer_any_more_holds_nobody_up(stores, policy):
    on(stores, policy, "fast")
    stores.train(workers=2)
    stores.gradient_stores["fast"].broken = True
    stores.finished()
    stores.end_all()
    assert stores.over() == ["finished"]


def test_a_store_that_cannot_be_paid_is_not_used(stores, policy):
    state = on(stores, policy, "dear")
    assert stores.over() == ["stopped"]
    assert (state.outcome.reason, state.outcome.allocations) == ("budget", ())


def test_who_uses_a_store(stores, policy):
    on(stores, policy, "fast")
    on(stores, policy, "default", "b")
    assert stores.scheduler.users("fast") == ["a"]
    stores.scheduler.stop("a", "enough")
    stores.end_all("a", ending="cancelled")
    assert stores.scheduler.users("fast") == []


def test_jobs_leave_a_store_that_does_not_answer_unless_they_are_pinned_to_it(stores, policy):
    on(stores, policy, "fast")
    stores.train(workers=2)
    key = stores.save()
    pinned = stores.submit("b", 1, 1024, store="fast")
    stores.train("b")
    policy.choice = Decision(Allocation(6, 1024, "fast"), "")
    waiting = submit(stores, "c")
    stores.scheduler.store_gone("fast")
    stores.end_all("a", 0, "cancelled")
    stores.train("a", workers=2, generation=1)
    assert stores.start("a", 1) == key
    assert [a.store for a in stores.states["a"].allocations] == ["fast", "default"]
    assert len(pinned.allocations) == 1
    policy.choice = Decision(SMALL, "")
    policy.answer = Decision(Allocation(2, 2048, "fast"), "it does not know")
    stores.workload("a", generation=1)
    stores.progress("a", generation=1)
    look(stores)
    assert policy.asked[-1].stores == ("default", "dear")
    assert stores.states["a"].allocations[-1].store == "default"
    for job in "ab":
        stores.scheduler.stop(job, "enough")
        stores.end_all(job, ending="cancelled")
    assert waiting.allocations[0].store == "default"
    stores.scheduler.store_back("fast")
    on(stores, policy, "fast", "d")
    assert policy.asked[-1].stores == ("default", "fast", "dear")
