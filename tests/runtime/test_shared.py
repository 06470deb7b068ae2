"""Tensors that jobs share: real stores, jobs as objects with a name."""

import uuid

import numpy as np
import pytest

from smlt_tune.errors import StoreUnavailable
from smlt_tune.runtime import keys, shared
from smlt_tune.runtime.shared import (
    SharedTensor,
    SharedTensors,
    SharedTensorsWriter,
    TensorUpdate,
    damping,
    merged,
)
from smlt_tune.runtime.stores.directory import DirectoryStore
from smlt_tune.runtime.stores.redis_store import RedisStore


def array(*values):
    return np.array(values, np.float32)


def update(before, after, version=0):
    return TensorUpdate(np.float32(before), np.float32(after), version)


class Fleet:
    """Stores, and whoever uses them."""

    def __init__(self, url, folder):
        self.name = uuid.uuid4().hex
        self.keys = keys.FleetKeys(self.name).shared("search")
        self.parameters = RedisStore(url)
        self.objects = DirectoryStore(folder)

    def job(self, name=""):
        return SharedTensors(self.name, "search", self.parameters, self.objects, name)

    def writer(self, **options):
        return SharedTensorsWriter(self.job(), **options)

    def train(self, job, change, names, size=2):
        """What a job does: reads, changes, pushes; what it read."""
        known = self.job().read(names)
        nothing = SharedTensor(np.zeros(size, np.float32), 0)
        pairs = {name: known.get(name, nothing) for name in names}
        self.job(job).push(
            {n: TensorUpdate(t.value, t.value + change, t.version) for n, t in pairs.items()}
        )
        return known


@pytest.fixture
def fleet(valkey, tmp_path):
    made = Fleet(valkey.unix_url, tmp_path)
    yield made
    made.parameters.delete_prefix(made.keys.prefix)
    made.parameters.close()


@pytest.mark.parametrize(
    ("known", "new", "expected"),
    [
        pytest.param(None, update([1, 1], [3, 4]), array(3, 4), id="the first one is taken over"),
        pytest.param((array(5, 5), 1), update([5, 5], [6, 7], 1), array(6, 7), id="fresh: whole"),
        pytest.param(
            (array(5, 5), 3), update([1, 1], [2, 3], 1), array(5 + 1 / 3, 5 + 2 / 3), id="stale"
        ),
        pytest.param((array(5, 5), 1), update([5], [7], 1), array(7, 5), id="narrower"),
        pytest.param((array(5), 1), update([5, 1], [7, 2], 1), array(7, 2), id="wider: grows"),
        pytest.param(
            (array(5, np.nan), 1), update([5, 1], [7, 2], 1), array(7, 2), id="nobody trained it"
        ),
        pytest.param(
            (array([1, 2]), 1),
            update([[1], [0]], [[3], [4]], 1),
            array([3, 2], [4, np.nan]),
            id="what no job has had stays unknown",
        ),
        pytest.param((np.float32(5), 1), update(5, 6, 1), np.float32(6), id="a number"),
    ],
)
def test_how_an_update_is_merged(known, new, expected):
    tensor = merged(known and SharedTensor(np.asarray(known[0]), known[1]), new)
    np.testing.assert_allclose(tensor.value, expected, rtol=1e-6)
    assert tensor.version == (known[1] if known else 0) + 1


def test_what_one_job_pushes_the_next_one_reads(fleet):
    writer = fleet.writer()
    assert fleet.train("a", 1.0, ["x", "y"]) == {}
    assert writer.merge() == ["a"]
    assert fleet.train("b", 1.0, ["y", "z"]).keys() == {"y"}
    assert writer.merge() == ["b"]
    found = fleet.job().read(["x", "y", "z", "nothing"])
    assert {name: list(tensor.value) for name, tensor in found.items()} == {
        "x": [1, 1],
        "y": [2, 2],
        "z": [1, 1],
    }
    assert {name: tensor.version for name, tensor in found.items()} == {"x": 1, "y": 2, "z": 1}


def test_concurrent_jobs_lose_no_update(fleet):
    writer = fleet.writer()
    fleet.train("first", 1.0, ["x", "y"])
    writer.merge()
    for job, change, name in [("a", 10.0, "x"), ("b", 100.0, "x"), ("c", 1000.0, "y")]:
        fleet.train(job, change, [name])  # all have read the same
    assert writer.merge() == ["a", "b", "c"]
    found = fleet.job().read(["x", "y"])
    assert found["x"].value[0] == 1 + 10 + 100 * damping(1)
    assert found["y"].value[0] == 1 + 1000  # whoever trained x at the same time


def test_an_update_counts_once_whoever_repeats_it_and_whenever(fleet):
    writer = fleet.writer()
    assert fleet.job("a").push({"x": update([0], [1])})
    assert not fleet.job("a").push({"x": update([0], [5])})  # its restarted worker
    assert writer.merge() == ["a"]
    assert fleet.job("a").push({"x": update([0], [5])})  # a worker that was taken for dead
    assert writer.merge() == []
    assert fleet.writer().merge() == []
    assert list(fleet.job().read(["x"])["x"].value) == [1]
    assert fleet.objects.list(fleet.keys.updates) == []


@pytest.mark.parametrize("lost", [False, True], ids=["hot values stay", "hot values are lost"])
def test_a_client_that_dies_while_it_merges_leaves_nothing_half_done(fleet, lost, monkeypatch):
    writer = fleet.writer()
    fleet.train("a", 1.0, ["x"])
    writer.merge()
    fleet.train("b", 1.0, ["x"])
    with monkeypatch.context() as patch:
        patch.setattr(RedisStore, "put", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # b's values lie in the object store only
            writer.merge()
    if lost:
        fleet.parameters.delete_prefix(fleet.keys.prefix)
        assert fleet.job().read(["x"])["x"].value[0] == 2
    assert fleet.writer().merge() == []
    assert fleet.job().read(["x"])["x"] == SharedTensor(pytest.approx([2, 2]), 2)


def test_what_was_changed_least_recently_leaves_the_parameter_store_not_the_fleet(fleet):
    writer = fleet.writer(hot_bytes=16)  # two tensors of two numbers
    for job, names in [("a", ["x", "y"]), ("b", ["z"]), ("c", ["y"])]:
        fleet.train(job, 1.0, names)
        writer.merge()
    present = fleet.parameters.get([fleet.keys.hot(name) for name in "xyz"])
    assert [content is not None for content in present] == [False, True, True]
    found = fleet.job().read(["x", "y", "z"])
    assert [found[name].value[0] for name in "xyz"] == [1, 2, 1]


def test_objects_whose_values_were_all_replaced_are_deleted(fleet):
    writer = fleet.writer()
    for job, names in [("a", ["x", "y"]), ("b", ["x"]), ("c", ["x"])]:
        fleet.train(job, 1.0, names)
        writer.merge()
    assert len(fleet.objects.list(fleet.keys.tensors)) == 2  # of y and of x


def test_a_reader_looks_again_if_a_merge_takes_objects_away(fleet, monkeypatch):
    writer = fleet.writer(hot_bytes=0)
    fleet.train("a", 1.0, ["x"])
    writer.merge()
    get, steps = fleet.objects.get, iter(["b"])

    def merges_meanwhile(key):
        for job in steps:
            fleet.objects.get = get
            fleet.job(job).push({"x": update([1, 1], [2, 2], 1)})
            writer.merge()
        return get(key)

    monkeypatch.setattr(fleet.objects, "get", merges_meanwhile)
    assert fleet.job().read(["x"])["x"].version == 2


def test_a_reader_gives_up_if_objects_that_should_exist_never_do(fleet, monkeypatch):
    monkeypatch.setattr(shared, "ATTEMPTS", 2)
    fleet.train("a", 1.0, ["x"])
    fleet.writer(hot_bytes=0).merge()
    fleet.objects.delete(fleet.objects.list(fleet.keys.tensors))
    with pytest.raises(StoreUnavailable, match="more than one client"):
        fleet.job().read(["x"])


def test_a_tensor_with_another_number_of_dimensions_changes_nothing(fleet, caplog):
    writer = fleet.writer()
    fleet.job("a").push({"x": update([1], [2]), "y": update([1], [2])})
    fleet.job("b").push({"x": update([[1]], [[9]]), "y": update([1], [3])})
    assert writer.merge() == ["a", "b"]
    found = fleet.job().read(["x", "y"])
    assert list(found["x"].value) == [2]
    assert list(found["y"].value) == [3]
    assert "x has another number of dimensions" in caplog.text
