"""The scheduler, driven by hand: see :mod:`tests.backend.scheduler_world`."""

import random
from dataclasses import replace

import pytest

from smlt_tune.backend.job import JobSpec, JobState
from smlt_tune.backend.platforms.base import InvocationResult
from smlt_tune.backend.resource_manager.observations import Allocation, Decision
from smlt_tune.backend.resource_manager.policy import Bounds, PinnedOrDefault
from smlt_tune.backend.task_scheduler import (
    GRACE_S,
    MOST_STRIKES,
    START_TIMEOUT_S,
    THROTTLE_PAUSE_S,
)
from smlt_tune.errors import (
    BudgetExhausted,
    FunctionLost,
    JobError,
    OutOfMemory,
    PlatformError,
    StoreUnavailable,
    TrainingFunctionError,
)
from smlt_tune.runtime import keys, wire
from smlt_tune.runtime.position import Position
from tests.backend.scheduler_world import (
    LIMITS,
    WORST,
    CancellingPlatform,
    FakePlatform,
    World,
    names,
)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


# --- normal lives ---------------------------------------------------------------------------------


def test_normal_life(world):
    state = world.submit(workers=2)
    assert world.running() == names(0, [0, 1])
    assert world.key("open") is not None
    world.ready(ranks=[1])
    assert world.key("start") is None  # all or nobody
    assert state.status == "queued"
    world.ready(ranks=[0])
    assert world.start() is None  # from the very beginning
    assert state.status == "running"
    world.progress(ranks=[0, 1])
    world.say(wire.Reported, "a", 0, 0, index=0, metrics={"loss": 1.0})
    world.finished(value=7, reports=[{"loss": 1.0}, {"loss": 0.5}])
    world.finished(rank=1)
    assert state.status == "running"  # until its functions are gone and paid for
    assert world.key("open") is None
    world.end_all()
    assert world.over() == ["finished"]
    assert state.outcome.value == 7
    assert [r.metrics for r in state.outcome.reports] == [{"loss": 1.0}, {"loss": 0.5}]
    assert [r.index for r in state.outcome.reports] == [0, 1]
    assert world.ledger.job_usd("a") == state.outcome.cost_usd > 0
    assert world.platform.cancelled == set()


def test_first_come_first_served_and_never_above_the_limit(world):
    world.submit("a", 5)
    world.submit("b", 4)
    world.submit("c", 2)  # would fit, but must not overtake b
    assert world.running("a")
    assert not world.running("b")
    assert not world.running("c")
    world.train("a", 5)
    world.finished("a")
    for number, name in enumerate(world.running("a")):
        world.end(name)
        assert len(world.platform.calls) <= 8
        assert bool(world.running("b")) == (number >= 0)  # 8 - 4 are free
    assert len(world.running("b")) == 4
    assert len(world.running("c")) == 2


def test_a_plan_that_changes_keeps_its_turn(world):
    for name, workers in {"a": 8, "b": 8, "c": 1, "d": 1}.items():
        world.submit(name, workers)
    world.scheduler.resize("b", Bounds(2, None))
    world.scheduler.pause("c")
    world.scheduler.resume("c")  # waits anew, and behind d only if time has passed
    world.train("a", 8)
    for rank in range(8):
        world.finished("a", rank=rank)
    world.end_all("a")
    assert [len(world.running(name)) for name in "bcd"] == [2, 1, 1]
    order = [name.partition(".")[0] for name in world.platform.invoked[8:]]
    assert order == ["b", "b", "c", "d"]


def test_where_nothing_is_printed_there_are_no_log_files(tmp_path):
    world = World(tmp_path, logs=None)
    world.submit()
    ((invocation, _),) = world.platform.calls.values()
    assert invocation.log_path is None
    assert not (tmp_path / "logs").exists()


def test_throttled_in_mid_gang(world):
    world.platform.room = 2
    world.submit(workers=4)
    assert world.running() == names(0, [0, 1])
    assert world.ledger.job_reserved_usd("a") == pytest.approx(4 * WORST)
    world.submit("b", 5)  # the rest of a's gang counts as taken
    assert not world.running("b")
    world.platform.room = 1
    world.after(THROTTLE_PAUSE_S / 2)
    assert len(world.running()) == 2
    world.after(THROTTLE_PAUSE_S)
    assert len(world.running()) == 3
    world.ready(ranks=[0, 1, 2])
    assert world.key("start") is None
    world.platform.room = 100
    world.after(2 * THROTTLE_PAUSE_S)
    world.ready(ranks=[3])
    assert world.start() is None
    assert world.ledger.job_reserved_usd("a") == pytest.approx(4 * WORST)


def test_a_platform_that_delivers_twice_has_half_the_room(tmp_path):
    world = World(tmp_path, limits=replace(LIMITS, deliveries=2))
    world.submit("a", 3)
    world.submit("b", 2)
    assert len(world.platform.calls) == 3
    assert world.ledger.job_reserved_usd("a") == pytest.approx(6 * WORST, rel=1e-6)


def test_the_default_size_fits_a_platform_that_delivers_twice(tmp_path):
    world = World(tmp_path, limits=replace(LIMITS, concurrency=2, deliveries=2))
    world.submit(workers=None)
    assert len(world.running()) == 1


def test_a_function_that_cannot_run_there_fails_its_job_only(world):
    world.submit("b")
    world.platform.error = PlatformError("no such image")
    state = world.submit("a", 2)
    assert state.status == "failed"
    assert isinstance(state.error, JobError)
    assert "no such image" in str(state.error)
    assert world.states["b"].status == "queued"
    assert world.ledger.job_reserved_usd("a") == 0


# --- hand-over ------------------------------------------------------------------------------------


def test_hand_over_at_the_time_limit_with_room_for_both(world):
    state = world.submit(workers=2)
    world.train(workers=2)
    world.after(90)
    assert not world.running("a", 1)
    world.after(7)
    assert world.running("a", 1) == names(1, [0, 1])
    assert world.key("leave") is None  # the old ones train on until the new are there
    world.ready(generation=1, ranks=[0])
    assert world.key("leave") is None
    world.ready(generation=1, ranks=[1])
    assert world.key("leave") is not None
    assert world.key("start", generation=1) is None
    key = world.hand_over(ranks=[0, 1])
    assert world.start(generation=1) == key
    world.progress(generation=1, ranks=[0, 1], at=6)
    world.end_all("a", 0)
    world.finished(generation=1)
    world.end_all()
    assert world.over() == ["finished"]
    assert [a.reason for a in state.outcome.allocations] == ["first", "time limit"]


def test_hand_over_without_room_for_both(world):
    state = world.submit(workers=5)
    world.train(workers=5)
    world.scheduler.resize("a", Bounds(6, None))
    assert not world.running("a", 1)
    assert world.key("leave") is not None
    key = world.hand_over(ranks=range(5))
    for name in world.running("a", 0):
        assert len(world.running("a", 1)) == 0 or len(world.platform.calls) <= 8
        world.end(name)
    assert len(world.running("a", 1)) == 6
    world.train(generation=1, workers=6, at=6)
    assert world.start(generation=1) == key
    assert state.allocation.workers == 6


def test_workers_that_leave_by_themselves_are_followed(world):
    world.submit(workers=1)
    world.train()
    key = world.hand_over()
    world.after(1)
    assert world.running() == names(0, [0]) + names(1, [0])
    world.end(*names(0, [0]))
    world.ready(generation=1)
    assert world.start(generation=1) == key


def test_those_that_have_handed_over_but_stay_are_killed(world):
    world.submit()
    world.train()
    world.hand_over()
    world.after(GRACE_S - 1)
    assert world.platform.cancelled == set()
    world.after(2)
    assert world.platform.cancelled == set(names(0, [0]))


def test_errors_of_those_who_have_handed_over_do_not_matter(world):
    state = world.submit(workers=2)
    world.train(workers=2)
    world.hand_over(ranks=[0])
    world.after(1)
    world.say(wire.Stuck, "a", 0, 1)
    world.say(wire.Failed, "a", 0, 1, error="x", traceback="", by_user=True, retry=False)
    assert state.error is None
    assert world.running("a", 1) == names(1, [0, 1])
    assert world.platform.cancelled == set()


def test_nobody_is_invoked_for_a_generation_that_has_left(world):
    world.submit(workers=2)
    world.train(workers=2)
    world.platform.room = -1
    world.end(*names(0, [1]), "crashed")
    world.hand_over(ranks=[0])
    world.platform.room = 100
    world.after(1)
    assert names(0, [1], 1)[0] not in world.platform.invoked
    assert world.running("a", 1) == names(1, [0, 1])


# --- resize ---------------------------------------------------------------------------------------


def test_resize_while_queued_starts_with_the_new_size(world):
    world.submit("b", 8)
    state = world.submit("a", 2)
    world.scheduler.resize("a", Bounds(3, 2048))
    world.scheduler.stop("b", "enough")
    world.end_all("b", ending="cancelled")
    assert world.running() == names(0, [0, 1, 2])
    assert [(a.workers, a.memory_mb) for a in state.allocations] == [(3, 2048)]


def test_resize_while_starting(world):
    state = world.submit("a", 1)
    world.scheduler.resize("a", Bounds(2, None))
    assert not world.running("a", 1)
    world.train()
    world.after(0.1)
    assert world.running("a", 1) == names(1, [0, 1])
    assert state.allocations[-1].reason == "resize"


def test_resize_while_handing_over_and_twice_in_a_row_adds_up(world):
    state = world.submit("a", 1)
    world.train()
    world.scheduler.resize("a", Bounds(2, None))
    world.scheduler.resize("a", Bounds(3, None))
    world.scheduler.resize("a", Bounds(None, 2048))
    world.ready(generation=1, ranks=[0, 1])
    world.hand_over()
    world.end_all("a", 0)
    world.train(workers=2, generation=1, at=6)
    world.after(0.1)
    assert len(world.running("a", 2)) == 3
    assert [(a.workers, a.memory_mb) for a in state.allocations] == [
        (1, 1024),
        (2, 1024),
        (3, 2048),
    ]


def test_a_resize_under_way_is_not_lost_with_all_workers(world):
    state = world.submit("a", 1)
    world.train()
    world.scheduler.resize("a", Bounds(3, None))
    assert world.running("a", 1)
    world.end(*names(0, [0]), "crashed")  # nobody is left to hand over
    world.end_all("a", 1, "cancelled")
    assert len(world.running("a", 2)) == 3
    assert state.allocations[-1].workers == 3


def test_resize_after_the_end_does_nothing(world):
    world.submit()
    world.train()
    world.finished()
    world.scheduler.resize("a", Bounds(4, None))
    world.end_all()
    world.scheduler.resize("a", Bounds(4, None))
    assert world.over() == ["finished"]


# --- losses ---------------------------------------------------------------------------------------


def test_a_worker_lost_before_the_start_is_replaced(world):
    world.submit(workers=2)
    world.ready(ranks=[0, 1][:1])
    world.end(*names(0, [0]), "crashed")
    assert world.running() == [*names(0, [0], 1), *names(0, [1])]
    assert not world.platform.calls[names(0, [0], 1)[0]][1].joining
    world.ready(ranks=[1])
    assert world.key("start") is None  # the replacement has to be there too
    world.ready(ranks=[0], incarnation=1)
    assert world.start() is None


def test_a_worker_lost_with_survivors_is_replaced_alone(world):
    state = world.submit(workers=3)
    world.train(workers=3)
    world.end(*names(0, [1]), "crashed")
    assert world.running() == [*names(0, [0]), *names(0, [1], 1), *names(0, [2])]
    assert world.platform.calls[names(0, [1], 1)[0]][1].joining
    assert len(state.allocations) == 1
    assert world.platform.cancelled == set()


def test_words_of_a_dead_worker_do_not_count_for_its_replacement(world):
    """Or the loss of the last survivor would leave replacements that wait for each other."""
    world.submit(workers=2)
    world.train(workers=2)
    world.end(*names(0, [1]), "crashed")
    world.progress(ranks=[1], incarnation=0)  # late
    world.end(*names(0, [0]), "crashed")
    assert len(world.running("a", 1)) == 2
    assert world.key("open") is None


def test_all_lost_begins_again_at_the_checkpoint(world):
    state = world.submit(workers=2)
    world.train(workers=2)
    key = world.save(at=3)
    world.end_all("a", 0, "crashed")  # the second one kills the first one's replacement
    assert world.platform.cancelled == set(names(0, [0], 1))
    world.end(names(0, [0], 1)[0], "cancelled")
    assert world.running() == names(1, [0, 1])
    world.ready(generation=1, ranks=[0, 1])
    assert world.start(generation=1) == key
    assert len(state.allocations) == 2


@pytest.mark.parametrize("ending", ["crashed", "timed_out", "returned"])
def test_many_that_die_at_once_are_one_loss(tmp_path, ending):
    world = World(tmp_path, limits=replace(LIMITS, concurrency=40, max_workers=40))
    state = world.submit(workers=20)
    world.train(workers=20)
    for name in world.running():
        world.end(name, ending)
    assert state.status == "running"
    world.end_all("a", 0, "cancelled")
    assert len(world.running("a", 1)) == 20


def test_too_many_losses_without_progress(world):
    state = world.submit()
    for number in range(MOST_STRIKES + 1):
        assert state.error is None
        world.after(1)
        world.end(*names(0, [0], number), "crashed", detail="signal 9")
    assert isinstance(state.error, FunctionLost)
    assert "6 losses in a row" in str(state.error)
    assert "crashed signal 9" in str(state.error)
    assert world.over() == ["failed"]


def test_progress_forgives_losses(world):
    state = world.submit(workers=2)
    world.train(workers=2)
    for number in range(3 * MOST_STRIKES):
        world.progress(ranks=[0], at=number + 2)
        world.end(*names(0, [1], number), "crashed")
        world.ready(ranks=[1], incarnation=number + 1)
        world.progress(ranks=[1], incarnation=number + 1)
    assert state.error is None


def test_a_worker_that_has_returned_without_a_word_is_replaced(world):
    world.submit(workers=2)
    world.train(workers=2)
    world.end(*names(0, [0]))
    assert world.running() == [*names(0, [0], 1), *names(0, [1])]


def test_the_waiting_next_generation_mends_itself(world):
    world.submit()
    world.train()
    world.scheduler.resize("a", Bounds(2, None))
    world.ready(generation=1, ranks=[0, 1])
    world.end(*names(1, [0]), "crashed")
    assert names(1, [0], 1)[0] in world.running()
    world.hand_over()
    assert world.key("start", generation=1) is None
    world.ready(generation=1, ranks=[0], incarnation=1)
    assert world.start(generation=1) is not None


def test_rank_0_lost_while_the_others_finish(world):
    """Its replacement would wait for survivors that are gone."""
    state = world.submit(workers=2)
    world.train(workers=2)
    world.end(*names(0, [0]), "crashed")
    world.finished(rank=1)
    assert names(0, [0], 1)[0] in world.platform.cancelled
    world.end(*names(0, [1]))
    world.end_all("a", 0, "cancelled")
    assert world.running() == names(1, [0, 1])
    assert state.status == "running"


@pytest.mark.parametrize("throttled", [False, True])
def test_rank_0_lost_after_the_others_have_finished(world, throttled):
    state = world.submit(workers=2)
    world.train(workers=2)
    world.finished(rank=1, value="of rank 1")
    world.platform.room = 0 if throttled else 100
    world.end(*names(0, [0]), "crashed")
    world.platform.room = 100
    world.end(*names(0, [1]))
    world.after(1)
    assert state.status == "running"  # rank 1's word is not the job's
    assert world.running() == names(1, [0, 1])


def test_a_crash_after_finished_is_none(world):
    state = world.submit()
    world.train()
    world.finished(value=3)
    world.end_all(ending="crashed")
    assert world.over() == ["finished"]
    assert state.outcome.value == 3


def test_stuck_begins_again(world):
    world.submit(workers=2)
    world.train(workers=2)
    key = world.save(at=2)
    world.say(wire.Stuck, "a", 0, 0)
    world.say(wire.Stuck, "a", 0, 1)
    assert world.platform.cancelled == set(names(0, [0, 1]))
    assert world.running("a", 1) == names(1, [0, 1])
    world.ready(generation=1, ranks=[0, 1])
    assert world.start(generation=1) == key


def test_repeats_and_late_words_are_harmless(world):
    state = world.submit(workers=2)
    for _ in range(3):
        world.train(workers=2)
        world.say(wire.Reported, "a", 0, 0, index=0, metrics={"loss": 1})
        world.say(wire.Saved, "a", 0, 0, checkpoint="x")
    for _ in range(3):
        world.hand_over(ranks=[0, 1])
        world.after(1)
    assert world.running("a", 1) == names(1, [0, 1])
    world.end_all("a", 0)
    for _ in range(2):
        world.train("a", 2, generation=1, at=6)
        world.train("a", 2, generation=0, at=9)
        world.finished(generation=0, value="old")
        world.say(wire.Stuck, "a", 0, 0)
        world.say(wire.Failed, "a", 0, 0, error="old", traceback="", by_user=True, retry=False)
    assert state.status == "running"
    for _ in range(2):
        world.finished(generation=1, value="new")
        world.finished(generation=1, rank=1)
    world.end_all()
    world.finished(generation=1, value="late")
    world.scheduler.ended(InvocationResult(names(1, [0])[0], "returned", 9.0))
    assert world.over() == ["finished"]
    assert state.outcome.value == "new"
    assert len(state.outcome.reports) == 1


def test_late_reports_belong_to_those_who_made_them(world):
    state = world.submit(workers=1)
    world.train()
    world.scheduler.resize("a", Bounds(2, None))
    world.ready(generation=1, ranks=[0, 1])
    world.hand_over()
    world.say(wire.Reported, "a", 0, 0, index=0, metrics={"loss": 1})
    assert (state.reports[0].workers, state.reports[0].generation) == (1, 0)


def test_an_error_of_the_function(world):
    state = world.submit(workers=2)
    world.train(workers=2)
    world.say(wire.Failed, "a", 0, 1, error="KeyError", traceback="tb", by_user=True, retry=False)
    world.end_all()
    assert world.over() == ["failed"]
    assert isinstance(state.error, TrainingFunctionError)
    assert state.error.worker_traceback == "tb"


# --- memory ---------------------------------------------------------------------------------------


def test_out_of_memory_without_a_pin_doubles(world):
    world.submit(workers=1, memory_mb=None)
    world.train()
    world.end_all(ending="out_of_memory", peak_mb=1769)
    assert world.platform.calls[names(1, [0])[0]][0].memory_mb == 2 * 1769


def test_out_of_memory_with_a_pin_fails(world):
    state = world.submit(workers=2)
    world.train(workers=2)
    world.end(*names(0, [0]), "out_of_memory", peak_mb=1000.0)
    world.end_all(ending="cancelled")
    assert world.over() == ["failed"]
    assert isinstance(state.error, OutOfMemory)
    assert state.error.limit_mb == 1024


def test_out_of_memory_while_more_is_on_its_way(world):
    world.submit(workers=1)
    world.train()
    world.scheduler.resize("a", Bounds(None, 2048))
    world.end(*names(0, [0]), "out_of_memory")
    world.end_all("a", 1, "cancelled")
    assert world.platform.calls[names(2, [0])[0]][0].memory_mb == 2048


def test_out_of_memory_of_the_next_generation(world):
    """What counts is the memory of those who had too little, not that of those who train."""
    state = world.submit(workers=1, memory_mb=None)
    world.train()
    smaller = replace(state.allocation, workers=2, memory_mb=512)
    world.scheduler._active["a"].resize_to = Decision(smaller, "a test")
    world.scheduler.tick()
    world.end(*names(1, [0]), "out_of_memory")
    world.end_all("a", 0, "cancelled")
    world.end_all("a", 1, "cancelled")
    assert (state.allocations[-1].workers, state.allocations[-1].memory_mb) == (2, 1024)


# --- hangs ----------------------------------------------------------------------------------------


def test_one_that_hangs_is_replaced(world):
    world.submit(workers=2)
    world.train(workers=2)
    for _ in range(4):
        world.after(10)
        world.progress(ranks=[0], waiting=True)
    assert world.platform.cancelled == set(names(0, [1]))
    world.end(*names(0, [1]), "cancelled")
    assert names(0, [1], 1)[0] in world.running()
    assert world.key("open") is not None


def test_all_that_hang_begin_again(world):
    world.submit(workers=2)
    world.train(workers=2)
    world.after(32)
    assert world.platform.cancelled == set(names(0, [0, 1]))
    world.end_all("a", 0, "cancelled")
    world.end_all("a", 0, "cancelled")
    assert world.running("a", 1) == names(1, [0, 1])


def test_one_that_never_starts_is_given_up(tmp_path):
    world = World(tmp_path, limits=replace(LIMITS, time_limit_s=900.0))
    world.submit()
    world.after(START_TIMEOUT_S - 1)
    assert not world.platform.cancelled
    world.after(2)
    assert world.platform.cancelled == set(names(0, [0]))


def test_a_replacement_that_hangs_at_its_start_is_judged_by_the_others(world):
    world.submit(workers=2)
    world.after(1)
    world.train(workers=2)
    world.end(*names(0, [1]), "crashed")
    for _ in range(4):  # 40 s: no pace of its own, but workers of this job start within a second
        assert not world.platform.cancelled
        world.after(10)
        world.progress(ranks=[0], waiting=True)
    assert world.platform.cancelled == set(names(0, [1], 1))


def test_a_hang_where_nothing_can_be_cancelled_ends_at_the_time_limit(tmp_path):
    world = World(tmp_path, platform=FakePlatform)
    world.submit(workers=2)
    world.train(workers=2)
    for _ in range(9):
        world.after(10)
        world.progress(ranks=[0], waiting=True)
    world.end(*names(0, [1]), "timed_out", seconds=100.0)
    assert names(0, [1], 1)[0] in world.running()


def test_stop_where_nothing_can_be_cancelled(tmp_path):
    world = World(tmp_path, platform=FakePlatform)
    state = world.submit(workers=2)
    world.train(workers=2)
    world.scheduler.stop("a", "pruned")
    assert world.key("open") is None
    world.after(100)
    assert state.outcome is None
    world.end_all()
    assert world.over() == ["stopped"]


# --- the stores -----------------------------------------------------------------------------------


def _queued(world):
    world.submit("b", 8)
    world.submit("a", 2)


def _starting(world):
    world.submit("a", 2)
    world.ready(ranks=[0])


def _training(world):
    world.submit("a", 2)
    world.train(workers=2)


def _throttled(world):
    world.platform.room = 1
    world.submit("a", 2)
    world.platform.room = 100


def _handing_over(world):
    _training(world)
    world.scheduler.resize("a", Bounds(3, None))
    world.ready(generation=1, ranks=[0, 1, 2])


def _handed_over(world):
    _handing_over(world)
    world.hand_over(ranks=[0])


def _no_room(world):
    _training(world)
    world.scheduler.resize("a", Bounds(7, None))
    world.hand_over(ranks=[0, 1])


def _mending(world):
    _training(world)
    world.end(*names(0, [0]), "crashed")


def _finishing(world):
    _training(world)
    world.finished()


STATES = [
    _queued,
    _starting,
    _throttled,
    _training,
    _mending,
    _handing_over,
    _handed_over,
    _no_room,
    _finishing,
]


def calm(world):
    """From here on everything goes well: all workers do what is expected of them."""
    for _ in range(60):
        if world.scheduler.idle:
            return
        world.after(1.0)
        for name, (_, spec) in list(world.platform.calls.items()):
            who = {"generation": spec.generation, "incarnation": spec.incarnation}
            if name in world.platform.cancelled:
                world.end(name, "cancelled")
            elif world.key("open", spec.job, spec.generation) is None:
                world.end(name)
            elif world.key("leave", spec.job, spec.generation) is not None:
                world.hand_over(spec.job, spec.generation, [spec.rank], at=9)
                world.end(name)
            else:
                world.ready(spec.job, ranks=[spec.rank], **who)
                if world.key("start", spec.job, spec.generation) is not None:
                    world.progress(spec.job, ranks=[spec.rank], at=9, **who)
                    world.finished(spec.job, rank=spec.rank, **who)
                    world.end(name)
    raise AssertionError("a job is stuck")


@pytest.mark.parametrize("reach", STATES)
def test_stop_in_every_state(world, reach):
    reach(world)
    world.scheduler.stop("a", "pruned")
    world.scheduler.stop("a", "again")
    calm(world)
    world.over(*world.states)
    outcome = world.states["a"].outcome
    if reach is _finishing:
        assert outcome.status == "finished"
    else:
        assert (outcome.status, outcome.reason) == ("stopped", "pruned")


@pytest.mark.parametrize("reach", STATES)
def test_the_parameter_store_is_lost_in_every_state(world, reach):
    reach(world)
    live = set(world.platform.calls)
    world.store.values.clear()
    world.scheduler.store_lost()
    if reach is not _finishing:
        assert set(world.running("a")) & live <= world.platform.cancelled
    world.scheduler.store_lost()
    calm(world)
    assert set(world.over(*world.states)) == {"finished"}


@pytest.mark.parametrize("reach", STATES)
@pytest.mark.parametrize("early", [False, True])
def test_pause_and_resume_in_every_state(world, reach, early):
    reach(world)
    world.scheduler.pause("a")
    world.scheduler.pause("a")
    world.scheduler.resume("b")  # is not paused
    if not early:
        rest(world)
    state = world.states["a"]
    if reach is _finishing:
        assert early or state.status == "finished"
    elif not early:
        assert state.status == "paused"
        assert world.running("a") == []
        assert world.ledger.job_reserved_usd("a") == 0
        assert not [key for key in world.store.values if key.startswith("smlt:f:a:")]
        world.after(1000)
        assert world.running("a") == []
    world.scheduler.resume("a")
    world.scheduler.resume("a")
    calm(world)
    world.over(*world.states)
    assert state.outcome.status == "finished"
    told = [kind for kind, job, _ in world.history if job == "a" and kind in ("paused", "resumed")]
    assert told == ([] if reach is _finishing else ["paused", "resumed"])
    if not early and reach is not _finishing:
        assert state.decisions[-1].occasion == "resumed"
        assert state.outcome.allocations[-1].reason == "resumed"


def rest(world):
    """Workers do what is expected of them until none of the job is left."""
    for _ in range(30):
        world.after(1.0)
        for name, (_, spec) in list(world.platform.calls.items()):
            if spec.job != "a":
                continue
            if name in world.platform.cancelled:
                world.end(name, "cancelled")
            elif world.key("open", spec.job, spec.generation) is None:
                world.end(name)
            elif world.key("leave", spec.job, spec.generation) is not None:
                world.hand_over(spec.job, spec.generation, [spec.rank], at=7)
                world.end(name)
            elif world.key("start", spec.job, spec.generation) is None:
                world.ready(spec.job, spec.generation, [spec.rank], spec.incarnation)
        if not world.running("a"):
            return
    raise AssertionError("it does not come to rest")


def test_a_job_that_comes_to_no_boundary_is_killed_and_goes_on_from_its_last_checkpoint(world):
    state = world.submit()
    world.train()
    key = world.save(at=3)
    world.scheduler.pause("a")
    world.after(GRACE_S - 1)
    assert world.platform.cancelled == set()
    world.after(2)
    assert world.platform.cancelled == set(names(0, [0]))
    world.end_all(ending="cancelled")
    assert state.status == "paused"
    world.scheduler.resume("a")
    assert state.status == "queued"
    world.train(generation=1)
    assert world.start(generation=1) == key


@pytest.mark.parametrize("end", ["stop", "deadline"])
def test_a_paused_job_is_not_over(tmp_path, end):
    world = World(tmp_path, deadline_s=1050.0)
    state = world.submit()
    world.train()
    world.scheduler.pause("a")
    key = world.hand_over()
    world.end_all()
    assert not world.scheduler.idle
    if end == "stop":
        world.scheduler.stop("a", "pruned")
    else:
        world.after(100)
    assert world.over() == ["stopped"]
    assert state.outcome.checkpoint.endswith(key)


def test_paused_jobs_are_in_nobodys_way(world):
    world.submit("a", 8)
    world.train("a", 8)
    world.submit("b", 8)
    world.scheduler.pause("b")
    world.scheduler.pause("a")
    world.hand_over("a", ranks=range(8))
    world.end_all("a")
    assert [world.states[name].status for name in "ab"] == ["paused", "paused"]
    world.submit("c", 8)
    assert len(world.running("c")) == 8
    world.scheduler.resume("b")
    assert not world.running("b")
    world.train("c", 8)
    world.finished("c")
    world.end_all("c")
    assert len(world.running("b")) == 8


@pytest.mark.parametrize("reach", STATES)
def test_the_deadline_in_every_state(tmp_path, reach):
    world = World(tmp_path, deadline_s=1050.0)
    reach(world)
    world.clock.now = 1050.0
    world.scheduler.tick()
    calm(world)
    world.over(*world.states)
    outcome = world.states["a"].outcome
    assert (outcome.status, outcome.reason) == (
        ("finished", "") if reach is _finishing else ("stopped", "deadline")
    )


@pytest.mark.parametrize("reach", STATES)
def test_a_parameter_store_out_of_reach_in_every_state(world, reach):
    """Nobody waits for ever, and jobs that come when it is back are fenced as ever."""
    reach(world)
    world.store.broken = True
    world.scheduler.abandon(StoreUnavailable("no answer"))
    for name in world.platform.cancelled & set(world.platform.calls):
        world.end(name, "cancelled")
    world.end_all("a")
    assert world.states["a"].status == ("finished" if reach is _finishing else "failed")
    assert world.ledger.reserved_usd == 0
    world.store.broken = False
    world.store.values.clear()
    world.submit("later")
    world.train("later")
    world.scheduler.stop("later", "enough")
    assert world.key("open", "later") is None


@pytest.mark.parametrize("reach", [_training, _handing_over])
def test_a_store_that_fails_while_a_generation_is_launched(world, reach):
    reach(world)
    world.store.broken = True
    with pytest.raises(StoreUnavailable) as failed:
        world.submit("b")
    world.scheduler.abandon(failed.value)
    world.end_all("a", ending="cancelled")
    world.store.values.clear()
    assert world.over("b", "a") == ["failed", "failed"]


def test_a_store_that_goes_away_with_a_generation(world):
    _handed_over(world)
    other = world.submit("b")
    world.store.broken = True
    world.end_all("a", 0)
    world.end_all("a", ending="cancelled")
    assert world.states["a"].status == "failed"
    world.end_all("b", ending="cancelled")
    assert other.status == "failed"
    world.store.values.clear()
    world.over("a", "b")


def test_many_jobs_wait_when_the_store_goes_away_in_between(world):
    world.submit("a", 8)
    for name in "bcd":
        world.submit(name, 2)
    world.train("a", 8)
    world.store.broken = True
    world.finished("a")
    world.end_all("a")
    world.store.values.clear()
    assert world.over("b", "c", "d", "a") == ["failed", "failed", "failed", "finished"]


@pytest.mark.parametrize("error", [BudgetExhausted("no money"), StoreUnavailable("no answer")])
def test_an_object_store_that_refuses_at_the_end(world, monkeypatch, error):
    def refuse(prefix):
        raise error

    state = world.submit()
    world.train()
    world.say(wire.Saved, "a", 0, 0, checkpoint="the-last")
    monkeypatch.setattr(world.objects, "list", refuse)
    world.scheduler.stop("a", "pruned")
    world.end_all(ending="cancelled")
    assert world.over() == ["stopped"]
    assert state.outcome.checkpoint.endswith("/the-last")


def test_no_money_to_look_for_the_checkpoint(world, monkeypatch):
    def refuse(prefix):
        raise BudgetExhausted("no money")

    state = world.submit()
    other = world.submit("b")
    world.train()
    monkeypatch.setattr(world.objects, "list", refuse)
    world.end_all(ending="crashed")
    assert (state.status, state.outcome.reason) == ("stopped", "budget")
    assert other.error is None


def test_a_history_that_cannot_be_written_leaves_nobody_waiting(world):
    def full(kind, job, body):
        raise OSError("no space")

    state = world.submit()
    world.train()
    world.scheduler.stop("a", "pruned")
    world.scheduler._record = lambda kind, *rest: full(kind, *rest) if kind == "ended" else None
    with pytest.raises(OSError, match="no space"):
        world.end_all(ending="cancelled")
    assert state.outcome.reason == "pruned"


# --- money ----------------------------------------------------------------------------------------


def test_a_budget_too_small_for_the_start(tmp_path):
    world = World(tmp_path, budget_usd=1e-7)
    state = world.submit()
    assert world.over() == ["stopped"]
    assert (state.outcome.reason, state.outcome.allocations) == ("budget", ())


def test_a_job_waits_for_what_others_have_reserved(tmp_path):
    world = World(tmp_path, budget_usd=1.4 * 20 * WORST / 100)
    world.submit("a")
    world.submit("b")
    waits = world.submit("c")
    assert waits.status == "queued"
    assert not world.running("c")
    for job in "ab":
        world.train(job)
        world.finished(job)
        world.end_all(job, seconds=0.1)
    calm(world)
    assert set(world.over("a", "b", "c")) == {"finished"}


def test_another_fleet_of_the_project_takes_the_money_meanwhile(world, monkeypatch):
    """Between two reservations for one generation; later there is enough again."""
    world.submit("a")
    world.train("a")
    reserve = world.ledger.reserve

    def taken(entry_id, *arguments, **options):
        if entry_id.endswith(".r1.i0"):
            raise BudgetExhausted("another fleet was faster")
        reserve(entry_id, *arguments, **options)

    monkeypatch.setattr(world.ledger, "reserve", taken)
    waits = world.submit("b", workers=2)
    assert (waits.status, world.running("b")) == ("queued", [])
    monkeypatch.undo()
    world.finished("a")
    world.end_all("a")
    calm(world)
    assert world.over("a", "b") == ["finished", "finished"]
    assert world.ledger.reserved_usd == 0


def test_those_who_are_throttled_hold_money_too(tmp_path):
    world = World(tmp_path, budget_usd=1.05 * 20 * WORST / 100)
    world.platform.room = 0
    world.submit("a")
    waits = world.submit("b")
    assert waits.status == "queued"
    world.platform.room = 100
    world.after(1)
    calm(world)
    assert set(world.over("a", "b")) == {"finished"}


def test_no_money_for_a_replacement(tmp_path):
    """Survivors do not wait for one that never comes: what they had reserved does for all."""
    world = World(tmp_path, budget_usd=2 * 21 * WORST / 100)
    state = world.submit(workers=2)
    world.train(workers=2)
    lease = world.platform.calls[names(0, [0])[0]][0].timeout_s
    world.end(*names(0, [0]), "crashed", seconds=lease)
    calm(world)
    assert world.over() == ["finished"]
    assert [a.reason for a in state.allocations] == ["first", "a replacement cannot be paid for"]


def test_no_money_for_a_replacement_of_one_that_should_leave(tmp_path):
    """The others cannot leave without it."""
    world = World(tmp_path, budget_usd=5 * 20.4 * WORST / 100)
    state = world.submit(workers=5)
    world.train(workers=5)
    world.scheduler.resize("a", Bounds(4, None))
    assert world.key("leave") is not None
    lease = world.platform.calls[names(0, [0])[0]][0].timeout_s
    world.end(*names(0, [0]), "crashed", seconds=lease)
    world.after(0.1)
    assert world.key("open") is None
    world.end_all(ending="cancelled", seconds=lease)
    assert world.over() == ["stopped"]
    assert state.outcome.reason == "budget"


def test_no_money_for_a_replacement_in_the_next_generation(tmp_path):
    """Those who train go on."""
    world = World(tmp_path, budget_usd=2 * 21 * WORST / 100)
    state = world.submit()
    world.train()
    world.scheduler.resize("a", Bounds(None, 1025))
    lease = world.platform.calls[names(1, [0])[0]][0].timeout_s
    world.end(*names(1, [0]), "crashed", seconds=lease)
    world.after(0.1)
    assert state.status == "running"
    assert world.running() == names(0, [0])
    assert world.key("open") is not None
    world.finished()
    world.end_all()
    assert world.over() == ["finished"]


def test_no_money_for_the_hand_over(tmp_path):
    world = World(tmp_path, budget_usd=21 * WORST / 100)
    state = world.submit()
    world.train()
    lease = world.platform.calls[names(0, [0])[0]][0].timeout_s
    world.after(lease - 1)
    assert world.running() == names(0, [0])
    assert state.error is None  # goes on up to the end of its lease
    world.hand_over()
    world.end_all(seconds=lease)
    assert world.over() == ["stopped"]
    assert state.outcome.reason == "budget"
    assert state.outcome.checkpoint is not None


def test_a_lease_that_is_too_short_for_an_iteration_is_not_paid_for(tmp_path):
    world = World(tmp_path, budget_usd=33 * WORST / 100)
    state = world.submit()
    lease = world.platform.calls[names(0, [0])[0]][0].timeout_s
    world.after(10)  # its start
    world.ready()
    world.progress(slowest=4.0)
    world.after(lease - 11)
    world.hand_over()
    world.end_all(seconds=lease)
    assert world.over() == ["stopped"]
    assert (state.outcome.reason, len(state.allocations)) == ("budget", 1)


def test_a_lease_without_progress_is_followed_by_a_longer_one_or_none(tmp_path):
    world = World(tmp_path, budget_usd=70 * WORST / 100)
    state = world.submit()
    leases = []
    while world.running():
        (name,) = world.running()
        leases.append(world.platform.calls[name][0].timeout_s)
        world.after(1)
        world.end(name, "timed_out", seconds=leases[-1])
    assert leases == [pytest.approx(20.0), pytest.approx(40.0)]
    assert world.over() == ["stopped"]
    assert (state.error, state.outcome.reason) == (None, "budget")


def test_a_lease_that_something_else_has_spoilt_is_not_held_against_the_job(tmp_path):
    world = World(tmp_path, budget_usd=70 * WORST / 100)
    world.submit()
    (first,) = world.running()
    world.end(first, "timed_out", seconds=20.0)  # it had hung before its first iteration
    (second,) = world.running()
    assert world.platform.calls[second][0].timeout_s == pytest.approx(40.0)
    world.after(1)
    world.ready(incarnation=1)
    world.progress(incarnation=1, at=1)
    world.hand_over()
    world.end(second, seconds=25.0)
    (third,) = world.running()
    assert world.platform.calls[third][0].timeout_s == pytest.approx(20.0)


def test_a_program_that_cannot_tell_its_pace_gets_the_leases_there_are(tmp_path):
    world = World(tmp_path, budget_usd=33 * WORST / 100)
    world.submit()
    lease = world.platform.calls[names(0, [0])[0]][0].timeout_s
    world.after(1)
    world.ready()
    world.progress(slowest=lease)
    world.after(lease - 2)
    world.hand_over()
    world.end_all(generation=0, seconds=lease)
    assert world.running() == names(1, [0])


def test_reservations_are_released_in_the_same_order_every_time(world):
    world.platform.room = 0
    world.submit(workers=8)
    world.scheduler.stop("a", "pruned")
    released = [e.entry_id for e in world.journal if e.settled_usd is not None]
    assert released == names(0, reversed(range(8)))


def test_a_resize_is_kept_when_money_comes_back_only_with_the_old_functions(tmp_path):
    world = World(tmp_path, budget_usd=5 * 25 * WORST / 100)
    state = world.submit(workers=5)
    world.train(workers=5)
    world.scheduler.resize("a", Bounds(4, None))
    assert world.key("leave") is not None
    world.after(1)
    world.hand_over(ranks=range(5))
    world.end_all("a", 0, seconds=1.0)
    assert state.allocations[-1].workers == 4


# --- a job of an earlier client -------------------------------------------------------------------


def test_a_resumed_job_hears_what_was_said_in_between(world):
    """What the dead client had not read is still in the stream."""
    key = world.save(at=4)
    names_of_old = keys.FleetKeys("f").generation("a", 0)
    world.store.values[names_of_old.open] = b"1"
    state = JobState(JobSpec("a", "f", "c", 0, Bounds(1, 1024)))
    first = world.submit("x")
    world.train("x")
    state.allocations = list(first.allocations)
    world.states["a"] = state
    world.scheduler.submit(state, next_number=1)
    assert world.key("open", generation=0) is None  # what outlived the client is fenced off
    assert world.running() == names(1, [0])
    world.say(wire.Reported, "a", 0, 0, index=0, metrics={"loss": 1})
    world.say(wire.Reported, "a", 7, 0, index=1, metrics={"loss": 2})  # of a group nobody knows
    world.finished(generation=0)
    assert [r.metrics for r in state.reports] == [{"loss": 1}]
    world.ready(generation=1)
    assert world.start(generation=1) == key


# --- lockstep -------------------------------------------------------------------------------------


def test_every_generation_knows_what_was_consumed(world):
    state = world.submit(lockstep=True)
    assert world.key("consumed") == b"0"
    world.train()
    world.say(wire.Reported, "a", 0, 0, index=0, metrics={}, checkpoint="jobs/a/checkpoints/x")
    assert state.reports[0].checkpoint == f"{world.objects.url}/jobs/a/checkpoints/x"
    for count, known in [(1, b"1"), (0, b"1"), (1, b"1"), (3, b"3")]:
        world.scheduler.acknowledge("a", count)
        assert world.key("consumed") == known
    world.scheduler.acknowledge("nobody", 1)
    world.store.values.clear()
    world.scheduler.store_lost()
    world.end_all(ending="cancelled")
    assert world.key("consumed", generation=1) == b"3"


@pytest.mark.parametrize("lockstep", [False, True])
def test_in_lockstep_what_is_reported_again_takes_the_place_of_the_old(world, lockstep):
    state = world.submit(lockstep=lockstep, first_report=4)
    world.train()
    for index, loss in [(3, 0), (5, 0), (4, 1), (5, 2), (5, 3), (4, 1)]:
        world.say(wire.Reported, "a", 0, 0, index=index, metrics={"loss": loss})
    assert [(r.index, r.metrics["loss"]) for r in state.reports] == [(4, 1), (5, 2)]
    world.scheduler.store_lost()
    world.end_all(ending="cancelled")
    for generation, index, loss in [(1, 4, 1), (1, 5, 9), (0, 4, 7)]:
        world.say(wire.Reported, "a", generation, 0, index=index, metrics={"loss": loss})
    expected = [(4, 1, 0), (5, 9, 1)] if lockstep else [(4, 1, 0), (5, 2, 0)]
    assert [(r.index, r.metrics["loss"], r.generation) for r in state.reports] == expected


@pytest.mark.parametrize("then", ["it goes on", "it does not come back"])
def test_losses_while_a_report_waits_for_the_client_do_not_count(world, then):
    state = world.submit(lockstep=True)
    world.train()
    key = world.save(at=1)
    world.say(wire.Reported, "a", 0, 0, index=0, metrics={}, checkpoint=key)
    for number in range(3 * MOST_STRIKES):
        world.end(*names(number, [0]), "crashed")
        world.train(generation=number + 1)
        assert world.start(generation=number + 1) == key
    assert state.error is None
    if then == "it goes on":
        world.scheduler.acknowledge("a", 1)
    for _ in range(MOST_STRIKES + 2):
        assert state.error is None
        (name,) = world.running()
        world.end(name, "crashed")
        if then == "it goes on" and world.running():
            world.train(generation=state.allocations[-1].generation)
        if not world.running():
            break
    assert isinstance(state.error, FunctionLost)


# --- anything in any order ------------------------------------------------------------------------


class Worker:
    """One invocation as a real worker would behave, one step at a time."""

    def __init__(self, simulation, name):
        self.name, self.simulation = name, simulation
        self.invocation, self.spec = simulation.world.platform.calls[name]
        self.started = simulation.world.clock.now
        self.state, self.hung = "loading", False

    def say(self, kind, **content):
        spec = self.spec
        event = kind(spec.job, spec.generation, spec.rank, spec.incarnation, **content)
        self.simulation.stream.append(event)

    def sign(self, at, *, waiting):
        content = {"position": Position(0, 1, at).encode(), "iterations": at, "chunk": 3}
        content |= {"iteration_s": self.simulation.chance.uniform(0.1, 0.2), "sync_s": 0.0}
        content |= {"left": max(0, 30 - at), "other_share": None}
        content |= {"slowest_s": 0.1, "batch": 1, "peak_mb": 1.0}
        self.say(wire.Progress, waiting=waiting, **content)

    def compute(self):
        content = {"parameters": 9, "gradient_bytes": 36, "flops_per_sample": 54.0}
        content |= {"activation_bytes": 0.0, "iterations": 30}
        self.say(wire.Workload, batch=self.simulation.chance.choice([1, 2]), **content)

    def key(self, what):
        return self.simulation.world.key(what, self.spec.job, self.spec.generation)


class Simulation:
    """Jobs of so many iterations each, and what chance does to them."""

    def __init__(self, world, seed):
        self.world, self.chance = world, random.Random(seed)
        self.workers, self.stream, self.groups = {}, [], {}
        self.length = {}
        self.faults = True

    def step(self):
        chance, world = self.chance, self.world
        for name in world.platform.calls:
            self.workers.setdefault(name, Worker(self, name))
        world.clock.now += chance.choice([0.0, 0.05, 0.3, 1.0, 4.0] if self.faults else [0.3])
        if chance.random() < 0.6:
            world.scheduler.tick()
        if self.faults:
            self.disturb()
        for worker in chance.sample(list(self.workers.values()), len(self.workers)):
            if worker.name in self.workers and chance.random() < 0.7:
                self.act(worker)
        if chance.random() < 0.7:
            self.flush()
        self.check()

    def act(self, worker):
        name, platform = worker.name, self.world.platform
        age = self.world.clock.now - worker.started
        if name in platform.cancelled:
            self.end(worker, "cancelled")
        elif age >= worker.invocation.timeout_s:
            self.end(worker, "timed_out")
        elif worker.hung:
            return
        elif worker.state == "leaving" or worker.key("open") is None:
            self.end(worker, "returned")
        elif worker.state == "loading":
            worker.say(wire.Ready)
            worker.state = "waiting"
        elif worker.state == "waiting":
            self.enter(worker)
        else:
            self.train(worker)

    def mates(self, worker):
        spec = worker.spec
        return [
            w
            for w in self.workers.values()
            if (w.spec.job, w.spec.generation) == (spec.job, spec.generation)
        ]

    def enter(self, worker):
        group = (worker.spec.job, worker.spec.generation)
        if worker.spec.joining:
            able = any(m.state == "begun" and not m.hung for m in self.mates(worker))
        else:
            able = worker.key("start") is not None
        if able:
            if group not in self.groups:
                start = wire.Start.decode(worker.key("start")).checkpoint
                at = Position.decode(start.rpartition("/")[2]).iteration if start else 0
                self.groups[group] = at
            worker.state = "begun"
            if worker.spec.rank == 0:
                worker.compute()
        worker.sign(self.groups.get(group, 0), waiting=not able)

    def train(self, worker):
        """The whole group moves on, if all of it is there."""
        spec, mates = worker.spec, self.mates(worker)
        group = (spec.job, spec.generation)
        if len(mates) < spec.workers or any(m.state != "begun" or m.hung for m in mates):
            worker.sign(self.groups[group], waiting=True)
            return
        self.groups[group] += 1
        at = self.groups[group]
        late = self.world.clock.now - worker.started > 0.8 * worker.invocation.timeout_s
        done = at >= self.length[spec.job]
        for mate in self.chance.sample(mates, len(mates)):
            mate.sign(at, waiting=False)
            if done:
                content = {"checkpoint": None, "value": at, "reports": []}
                content |= {"other_share": None, "end_s": None}
                mate.say(wire.Finished, **content)
            elif late or worker.key("leave") is not None:
                mate.say(wire.HandedOver, checkpoint=self.world.save(spec.job, at))
            else:
                continue
            mate.state = "leaving"
            if self.faults and self.chance.random() < 0.1:
                self.stream.pop()  # it died just before it could say so
                self.end(mate, "crashed")
        if not done and self.chance.random() < 0.3:
            self.world.save(spec.job, at)

    def end(self, worker, ending):
        self.flush()
        del self.workers[worker.name]
        if worker.name in self.world.platform.calls:
            limit = worker.invocation.timeout_s
            seconds = limit if ending == "timed_out" else min(limit, 0.5)
            self.world.end(worker.name, ending, seconds=seconds)

    def flush(self):
        events, self.stream = self.stream, []
        for event in events:
            for _ in range(self.chance.choice([1, 1, 2])):
                self.world.scheduler.event(event)

    def disturb(self):
        chance, world = self.chance, self.world
        what = chance.random()
        victims = list(self.workers.values())
        if what < 0.12 and victims:
            self.end(chance.choice(victims), chance.choice(["crashed", "crashed", "returned"]))
        elif what < 0.14 and victims:
            self.end(chance.choice(victims), "out_of_memory")
        elif what < 0.17 and victims:
            chance.choice(victims).hung = True
        elif what < 0.2 and victims:
            job = chance.choice(victims).spec.job
            for worker in [w for w in victims if w.spec.job == job]:
                if worker.name in self.workers:
                    self.end(worker, "crashed")
        elif what < 0.25:
            job = chance.choice(list(world.states))
            world.scheduler.resize(job, Bounds(chance.randint(1, 4), None))
        elif what < 0.26:
            world.scheduler.stop(chance.choice(list(world.states)), "chance")
        elif what < 0.28:
            world.store.values.clear()
            world.scheduler.store_lost()
        elif what < 0.29:
            chance.choice(
                [
                    world.scheduler.store_lost,
                    world.scheduler.store_gone,
                    world.scheduler.store_back,
                ]
            )("fast")
        elif what < 0.31:
            world.scheduler.pause(chance.choice(list(world.states)))
        elif what < 0.33:
            world.scheduler.resume(chance.choice(list(world.states)))
        elif what < 0.36:
            world.platform.room = chance.choice([0, 1, 100])
        elif what < 0.43 and len(world.states) < 6:
            self.submit()

    def submit(self):
        name = f"j{len(self.world.states)}"
        self.length[name] = self.chance.choice([1, 5, 30])
        memory_mb = self.chance.choice([None, 512])
        self.world.submit(name, self.chance.choice([None, 1, 2, 4]), memory_mb)

    def check(self):
        world = self.world
        totals = world.ledger.totals()
        assert totals.available >= 0
        limits = world.platform.limits
        assert len(world.platform.calls) <= limits.concurrency // limits.deliveries
        for name, state in world.states.items():
            started = [
                key
                for key in world.store.values
                if key.startswith(f"smlt:f:{name}:") and key.endswith(":start")
                if key.removesuffix("start") + "open" in world.store.values
            ]
            assert len(started) <= 1 or len(self.left(name, started)) <= 1
            if state.over:
                assert world.running(name) == []
                assert not [k for k in world.store.values if k.startswith(f"smlt:f:{name}:")]
                assert world.ledger.job_reserved_usd(name) == 0

    def left(self, name, started):
        """Of the groups with a start key, those that have not handed over."""
        job = self.world.scheduler._active[name]
        live = {g.number for g in job.generations if not g.left}
        return [key for key in started if int(key.split(":g")[1].split(":")[0]) in live]

    def calm_down(self):
        self.faults = False
        self.world.platform.room = 10**9
        for name in self.world.states:
            self.world.scheduler.resume(name)
        for _ in range(4000):
            if self.world.scheduler.idle:
                return
            self.step()
        raise AssertionError("a job is stuck")


class Fickle(PinnedOrDefault):
    """Changes its mind whenever it is asked."""

    def __init__(self, chance):
        self.chance = chance

    def first(self, facts):
        chance, bounds = self.chance, facts.bounds
        assert facts.functions >= 1
        workers = bounds.workers or chance.randint(1, min(4, facts.functions))
        memory_mb = bounds.memory_mb or chance.choice([512, 1024])
        return Decision(Allocation(workers, memory_mb, chance.choice(facts.stores)), "a whim")

    def review(self, facts):
        return self.first(facts) if self.chance.random() < 0.7 else None


@pytest.mark.parametrize("kind", ["plenty", "poor", "twice", "no cancel", "fickle"])
@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens(tmp_path, seed, kind):
    limits = replace(LIMITS, time_limit_s=30.0, deliveries=2 if kind == "twice" else 1)
    platform = FakePlatform if kind == "no cancel" else CancellingPlatform
    budget_usd = {"plenty": None, "poor": 60 * WORST / 100}.get(kind, 1.0)
    options = {"limits": limits, "platform": platform, "budget_usd": budget_usd}
    if kind == "fickle":
        options |= {"policy": Fickle(random.Random(seed)), "gradient_stores": ["fast"]}
    world = World(tmp_path, **options)
    simulation = Simulation(world, f"{seed} {kind}")
    simulation.submit()
    for _ in range(150):
        simulation.step()
    simulation.calm_down()
    world.over(*world.states)
