"""Limits by control groups, version 2: one directory per instance."""

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

_CONTROLLERS = frozenset({"cpu", "memory"})
#: Weight of an ordinary group, and the greatest.
_WEIGHT, _MAX_WEIGHT = 100, 10_000


class Cgroup2:
    """A version 2 group that we may write to, with ``cpu`` and ``memory`` for its children.

    Args:
        base: The group under which groups are made.
    """

    name = "cgroup2"

    def __init__(self, base: Path) -> None:
        self._base = base
        self._owner = base

    @classmethod
    def find(cls, proc: Path = Path("/proc/self")) -> Cgroup2 | str:
        """Looks for a group that we may use: that of the calling process or one above it.

        A group with processes cannot hand controllers on to its children, hence the search
        upwards; and a process may move only within a group that its user may write to, hence no
        search elsewhere.

        Args:
            proc: Where ``mountinfo`` and ``cgroup`` of the process lie.

        Returns:
            The isolation, or why it cannot be used.
        """
        mounted = mounts(proc, "cgroup2")
        if not mounted:
            return "no version 2 hierarchy is mounted"
        reasons = []
        for mount in mounted:
            own = mount.directory(own_paths(proc).get("", "/"))
            for group in (own, *own.parents):
                if not group.is_relative_to(mount.point):
                    break
                try:
                    _hand_on(group)
                    cls(group)._try_out()
                except OSError as error:
                    reasons.append(f"{group}: {error}")
                else:
                    return cls(group)
        return "; ".join(reasons)

    def _try_out(self) -> None:
        group = self._base / owner_name(f"probe-{os.urandom(4).hex()}")
        group.mkdir()
        try:
            for name in ("cpu.max", "memory.max"):
                put(group / name, (group / name).read_text().strip())
        finally:
            group.rmdir()

    def reap(self, clock: Clock) -> None:
        reap_under(self._base, clock)

    def open(self) -> None:
        self._owner = self._base / owner_name()
        self._owner.mkdir()
        _hand_on(self._owner)

    def cage(self, number: int, share: Share) -> Cgroup2Cage:
        made = Cgroup2Cage(self._owner / str(number), share)
        # To the rest of the machine the owner's group is one competitor: as many as are in it.
        weight = min(_WEIGHT * groups_below(self._owner), _MAX_WEIGHT)
        put(self._owner / "cpu.weight", weight, optional=True)
        return made

    def close(self) -> None:
        remove_tree(self._owner)


def _hand_on(group: Path) -> None:
    """Makes the controllers available to the children of a group.

    Raises:
        OSError: It has not got them itself, or has processes of its own, or we may not.
    """
    missing = _CONTROLLERS - set((group / "cgroup.controllers").read_text().split())
    if missing:
        raise OSError(f"the controllers {', '.join(sorted(missing))} are not available")
    if not os.access(group / "cgroup.procs", os.W_OK):
        raise OSError("not writable")
    wanted = _CONTROLLERS - set((group / "cgroup.subtree_control").read_text().split())
    if wanted:
        put(group / "cgroup.subtree_control", " ".join(f"+{name}" for name in sorted(wanted)))


class Cgroup2Cage(KernelCage):
    """The group of one instance."""

    def __init__(self, group: Path, share: Share) -> None:
        self._group = group
        self._share = share
        group.mkdir()
        quota, period = quota_us(share.cores)
        put(group / "cpu.max", f"{quota} {period}")
        put(group / "memory.max", share.own_bytes)
        put(group / "memory.swap.max", 0, optional=True)
        # A function that exceeds its memory ends as a whole.
        put(group / "memory.oom.group", 1, optional=True)

    def enter(self) -> None:
        put(self._group / "cgroup.procs", 0)

    def exceeded_mb(self, peak_bytes: int) -> float:
        events, peak = self._group / "memory.events", self._group / "memory.peak"
        return killed_at_mb(events, peak, self._share)

    def kill(self) -> None:
        try:
            put(self._group / "cgroup.kill", 1)
        except OSError:  # before Linux 5.14
            linux.signal_all(processes(self._group), signal.SIGKILL)

    def remove(self) -> bool:
        remove_tree(self._group)  # with groups that the function has made below
        return not self._group.exists()


if TYPE_CHECKING:
    from smlt_tune.backend.platforms.local.isolation import Isolation

    _: Isolation = Cgroup2(Path())
