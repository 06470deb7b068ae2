"""What is asked of the Linux kernel directly: prctl and /proc."""

import ctypes
import os
import re
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PAGE = os.sysconf("SC_PAGE_SIZE")
_libc = ctypes.CDLL(None, use_errno=True)

MB = 1024 * 1024


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def die_with_parent(parent: int) -> None:
    """The kernel kills the calling process as soon as ``parent`` is dead, however it dies."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Processes that descendants leave behind become children of the calling process."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


@dataclass(frozen=True)
class Resident:
    """Resident memory of a process.

    Attributes:
        total: All of it, bytes.
        files: The part that maps files or shared memory, bytes.
    """

    total: int
    files: int


def resident(pid: int) -> Resident | None:
    """Resident memory of a process; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_bytes().split()
    except OSError:
        return None
    return Resident(int(fields[1]) * _PAGE, int(fields[2]) * _PAGE)


def status_bytes(pid: int, field: str) -> int:
    """A memory field of /proc/PID/status, bytes; 0 if it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def proportional_bytes(pid: int) -> int:
    """Memory of a process where shared pages are divided by those who share them, bytes."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def forget_peak() -> None:
    """The peak of the calling process starts anew from what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # a kernel without it: the peak is the instance's, as Lambda reports it


def cpu_seconds(pid: int) -> float | None:
    """CPU time of a process and all its threads, also of those that ended; None if it is gone."""
    try:
        # NOTE: clock_getcpuclockid(3): exact to nanoseconds, where /proc/PID/stat counts ticks.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return None


def stat_fields(pid: int | str) -> list[str]:
    """Fields of /proc/PID/stat from the third (state) on; empty if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()


def start_ticks(pid: int) -> int:
    """When a process started, in ticks since boot; 0 if it is gone. Tells reused ids apart."""
    fields = stat_fields(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else 0


def pid_namespace() -> int:
    """Identifies the set of processes that this one can see."""
    return os.stat("/proc/self/ns/pid").st_ino


def marked(mark: str) -> list[int]:
    """Processes that have a text on their command line or in the environment they began with."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            for file in ("cmdline", "environ"):
                try:
                    data = Path(f"/proc/{name}/{file}").read_bytes()
                except OSError:
                    break  # gone, or not ours
                if mark.encode() in data:
                    found.append(int(name))
                    break
    return found


def children(pid: int) -> list[int]:
    """Child processes, of all threads; empty if the process is gone."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            text = Path(f"/proc/{pid}/task/{task}/children").read_text()
            found.extend(int(child) for child in text.split())
    except OSError:
        return found
    return found


def descendants(pid: int) -> list[int]:
    """Children, their children and so on."""
    found: list[int] = []
    queue = [pid]
    while queue:
        below = children(queue.pop())
        found.extend(below)
        queue.extend(below)
    return found


def signal_all(pids: Iterable[int], number: int) -> None:
    """Sends a signal to every one of the processes that still exists."""
    for pid in pids:
        if pid <= 1:  # 0: a process outside of our namespace; never our own group, never init
            continue
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def kill_group(leader: int) -> None:
    """Kills a process group."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
