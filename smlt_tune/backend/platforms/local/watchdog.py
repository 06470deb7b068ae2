"""Limits without any privilege: the helper watches its instances and stops those that run ahead.

CPU: a bucket fills with the share of the instance and empties with the CPU time it has used; while
it is empty the instance is stopped (SIGSTOP). The mean is exact, the grain is coarser than the
kernel's. Memory: what is resident is looked at as often, and at the end the kernel's own record of
the peak, so that no excess goes unnoticed; a limit on data segments catches a single huge
allocation in between.
"""

# ruff: noqa: D102 - the contracts stand on the protocols

from __future__ import annotations

import os
import resource
import signal
from typing import TYPE_CHECKING

from smlt_tune.backend.platforms.local import linux
from smlt_tune.backend.platforms.local.isolation import Share
from smlt_tune.runtime.clock import Clock

#: How often an instance is looked at, seconds.
INTERVAL_S = 0.005
#: How often its child processes are looked for, seconds.
DESCENDANTS_S = 0.1
#: How much a bucket holds: what an instance that had to wait for a core may catch up on, seconds at
#: its share.
BURST_S = 0.1
#: Data segments may exceed twice the memory by this much: mapped is not yet resident. Bytes.
DATA_MARGIN = 1024 * linux.MB


class Watchdog:
    """Needs nothing but the right to signal one's own children."""

    name = "watchdog"

    def reap(self, clock: Clock) -> None:
        """Nothing is left behind on disk, and instances die with their helper."""

    def open(self) -> None:
        """Nothing to own."""

    def cage(self, number: int, share: Share) -> WatchdogCage:
        return WatchdogCage(share)

    def close(self) -> None:
        """Nothing was made."""


class WatchdogCage:
    """What the helper knows of one instance."""

    interval_s: float | None = INTERVAL_S

    def __init__(self, share: Share) -> None:
        self._share = share
        self._pid = 0
        self._children: list[int] = []
        self._children_bytes = 0
        self._used: dict[int, float] = {}
        self._tokens = 0.0
        self._most = share.cores * BURST_S
        self._looked: float | None = None
        self._looked_for_children = float("-inf")
        self._stopped = False
        self._peak = 0

    def enter(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = linux.status_bytes(os.getpid(), "VmData") or self._share.preloaded.total
        limit += 2 * self._share.memory_mb * linux.MB + DATA_MARGIN
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))

    def adopt(self, pid: int) -> None:
        self._pid = pid

    def resume(self) -> None:
        self._continue()

    def enforce(self, now: float) -> None:
        if now - self._looked_for_children >= DESCENDANTS_S:
            self._looked_for_children = now
            self._children = linux.descendants(self._pid)
            self._children_bytes = sum(map(linux.proportional_bytes, self._children))
        self._measure_memory()
        used = self._cpu_since_last()
        earned_s = INTERVAL_S if self._looked is None else now - self._looked
        self._looked = now
        self._tokens = min(self._tokens + earned_s * self._share.cores - used, self._most)
        if self._tokens <= 0 and not self._stopped:
            self._stopped = True
            linux.signal_all((self._pid, *self._children), signal.SIGSTOP)
        elif self._tokens > 0:
            self._continue()

    def _continue(self) -> None:
        if self._stopped:
            self._stopped = False
            linux.signal_all((self._pid, *self._children), signal.SIGCONT)

    def _cpu_since_last(self) -> float:
        before, self._used = self._used, {}
        for pid in (self._pid, *self._children):
            used = linux.cpu_seconds(pid)
            if used is not None:
                self._used[pid] = used
        return sum(used - before.get(pid, 0.0) for pid, used in self._used.items())

    def _measure_memory(self) -> None:
        now = linux.resident(self._pid)
        if now is not None:
            whole = self._share.whole_bytes(now.total, now.files) + self._children_bytes
            self._peak = max(self._peak, whole)

    def exceeded_mb(self, peak_bytes: int) -> float:
        self._peak = max(self._peak, peak_bytes)
        return self._peak / linux.MB if self._peak > self._share.memory_mb * linux.MB else 0.0

    def kill(self) -> None:
        linux.signal_all(
            {*self._children, *linux.descendants(self._pid)} if self._pid else (), signal.SIGKILL
        )

    def remove(self) -> bool:
        return True


if TYPE_CHECKING:
    from smlt_tune.backend.platforms.local.isolation import Isolation

    _: Isolation = Watchdog()
