"""How an instance is kept within its CPU share and its memory: the protocol and what all share.

An :class:`Isolation` makes one :class:`Cage` for every instance. All live in the helper process,
which is single-threaded; only :meth:`Isolation.reap` is called by the client too.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from smlt_tune.backend.platforms.base import MB_PER_VCPU
from smlt_tune.backend.platforms.local import linux
from smlt_tune.runtime.clock import Clock

#: Length of a scheduling period: short enough that a step is not slowed in lumps. Microseconds.
PERIOD_US = 20_000
#: The kernel refuses a shorter quota: small shares get a longer period instead. Microseconds.
MIN_QUOTA_US = 1_000
#: The kernel refuses a longer period. Microseconds.
MAX_PERIOD_US = 1_000_000

_OWNER = re.compile(r"smlt-(\d+)-(\d+)-(\d+)(?:-.*)?")


@dataclass(frozen=True)
class Share:
    """What one instance may use.

    Attributes:
        memory_mb: Memory of the function as a whole.
        cores: CPU seconds per second.
        preloaded: What it shares with the helper from the beginning; counts towards its memory.
    """

    memory_mb: int
    cores: float
    preloaded: linux.Resident

    @property
    def own_bytes(self) -> int:
        """What the instance may allocate itself, bytes. Not positive: it cannot even start."""
        return self.memory_mb * linux.MB - self.preloaded.total

    def whole_bytes(self, total: int, files: int) -> int:
        """Resident memory of the function if it had been started by itself, bytes.

        A forked process maps the files of its parent only when it touches them; a function started
        by itself has read them all.
        """
        return total + max(0, self.preloaded.files - files)


class Cage(Protocol):
    """The limits around one instance and everything it starts."""

    #: How often :meth:`enforce` must be called, seconds; None if the kernel does the work.
    interval_s: float | None

    def enter(self) -> None:
        """Called once in the new process: limits it from here on."""

    def adopt(self, pid: int) -> None:
        """Called once in the helper with the id of the new process."""

    def resume(self) -> None:
        """An idle instance gets work."""

    def enforce(self, now: float) -> None:
        """Enforces the CPU share of a busy instance; ``now`` in seconds."""

    def exceeded_mb(self, peak_bytes: int) -> float:
        """Peak of the function as a whole if it exceeded its memory, MB; else 0.

        Args:
            peak_bytes: The highest resident memory that is known from elsewhere.
        """

    def kill(self) -> None:
        """Kills all processes in it, waits for none."""

    def remove(self) -> bool:
        """Frees it; False if processes are still dying in it: call again."""


class Isolation(Protocol):
    """A way to limit instances."""

    #: As in ``LocalPlatform(isolation=...)``.
    name: str

    def reap(self, clock: Clock) -> None:
        """Removes what owners that died without cleaning up have left, and their processes."""

    def open(self) -> None:
        """The calling process becomes the owner of the cages."""

    def cage(self, number: int, share: Share) -> Cage:
        """Limits for a new instance. ``number`` is unique for the owner."""

    def close(self) -> None:
        """The owner has removed every cage and ends."""


def threads(vcpus: float) -> int:
    """How many threads a function of that size should compute with."""
    return max(1, math.floor(vcpus))


def vcpus(memory_mb: int) -> float:
    """Virtual CPUs of a function of that size."""
    return memory_mb / MB_PER_VCPU


def cores(memory_mb: int, cores_per_vcpu: float, usable: float) -> float:
    """CPU seconds per second of a function of that size, at most what the machine has."""
    of_function = vcpus(memory_mb)
    return min(min(of_function, threads(of_function)) * cores_per_vcpu, usable)


def quota_us(share: float) -> tuple[int, int]:
    """Quota and period of the kernel's bandwidth control for that many cores, microseconds."""
    period = PERIOD_US
    if share * period < MIN_QUOTA_US:
        period = min(MAX_PERIOD_US, math.ceil(MIN_QUOTA_US / share))
    return max(MIN_QUOTA_US, round(share * period)), period


def owner_name(suffix: str = "") -> str:
    """Name of a directory of the calling process that others recognise once it is dead."""
    pid = os.getpid()
    name = f"smlt-{linux.pid_namespace()}-{pid}-{linux.start_ticks(pid)}"
    return f"{name}-{suffix}" if suffix else name


def left_behind(base: Path) -> list[Path]:
    """Directories under ``base`` whose owner is dead. Those of other containers are left alone."""
    dead = []
    for path in base.glob("smlt-*"):
        match = _OWNER.fullmatch(path.name)
        if match is None:
            continue
        namespace, pid, started = (int(group) for group in match.groups())
        if namespace == linux.pid_namespace() and linux.start_ticks(pid) != started:
            dead.append(path)
    return dead
