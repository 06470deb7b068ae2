"""Which isolation this machine offers, and how many cores."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from smlt_tune.backend.platforms.local.cgroup1 import Cgroup1
from smlt_tune.backend.platforms.local.cgroup2 import Cgroup2
from smlt_tune.backend.platforms.local.cgroupfs import counter, mounts, own_paths
from smlt_tune.backend.platforms.local.isolation import Isolation
from smlt_tune.backend.platforms.local.watchdog import Watchdog
from smlt_tune.errors import PlatformError

IsolationName = Literal["auto", "cgroup1", "cgroup2", "watchdog"]

#: Best first.
_WAYS: dict[str, Callable[[], Isolation | str]] = {
    "cgroup1": Cgroup1.find,
    "cgroup2": Cgroup2.find,
    "watchdog": Watchdog,
}
NAMES = ("auto", *_WAYS)


def find(name: str) -> Isolation:
    """The isolation of that name, or for ``auto`` the best that works here.

    Raises:
        PlatformError: It does not work here; says why.
    """
    for way in _WAYS if name == "auto" else (name,):
        isolation = _WAYS[way]()
        if not isinstance(isolation, str):
            return isolation
    raise PlatformError(
        f"isolation={name!r} cannot be used on this machine ({isolation}); "
        "pass isolation='auto' to take what works"
    )


def usable_cores(proc: Path = Path("/proc/self")) -> float:
    """Cores that this process may use: by its affinity and by the quota of its group."""
    cores = float(len(os.sched_getaffinity(0)))
    try:
        return min(cores, _quota_cores(proc))
    except OSError:
        return cores


def _quota_cores(proc: Path) -> float:
    paths = own_paths(proc)
    for mount in mounts(proc, "cgroup"):
        if "cpu" in mount.options:
            group = mount.directory(paths.get("cpu", "/"))
            quota = counter(group / "cpu.cfs_quota_us")
            period = counter(group / "cpu.cfs_period_us")
            return quota / period if quota > 0 and period > 0 else float("inf")
    for mount in mounts(proc, "cgroup2"):
        file = mount.directory(paths.get("", "/")) / "cpu.max"
        if file.is_file():
            quota_text, _, period_text = file.read_text().strip().partition(" ")
            if quota_text != "max":
                return int(quota_text) / int(period_text or 100_000)
    return float("inf")
