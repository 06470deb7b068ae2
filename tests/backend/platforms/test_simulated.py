"""Functions in virtual time: how they start, end, fail and are billed."""

from itertools import pairwise

import pytest

from smlt_tune.backend.platforms.base import Invocation
from smlt_tune.backend.platforms.simulated import (
    SimulatedPlatform,
    SimulatedTraining,
    SimulationOptions,
)
from smlt_tune.backend.platforms.simulated.changing_prices import ChangingPrices
from smlt_tune.backend.platforms.simulated.stores import (
    SimulatedObjectStore,
    SimulatedParameterStore,
)
from smlt_tune.backend.platforms.simulated.virtual_time import VirtualTime
from smlt_tune.backend.prices import load_prices
from smlt_tune.errors import InvalidInput, ObjectNotFound, PlatformError, Throttled, UsageError
from smlt_tune.runtime import keys, wire
from smlt_tune.runtime.checkpoint import Checkpoints
from smlt_tune.runtime.features import ModelFeatures
from smlt_tune.runtime.position import Position

NAMES = keys.FleetKeys("f").generation("job", 0)


class Cloud:
    """A platform, and a job of one generation whose scheduler is the test."""

    def __init__(self, workers=1, *, start=True, training=None, **options):
        options = {"start_spread": 0.0, "cold_start_s": 1.0, "warm_start_s": 0.1, **options}
        self.platform = SimulatedPlatform(SimulationOptions(**options))
        self.workers, self.said, self.results = workers, [], []
        self.platform.listeners["f"] = self.said.append
        wanted = {"epochs": 2, "iterations": 10, "iteration_s": lambda n, mb, batch: 1.0}
        self.platform.programs["f", "job"] = lambda: SimulatedTraining(
            **{**wanted, "load_s": 0.0, "save_s": 0.5, **(training or {})}
        )
        self.put(open=b"1")
        if start:
            self.put(start=wire.Start(None).encode())

    def put(self, **values):
        items = {getattr(NAMES, name): value for name, value in values.items()}
        wake = [NAMES.tokens(rank) for rank in range(self.workers)]
        self.platform.parameter_store.put_once(items, ttl_s=60, announce=wake)

    def invoke(self, rank=0, *, incarnation=0, joining=False, timeout_s=100.0, memory_mb=1024):
        name = f"job.g0.r{rank}.i{incarnation}"
        spec = wire.WorkerSpec(
            "f", "job", 0, rank, self.workers, incarnation, joining, 0, 0, "", "", {}, "", "", {},
            1.0, timeout_s,
        )  # fmt: skip
        invocation = Invocation(name, memory_mb, timeout_s, spec.encode())
        self.platform.invoke(invocation, self.results.append)
        return name

    def pass_time(self, seconds):
        self.platform.time.sleep(seconds)

    def heard(self, kind):
        return [event for event in self.said if isinstance(event, kind)]

    def endings(self):
        return [result.ending for result in self.results]


def test_a_function_is_billed_from_its_delivery_to_its_end_by_the_millisecond():
    cloud = Cloud(cold_start_s=1.0002)
    cloud.invoke()
    cloud.pass_time(50)
    (result,) = cloud.results
    assert (result.ending, result.cold, result.deliveries) == ("returned", True, 1)
    assert result.start_s == pytest.approx(1.0002)
    assert result.billed_s == 21.501  # start, 20 iterations, a checkpoint
    assert cloud.platform.bill().gb_s == pytest.approx(21.501)
    assert cloud.platform.bill().requests == 1
    kinds = [type(event) for event in cloud.said if not isinstance(event, wire.Progress)]
    assert kinds == [wire.Ready, wire.Reported, wire.Reported, wire.Finished]


def test_an_instance_stays_warm_for_a_while_for_functions_of_its_size():
    cloud = Cloud(keep_alive_s=60)
    for memory_mb, pause_s in ((1024, 50), (1024, 50), (2048, 50), (2048, 120), (2048, 0)):
        cloud.invoke(memory_mb=memory_mb, incarnation=len(cloud.results))
        cloud.pass_time(22 + pause_s)
    cloud.pass_time(30)
    assert [result.cold for result in cloud.results] == [True, False, True, False, True]
    assert [result.start_s for result in cloud.results[:2]] == pytest.approx([1.0, 0.1])


def test_there_is_room_for_so_many_functions():
    cloud = Cloud(workers=3, concurrency=2)
    for rank in (0, 1):
        cloud.invoke(rank)
    with pytest.raises(Throttled, match="wait until"):
        cloud.invoke(2)
    assert cloud.platform.bill().requests == 2


def test_invocations_are_refused_by_chance():
    cloud = Cloud(throttles=0.5, workers=100)
    refused = 0
    for rank in range(100):
        try:
            cloud.invoke(rank)
        except Throttled:
            refused += 1
    assert 30 < refused < 70


def test_the_time_limit_ends_a_function_that_comes_to_no_boundary():
    cloud = Cloud(training={"iteration_s": lambda n, mb, batch: 500.0})
    cloud.invoke(timeout_s=30.0)
    cloud.pass_time(31)
    (result,) = cloud.results
    assert (result.ending, result.billed_s) == ("timed_out", 30.0)
    assert result.detail == "ran longer than its time limit of 30 s"


def test_near_its_time_limit_a_generation_hands_over_by_itself():
    cloud = Cloud()
    cloud.invoke(timeout_s=15.0)
    cloud.pass_time(15)
    (said,) = cloud.heard(wire.HandedOver)
    done = Position.decode(said.checkpoint.rpartition("/")[2])
    assert Position(0, 1, 5) < done < Position(1, 1, 5)
    assert cloud.endings() == ["returned"]
    assert Checkpoints(cloud.platform.objects, "job").latest() == said.checkpoint


def test_a_generation_begins_when_all_are_there_and_where_it_is_told():
    cloud = Cloud(workers=2, start=False)
    cloud.invoke(0)
    cloud.pass_time(5)
    cloud.invoke(1)
    cloud.pass_time(5)
    assert {type(event) for event in cloud.said} == {wire.Ready, wire.Progress}
    assert all(event.waiting for event in cloud.heard(wire.Progress))
    key = Checkpoints(cloud.platform.objects, "job").save(Position(1, 1, 8), b"state")
    cloud.put(start=wire.Start(key).encode())
    cloud.pass_time(3)
    assert [report.index for report in cloud.heard(wire.Reported)] == [1]
    assert [bool(f.reports) for f in cloud.heard(wire.Finished)] == [True, False]


def test_a_generation_leaves_at_the_end_of_an_iteration():
    cloud = Cloud(workers=2)
    cloud.invoke(0)
    cloud.invoke(1)
    cloud.pass_time(4.3)
    cloud.put(leave=b"1")
    cloud.pass_time(1.5)
    said = cloud.heard(wire.HandedOver)
    assert len(said) == 2
    assert Position.decode(said[0].checkpoint.rpartition("/")[2]) == Position(0, 1, 4)
    assert [result.billed_s for result in cloud.results] == [5.5, 5.5]


def test_a_closed_generation_ends_without_a_word():
    cloud = Cloud()
    cloud.invoke()
    cloud.pass_time(3)
    cloud.platform.parameter_store.delete([NAMES.open])
    cloud.pass_time(2)
    assert cloud.endings() == ["returned"]
    assert not cloud.heard(wire.Finished)


def test_a_lost_worker_costs_the_others_one_iteration():
    cloud = Cloud(workers=2)
    cloud.invoke(0)
    victim = cloud.invoke(1)
    cloud.pass_time(4.5)  # in the fourth iteration
    cloud.platform.cancel(victim)
    cloud.pass_time(10)
    assert cloud.endings() == ["cancelled"]
    cloud.invoke(1, incarnation=1, joining=True)
    cloud.pass_time(20)
    # 3 iterations, then from 14.5 on: a start, a gift, 17 iterations, a checkpoint.
    assert cloud.results[1].billed_s == pytest.approx(14.5 + 1.0 + 0.5 + 17 + 0.5)
    assert cloud.endings() == ["cancelled", "returned", "returned"]


def test_functions_crash_and_hang_as_often_as_they_shall():
    cloud = Cloud(workers=400, start=False, crashes_per_hour=36.0, hangs_per_hour=36.0)
    for rank in range(400):
        cloud.invoke(rank)
    cloud.pass_time(99)  # of e = 2.7 functions one survives that long; one does not fall silent
    crashed = cloud.endings().count("crashed")
    assert 200 < crashed < 300
    cloud.said.clear()
    cloud.pass_time(0.9)
    signs = {event.rank for event in cloud.heard(wire.Progress)}
    assert 20 < len(signs) < 100


def test_a_slow_instance_holds_everybody_up():
    times = []
    for share in (0.0, 1.0):
        cloud = Cloud(slow_share=share, slow_factor=3.0)
        cloud.invoke()
        cloud.pass_time(99)
        times.append(cloud.results[0].billed_s)
    assert times == [21.5, 61.5]


def test_epochs_take_the_same_time_wherever_they_are_trained():
    ends = []
    for workers in (1, 2):
        cloud = Cloud(workers=workers, pace_spread=0.3)
        for rank in range(workers):
            cloud.invoke(rank)
        cloud.pass_time(99)
        ends.append(cloud.results[0].billed_s)
    assert ends[0] == ends[1] != 21.5


def test_some_invocations_are_delivered_twice_and_billed_twice():
    cloud = Cloud(duplicates=1.0, concurrency=4)
    assert cloud.platform.limits.deliveries == 2
    assert cloud.platform.limits.functions == 2
    cloud.invoke()
    cloud.pass_time(50)
    (result,) = cloud.results
    assert (result.ending, result.deliveries) == ("returned", 2)
    assert result.billed_s > 21.5
    assert cloud.platform.bill().requests == 2
    assert cloud.platform.bill().gb_s == pytest.approx(result.billed_s)
    assert len(cloud.heard(wire.Finished)) in (1, 2)


def test_cancel_ends_every_delivery_and_ignores_what_is_unknown():
    cloud = Cloud(duplicates=1.0, start=False)
    name = cloud.invoke()
    cloud.pass_time(15)
    cloud.platform.cancel("never heard of")
    cloud.platform.cancel(name)
    cloud.platform.cancel(name)
    assert [(r.ending, r.deliveries) for r in cloud.results] == [("cancelled", 2)]


def test_close_is_idempotent_and_final():
    cloud = Cloud()
    cloud.invoke()
    cloud.platform.close()
    cloud.platform.close()
    assert cloud.endings() == ["cancelled"]
    with pytest.raises(PlatformError, match="closed"):
        cloud.invoke(incarnation=1)


def test_refuses_what_is_out_of_range():
    with pytest.raises(InvalidInput) as caught:
        Cloud().invoke(memory_mb=1, timeout_s=10_000.0)
    assert len(caught.value.mistakes) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1, "concurrency": 0, "min_memory_mb": True},
        {"min_memory_mb": 2048, "max_memory_mb": 1024},
        {"time_limit_s": 0, "progress_s": float("inf"), "slow_factor": "2"},
        {"cold_start_s": -1, "start_spread": float("nan"), "crashes_per_hour": None},
        {"slow_share": 1.1, "duplicates": -0.1, "throttles": 1.0},
        {"price_changes": ((5.0, 2.0), (3.0, 1.0))},
        {"price_changes": ((5.0, 0.0),)},
        {"price_changes": 2.0},
    ],
)
def test_every_mistake_in_the_options_is_listed(wrong):
    with pytest.raises(InvalidInput) as refused:
        SimulationOptions(**wrong)
    mistakes = refused.value.mistakes
    named = [name for name in wrong if any(name in mistake for mistake in mistakes)]
    assert named == list(wrong)


GROWING = {
    "epochs": 3,
    "iterations": (8, 4, 4),
    "batch": (16, 32, 32),
    "iteration_s": lambda n, mb, batch: batch / 16,
    "features": ModelFeatures(1_000, 4_000, 6e3, 1e2),
}


def test_a_batch_size_that_grows_is_said_when_it_does():
    cloud = Cloud(training=GROWING, progress_s=3.0)
    cloud.invoke()
    cloud.pass_time(50)
    told = [(event.batch, event.iterations) for event in cloud.heard(wire.Workload)]
    assert told == [(16, 24), (32, 16)]  # until then the first epoch was expected to be repeated
    assert cloud.results[0].billed_s == pytest.approx(1.0 + 8 + 2 * 8 + 0.5)
    progress = cloud.heard(wire.Progress)
    assert {(event.batch, event.iterations + event.left) for event in progress} == set(told)
    measured = {(event.batch, event.iteration_s) for event in progress if event.chunk}
    assert measured == {(16, 1.0), (32, 2.0)}


def test_a_run_whose_epochs_differ_goes_on_where_it_was():
    training = SimulatedTraining(**GROWING)
    for done in range(training.total + 1):
        assert training.done_at(training.position(done)) == done
    assert [training.epoch_at(done) for done in (0, 7, 8, 11, 12, 16)] == [0, 0, 1, 1, 2, 3]
    cloud = Cloud(start=False, training=GROWING)
    cloud.put(start=wire.Start(f"c/{Position(1, 1, 2).encode()}").encode())
    cloud.invoke()
    cloud.pass_time(50)
    assert cloud.results[0].billed_s == pytest.approx(1.0 + 6 * 2 + 0.5)
    assert [event.index for event in cloud.heard(wire.Reported)] == [1, 2]


def test_every_mistake_in_a_training_is_listed():
    with pytest.raises(InvalidInput) as refused:
        SimulatedTraining(epochs=0, iterations=1.5, iteration_s=2.0, memory_mb=-1, load_s=None)
    assert len(refused.value.mistakes) == 5
    with pytest.raises(InvalidInput) as refused:
        SimulatedTraining(epochs=2, iterations=(1, 0), iteration_s=lambda *_: 1.0, batch=(8, 8, 8))
    assert len(refused.value.mistakes) == 2


class TestVirtualTime:
    """The clock and its agenda."""

    def test_things_happen_when_they_are_due_in_the_order_of_the_agenda(self):
        time, seen = VirtualTime(), []

        def note(name):
            seen.append((time.monotonic(), name))

        time.after(2.0, lambda: note("c"))
        time.after(1.0, lambda: note("a"))
        time.after(1.0, lambda: (note("b"), time.after(0.0, lambda: note("next"))))
        time.after(1.0, lambda: note("never")).cancel()
        time.after(float("inf"), lambda: note("never"))
        time.sleep(1.5)
        assert seen == [(1.0, "a"), (1.0, "b"), (1.0, "next")]
        assert (time.monotonic(), time.wall() - VirtualTime().wall()) == (1.5, 1.5)
        assert time.step()
        assert time.monotonic() == 2.0
        assert not time.step()

    def test_what_happens_cannot_wait(self):
        time = VirtualTime()
        time.after(1.0, lambda: time.after(1.0, lambda: None) and time.sleep(5.0))
        with pytest.raises(UsageError, match="put on the agenda"):
            time.sleep(3.0)


def test_the_parameter_store_keeps_the_first_and_wakes_who_watches():
    time = VirtualTime()
    store, woken = SimulatedParameterStore(time), []
    store.watch("to0", lambda: woken.append(time.monotonic()))
    assert store.put_once({"a:1": b"x", "b": b"y"}, ttl_s=1, announce=["to0", "to1"]) == [True] * 2
    assert store.put_once({"a:1": b"z", "a:2": b"z"}, ttl_s=1) == [False, True]
    store.put({"b": b"new"}, ttl_s=1)
    assert woken == []
    time.sleep(1)
    assert woken == [0.0]
    store.unwatch("to0")
    store.put_once({}, ttl_s=1, announce=["to0"])
    time.sleep(1)
    assert woken == [0.0]
    assert store.get(["b", "a:1", "none"]) == [b"new", b"x", None]
    assert store.delete_prefix("a:") == 2
    store.delete(["b", "none"])
    assert store.get(["a:1", "a:2", "b"]) == [None] * 3


def test_the_object_store_keeps_lists_and_deletes():
    store = SimulatedObjectStore()
    assert store.put("jobs/a/2", b"2")
    assert store.put("jobs/a/1", b"1", if_absent=True)
    assert not store.put("jobs/a/1", b"x", if_absent=True)
    assert store.put("jobs/ab", b"3")
    assert store.list("jobs/a/") == ["jobs/a/1", "jobs/a/2"]
    assert store.get("jobs/a/1") == b"1"
    store.delete(["jobs/a/1", "none"])
    assert store.list("") == ["jobs/a/2", "jobs/ab"]
    with pytest.raises(ObjectNotFound):
        store.get("jobs/a/1")


def test_prices_change_when_they_shall_and_the_dearest_to_come_is_reserved():
    time, prices = VirtualTime(), load_prices()
    changing = ChangingPrices.of(prices, ((10.0, 3.0), (20.0, 0.5)), time)
    once = prices.invocation_usd(1024, 1000.0)
    worst = prices.worst_case_usd(1024, 1000.0)
    seen = []
    for _ in range(3):
        seen.append((changing.invocation_usd(1024, 1000.0), changing.worst_case_usd(1024, 1000.0)))
        time.sleep(10.0)
    expected = [(once, 3 * worst), (3 * once, 3 * worst), (once / 2, worst / 2)]
    assert [a for a, _ in seen] == pytest.approx([a for a, _ in expected], abs=1e-9)
    assert [b for _, b in seen] == pytest.approx([b for _, b in expected], abs=1e-9)
    assert all(before[1] >= after[0] for before, after in pairwise(seen))
