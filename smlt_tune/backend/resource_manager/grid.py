"""The allocations that a job may have."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smlt_tune.backend.resource_manager.observations import Allocation
from smlt_tune.backend.resource_manager.policy import JobFacts, memory_range, most_workers
from smlt_tune.backend.resource_manager.tables import PlatformTable

Array = NDArray[np.float64]

#: Ratio of neighbouring sizes, and up to how many workers (beyond the least) all are in the grid.
MEMORY_STEP, WORKERS_STEP, ALL_WORKERS = 1.25, 1.25, 8


@dataclass(frozen=True)
class Grid:
    """Allocations as arrays of shape (p,); stores by their number."""

    workers: Array
    memory_mb: Array
    store: NDArray[np.int64]

    @classmethod
    def of(cls, allocations: Sequence[Allocation], stores: list[str]) -> "Grid":
        """Of some allocations; a store that is not known any more is taken for the first."""
        numbers = {name: number for number, name in enumerate(stores)}
        return cls(
            np.array([float(a.workers) for a in allocations]),
            np.array([float(a.memory_mb) for a in allocations]),
            np.array([numbers.get(a.store, 0) for a in allocations], dtype=np.int64),
        )

    @classmethod
    def product(cls, workers: list[int], memory_mb: list[int], stores: list[int]) -> "Grid":
        """All combinations."""
        n, m, s = np.meshgrid(workers, memory_mb, stores, indexing="ij")
        return cls(n.ravel().astype(float), m.ravel().astype(float), s.ravel())

    def joined(self, other: "Grid") -> "Grid":
        """This one, then the other."""
        return Grid(
            np.concatenate([self.workers, other.workers]),
            np.concatenate([self.memory_mb, other.memory_mb]),
            np.concatenate([self.store, other.store]),
        )


def grid_of(facts: JobFacts, table: PlatformTable, stores: list[str]) -> Grid:
    """Sizes in equal ratios; all that bends and all small numbers of workers are in it."""
    wanted = facts.stores if facts.bounds.store is None else (facts.bounds.store,)
    usable = [i for i, name in enumerate(stores) if name in wanted] or list(range(len(stores)))
    return Grid.product(_worker_counts(facts), _memory_sizes(facts, table), usable)


def _worker_counts(facts: JobFacts) -> list[int]:
    bounds = facts.bounds
    if bounds.workers is not None:
        return [bounds.workers]
    most = most_workers(facts)
    if facts.functions is not None:
        most = max(bounds.min_workers, min(most, facts.functions))
    counts = set(range(bounds.min_workers, min(most, bounds.min_workers + ALL_WORKERS) + 1))
    count = float(max(counts))
    while count < most:
        count *= WORKERS_STEP
        counts.add(min(most, round(count)))
    return sorted(counts)


def _memory_sizes(facts: JobFacts, table: PlatformTable) -> list[int]:
    bounds, (low, high) = facts.bounds, memory_range(facts)
    if bounds.memory_mb is not None:
        return [bounds.memory_mb]
    sizes = {low, high, *(m for m in table.memory_mb if low <= m <= high)}
    size = float(low)
    while size < high:
        size *= MEMORY_STEP
        sizes.add(min(high, round(size)))
    return sorted(sizes)


def around(grid: Grid, best: int, facts: JobFacts) -> Grid:
    """Between a point of the grid and its neighbours."""
    bounds = facts.bounds
    n, m, store = int(grid.workers[best]), int(grid.memory_mb[best]), int(grid.store[best])

    def between(values: Array, at: int, count: int) -> list[int]:
        place = int(np.searchsorted(values, at))
        low, high = int(values[max(place - 1, 0)]), int(values[min(place + 1, len(values) - 1)])
        step = (high - low) / (count - 1)
        return sorted({round(low + step * number) for number in range(count)} | {at})

    workers = [n] if bounds.workers is not None else between(np.unique(grid.workers), n, 7)
    sizes = [m] if bounds.memory_mb is not None else between(np.unique(grid.memory_mb), m, 11)
    return Grid.product(workers, sizes, [store])
