"""What may be asked of the Ray platform."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smlt_tune.backend.platforms.base import MB_PER_VCPU, is_positive, mistakes_in_entry
from smlt_tune.backend.platforms.local.probe import NAMES, IsolationName
from smlt_tune.errors import InvalidInput

#: Memory of the actor's own process, which Ray needs and no function pays for: it is reserved on
#: the node beside the function's. Measured with Ray 2.60: 60 MB of its own, 72 with its part of
#: what four actors of a node share (152 MB resident). MB.
ACTOR_MB = 96
#: Ray counts resources in steps of this.
_STEP = 1e-4


@dataclass(frozen=True)
class Options:
    """Checked options of a :class:`RayPlatform`; see there."""

    address: str | None
    concurrency: int | None
    time_limit_s: float
    cores_per_vcpu: float
    gpus: float
    autoscaling: bool
    keep_alive_s: float
    isolation: IsolationName
    entry: str
    preload: Sequence[str]
    runtime_env: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        mistakes = [
            *self._mistakes_in_address(),
            *self._mistakes_in_numbers(),
            *self._mistakes_in_choices(),
            *mistakes_in_entry(self.entry),
        ]
        if mistakes:
            raise InvalidInput(mistakes)

    def _mistakes_in_address(self) -> list[str]:
        address: Any = self.address
        if address is None:
            return []
        if not isinstance(address, str) or not address:
            return [f"address={address!r}: must be 'auto', 'local', 'host:port' or None"]
        if address.startswith("ray://"):
            return [
                f"address={address!r}: Ray Client cannot stream what functions say; run this "
                "program on the cluster (ray job submit) with address='auto'"
            ]
        return []

    def _mistakes_in_numbers(self) -> list[str]:
        mistakes = []
        count: Any = self.concurrency
        if count is None:
            if self.autoscaling is True:
                mistakes.append(
                    "concurrency=None: a cluster that grows has no size of its own, say how many "
                    "functions may run at once"
                )
        elif not isinstance(count, int) or isinstance(count, bool) or count < 1:
            mistakes.append(f"concurrency={count!r}: must be an integer of at least 1, or None")
        mistakes += [
            f"{name}={value!r}: must be a positive number of {unit}"
            for name, value, unit in (
                ("time_limit_s", self.time_limit_s, "seconds"),
                ("cores_per_vcpu", self.cores_per_vcpu, "cores"),
            )
            if not is_positive(value)
        ]
        if not _is_gpus(self.gpus):
            mistakes.append(
                f"gpus={self.gpus!r}: must be 0, a share of one GPU from {_STEP:g} to 1, or a "
                "whole number of them"
            )
        if not is_positive(self.keep_alive_s) and self.keep_alive_s != 0:
            mistakes.append(
                f"keep_alive_s={self.keep_alive_s!r}: must be a number of seconds, 0 to keep none"
            )
        return mistakes

    def _mistakes_in_choices(self) -> list[str]:
        mistakes = []
        preload: Any = self.preload
        runtime_env: Any = self.runtime_env
        if self.autoscaling not in (False, True):
            mistakes.append(f"autoscaling={self.autoscaling!r}: must be one of False, True")
        if self.isolation not in NAMES:
            known = ", ".join(map(repr, NAMES))
            mistakes.append(f"isolation={self.isolation!r}: must be one of {known}")
        if isinstance(preload, str) or not isinstance(preload, Sequence):
            mistakes.append(f"preload={preload!r}: must be a sequence of module names")
        if runtime_env is not None and not isinstance(runtime_env, Mapping):
            mistakes.append(
                f"runtime_env={runtime_env!r}: must be a mapping as ray.init takes it, or None"
            )
        return mistakes

    def vcpus(self, memory_mb: int) -> float:
        """Virtual CPUs of a function of that size."""
        return memory_mb / MB_PER_VCPU

    def cores(self, memory_mb: int) -> float:
        """Cores of a function of that size: no more than its threads can use."""
        vcpus = self.vcpus(memory_mb)
        return min(vcpus, max(1, math.floor(vcpus))) * self.cores_per_vcpu

    def resources(self, memory_mb: int) -> dict[str, float]:
        """What Ray reserves for a function of that size, by Ray's names; memory in bytes."""
        found = {
            "CPU": max(_STEP, round(self.cores(memory_mb), 4)),
            "memory": float((memory_mb + ACTOR_MB) << 20),
        }
        return {**found, "GPU": float(self.gpus)} if self.gpus else found


def _is_gpus(value: Any) -> bool:
    if value == 0 and not isinstance(value, bool):
        return True
    return is_positive(value) and (_STEP <= value <= 1 or float(value).is_integer())
