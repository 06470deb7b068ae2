"""What may be asked of a simulated platform."""

import math
from dataclasses import dataclass
from typing import Any

from smlt_tune.backend.platforms.base import PlatformLimits, is_positive
from smlt_tune.errors import InvalidInput


@dataclass(frozen=True)
class SimulationOptions:
    """A simulated platform. Whatever is random follows from the seed and from names alone.

    Attributes:
        seed: Of everything random.
        min_memory_mb: Smallest function, MB.
        max_memory_mb: Largest function, MB.
        time_limit_s: Longest time an invocation may run, seconds.
        concurrency: How many functions may run at once.
        cold_start_s: Median time until a new instance runs the function's code, seconds.
        warm_start_s: The same of an instance that has run before.
        start_spread: Standard deviation of the logarithm of both.
        keep_alive_s: How long an instance that has nothing to do stays warm, seconds.
        pace_spread: Standard deviation of the logarithm of an epoch's time per iteration.
        slow_share: Share of instances that are slow; all workers of a job wait for the slowest.
        slow_factor: Times as long as others take.
        crashes_per_hour: How often a function that runs dies, on average.
        hangs_per_hour: How often one falls silent for good, on average.
        throttles: Share of the invocations that are refused although there is room.
        duplicates: Share of the invocations that are delivered twice.
        price_changes: When all prices of functions change, in seconds from the beginning, and by
            what they are multiplied from then on; ascending. What ends is charged by the price
            then, and what may come was announced: reservations count on the highest.
        progress_s: How often a worker says where it is, seconds. Large values make long
            simulations fast; it has to stay below the fleet's ``hang_timeout_s``.

    Raises:
        InvalidInput: Lists every mistake.
    """

    seed: int = 0
    min_memory_mb: int = 128
    max_memory_mb: int = 10_240
    time_limit_s: float = 900.0
    concurrency: int = 1000
    cold_start_s: float = 2.0
    warm_start_s: float = 0.05
    start_spread: float = 0.2
    keep_alive_s: float = 600.0
    pace_spread: float = 0.0
    slow_share: float = 0.0
    slow_factor: float = 2.0
    crashes_per_hour: float = 0.0
    hangs_per_hour: float = 0.0
    throttles: float = 0.0
    duplicates: float = 0.0
    price_changes: tuple[tuple[float, float], ...] = ()
    progress_s: float = 0.5

    def __post_init__(self) -> None:
        mistakes = [
            *self._mistakes_in_counts(),
            *self._mistakes_in_numbers(),
            *self._mistakes_in_prices(),
        ]
        if mistakes:
            raise InvalidInput(mistakes)

    def limits(self) -> PlatformLimits:
        """What the platform allows."""
        deliveries = 2 if self.duplicates else 1
        return PlatformLimits(
            min_memory_mb=self.min_memory_mb,
            max_memory_mb=self.max_memory_mb,
            time_limit_s=float(self.time_limit_s),
            concurrency=self.concurrency,
            deliveries=deliveries,
            max_workers=max(1, self.concurrency // deliveries),
        )

    def _mistakes_in_counts(self) -> list[str]:
        counts: dict[str, tuple[object, int]] = {
            "seed": (self.seed, 0),
            "min_memory_mb": (self.min_memory_mb, 1),
            "max_memory_mb": (self.max_memory_mb, 1),
            "concurrency": (self.concurrency, 1),
        }
        mistakes = [
            f"{name}={value!r}: must be a whole number of at least {least}"
            for name, (value, least) in counts.items()
            if not isinstance(value, int) or isinstance(value, bool) or value < least
        ]
        if not mistakes and self.min_memory_mb > self.max_memory_mb:
            mistakes.append(f"min_memory_mb={self.min_memory_mb} is above max_memory_mb")
        return mistakes

    def _mistakes_in_numbers(self) -> list[str]:
        positive = ("time_limit_s", "slow_factor", "progress_s")
        times = ("cold_start_s", "warm_start_s", "start_spread", "keep_alive_s", "pace_spread")
        at_least_0 = (*times, "crashes_per_hour", "hangs_per_hour")
        mistakes = [
            f"{name}={value!r}: must be a number above 0"
            for name in positive
            if not is_positive(value := getattr(self, name))
        ]
        mistakes += [
            f"{name}={value!r}: must be a number of at least 0"
            for name in at_least_0
            if not _within(value := getattr(self, name), math.inf)
        ]
        shares = {"slow_share": self.slow_share, "duplicates": self.duplicates}
        mistakes += [
            f"{name}={value!r}: must be a share from 0 to 1"
            for name, value in shares.items()
            if not _within(value, 1.0)
        ]
        if not _within(self.throttles, 1.0) or self.throttles == 1:
            mistakes.append(f"throttles={self.throttles!r}: must be a share from 0 to below 1")
        return mistakes

    def _mistakes_in_prices(self) -> list[str]:
        changes: Any = self.price_changes
        try:
            good = all(_within(at_s, math.inf) and is_positive(by) for at_s, by in changes)
            good = good and [*changes] == sorted(changes)
        except (TypeError, ValueError):
            good = False
        if good:
            return []
        return [f"price_changes={changes!r}: must be pairs (seconds, factor above 0), ascending"]


def _within(value: Any, most: float) -> bool:
    return value == 0 or (is_positive(value) and value <= most)
