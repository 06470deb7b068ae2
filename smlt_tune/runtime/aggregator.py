"""Hierarchical Aggregator (paper 2d, section 3.3): gradients meet in the parameter store.

Every worker cuts its gradient, weighted by its share of the samples, into m shards and uploads
each to the shard's aggregator, which is one of the workers. The aggregator adds the parts up in the
order of the ranks and uploads the sum; everybody downloads the sums. An aggregator keeps its own
part and sum, so for a gradient of M bytes a worker uploads M (1 - 1/n) + M/n and downloads
2 M (1 - 1/n).

Why the result is the same on every replica, bit by bit, whatever arrives when and how often:

- Parts are added in the order of the ranks, not of their arrival.
- The first writer of a key wins. Who comes second, a duplicate or a zombie, uses what is stored.
- All workers, the aggregator included, use the aggregated shard as it is stored.

A shard's header carries whether the generation shall hand over after this iteration. The bit is set
in one place, the aggregated shard 0, so all workers leave at the same iteration without a barrier.
"""

import itertools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smlt_tune.errors import UsageError
from smlt_tune.runtime.keys import GenerationKeys
from smlt_tune.runtime.stores.base import Buffer, ParameterStore

#: Preferred size of a shard in bytes: the store is fastest with values of 256 KB to 4 MB.
SHARD_BYTES = 1 << 20

#: Values live this long in the parameter store if nobody deletes them, in seconds.
TTL_S = 3600.0

#: A blocked worker looks around for this often, in seconds: requests for state, fencing.
LOOK_AROUND_S = 0.2

#: Values of finished synchronisations are deleted in batches of this many bytes or syncs.
SWEEP_BYTES = 16 << 20
SWEEP_SYNCS = 16

#: At most this much is kept for replacements that replay an iteration, in bytes.
REPLAY_BYTES = 1 << 30

#: leave (0/1), 3 bytes unused, checksum of what the vector is made of.
_HEADER = struct.Struct("<B3xI")

Array = NDArray[Any]


class Superseded(BaseException):
    """The others have gone on without this invocation: it is a late duplicate and may vanish."""


class HierarchicalAggregator:
    """Adds vectors up over the workers of one generation.

    Args:
        store: Where the workers meet.
        keys: Of the generation.
        rank: Of this worker.
        workers: Size of the generation (n).
        shards: Number of shards (m); 0 chooses a multiple of n by size.
        on_idle: Called again and again while the worker waits. May raise to end the wait.
        leave_is_wanted: Asked by the aggregator of shard 0 in every synchronisation; None looks for
            the ``leave`` key in the store.
    """

    def __init__(
        self,
        store: ParameterStore,
        keys: GenerationKeys,
        *,
        rank: int,
        workers: int,
        shards: int = 0,
        on_idle: Callable[[], None] = lambda: None,
        leave_is_wanted: Callable[[], bool] | None = None,
    ) -> None:
        self._store = store
        self._keys = keys
        self._rank = rank
        self._workers = workers
        self._shards = shards
        self._on_idle = on_idle
        self._leave_is_wanted = leave_is_wanted
        self._cursor = "0"
        self._litter: dict[int, list[str]] = {}
        self._litter_bytes = 0

    def reduce(
        self,
        sync: int,
        vector: Array,
        *,
        weight: float,
        check: int,
        leave: bool,
        replay: int | None = None,
    ) -> tuple[Array, bool]:
        """The weighted sum of all workers' vectors.

        Args:
            sync: Number of this synchronisation, equal on all workers.
            vector: Shape (p,), float32 or float64; what this worker contributes.
            weight: This worker's share of the samples; the shares add up to 1.
            check: Checksum of what the vector is made of; must be equal on all workers.
            leave: This worker wants the generation to hand over after this iteration.
            replay: The oldest synchronisation that a replacement may have to go through again, the
                first of the present iteration; None if each iteration has only one.

        Returns:
            The sum, shape (p,), and whether the generation hands over.

        Raises:
            UsageError: The workers' vectors are not made of the same things.
            Superseded: The others have finished this synchronisation long ago.
        """
        bounds = self._bounds(vector)
        header = _HEADER.pack(leave, check)
        mine: dict[int, bytearray] = {}
        parts: dict[str, Buffer] = {}
        for shard, (begin, end) in enumerate(bounds):
            content = _weighted(header, vector[begin:end], weight)
            owner = shard % self._workers
            if owner == self._rank:
                mine[shard] = content
            else:
                parts[self._keys.part(sync, shard, self._rank)] = content
        owners = {shard % self._workers for shard in range(len(bounds))} - {self._rank}
        if parts:
            wake = [self._keys.tokens(owner) for owner in sorted(owners)]
            self._store.put_once(parts, ttl_s=TTL_S, announce=wake)
        sums = self._aggregate(sync, mine, vector.dtype)
        rest = {self._keys.shard(sync, s): s for s in range(len(bounds)) if s not in sums}
        for key, total in self._collect(list(rest), sync).items():
            sums[rest[key]] = total
        self._remember(sync, list(mine), sum(map(len, mine.values())), replay)
        return self._assemble(sums, bounds, vector, check)

    def gather(self, place: str, content: bytes, ranks: Sequence[int]) -> list[bytes]:
        """The contributions of some ranks, this one among them, under a name, in their order."""
        names = [self._keys.mean(place, rank) for rank in ranks]
        wake = [self._keys.tokens(r) for r in ranks if r != self._rank]
        own = self._keys.mean(place, self._rank)
        self._store.put_once({own: content}, ttl_s=TTL_S, announce=wake)
        found = self._collect(names, None)
        return [found[name] for name in names]

    def wait_for(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Values of the keys, once all of them exist."""
        return self._collect(list(keys), None)

    def _bounds(self, vector: Array) -> list[tuple[int, int]]:
        count = self._shards
        if not count:
            count = self._workers * -(-vector.nbytes // (self._workers * SHARD_BYTES))
        count = max(1, min(count, vector.size))
        cuts = [vector.size * i // count for i in range(count + 1)]
        return list(itertools.pairwise(cuts))

    def _aggregate(
        self, sync: int, mine: dict[int, bytearray], dtype: np.dtype[Any]
    ) -> dict[int, bytes]:
        """Adds up this worker's shards, each as soon as it is complete."""
        sources = {
            self._keys.part(sync, shard, rank): (shard, rank)
            for shard in mine
            for rank in range(self._workers)
            if rank != self._rank
        }
        parts: dict[int, dict[int, Buffer]] = {s: {self._rank: own} for s, own in mine.items()}
        sums: dict[int, bytes] = {}

        def arrived(found: dict[str, bytes], leave: bool) -> None:
            for key, content in found.items():
                shard, rank = sources[key]
                parts[shard][rank] = content
            ready = [s for s in parts if len(parts[s]) == self._workers]
            done = {s: _fold([parts[s][r] for r in range(self._workers)], dtype) for s in ready}
            if 0 in done and leave:
                done[0] = _HEADER.pack(1, _HEADER.unpack_from(done[0])[1]) + done[0][_HEADER.size :]
            sums.update(self._publish(sync, done))
            for shard in ready:
                del parts[shard]

        if mine:
            self._collect(list(sources), sync, arrived, watch_leave=0 in mine)
        return sums

    def _publish(self, sync: int, done: dict[int, bytes]) -> dict[int, bytes]:
        if not done:
            return {}
        names = {self._keys.shard(sync, s): s for s in done}
        wake = [self._keys.tokens(r) for r in range(self._workers) if r != self._rank]
        content: dict[str, Buffer] = {name: done[s] for name, s in names.items()}
        stored = self._store.put_once(content, ttl_s=TTL_S, announce=wake)
        lost = [name for name, won in zip(names, stored, strict=True) if not won]
        for name, value in zip(lost, self._store.get(lost) if lost else [], strict=True):
            if value is None:
                raise Superseded
            done[names[name]] = value
        return done

    def _collect(
        self,
        names: list[str],
        sync: int | None,
        arrived: Callable[[dict[str, bytes], bool], None] | None = None,
        *,
        watch_leave: bool = False,
    ) -> dict[str, bytes]:
        """Waits until every key exists; hands over what has come in whenever something has."""
        found: dict[str, bytes] = {}
        missing = names
        extra = [self._keys.leave] if watch_leave and self._leave_is_wanted is None else []
        leave = bool(watch_leave and self._leave_is_wanted and self._leave_is_wanted())
        while True:
            values = self._store.get([*missing, *extra]) if missing or extra else []
            leave = leave or bool(extra and values[-1] is not None)
            new = {k: v for k, v in zip(missing, values, strict=False) if v is not None}
            found.update(new)
            missing = [k for k in missing if k not in new]
            if arrived and (new or not missing):
                arrived(new, leave)
            if not missing:
                return found
            before = self._cursor
            self._cursor = self._store.wait(
                self._keys.tokens(self._rank), before, timeout_s=LOOK_AROUND_S
            )
            if self._cursor == before:
                self._check_superseded(sync)
                self._on_idle()

    def _check_superseded(self, sync: int | None) -> None:
        (gone,) = self._store.get([self._keys.gone])
        if sync is not None and gone is not None and sync <= int(gone):
            raise Superseded

    def _remember(self, sync: int, shards: list[int], size: int, replay: int | None) -> None:
        """Deletes what nobody needs any more.

        That this worker has every sum of this synchronisation means that everybody has contributed
        to it, hence has read everything of the one before, and is in the same iteration. Who has to
        be replaced from here on begins at that iteration, whose first synchronisation is
        ``replay``.
        """
        needed = sync if replay is None or self._litter_bytes > REPLAY_BYTES else min(sync, replay)
        old = [s for s in self._litter if s < needed]
        if old and (self._litter_bytes > SWEEP_BYTES or len(old) >= SWEEP_SYNCS):
            if self._rank == 0:
                self._store.put({self._keys.gone: str(max(old)).encode()}, ttl_s=TTL_S)
            self._store.delete([key for s in old for key in self._litter.pop(s)])
            if not self._litter:
                self._litter_bytes = 0
        others = [r for r in range(self._workers) if r != self._rank]
        self._litter[sync] = [self._keys.shard(sync, shard) for shard in shards]
        self._litter[sync] += [self._keys.part(sync, s, r) for s in shards for r in others]
        self._litter_bytes += size * self._workers

    def _assemble(
        self, sums: dict[int, bytes], bounds: list[tuple[int, int]], like: Array, check: int
    ) -> tuple[Array, bool]:
        total = np.empty_like(like)
        for shard, (begin, end) in enumerate(bounds):
            content = sums[shard]
            found = _HEADER.unpack_from(content)[1]
            if found != check or len(content) != _HEADER.size + total[begin:end].nbytes:
                raise UsageError(
                    "the workers do not have gradients for the same parameters in the same "
                    "iteration; a training step must not depend on the worker's part of the data"
                )
            total[begin:end] = np.frombuffer(content, like.dtype, offset=_HEADER.size)
        return total, bool(_HEADER.unpack_from(sums[0])[0])


def _weighted(header: bytes, values: Array, weight: float) -> bytearray:
    content = bytearray(_HEADER.size + values.nbytes)
    content[: _HEADER.size] = header
    if weight:  # a worker without samples contributes zeros, whatever its gradient is
        target = np.frombuffer(content, values.dtype, offset=_HEADER.size)
        np.multiply(values, values.dtype.type(weight), out=target)
    return content


def _fold(parts: Sequence[Buffer], dtype: np.dtype[Any]) -> bytes:
    """Adds up parts in the given order. The header tells if any wants to leave, or disagreement."""
    headers = [_HEADER.unpack_from(part) for part in parts]
    checks = {check for _, check in headers}
    if len(checks) > 1 or len({len(part) for part in parts}) > 1:
        return _HEADER.pack(0, 0)  # every worker's check fails: all raise the same error
    total = bytearray(parts[0])
    _HEADER.pack_into(total, 0, any(leave for leave, _ in headers), checks.pop())
    values = np.frombuffer(total, dtype, offset=_HEADER.size)
    for part in parts[1:]:
        values += np.frombuffer(part, dtype, offset=_HEADER.size)
    return bytes(total)
