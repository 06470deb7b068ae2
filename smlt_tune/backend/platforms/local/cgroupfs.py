"""Reading and writing the control group file systems."""

import errno
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from smlt_tune.backend.platforms.local import linux
from smlt_tune.backend.platforms.local.isolation import Share, left_behind
from smlt_tune.runtime.clock import Clock

#: How long killed processes are waited for before their groups are left to the next start, seconds.
_REAP_S = 2.0


class KernelCage:
    """What cages have in common whose limits the kernel enforces by itself."""

    interval_s: float | None = None

    def adopt(self, pid: int) -> None:
        """Nothing: the process has entered by itself."""

    def resume(self) -> None:
        """Nothing: the kernel enforces the limits."""

    def enforce(self, now: float) -> None:
        """Nothing: the kernel enforces the limits."""


def killed_at_mb(events: Path, peak: Path, share: Share) -> float:
    """Memory of a function that the kernel has killed for it, MB; 0 if it has not.

    Args:
        events: File of the group with a line ``oom_kill N``.
        peak: File with the highest memory of the group, bytes.
        share: Of the function; says what it shares with the helper on top.
    """
    try:
        text = events.read_text()
    except OSError:
        return 0.0
    kills = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    if kills is None or int(kills[1]) == 0:
        return 0.0
    own = counter(peak) or share.own_bytes
    return (share.preloaded.total + own) / linux.MB


@dataclass(frozen=True)
class Mount:
    """One mounted hierarchy.

    Attributes:
        root: Which of its directories is mounted.
        point: Where.
        options: Of the hierarchy; version 1 names its controllers here.
    """

    root: str
    point: Path
    options: frozenset[str]

    def directory(self, path: str) -> Path:
        """Where the group with that name (as in /proc/PID/cgroup) lies; else the mount itself."""
        if self.root != "/" and (path + "/").startswith(self.root + "/"):
            path = path[len(self.root) :]
        directory = self.point / path.lstrip("/")
        return directory if directory.is_dir() else self.point


def mounts(proc: Path, kind: str) -> list[Mount]:
    """Hierarchies of a kind (``cgroup``, ``cgroup2``) that the process sees."""
    found = []
    for line in (proc / "mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        where, what = before.split(), after.split()
        if what[0] == kind:
            options = frozenset(what[2].split(",")) if len(what) > 2 else frozenset()
            found.append(Mount(where[3], Path(where[4].replace("\\040", " ")), options))
    return found


def own_paths(proc: Path) -> dict[str, str]:
    """Group of the process by controller; version 2 under the empty name."""
    paths = {}
    for line in (proc / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            paths[controller] = path
    return paths


def put(path: Path, value: object, *, optional: bool = False) -> None:
    """Writes one value in one system call, as the kernel wants it.

    Args:
        path: The file.
        value: What to write.
        optional: Go on if the kernel does not know the file or refuses the value.
    """
    try:
        with open(path, "wb", buffering=0) as file:
            file.write(str(value).encode())
    except OSError as error:
        if not optional:
            raise OSError(error.errno, f"{error.strerror} writing {value}", str(path)) from error


def counter(path: Path) -> int:
    """A number; 0 if it cannot be read."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def processes(group: Path) -> list[int]:
    """Processes directly in a group; empty if it is gone."""
    try:
        return [int(line) for line in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def groups_below(group: Path) -> int:
    """How many groups lie directly in a group."""
    return sum(entry.is_dir() for entry in os.scandir(group))


def remove_tree(group: Path) -> None:
    """Removes a group and those below it as far as they are empty."""
    for directory, _, _ in os.walk(group, topdown=False):
        try:
            os.rmdir(directory)
        except OSError as error:
            if error.errno not in {errno.EBUSY, errno.ENOENT, errno.ENOTEMPTY, errno.EACCES}:
                raise


def reap_under(base: Path, clock: Clock) -> None:
    """Kills and removes what dead owners have left under ``base``."""
    deadline = clock.monotonic() + _REAP_S
    for path in left_behind(base):
        while path.exists():
            for directory, _, _ in os.walk(path):
                linux.signal_all(processes(Path(directory)), signal.SIGKILL)
            remove_tree(path)
            if clock.monotonic() >= deadline:
                break  # not ours to wait for; the next start tries again
            clock.sleep(0.001)
