"""Calibration: measures a platform in about a minute, by functions that run on it.

| measured | how |
|---|---|
| s(m), R | steps of a small network per second, at sizes on every side of a jump |
| t0 | what the platform says of cold and of warm starts |
| l | median round trip of a small request, one function |
| w | large values there and back, one function of the largest size, less its own CPU time |
| W | the same by several functions at once: what a store moves at least |
| h | CPU time of a synchronisation by two functions, per byte |

All is repeated in rounds, so that a disturbance hits one round and not one figure, and the median
counts. Where a function has at most one core, its quota binds, and speed is taken per CPU second
times its cores: that is blind to whoever else uses the machine. What can only be had by the wall
(speed elsewhere, w, W) is that of the fastest round, as others make it slower, never faster.

Between the measured sizes speed follows the platform's law (see ``platform_tables``), times what
was measured over the law at the nearest size with as many threads.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from smlt_tune.backend.fleet import FIRST_TRY_S, Fleet
from smlt_tune.backend.platform_tables import bends, cores_of, platform_table, threads_of
from smlt_tune.backend.platforms.base import (
    MB_PER_VCPU,
    Bill,
    Cancels,
    Done,
    Invocation,
    InvocationResult,
    Platform,
    PlatformLimits,
    Scales,
    is_positive,
)
from smlt_tune.backend.resource_manager.observations import not_counts
from smlt_tune.backend.resource_manager.physics import worker_bytes
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from smlt_tune.backend.resource_manager.tables import PlatformTable, StoreTable
from smlt_tune.errors import InvalidInput, OutOfMemory, PlatformError
from smlt_tune.runtime import probes
from smlt_tune.runtime.clock import SYSTEM_CLOCK, Clock
from smlt_tune.runtime.stores.opening import open_parameter_store

__all__ = ["calibrate", "comparison", "platform_table"]

#: Shares of the time for speed and for every kind of transfer; the rest goes into starting.
_TRAIN_SHARE, _TRANSFER_SHARE = 0.5, 0.1
#: Sizes below one virtual CPU that are measured, as shares of 1,769 MB.
_SMALL = (0.35, 0.6)
#: Functions that use a store at once to find out what it moves.
_CROWD = 4
#: Synchronisations per measurement of their CPU time.
_SYNCS = 8
#: A link takes at least this part of a transfer: what is left after CPU time may be noise.
_LEAST_WAIT = 0.05
#: Kind of the parameter store that a fleet starts for itself.
_EMBEDDED = "redis"


def calibrate(
    platform: Platform,
    *,
    parameter_stores: Mapping[str, str] | None = None,
    seconds: float = 60.0,
    rounds: int = 3,
    say: Callable[[str], None] = lambda line: None,
    clock: Clock = SYSTEM_CLOCK,
) -> PlatformTable:
    """Measures a platform and its stores. Costs what its functions cost.

    Args:
        platform: Which; nothing else should run on it meanwhile.
        parameter_stores: Their URLs, by a name for messages, one of each kind (scheme of the URL);
            None for the one that a fleet starts for itself.
        seconds: About how long to measure; starting functions comes on top.
        rounds: How often everything is repeated.
        say: Gets a line for people whenever something is known, and what it has cost.
        clock: Time.

    Raises:
        InvalidInput: The time is not positive, there is no round, or two stores are of one kind.
        StoreUnavailable: A parameter store does not answer.
        PlatformError: Functions of no size could train, or were stopped.
    """
    kinds, mistakes = _kinds(parameter_stores)
    if not is_positive(seconds):
        mistakes.append(f"seconds={seconds!r}: must be a positive number")
    if mistakes := mistakes + not_counts({"rounds": rounds}):
        raise InvalidInput(mistakes)
    for given in filter(None, kinds.values()):
        with closing(open_parameter_store(given, retry_s=FIRST_TRY_S)) as store:
            store.server_id()  # says at once if there is no server, or the password is wrong
    recorder = _recorder(platform)
    stores: dict[str, _StoreTimes] = {}
    rates: dict[int, float] = {}
    cost_usd = 0.0
    for kind, url in kinds.items():
        with Fleet(platform=recorder, parameter_store=url, policy=PinnedOrDefault()) as fleet:
            bench = _Bench(fleet, platform, rounds, say)
            if not rates:
                rates = bench.rates(_TRAIN_SHARE * seconds)
            stores[kind] = bench.store(kind, _TRANSFER_SHARE * seconds / len(kinds))
        cost_usd += fleet.settled_usd
    cold_s, warm_s = recorder.starts()
    say(f"starts: cold {cold_s:.3f} s, warm {warm_s:.3f} s")
    say(f"this has cost {cost_usd:.6f} USD")
    sizes, speed, at_vcpu = _curve(platform, rates)
    return PlatformTable(
        fingerprint=platform.fingerprint,
        memory_mb=sizes,
        speed=speed,
        flops=at_vcpu * probes.STEP_FLOPS,
        bandwidth=statistics.median(s.link for s in stores.values()),
        handling_s=statistics.median(s.handling_s for s in stores.values()),
        start_s=cold_s,
        warm_start_s=warm_s,
        stores={kind: StoreTable(s.latency_s, s.bandwidth) for kind, s in stores.items()},
        measured=datetime.fromtimestamp(clock.wall(), UTC).date().isoformat(),
    )


def comparison(table: PlatformTable, other: PlatformTable) -> list[tuple[str, str, str, str]]:
    """For people: what is measured, its value, the other table's, and the difference."""
    rows = [
        _row(f"speed at {size:,} MB", value, float(other.speed_at(size)), "", 1.0)
        for size, value in zip(table.memory_mb, table.speed, strict=True)
    ]
    rows += [
        _row("training, 1,769 MB", table.flops, other.flops, "GFLOP/s", 1e-9),
        _row("link of a function", table.bandwidth, other.bandwidth, "MB/s", 1e-6),
        _row("handling, 1,769 MB", table.handling_s, other.handling_s, "s/GB", 1e9),
        _row("cold start", table.start_s, other.start_s, "s", 1.0),
        _row("warm start", table.warm_start_s, other.warm_start_s, "s", 1.0),
    ]
    for kind, store in table.stores.items():
        known = other.stores.get(kind)
        latency_s = known.latency_s if known else 0.0
        bandwidth = known.bandwidth if known else 0.0
        rows += [
            _row(f"{kind}: small request", store.latency_s, latency_s, "ms", 1e3),
            _row(f"{kind}: moves at least", store.bandwidth, bandwidth, "MB/s", 1e-6),
        ]
    return rows


def _row(
    what: str, value: float, other: float, unit: str, scale: float
) -> tuple[str, str, str, str]:
    def shown(amount: float) -> str:
        return f"{amount * scale:,.4g} {unit}".strip()

    if not other:
        return what, shown(value), "-", "-"
    return what, shown(value), shown(other), f"{100 * (value / other - 1):+.0f} %"


@dataclass(frozen=True)
class _StoreTimes:
    """What was measured with one store; the link and the handling are those of a function."""

    latency_s: float
    bandwidth: float
    link: float
    handling_s: float


class _Bench:
    """Measures by jobs of one fleet, one at a time."""

    def __init__(
        self, fleet: Fleet, platform: Platform, rounds: int, say: Callable[[str], None]
    ) -> None:
        self._fleet, self._platform, self._rounds, self._say = fleet, platform, rounds, say
        self._cores = cores_of(platform)
        limits = platform.limits
        self._most_mb = limits.max_memory_mb
        self._vcpu_mb = min(max(MB_PER_VCPU, limits.min_memory_mb), limits.max_memory_mb)

    def rates(self, seconds: float) -> dict[int, float]:
        """Training steps per second by size; sizes that are too small are left out."""
        sizes = _sizes(self._platform)
        # The middle one comes twice in a row: its second function starts warm.
        order = [s for size in sizes for s in [size] * (2 if size == self._vcpu_mb else 1)]
        window_s = seconds / (self._rounds * len(order))
        found: dict[int, list[float]] = {size: [] for size in sizes}
        for number in range(self._rounds):
            self._say(f"speed: round {number + 1} of {self._rounds}")
            for size in order:
                if size not in found:
                    continue
                try:
                    sample = self._run(probes.train, {"seconds": window_s}, size)
                except OutOfMemory:
                    self._say(f"{size:,} MB is too small for training")
                    del found[size]
                else:
                    found[size].append(self._rate(sample, size))
        if not found:
            raise PlatformError("functions of no size had memory enough for a small network")
        rates = {
            size: statistics.median(samples) if self._quota_binds(size) else max(samples)
            for size, samples in found.items()
        }
        for size, rate in rates.items():
            self._say(f"{size:,} MB: {rate * probes.STEP_FLOPS / 1e9:.3g} GFLOP/s")
        return rates

    def store(self, kind: str, seconds: float) -> _StoreTimes:
        """Latency and bandwidth of the fleet's store."""
        limits = self._platform.limits
        crowd = min(_CROWD, limits.functions, limits.max_workers)
        config = {"seconds": seconds / (2 * self._rounds)}
        alone, together, handling = [], [], []
        for _ in range(self._rounds):
            alone.append(self._run(probes.transfer, config, self._most_mb))
            if crowd > 1:
                together.append(self._run(probes.transfer, config, self._most_mb, crowd))
                handling.append(self._synchronisation_s())
        cores = min(1.0, self._cores(self._most_mb))
        waits = [
            max(s["wall_s"] - s["cpu_s"] / cores, _LEAST_WAIT * s["wall_s"]) / s["bytes"]
            for s in alone
        ]
        found = _StoreTimes(
            latency_s=statistics.median(s["latency_s"] for s in alone),
            bandwidth=max(s["bytes"] / s["wall_s"] for s in alone + together),
            link=1.0 / min(waits),
            handling_s=statistics.median(handling or [s["cpu_s"] / s["bytes"] for s in alone])
            / self._cores(MB_PER_VCPU),
        )
        self._say(
            f"{kind}: {1e3 * found.latency_s:.2f} ms for a small request, "
            f"{found.bandwidth / 1e6:,.0f} MB/s by {crowd} functions"
        )
        return found

    def _synchronisation_s(self) -> float:
        """CPU seconds of one core per byte that a worker of two moves."""
        sample = self._run(probes.synchronise, {"iterations": _SYNCS}, self._vcpu_mb, 2)
        return sample["cpu_s"] / worker_bytes(probes.GRADIENT_BYTES, 2)

    def _rate(self, sample: Mapping[str, float], size: int) -> float:
        """Steps per second of a function that has its share of the machine."""
        if self._quota_binds(size):
            return sample["steps"] / sample["cpu_s"] * self._cores(size)
        return sample["steps"] / sample["wall_s"]

    def _quota_binds(self, size: int) -> bool:
        """Whether one busy thread is enough to use all that the function may."""
        return isinstance(self._platform, Scales) and self._cores(size) <= 1.0

    def _run(
        self,
        function: Callable[..., Mapping[str, float]],
        config: Mapping[str, Any],
        memory_mb: int,
        workers: int = 1,
    ) -> Mapping[str, float]:
        job = self._fleet.submit(function, config, workers=workers, memory_mb=memory_mb)
        outcome = job.result()
        if outcome.status != "finished":
            raise PlatformError(f"the calibration was stopped: {outcome.reason}")
        value: Mapping[str, float] = outcome.value
        return value


@dataclass
class _Recorder:
    """A platform that remembers how its functions started."""

    platform: Platform
    results: list[InvocationResult] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.platform.name

    @property
    def fingerprint(self) -> str:
        return self.platform.fingerprint

    @property
    def limits(self) -> PlatformLimits:
        return self.platform.limits

    def invoke(self, invocation: Invocation, on_done: Done) -> None:
        def done(result: InvocationResult) -> None:
            self.results.append(result)
            on_done(result)

        self.platform.invoke(invocation, done)

    def vcpus(self, memory_mb: int) -> float:
        return self.platform.vcpus(memory_mb)

    def bill(self) -> Bill:
        return self.platform.bill()

    def close(self) -> None:
        self.platform.close()

    def starts(self) -> tuple[float, float]:
        """Medians of cold and of warm starts, seconds; the one for both if only one was seen."""
        ok = [r for r in self.results if r.ending == "returned"]
        cold = [r.start_s for r in ok if r.cold]
        warm = [r.start_s for r in ok if not r.cold]
        return statistics.median(cold or warm), statistics.median(warm or cold)


@dataclass
class _CancellingRecorder(_Recorder):
    """The same around a platform that cancels."""

    platform: Any

    def cancel(self, invocation_id: str) -> None:
        self.platform.cancel(invocation_id)


def _recorder(platform: Platform) -> _Recorder:
    return (_CancellingRecorder if isinstance(platform, Cancels) else _Recorder)(platform)


def _kinds(parameter_stores: Mapping[str, str] | None) -> tuple[dict[str, str | None], list[str]]:
    """URLs by kind of store, and mistakes; None stands for the one that a fleet starts itself."""
    kinds: dict[str, str | None] = {}
    mistakes = []
    for name, url in (parameter_stores or {}).items():
        kind = url.partition("://")[0]
        if kind in kinds:
            mistakes.append(f"parameter store {name!r}: another one of kind {kind!r} was given")
        kinds[kind] = url
    return kinds or {_EMBEDDED: None}, mistakes


def _sizes(platform: Platform) -> list[int]:
    """Sizes to measure, ascending: where the number of threads grows, some below, the largest."""
    low, high = platform.limits.min_memory_mb, platform.limits.max_memory_mb
    steps = [s for s in bends(platform) if s > low and _grows_at(platform, s)]
    wanted = {*steps, high, MB_PER_VCPU, *(round(share * MB_PER_VCPU) for share in _SMALL)}
    return sorted({min(max(size, low), high) for size in wanted})


def _grows_at(platform: Platform, size: int) -> bool:
    return threads_of(platform, size) > threads_of(platform, size - 1)


def _curve(
    platform: Platform, rates: Mapping[int, float]
) -> tuple[tuple[int, ...], tuple[float, ...], float]:
    """Sizes, their speeds relative to 1,769 MB, and the rate there."""
    cores = cores_of(platform)

    def rate_at(size: int) -> float:
        nearest = _nearest(platform, size, list(rates))
        return rates[nearest] * cores(size) / cores(nearest)

    sizes = tuple(sorted({*bends(platform), *rates}))
    reference = rate_at(MB_PER_VCPU)
    return sizes, tuple(rate_at(size) / reference for size in sizes), reference


def _nearest(platform: Platform, size: int, measured: Sequence[int]) -> int:
    """The measured size that stands for another: with as many threads if there is one."""

    def distance(other: int) -> tuple[int, float]:
        threads = abs(threads_of(platform, other) - threads_of(platform, size))
        return threads, abs(math.log(other / size))

    return min(measured, key=distance)
