"""What the backend knows about a place where functions run.

One essential verb, :meth:`Platform.invoke`. What only some platforms can do is a small protocol of
its own (:class:`Cancels`, :class:`Scales`, ...), never a method that raises NotImplementedError.
"""

import importlib
import math
import platform
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from smlt_tune.errors import InvalidInput

#: Memory at which a function has one virtual CPU (AWS Lambda), in MB.
MB_PER_VCPU = 1769

Ending = Literal["returned", "crashed", "out_of_memory", "timed_out", "cancelled"]


@dataclass(frozen=True)
class PlatformLimits:
    """What a platform allows.

    Attributes:
        min_memory_mb: Smallest function.
        max_memory_mb: Largest function.
        time_limit_s: Longest time an invocation may run.
        concurrency: How many functions may run at once.
        deliveries: How often the platform may run one invocation at most. Reservations count it.
        max_workers: Largest job.
        init_s: Initialisation that may be billed on top of an invocation's time-out.
    """

    min_memory_mb: int
    max_memory_mb: int
    time_limit_s: float
    concurrency: int
    deliveries: int = 1
    max_workers: int = 1000
    init_s: float = 0.0

    @property
    def functions(self) -> int:
        """How many invocations may run at once, as each may take a function per delivery."""
        return max(1, self.concurrency // self.deliveries)


@dataclass(frozen=True)
class Invocation:
    """One call of a function.

    Attributes:
        invocation_id: Unique name; appears in the bill.
        memory_mb: Memory of the function; gives its CPU share too.
        timeout_s: The platform ends the function after this time. At most the platform's limit.
        payload: Encoded :class:`smlt_tune.runtime.wire.WorkerSpec`. Holds secrets: never logged.
        log_path: File to which the function's output is appended, or None.
        bill_path: File to which a platform that :class:`KeepsBills` appends what it charges, or
            None. Its folder exists.
    """

    invocation_id: str
    memory_mb: int
    timeout_s: float
    payload: bytes
    log_path: Path | None = None
    bill_path: Path | None = None

    def __repr__(self) -> str:
        return f"Invocation({self.invocation_id!r}, {self.memory_mb} MB, {self.timeout_s:g} s)"


@dataclass(frozen=True)
class InvocationResult:
    """How an invocation ended, told once, after every delivery of it has ended.

    Attributes:
        invocation_id: Of the invocation.
        ending: ``returned`` if any delivery returned.
        billed_s: Billed duration of all deliveries together, seconds, rounded up to 1 ms each.
        deliveries: How often it ran.
        cold: Whether a new instance had to be started.
        peak_mb: Highest resident memory, MB; 0 if it is not known.
        start_s: Time from the call until the function's code ran, seconds.
        cpu_s: CPU time used, seconds; 0 if it is not known.
        detail: For people: signal, exit code, limit.
    """

    invocation_id: str
    ending: Ending
    billed_s: float
    deliveries: int = 1
    cold: bool = True
    peak_mb: float = 0.0
    start_s: float = 0.0
    cpu_s: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class Bill:
    """What a platform has charged for, by its own records.

    Attributes:
        gb_s: Billed memory-time, GB (1,024 MB) times seconds.
        requests: Invocations delivered.
    """

    gb_s: float
    requests: int


@dataclass(frozen=True)
class Charge:
    """What a platform has written down of an invocation.

    Attributes:
        memory_mb: Of its function, MB.
        timeout_s: After this time it would have been ended, seconds.
        result: How it ended; its times and its memory are not written down.
    """

    memory_mb: int
    timeout_s: float
    result: InvocationResult


Done = Callable[[InvocationResult], None]


class Platform(Protocol):
    """A place where functions run. May be used from several threads."""

    @property
    def name(self) -> str:
        """As in ``Fleet(platform=...)``."""

    @property
    def fingerprint(self) -> str:
        """What its speed depends on. What was measured on one platform holds on its equals."""

    @property
    def limits(self) -> PlatformLimits:
        """What it allows."""

    def invoke(self, invocation: Invocation, on_done: Done) -> None:
        """Starts a function with the payload and returns without waiting for it.

        The function runs ``smlt_tune.runtime.worker.run(payload)``.

        Args:
            invocation: What to run.
            on_done: Called exactly once, from any thread, when it is over. Must not block.

        Raises:
            Throttled: The concurrency limit is reached; nothing was started, nothing is billed.
            PlatformError: The platform cannot run it.
        """

    def vcpus(self, memory_mb: int) -> float:
        """Virtual CPUs of a function of that size."""

    def bill(self) -> Bill:
        """Everything charged so far, counted independently of the results handed out."""

    def close(self) -> None:
        """Ends all functions, waits for them, frees everything. Idempotent."""


@runtime_checkable
class Cancels(Protocol):
    """A platform that can end a running invocation."""

    def cancel(self, invocation_id: str) -> None:
        """Ends it at once; ``on_done`` follows with ``cancelled``. Unknown ids are ignored."""


@runtime_checkable
class EndsWithClient(Protocol):
    """A platform whose functions end when the client that invoked them dies, however it dies."""

    @property
    def outlives_s(self) -> float:
        """How long after its death the last of them may still run, seconds."""


@runtime_checkable
class KeepsBills(Protocol):
    """A platform that writes down what it charges, however the client dies."""

    def charged(self, bill_path: Path, invocation_ids: Collection[str]) -> dict[str, Charge | None]:
        """What invocations of a client that is dead were charged.

        Waits until none of them runs any more.

        Args:
            bill_path: The file that they named, whether it exists or not. No living client does.
            invocation_ids: Which.

        Returns:
            By id, None for one that never ran. Those of which that cannot be known are left out.
        """


@runtime_checkable
class Scales(Protocol):
    """A platform that knows what its virtual CPUs are made of."""

    def cores(self, memory_mb: int) -> float:
        """Real cores that a function of that size may use."""


@runtime_checkable
class Spreads(Protocol):
    """A platform whose functions may run on other machines than the client."""

    @property
    def elsewhere(self) -> bool:
        """Whether they may, as things are: they cannot reach then what only this machine can."""


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model of this machine's CPU, for fingerprints."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return " ".join((models[0] if models else platform.machine()).split())


def check_invocation(invocation: Invocation, limits: PlatformLimits) -> None:
    """Refuses what a platform with these limits cannot run.

    Raises:
        InvalidInput: Memory or time are out of range; lists every mistake.
    """
    mistakes = []
    memory_mb: Any = invocation.memory_mb
    timeout_s: Any = invocation.timeout_s
    is_integer = isinstance(memory_mb, int) and not isinstance(memory_mb, bool)
    if not is_integer or not limits.min_memory_mb <= memory_mb <= limits.max_memory_mb:
        mistakes.append(
            f"memory_mb={memory_mb!r}: must be an integer from {limits.min_memory_mb} to "
            f"{limits.max_memory_mb}"
        )
    if not is_positive(timeout_s) or timeout_s > limits.time_limit_s:
        mistakes.append(
            f"timeout_s={timeout_s!r}: must be positive and at most {limits.time_limit_s:g}"
        )
    if mistakes:
        raise InvalidInput(mistakes)


def is_positive(value: Any) -> bool:
    """Whether it is a finite number above zero."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0


def mistakes_in_entry(entry: Any) -> list[str]:
    """What is wrong with an entry point, ``package.module:function``; empty if nothing is."""
    parts = entry.split(":") if isinstance(entry, str) else []
    if len(parts) == 2 and all(name.isidentifier() for part in parts for name in part.split(".")):
        return []
    return [f"entry={entry!r}: must be 'package.module:function'"]


def load_entry(entry: str) -> Callable[[bytes], Any]:
    """The function of an entry point, ``package.module:function``.

    Raises:
        ImportError: There is no such module.
        AttributeError: There is no such function in it.
    """
    module, _, name = entry.partition(":")
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    return function  # type: ignore[no-any-return]
