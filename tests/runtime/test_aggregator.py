"""Threads as workers over a real server; delays at random before every request to it."""

import itertools
import random
import threading
import time
import uuid

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smlt_tune.errors import UsageError
from smlt_tune.runtime import aggregator as module
from smlt_tune.runtime.aggregator import HierarchicalAggregator, Superseded
from smlt_tune.runtime.keys import FleetKeys
from smlt_tune.runtime.stores.redis_store import RedisStore


class Unsteady:
    """A store that is now and then late, differently each time."""

    def __init__(self, store, seed):
        self._store = store
        self._random = random.Random(seed)

    def __getattr__(self, name):
        verb = getattr(self._store, name)

        def late(*args, **kwargs):
            if self._random.random() < 0.3:
                time.sleep(self._random.random() * 0.003)
            return verb(*args, **kwargs)

        return late


@pytest.fixture(scope="module")
def store(valkey):
    store = RedisStore(valkey.unix_url)
    yield store
    store.close()


class Group:
    """The workers of a generation that nobody else uses."""

    def __init__(self, store, workers, *, shards=0, seed=0):
        self.store = store
        self.workers = workers
        self.shards = shards
        self.seed = seed
        self.keys = FleetKeys(uuid.uuid4().hex).generation("j", 0)

    def worker(self, rank, *, copy=0, on_idle=lambda: None):
        return HierarchicalAggregator(
            Unsteady(self.store, f"{self.seed}.{rank}.{copy}"),
            self.keys,
            rank=rank,
            workers=self.workers,
            shards=self.shards,
            on_idle=on_idle,
        )

    def run(self, work, ranks=None):
        """Runs work(rank, copy) in a thread for each rank; what each returned or raised."""
        ranks = range(self.workers) if ranks is None else ranks
        results = [None] * len(ranks)

        def body(i, rank, copy):
            try:
                results[i] = work(rank, copy)
            except BaseException as error:
                results[i] = error

        copies = [list(ranks[:i]).count(r) for i, r in enumerate(ranks)]
        threads = [
            threading.Thread(target=body, args=(i, r, c), daemon=True)
            for i, (r, c) in enumerate(zip(ranks, copies, strict=True))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        return results

    def names(self):
        client = self.store._run([("KEYS", f"{self.keys.prefix}*")])[0]
        return sorted(name.decode().removeprefix(self.keys.prefix) for name in client)


def expected(vectors, weights):
    """The rank-ordered sum, every operation in the vectors' own precision."""
    kind = vectors[0].dtype.type
    parts = [v * kind(w) if w else np.zeros_like(v) for v, w in zip(vectors, weights, strict=True)]
    return list(itertools.accumulate(parts))[-1]


def bits(array):
    return array.tobytes()


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    workers=st.integers(1, 5),
    shards=st.integers(0, 9),
    size=st.integers(0, 40),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_all_replicas_get_the_sum_in_the_order_of_the_ranks(
    store, workers, shards, size, dtype, seed, data
):
    """Bitwise, whatever arrives when, with duplicates, idle workers and any number of shards."""
    samples = data.draw(st.lists(st.integers(0, 9), min_size=workers, max_size=workers))
    samples[0] += 1
    twice = data.draw(st.lists(st.integers(0, workers - 1), max_size=2))
    leaver = data.draw(st.none() | st.integers(0, workers - 1))
    rng = np.random.default_rng(seed)
    syncs = 3
    vectors = rng.normal(size=(syncs, workers, size)).astype(dtype)
    weights = [s / sum(samples) for s in samples]
    for rank in range(workers):
        if not samples[rank]:
            vectors[:, rank] = np.nan  # of a borrowed sample: must not count
    group = Group(store, workers, shards=shards, seed=seed)

    def work(rank, copy):
        mine = group.worker(rank, copy=copy)
        return [
            mine.reduce(s, vectors[s, rank], weight=weights[rank], check=7, leave=leaves(s, rank))
            for s in range(syncs)
        ]

    def leaves(sync, rank):
        return sync == 1 and rank == leaver

    results = group.run(work, [*range(workers), *twice])
    for sync in range(syncs):
        total = expected(vectors[sync], weights)
        leave = sync == 1 and leaver is not None
        assert [(bits(r[sync][0]), r[sync][1]) for r in results] == [(bits(total), leave)] * len(
            results
        )


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("large", [False, True])
def test_the_shards_of_large_vectors_are_of_the_preferred_size(store, workers, large, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 1000)
    group = Group(store, workers)
    size = 2000 if large else 10
    vectors = [np.full(size, float(r), np.float32) for r in range(workers)]
    results = group.run(
        lambda r, _: group.worker(r).reduce(0, vectors[r], weight=1.0, check=1, leave=False)
    )
    assert {bits(v) for v, _ in results} == {bits(expected(vectors, [1.0] * workers))}
    shards = {n.split(":")[1] for n in group.names() if n.startswith("s0:")}
    assert len(shards) == (-(-8000 // (1000 * workers)) * workers if large else workers)


def test_a_worker_alone_needs_nobody(store):
    group = Group(store, 1)
    vector = np.array([1.0, np.nan, -np.inf, -0.0], np.float32)
    total, leave = group.worker(0).reduce(0, vector, weight=1.0, check=1, leave=True)
    assert bits(total) == bits(vector)
    assert leave


def test_the_scheduler_asks_all_of_them_to_leave_at_the_same_time(store):
    group = Group(store, 3)

    def work(rank, _):
        mine = group.worker(rank)
        seen = []
        for sync in range(30):
            if rank == 2 and sync == 10:
                store.put({group.keys.leave: b"1"}, ttl_s=60)
            vector = np.ones(4, np.float32)
            _, leave = mine.reduce(sync, vector, weight=1.0, check=1, leave=False)
            seen.append(leave)
            if leave:
                break
        return seen

    first, *others = group.run(work)
    assert 10 <= len(first) <= 12
    assert others == [first, first]
    assert first[-1]


@pytest.mark.parametrize("differs", ["check", "size", "dtype"])
def test_workers_that_disagree_all_learn_of_it(store, differs):
    group = Group(store, 3, shards=2)

    def work(rank, _):
        odd = rank == 1
        vector = np.ones(5 if odd and differs == "size" else 4, np.float32)
        if odd and differs == "dtype":
            vector = vector.astype(np.float64)
        check = 8 if odd and differs == "check" else 7
        return group.worker(rank).reduce(0, vector, weight=1.0, check=check, leave=False)

    results = group.run(work)
    assert {type(r) for r in results} == {UsageError}
    assert {str(r) for r in results} == {
        "the workers do not have gradients for the same parameters in the same iteration; a "
        "training step must not depend on the worker's part of the data"
    }


def train(group, rank, *, copy=0, syncs, replay=None):
    mine = group.worker(rank, copy=copy)
    return [
        mine.reduce(
            s,
            np.full(6, rank + s, np.float32),
            weight=1.0,
            check=1,
            leave=False,
            replay=None if replay is None else s // replay * replay,
        )[0][0]
        for s in range(syncs)
    ]


def test_old_values_are_deleted(store):
    group = Group(store, 2, shards=3)
    counts = []

    def work(rank, _):
        mine = group.worker(rank)
        for sync in range(100):
            mine.reduce(sync, np.ones(6, np.float32), weight=1.0, check=1, leave=False)
            if rank == 0:
                counts.append(len(group.names()))

    group.run(work)
    per_sync = 3 + 3  # sums, and the parts that have to travel
    assert max(counts) <= (module.SWEEP_SYNCS + 4) * per_sync + 4
    assert len(counts) == 100


def test_large_values_are_deleted_at_once(store, monkeypatch):
    monkeypatch.setattr(module, "SWEEP_BYTES", 10)
    group = Group(store, 2)
    group.run(lambda rank, _: train(group, rank, syncs=20))
    kept = {int(n[1:].split(":")[0]) for n in group.names() if n.startswith("s")}
    assert kept <= {17, 18, 19}


def test_a_late_duplicate_finds_that_the_others_have_gone_on(store, monkeypatch):
    monkeypatch.setattr(module, "LOOK_AROUND_S", 0.01)
    for zombie in range(3):
        group = Group(store, 3)
        sums = group.run(lambda rank, _, g=group: train(g, rank, syncs=40))
        assert sums[0] == sums[1] == sums[2] == [3 + 3 * s for s in range(40)]
        [late] = group.run(lambda rank, _, g=group: train(g, rank, copy=1, syncs=40), [zombie])
        assert isinstance(late, Superseded)


def test_a_late_duplicate_whose_values_still_exist_gets_the_same(store):
    group = Group(store, 2)
    first, _ = group.run(lambda rank, _: train(group, rank, syncs=3))
    [again] = group.run(lambda rank, _: train(group, rank, copy=1, syncs=3), [0])
    assert again == first


def test_a_late_duplicate_changes_nothing(store):
    """Whose gradient is wrong, say because its state is: the first writer wins."""
    group = Group(store, 2)

    def work(rank, copy):
        time.sleep(0.05 * copy)
        vector = np.full(4, 100.0 if copy else 1.0, np.float32)
        return group.worker(rank, copy=copy).reduce(0, vector, weight=1.0, check=1, leave=False)

    results = group.run(work, [0, 1, 0, 1])
    assert [bits(r[0]) for r in results] == [bits(np.full(4, 2, np.float32))] * 4


@pytest.mark.parametrize("per_iteration", [3, 20])
def test_a_replacement_can_go_through_the_whole_iteration_again(store, monkeypatch, per_iteration):
    """However much was deleted before it: several backward passes in one iteration."""
    monkeypatch.setattr(module, "SWEEP_BYTES", 10)
    group = Group(store, 2, shards=2)
    died_at = 2 * per_iteration - 1  # the last synchronisation of the second iteration
    began_again = threading.Event()

    def work(rank, copy):
        if copy:
            began_again.wait(30)
        mine = group.worker(rank, copy=copy, on_idle=began_again.set)
        sums = []
        for s in range(per_iteration if copy else 0, 3 * per_iteration):
            if rank == 1 and not copy and s == died_at:
                return None
            first = s // per_iteration * per_iteration
            vector = np.full(4, rank + s, np.float32)
            sums.append(
                mine.reduce(s, vector, weight=1.0, check=1, leave=False, replay=first)[0][0]
            )
        return sums

    survivor, _, replacement = group.run(work, [0, 1, 1])
    assert survivor == [1 + 2 * s for s in range(3 * per_iteration)]
    assert replacement == survivor[per_iteration:]


def test_what_is_kept_for_replacements_is_bounded(store, monkeypatch):
    monkeypatch.setattr(module, "SWEEP_BYTES", 10)
    monkeypatch.setattr(module, "REPLAY_BYTES", 500)
    group = Group(store, 2)
    group.run(lambda rank, _: train(group, rank, syncs=60, replay=1000))
    kept = {int(n[1:].split(":")[0]) for n in group.names() if n.startswith("s")}
    assert len(kept) < 30


def test_contributions_to_a_mean_come_in_the_order_of_the_ranks(store):
    group = Group(store, 4)
    got = group.run(lambda r, _: group.worker(r).gather("p", bytes([r]), range(4)))
    assert got == [[b"\0", b"\1", b"\2", b"\3"]] * 4


def test_some_may_be_absent_from_a_mean(store):
    group = Group(store, 4)
    got = group.run(lambda r, _: group.worker(r).gather("p", bytes([r]), [0, 2]), [0, 2])
    assert got == [[b"\0", b"\2"]] * 2


def test_the_first_contribution_to_a_mean_counts(store):
    group = Group(store, 2)

    def work(rank, copy):
        time.sleep(0.05 * copy)
        return group.worker(rank).gather("p", bytes([rank, copy]), range(2))

    assert group.run(work, [0, 1, 1]) == [[b"\0\0", b"\1\0"]] * 3


def test_a_worker_that_waits_looks_around_and_may_give_up(store, monkeypatch):
    monkeypatch.setattr(module, "LOOK_AROUND_S", 0.01)
    group = Group(store, 2)

    class GiveUp(BaseException):
        pass

    looks = []

    def idle():
        looks.append(1)
        if len(looks) == 3:
            raise GiveUp

    worker = group.worker(0, on_idle=idle)
    with pytest.raises(GiveUp):
        worker.reduce(0, np.ones(3, np.float32), weight=1.0, check=1, leave=False)
    looks.clear()
    with pytest.raises(GiveUp):
        worker.wait_for([group.keys.start])
    store.put_once({group.keys.start: b"go"}, ttl_s=60)
    assert worker.wait_for([group.keys.start]) == {group.keys.start: b"go"}
