"""Data Iterator and Minibatch Buffer (paper 2a, 2b).

The data iterator decides which samples make up an iteration's global batch and which part of it
this worker gets; that depends on nothing but (seed, epoch, loop, iteration) and (rank, workers).
The minibatch buffer turns a part into arrays. An uploaded data set lies in the object store in
shards; a worker fetches a shard when it first needs a sample of it.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from smlt_tune.errors import InvalidInput, ObjectDamaged
from smlt_tune.runtime import keys
from smlt_tune.runtime.position import part, sample_order
from smlt_tune.runtime.stores.base import ObjectStore

#: Largest shard of an uploaded data set, in bytes.
DATA_SHARD_BYTES = 250_000_000

Indices = NDArray[np.int64]
Fetch = Callable[[Indices], Any]


@dataclass(frozen=True)
class Minibatch:
    """One worker's part of one iteration.

    Attributes:
        iteration: Number within the loop.
        indices: Samples of the data set, shape (k,); never empty.
        samples: How many of them count. 0 where the global batch is smaller than the number of
            workers: the worker then works on a borrowed sample, whose gradient has no weight.
        total: Size of the global batch.
        shuffled: The loop visits its samples in random order.
    """

    iteration: int
    indices: Indices
    samples: int
    total: int
    shuffled: bool


@dataclass(frozen=True)
class DataIterator:
    """The minibatches of one loop over a data set.

    Attributes:
        size: Samples in the data set.
        batch_size: Global batch size.
        shuffle: Visit the samples in random order, a different one each epoch.
        drop_last: Leave out the last batch if it is smaller than the others.
        seed: Of the job.
        epoch: Number of the epoch.
        loop: Number of the loop in the epoch.
        rank: Of this worker.
        workers: How many share the batches.
    """

    size: int
    batch_size: int
    shuffle: bool
    drop_last: bool
    seed: int
    epoch: int
    loop: int
    rank: int
    workers: int

    def __len__(self) -> int:
        """Iterations of the loop."""
        full, rest = divmod(self.size, self.batch_size)
        return full + bool(rest and not self.drop_last)

    def minibatches(self, first: int = 0) -> Iterator[Minibatch]:
        """This worker's parts, from the iteration ``first`` on."""
        order = (
            sample_order(self.size, seed=self.seed, epoch=self.epoch, loop=self.loop)
            if self.shuffle
            else np.arange(self.size, dtype=np.int64)
        )
        for iteration in range(first, len(self)):
            start = iteration * self.batch_size
            stop = min(start + self.batch_size, self.size)
            begin, end = part(start, stop, rank=self.rank, workers=self.workers)
            indices = order[begin:end] if end > begin else order[start : start + 1]
            yield Minibatch(iteration, indices, end - begin, stop - start, self.shuffle)


def dataset_size(dataset: Any) -> int:
    """Number of samples. Raises InvalidInput for what is no data set."""
    if isinstance(dataset, tuple | list) and dataset and all(_is_array(a) for a in dataset):
        sizes = {len(a) for a in dataset}
        if len(sizes) > 1:
            raise InvalidInput(
                f"the arrays of a data set differ in length: {[len(a) for a in dataset]}"
            )
        return sizes.pop()
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InvalidInput(
            f"batches() needs a data set with __len__ and __getitem__, a tuple of arrays, or the "
            f"name of an uploaded one; got a {type(dataset).__name__}"
        )
    return len(dataset)


def minibatch_buffer(dataset: Any, native: Callable[[Any], Any]) -> Fetch:
    """A function that gives the samples of a data set under some indices.

    Args:
        dataset: A tuple or list of arrays or tensors, one array or tensor, or anything with
            ``__getitem__``, whose samples are collated as PyTorch's ``DataLoader`` does.
        native: Numpy arrays as the tensors of the framework in use.
    """
    if isinstance(dataset, UploadedDataset):
        return lambda indices: _map(native, dataset.take(indices))
    if _is_array(dataset):
        return lambda indices: native(_rows(dataset, indices))
    if isinstance(dataset, tuple | list) and all(_is_array(a) for a in dataset):
        return lambda indices: tuple(native(_rows(array, indices)) for array in dataset)
    return lambda indices: _collate([dataset[int(i)] for i in indices], native)


def _rows(array: Any, indices: Indices) -> Any:
    """Some rows; for tensors by ``index_select``, several times as fast as by ``[]`` with numpy."""
    select = getattr(array, "index_select", None)
    if select is None:
        return array[indices]
    from torch import from_numpy

    return select(0, from_numpy(indices))


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "__getitem__")


def _map(function: Callable[[Any], Any], arrays: Any) -> Any:
    return tuple(map(function, arrays)) if isinstance(arrays, tuple) else function(arrays)


def _collate(samples: list[Any], native: Callable[[Any], Any]) -> Any:
    if "torch" in sys.modules:
        from torch.utils.data import default_collate

        return default_collate(samples)
    if isinstance(samples[0], tuple | list):
        return tuple(native(np.stack(column)) for column in zip(*samples, strict=True))
    return native(np.stack(samples))


@dataclass(frozen=True)
class DataIndex:
    """Describes an uploaded data set; the object under its ``index`` key.

    Attributes:
        size: Number of samples.
        rows: Samples in each shard but the last.
        arrays: How many arrays make up a sample.
        single: The data set is one array, not a tuple of arrays.
    """

    size: int
    rows: int
    arrays: int
    single: bool

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()


def encode_shard(arrays: Sequence[NDArray[Any]]) -> bytes:
    """Rows of a data set as one object."""
    return save_arrays({str(i): np.ascontiguousarray(array) for i, array in enumerate(arrays)})


class UploadedDataset:
    """A data set in the object store. Shards are fetched when they are first needed and kept.

    Args:
        store: Where it lies.
        digest: SHA-256 of its index and shards' digests, under which it was uploaded.
    """

    def __init__(self, store: ObjectStore, digest: str) -> None:
        self._store = store
        self._digest = digest
        self._index = DataIndex(**json.loads(store.get(keys.data_index(digest))))
        self._shards: dict[int, Mapping[str, NDArray[Any]]] = {}

    def __len__(self) -> int:
        return self._index.size

    def __getitem__(self, index: int) -> Any:
        return self.take(np.array([index]))

    def take(self, indices: Indices) -> Any:
        """The samples under some indices: arrays of shape (k, ...)."""
        numbers, rows = indices // self._index.rows, indices % self._index.rows
        result: list[NDArray[Any]] = []
        for number in np.unique(numbers):
            shard = self._shard(int(number))
            here = numbers == number
            for i in range(self._index.arrays):
                values = shard[str(i)]
                if len(result) == i:
                    result.append(np.empty((len(indices), *values.shape[1:]), values.dtype))
                result[i][here] = values[rows[here]]
        return result[0] if self._index.single else tuple(result)

    def _shard(self, number: int) -> Mapping[str, NDArray[Any]]:
        if number not in self._shards:
            key = keys.data_shard(self._digest, number)
            try:
                self._shards[number] = load_arrays(self._store.get(key))
            except (ValueError, SafetensorError) as error:
                raise ObjectDamaged(f"shard {key} is damaged; upload the data set again") from error
        return self._shards[number]
