"""What may be asked of the local platform: options of it and of single invocations."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from smlt_tune.backend.platforms.base import (
    Invocation,
    PlatformLimits,
    is_positive,
    mistakes_in_entry,
)
from smlt_tune.backend.platforms.local.probe import NAMES, IsolationName
from smlt_tune.errors import InvalidInput

#: Smallest and largest function of AWS Lambda, MB.
MIN_MEMORY_MB, MAX_MEMORY_MB = 128, 10_240
#: Largest payload of a synchronous call of AWS Lambda, bytes.
MAX_PAYLOAD = 6 * 1024 * 1024
#: Cores left to the client and the rest of the machine when functions are scaled to it.
RESERVED_CORES = 0.3

#: What nearly every function needs; those that are not installed are left out.
PRELOAD = (
    "numpy",
    "torch",
    "torch._dynamo",
    "torch.utils.data",
    "redis",
    "hiredis",
    "safetensors",
    "safetensors.numpy",
    "cloudpickle",
)

Billing = Literal["wall", "cpu"]


@dataclass(frozen=True)
class Options:
    """Checked options of a :class:`LocalPlatform`; see there."""

    concurrency: int
    time_limit_s: float
    cores_per_vcpu: float | None
    billing: Billing
    keep_alive_s: float
    duplicates: bool
    isolation: IsolationName
    entry: str
    preload: Sequence[str]

    def __post_init__(self) -> None:
        mistakes = [
            *_mistake_of_machine(),
            *self._mistakes_in_numbers(),
            *_mistakes_in_choices(
                ("billing", self.billing, ("wall", "cpu")),
                ("isolation", self.isolation, NAMES),
                ("duplicates", self.duplicates, (False, True)),
            ),
            *mistakes_in_entry(self.entry),
            *_mistakes_in_preload(self.preload),
        ]
        if mistakes:
            raise InvalidInput(mistakes)

    def _mistakes_in_numbers(self) -> list[str]:
        mistakes = []
        if not _is_integer(self.concurrency) or self.concurrency < 1:
            mistakes.append(f"concurrency={self.concurrency!r}: must be an integer of at least 1")
        if not is_positive(self.time_limit_s):
            mistakes.append(
                f"time_limit_s={self.time_limit_s!r}: must be a positive number of seconds"
            )
        if self.cores_per_vcpu is not None and not is_positive(self.cores_per_vcpu):
            mistakes.append(
                f"cores_per_vcpu={self.cores_per_vcpu!r}: must be a positive number of cores, or "
                "None to share the machine evenly"
            )
        if not is_positive(self.keep_alive_s) and self.keep_alive_s != 0:
            mistakes.append(
                f"keep_alive_s={self.keep_alive_s!r}: must be a number of seconds, 0 to keep none"
            )
        return mistakes

    def limits(self) -> PlatformLimits:
        """What the platform allows with these options."""
        return PlatformLimits(
            min_memory_mb=MIN_MEMORY_MB,
            max_memory_mb=MAX_MEMORY_MB,
            time_limit_s=float(self.time_limit_s),
            concurrency=self.concurrency,
            deliveries=2 if self.duplicates else 1,
            max_workers=self.concurrency,
        )

    def scale(self, usable_cores: float) -> float:
        """Real cores behind one virtual CPU, on a machine with that many cores."""
        if self.cores_per_vcpu is not None:
            return float(self.cores_per_vcpu)
        return min(1.0, max(0.1, usable_cores - RESERVED_CORES) / self.concurrency)


def check_delivery(invocation: Invocation) -> None:
    """Refuses what cannot be handed to a function on this machine.

    Raises:
        InvalidInput: Lists every mistake.
    """
    mistakes = []
    if len(invocation.payload) > MAX_PAYLOAD:
        mistakes.append(
            f"the payload has {len(invocation.payload)} bytes: at most {MAX_PAYLOAD} fit, put "
            "more into the object store"
        )
    if invocation.log_path is not None and not invocation.log_path.parent.is_dir():
        mistakes.append(f"log_path={str(invocation.log_path)!r}: its folder does not exist")
    if mistakes:
        raise InvalidInput(mistakes)


def billed_ms(billing: Billing, wall_s: float, cpu_s: float, cores: float, limit_s: float) -> int:
    """For how long one delivery is billed, milliseconds.

    Args:
        billing: By what.
        wall_s: Time that it took, seconds.
        cpu_s: CPU time that it used, seconds.
        cores: Real cores that it might use.
        limit_s: Its time limit, seconds.
    """
    seconds = cpu_s / cores if billing == "cpu" else wall_s
    return max(1, math.ceil(min(seconds, limit_s) * 1000))


def _mistake_of_machine(system: str = sys.platform) -> list[str]:
    if system == "linux":
        return []
    return [f"the local platform needs Linux, this is {system}: use the inline platform"]


def _mistakes_in_choices(*choices: tuple[str, object, tuple[object, ...]]) -> list[str]:
    return [
        f"{name}={value!r}: must be one of {', '.join(map(repr, known))}"
        for name, value, known in choices
        if value not in known
    ]


def _mistakes_in_preload(preload: object) -> list[str]:
    if isinstance(preload, str) or not isinstance(preload, Sequence):
        return [f"preload={preload!r}: must be a sequence of module names"]
    return [
        f"preload: {module!r} is not the name of a module"
        for module in preload
        if not isinstance(module, str) or not all(part.isidentifier() for part in module.split("."))
    ]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
