"""Limits by control groups, version 1: one directory for CPU and one for memory per instance."""

# ruff: noqa: D102 - the contracts stand on the protocols

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from smlt_tune.backend.platforms.local import linux
from smlt_tune.backend.platforms.local.cgroupfs import (
    KernelCage,
    groups_below,
    killed_at_mb,
    mounts,
    own_paths,
    processes,
    put,
    reap_under,
    remove_tree,
)
from smlt_tune.backend.platforms.local.isolation import Share, owner_name, quota_us
from smlt_tune.runtime.clock import Clock

_CONTROLLERS = ("cpu", "memory")
#: Weight of an ordinary process, and the greatest of a group.
_SHARES, _MAX_SHARES = 1024, 262_144


class Cgroup1:
    """Version 1 hierarchies with writable ``cpu`` and ``memory`` controllers.

    Args:
        cpu: Directory under which groups for CPU are made.
        memory: The same for memory.
    """

    name = "cgroup1"

    def __init__(self, cpu: Path, memory: Path) -> None:
        self._bases = tuple(dict.fromkeys((cpu, memory)))
        self._cpu = cpu
        self._memory = memory
        self._owner = ""

    @classmethod
    def find(cls, proc: Path = Path("/proc/self")) -> Cgroup1 | str:
        """Looks for it below the groups of the calling process.

        Args:
            proc: Where ``mountinfo`` and ``cgroup`` of the process lie.

        Returns:
            The isolation, or why it cannot be used.
        """
        found = {}
        paths = own_paths(proc)
        for mount in mounts(proc, "cgroup"):
            for controller in set(_CONTROLLERS) & mount.options:
                found[controller] = mount.directory(paths.get(controller, "/"))
        missing = [name for name in _CONTROLLERS if name not in found]
        if missing:
            return f"no version 1 hierarchy for {' and '.join(missing)} is mounted"
        isolation = cls(found["cpu"], found["memory"])
        try:
            isolation._try_out()
        except OSError as error:
            return f"cannot make groups: {error}"
        return isolation

    def _try_out(self) -> None:
        name = owner_name(f"probe-{os.urandom(4).hex()}")
        made = []
        try:
            for base in self._bases:
                (base / name).mkdir()
                made.append(base / name)
            for path in (
                self._cpu / name / "cpu.cfs_quota_us",
                self._memory / name / "memory.limit_in_bytes",
            ):
                put(path, path.read_text().strip())
        finally:
            for path in made:
                path.rmdir()

    def reap(self, clock: Clock) -> None:
        for base in self._bases:
            reap_under(base, clock)

    def open(self) -> None:
        self._owner = owner_name()
        for base in self._bases:
            (base / self._owner).mkdir()

    def cage(self, number: int, share: Share) -> Cgroup1Cage:
        name = f"{self._owner}/{number}"
        made = Cgroup1Cage(self._cpu / name, self._memory / name, share)
        # To the rest of the machine the owner's group is one competitor: as many as are in it.
        weight = _SHARES * groups_below(self._cpu / self._owner)
        put(self._cpu / self._owner / "cpu.shares", min(weight, _MAX_SHARES), optional=True)
        return made

    def close(self) -> None:
        for base in self._bases:
            remove_tree(base / self._owner)


class Cgroup1Cage(KernelCage):
    """The two groups of one instance."""

    def __init__(self, cpu: Path, memory: Path, share: Share) -> None:
        self._cpu = cpu
        self._memory = memory
        self._share = share
        self._groups = tuple(dict.fromkeys((cpu, memory)))
        for group in self._groups:
            group.mkdir()
        quota, period = quota_us(share.cores)
        put(cpu / "cpu.cfs_period_us", period)
        put(cpu / "cpu.cfs_quota_us", quota)
        put(memory / "memory.limit_in_bytes", share.own_bytes)
        # Never below the limit without swap, hence after it. Missing where swap is not accounted.
        put(memory / "memory.memsw.limit_in_bytes", share.own_bytes, optional=True)
        put(memory / "memory.swappiness", 0, optional=True)

    def enter(self) -> None:
        for group in self._groups:
            put(group / "cgroup.procs", 0)

    def exceeded_mb(self, peak_bytes: int) -> float:
        events, peak = (
            self._memory / "memory.oom_control",
            self._memory / "memory.max_usage_in_bytes",
        )
        return killed_at_mb(events, peak, self._share)

    def kill(self) -> None:
        for group in self._groups:
            linux.signal_all(processes(group), signal.SIGKILL)

    def remove(self) -> bool:
        for group in self._groups:
            remove_tree(group)  # with groups that the function has made below
        return not any(group.exists() for group in self._groups)


if TYPE_CHECKING:
    from smlt_tune.backend.platforms.local.isolation import Isolation

    _: Isolation = Cgroup1(Path(), Path())
