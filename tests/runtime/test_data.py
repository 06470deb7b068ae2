import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smlt_tune.backend import artifact_manager
from smlt_tune.errors import InvalidInput, ObjectDamaged, ObjectNotFound
from smlt_tune.runtime import keys
from smlt_tune.runtime.data import (
    DataIndex,
    DataIterator,
    UploadedDataset,
    dataset_size,
    encode_shard,
    minibatch_buffer,
)
from smlt_tune.runtime.stores.directory import DirectoryStore


def iterator(size=10, batch_size=4, *, rank=0, workers=1, **changes):
    given = dict(shuffle=True, drop_last=False, seed=0, epoch=0, loop=1) | changes
    return DataIterator(size=size, batch_size=batch_size, rank=rank, workers=workers, **given)


def batches(workers, **changes):
    """The global batches, each put together from the workers' parts."""
    parts = [
        list(iterator(rank=r, workers=workers, **changes).minibatches()) for r in range(workers)
    ]
    return [
        [i for p in row for i in p.indices[: p.samples].tolist()]
        for row in zip(*parts, strict=True)
    ]


loops = st.fixed_dictionaries(
    {
        "size": st.integers(0, 60),
        "batch_size": st.integers(1, 70),
        "shuffle": st.booleans(),
        "drop_last": st.booleans(),
        "seed": st.integers(0, 3),
        "epoch": st.integers(-1, 3),
    }
)


@given(loops, st.integers(1, 12))
def test_the_parts_of_all_workers_make_up_the_same_batches_for_any_number_of_them(loop, workers):
    assert batches(workers, **loop) == batches(1, **loop)


@given(loops)
def test_every_sample_comes_exactly_once_in_an_epoch(loop):
    found = batches(1, **loop)
    seen = [i for batch in found for i in batch]
    size, batch_size = loop["size"], loop["batch_size"]
    rest = size % batch_size if loop["drop_last"] else 0
    assert len(seen) == len(set(seen)) == size - rest
    assert set(seen) <= set(range(size))
    assert len(found) == len(iterator(**loop))
    assert {len(b) for b in found[:-1]} <= {batch_size}
    if not loop["shuffle"]:
        assert seen == list(range(size - rest))


@given(loops, st.integers(1, 5), st.integers(0, 10))
def test_a_loop_continues_anywhere_as_if_it_had_run_from_the_start(loop, workers, first):
    for rank in range(workers):
        data = iterator(rank=rank, workers=workers, **loop)
        whole, rest = list(data.minibatches()), list(data.minibatches(first))
        assert [b.iteration for b in rest] == [b.iteration for b in whole][first:]
        assert [b.indices.tolist() for b in rest] == [b.indices.tolist() for b in whole[first:]]


@given(loops, st.integers(1, 12))
def test_a_worker_without_a_sample_borrows_one_that_does_not_count(loop, workers):
    for rank in range(workers):
        for batch in iterator(rank=rank, workers=workers, **loop).minibatches():
            assert len(batch.indices) == max(1, batch.samples)
            assert batch.shuffled == loop["shuffle"]
    for batch in iterator(rank=0, workers=workers, **loop).minibatches():
        assert batch.samples > 0  # rank 0 always has one


def test_every_epoch_and_loop_has_its_own_order():
    orders = {str(batches(1, epoch=e, loop=k)) for e in range(3) for k in range(3)}
    assert len(orders) == 9


# --- what is a data set ---------------------------------------------------------------------------


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, i):
        return {"x": torch.tensor([float(i)]), "y": i * i}


@pytest.mark.parametrize(
    ("dataset", "size"),
    [
        (np.zeros((3, 2)), 3),
        ((np.zeros(4), torch.zeros(4, 2)), 4),
        ([np.zeros(4)], 4),
        (list(range(6)), 6),
        (Squares(), 5),
        (torch.utils.data.TensorDataset(torch.zeros(7)), 7),
        ([], 0),
    ],
)
def test_what_is_a_data_set(dataset, size):
    assert dataset_size(dataset) == size


def test_what_is_none():
    with pytest.raises(InvalidInput) as caught:
        dataset_size(iter([1]))
    assert str(caught.value) == (
        "batches() needs a data set with __len__ and __getitem__, a tuple of arrays, or the name "
        "of an uploaded one; got a list_iterator"
    )
    with pytest.raises(InvalidInput) as caught:
        dataset_size((np.zeros(3), np.zeros(4)))
    assert str(caught.value) == "the arrays of a data set differ in length: [3, 4]"


def test_samples_become_arrays_of_the_framework():
    some = np.array([2, 0])
    native = torch.from_numpy
    x, y = np.arange(6.0).reshape(3, 2), np.arange(3)
    assert minibatch_buffer(x, native)(some).tolist() == [[4, 5], [0, 1]]
    a, b = minibatch_buffer((x, y), native)(some)
    assert (a.tolist(), b.tolist()) == ([[4, 5], [0, 1]], [2, 0])
    (only,) = minibatch_buffer((y,), native)(some)
    assert only.tolist() == [2, 0]


def test_tensors_stay_what_they_are():
    x = torch.arange(3, dtype=torch.bfloat16)
    got = minibatch_buffer((x,), lambda a: a)(np.array([1]))
    assert got[0].dtype == torch.bfloat16


def test_samples_are_collated_as_by_a_data_loader():
    batch = minibatch_buffer(Squares(), lambda a: a)(np.array([1, 3]))
    expected = next(iter(torch.utils.data.DataLoader(Squares(), 2, sampler=[1, 3])))
    assert batch["x"].tolist() == expected["x"].tolist() == [[1.0], [3.0]]
    assert batch["y"].tolist() == expected["y"].tolist() == [1, 9]


# --- uploaded data sets ---------------------------------------------------------------------------


class Counting(DirectoryStore):
    """Remembers what was read."""

    def __init__(self, root):
        super().__init__(root)
        self.read = []

    def get(self, key):
        self.read.append(key)
        return super().get(key)


def uploaded(tmp_path, monkeypatch, data, rows):
    """A data set uploaded in shards of a few rows."""
    arrays = data if isinstance(data, tuple) else (data,)
    row = sum(a.nbytes for a in arrays) // len(arrays[0])
    monkeypatch.setattr(artifact_manager, "DATA_SHARD_BYTES", rows * row)
    store = Counting(tmp_path)
    manager = artifact_manager.ArtifactManager(store)
    manager.upload("d", data)
    return UploadedDataset(store, manager.datasets["d"]), store


@pytest.mark.parametrize("rows", [1, 3, 10, 11])
def test_an_uploaded_data_set_is_like_its_arrays(tmp_path, monkeypatch, rows):
    x = np.arange(20.0, dtype=np.float32).reshape(10, 2)
    y = np.arange(10) % 3
    dataset, _ = uploaded(tmp_path, monkeypatch, (x, y), rows)
    assert dataset_size(dataset) == len(dataset) == 10
    indices = np.array([9, 0, 4, 4, 3])
    a, b = minibatch_buffer(dataset, lambda v: v)(indices)
    assert np.array_equal(a, x[indices])
    assert np.array_equal(b, y[indices])
    assert (a.dtype, b.dtype) == (x.dtype, y.dtype)
    assert dataset[7][0].tolist() == [x[7].tolist()]


def test_a_single_array_comes_back_as_one(tmp_path, monkeypatch):
    x = np.arange(10)
    dataset, _ = uploaded(tmp_path, monkeypatch, x, 4)
    assert dataset.take(np.array([8, 1])).tolist() == [8, 1]


def test_only_the_shards_that_are_needed_are_fetched_and_only_once(tmp_path, monkeypatch):
    dataset, store = uploaded(tmp_path, monkeypatch, np.arange(10), 2)
    assert [k.rsplit("/", 1)[1] for k in store.read] == ["index"]
    store.read.clear()
    for _ in range(2):
        dataset.take(np.array([3, 9, 2]))
    assert sorted(k.rsplit("/", 1)[1] for k in store.read) == ["000001", "000004"]


def test_a_damaged_shard_is_named(tmp_path, monkeypatch):
    dataset, store = uploaded(tmp_path, monkeypatch, np.arange(10), 5)
    key = next(k for k in store.list("data/") if k.endswith("000001"))
    store.put(key, b"\x08\0\0\0\0\0\0\0{}{}{}{}rubbish")
    with pytest.raises(ObjectDamaged, match=re.escape(f"shard {key} is damaged; upload the data")):
        dataset.take(np.array([7]))
    store.delete([key])
    with pytest.raises(ObjectNotFound):
        dataset.take(np.array([7]))


def test_the_index_is_json(tmp_path):
    store = DirectoryStore(tmp_path)
    store.put(keys.data_index("d"), DataIndex(size=2, rows=2, arrays=1, single=True).encode())
    store.put(keys.data_shard("d", 0), encode_shard([np.arange(4)[::2]]))
    assert UploadedDataset(store, "d").take(np.array([1])).tolist() == [2]
