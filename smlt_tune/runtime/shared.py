"""Tensors that the jobs of a search train together, by name (parameter sharing, as in ENAS).

A job reads the tensors that it needs when it begins, trains them, and pushes what it has made of
them at its end. The client merges what was pushed; it is the only one who writes. So no update is
lost, whatever trains at the same time, and none counts twice: an update has the name of its job,
whichever generation or restarted worker pushes it, and the first one stays.

Consistency. A job sees every tensor as it was between two merges, but not all tensors at the same
time, and misses what is merged while it trains. The more updates a tensor got since a job read it,
the less the job's change counts (:func:`damping`): c jobs at once together go about as far as one
job goes c times, not c times too far.

Where. All values lie in the object store: every merge writes one object with the tensors that it
changed and a list of where all others are. The most recently changed also lie in the parameter
store, from where jobs read them in one round trip. If that is lost, nothing but speed is.

Widths. Tensors of different sizes share their leading slices. What no job has trained yet is NaN.
"""

import json
import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from smlt_tune.errors import ObjectNotFound, StoreUnavailable
from smlt_tune.runtime import keys
from smlt_tune.runtime.aggregator import TTL_S
from smlt_tune.runtime.frameworks.base import META, read_meta
from smlt_tune.runtime.stores.base import ObjectStore, ParameterStore

if TYPE_CHECKING:
    from smlt_tune.runtime.session import Session

_LOG = logging.getLogger(__name__)

Array = NDArray[np.float32]

#: How much of the tensors lies in the parameter store, bytes.
HOT_BYTES = 256 * 2**20
#: How often a reader looks again if merges take objects away from under it.
ATTEMPTS = 20


@dataclass(frozen=True)
class SharedTensor:
    """One tensor as it was between two merges.

    Attributes:
        value: float32; NaN where no job has trained it yet.
        version: How many updates it holds.
    """

    value: Array
    version: int


@dataclass(frozen=True)
class TensorUpdate:
    """What one job has made of one tensor.

    Attributes:
        before: Values with which the job began, float32, finite.
        after: Values at its end, of the same shape, finite.
        version: Of the shared tensor that it read; 0 if there was none.
    """

    before: Array
    after: Array
    version: int


def damping(staleness: int) -> float:
    """Share of a job's change that counts, after so many updates that the job has not seen."""
    return 1.0 / (1.0 + staleness)


def merged(shared: SharedTensor | None, update: TensorUpdate) -> SharedTensor:
    """A shared tensor with one more update in it; it grows where the update is larger.

    Args:
        shared: What there is; None if nothing.
        update: Of the same number of dimensions.
    """
    if shared is None:
        return SharedTensor(update.after.copy(), 1)
    old, shape = shared.value, np.maximum(shared.value.shape, update.after.shape)
    value = np.full(shape, np.nan, np.float32)
    value[_leading(old.shape)] = old
    part = value[_leading(update.after.shape)]
    share = np.float32(damping(max(0, shared.version - update.version)))
    change = share * (update.after - update.before)
    part[...] = np.where(np.isnan(part), update.after, part + change)
    return SharedTensor(value, shared.version + 1)


class SharedTensors:
    """The shared tensors of a search, as its jobs see them.

    Args:
        fleet: Name of the fleet.
        search: Name of the search.
        parameter_store: Holds the most recently changed.
        object_store: Holds all.
        job: Who pushes.
    """

    def __init__(
        self,
        fleet: str,
        search: str,
        parameter_store: ParameterStore,
        object_store: ObjectStore,
        job: str = "",
    ) -> None:
        self.keys = keys.FleetKeys(fleet).shared(search)
        self.parameter_store = parameter_store
        self.object_store = object_store
        self._job = job

    @classmethod
    def of(cls, session: "Session") -> Self | None:
        """Those of the search that a session's job belongs to; None if the session runs alone.

        Jobs of a search are called ``<search>-<number>``.
        """
        home = session._home
        if home is None:
            return None
        fleet, job = home.spec.fleet, home.spec.job
        search = job.rpartition("-")[0] or job
        return cls(fleet, search, home.parameter_store, home.object_store, job)

    def read(self, names: Sequence[str]) -> dict[str, SharedTensor]:
        """The present values, those that do not exist left out.

        Raises:
            StoreUnavailable: Objects vanished again and again while they were looked up.
        """
        for _ in range(ATTEMPTS):
            wanted = [self.keys.index, *map(self.keys.hot, names)]
            index, *hot = self.parameter_store.get(wanted)
            found: dict[str, SharedTensor] = {}
            for content in hot:
                if content is not None:
                    found |= unpack(content)
            try:
                return found | self._cold(index, [name for name in names if name not in found])
            except ObjectNotFound:
                continue  # a merge has replaced it since
        raise StoreUnavailable(
            f"shared tensors vanished {ATTEMPTS} times while they were read: does more than one "
            "client merge the updates of this search?"
        )

    def push(self, updates: Mapping[str, TensorUpdate]) -> bool:
        """Hands in what the job has made of its tensors. The first push of a job counts.

        Returns:
            Whether it was the first.
        """
        arrays: dict[str, Array] = {}
        for name, update in updates.items():
            arrays |= {f"before/{name}": update.before, f"after/{name}": update.after}
        versions = json.dumps({name: update.version for name, update in updates.items()})
        content = save(arrays, {META: json.dumps({"versions": versions})})
        return self.object_store.put(self.keys.update(self._job), content, if_absent=True)

    def newest_index(self) -> "Index":
        """Where everything lies, by the object store."""
        objects = self.object_store.list(self.keys.tensors)
        return Index.of_object(self.object_store.get(objects[-1])) if objects else Index()

    def _cold(self, content: bytes | None, names: Sequence[str]) -> dict[str, SharedTensor]:
        if not names:
            return {}
        index = Index.decode(content) if content is not None else self.newest_index()
        found: dict[str, SharedTensor] = {}
        for number in sorted({index.places[name] for name in names if name in index.places}):
            tensors = unpack(self.object_store.get(self.keys.values(number)))
            here = [name for name in names if index.places.get(name) == number]
            found |= {name: tensors[name] for name in here}
        return found


@dataclass
class Index:
    """Where all shared tensors lie.

    Attributes:
        number: Of the newest object.
        places: By tensor, the number of the object that holds it.
        merged: Jobs whose updates are in the tensors.
    """

    number: int = 0
    places: dict[str, int] = field(default_factory=dict)
    merged: list[str] = field(default_factory=list)

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps([self.number, self.places, self.merged]).encode()

    @classmethod
    def decode(cls, content: bytes | str) -> "Index":
        """From JSON."""
        return cls(*json.loads(content))

    @classmethod
    def of_object(cls, content: bytes) -> "Index":
        """As it was when an object was written."""
        return cls.decode(read_meta(content)["index"])


class SharedTensorsWriter:
    """Merges what jobs push. One client at a time may have one for a search; it needs no thread.

    Args:
        shared: Where the tensors lie.
        hot_bytes: How much of them is kept in the parameter store.
    """

    def __init__(self, shared: SharedTensors, *, hot_bytes: int = HOT_BYTES) -> None:
        self._shared = shared
        self._hot_bytes = hot_bytes
        self._hot: OrderedDict[str, int] = OrderedDict()  # sizes; the least recently changed first
        self._index = shared.newest_index()
        # Hot values of an earlier client may lack what it merged last.
        shared.parameter_store.delete_prefix(shared.keys.prefix)
        self._publish({})

    def merge(self) -> list[str]:
        """Merges everything that was pushed; returns the names of the jobs.

        Repeats what a client that died in it had not finished.
        """
        objects = self._shared.object_store
        names = objects.list(self._shared.keys.updates)
        jobs = {name: self._shared.keys.job_of(name) for name in names}
        fresh = [name for name in names if jobs[name] not in self._index.merged]
        updates = [unpack_updates(objects.get(name)) for name in fresh]
        if updates:
            self._apply(updates, [jobs[name] for name in fresh])
        objects.delete(names)  # those that are not fresh come from workers that were long replaced
        return [jobs[name] for name in fresh]

    def _apply(self, updates: Iterable[Mapping[str, TensorUpdate]], jobs: Sequence[str]) -> None:
        updates = list(updates)
        tensors = self._shared.read(sorted({name for update in updates for name in update}))
        for update in updates:
            for name, each in update.items():
                known = tensors.get(name)
                if known is None or known.value.ndim == each.after.ndim:
                    tensors[name] = merged(known, each)
                else:  # jobs are told when they read; these began before there was anything to read
                    _LOG.warning("%s has another number of dimensions than is shared", name)
        old, number = self._index, self._index.number + 1
        places = {**old.places, **dict.fromkeys(tensors, number)}
        self._index = Index(number, places, [*old.merged, *jobs])
        content = pack(tensors, index=self._index.encode().decode())
        objects = self._shared.object_store
        objects.put(self._shared.keys.values(number), content)
        self._publish(tensors)
        gone = set(old.places.values()) - set(places.values())
        objects.delete([self._shared.keys.values(each) for each in sorted(gone)])

    def _publish(self, tensors: Mapping[str, SharedTensor]) -> None:
        """Puts changed tensors into the parameter store, and takes others out to make room."""
        of = self._shared.keys
        for name, tensor in tensors.items():
            self._hot[name] = tensor.value.nbytes
            self._hot.move_to_end(name)
        room, cold = self._hot_bytes - sum(self._hot.values()), []
        while room < 0:
            name, size = self._hot.popitem(last=False)
            room += size
            cold.append(of.hot(name))
        items = {of.hot(n): pack({n: t}) for n, t in tensors.items() if n in self._hot}
        store = self._shared.parameter_store
        store.put({**items, of.index: self._index.encode()}, ttl_s=TTL_S)
        store.delete(cold)


def pack(tensors: Mapping[str, SharedTensor], **more: str) -> bytes:
    """Tensors and their versions as safetensors, with more strings in the header."""
    versions = json.dumps({name: tensor.version for name, tensor in tensors.items()})
    meta = {META: json.dumps({"versions": versions, **more})}
    return save({name: tensor.value for name, tensor in tensors.items()}, meta)


def unpack(content: bytes) -> dict[str, SharedTensor]:
    """What :func:`pack` was given."""
    versions = json.loads(read_meta(content)["versions"])
    return {name: SharedTensor(array, versions[name]) for name, array in load(content).items()}


def unpack_updates(content: bytes) -> dict[str, TensorUpdate]:
    """What :meth:`SharedTensors.push` was given."""
    arrays = load(content)
    versions: dict[str, int] = json.loads(read_meta(content)["versions"])
    return {
        name: TensorUpdate(arrays[f"before/{name}"], arrays[f"after/{name}"], version)
        for name, version in versions.items()
    }


def _leading(shape: Sequence[int]) -> tuple[Any, ...]:
    """Index of the leading slices; gives a view of numbers too."""
    return (*(slice(size) for size in shape), ...)
