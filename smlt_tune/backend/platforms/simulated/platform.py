"""Functions that are computed instead of run."""

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from smlt_tune.backend.platforms.base import (
    MB_PER_VCPU,
    Bill,
    Done,
    Ending,
    Invocation,
    InvocationResult,
    PlatformLimits,
    check_invocation,
)
from smlt_tune.backend.platforms.simulated.delivery import Delivery
from smlt_tune.backend.platforms.simulated.generation import SimulatedGeneration
from smlt_tune.backend.platforms.simulated.options import SimulationOptions
from smlt_tune.backend.platforms.simulated.stores import (
    SimulatedObjectStore,
    SimulatedParameterStore,
)
from smlt_tune.backend.platforms.simulated.training import SimulatedTraining
from smlt_tune.backend.platforms.simulated.virtual_time import VirtualTime
from smlt_tune.errors import PlatformError, Throttled
from smlt_tune.runtime import wire

#: Mean time between two deliveries of one invocation, seconds.
DUPLICATE_S = 1.0


@dataclass(eq=False)
class _Call:
    """An invocation under way."""

    invocation: Invocation
    on_done: Done
    running: list[Delivery] = field(default_factory=list)
    ended: list[tuple[Delivery, Ending, str]] = field(default_factory=list)
    billed_ms: int = 0
    cold: bool = False
    start_s: float = 0.0


class SimulatedPlatform:
    """A cloud in virtual time: functions, both stores, and the bill.

    A function takes time to start, then does what :class:`SimulatedGeneration` says. It is billed
    per millisecond from its delivery on, as its time limit counts from there. Not thread-safe.

    Args:
        options: What it is like.

    Attributes:
        options: As given.
        time: Of the simulation.
        parameter_store: Where workers meet.
        objects: Where checkpoints lie.
        listeners: What takes the events of workers, by fleet.
        programs: What the functions of a job do, by fleet and job. Their code does not travel.
    """

    name = "simulated"

    def __init__(self, options: SimulationOptions | None = None) -> None:
        self.options = options or SimulationOptions()
        self.time = VirtualTime()
        self.parameter_store = SimulatedParameterStore(self.time)
        self.objects = SimulatedObjectStore()
        self.listeners: dict[str, Callable[[wire.WorkerEvent], None]] = {}
        self.programs: dict[tuple[str, str], Callable[[], SimulatedTraining]] = {}
        self._limits = self.options.limits()
        self._chance = Random(self.options.seed)
        self._calls: dict[str, _Call] = {}
        self._generations: dict[tuple[str, str, int], SimulatedGeneration] = {}
        #: Idle instances by memory: until when they stay warm, and how slow they are.
        self._idle: dict[int, list[tuple[float, float]]] = {}
        self._busy = 0
        self._mb_ms = 0
        self._requests = 0
        self._closed = False

    @property
    def fingerprint(self) -> str:  # noqa: D102 - the contract stands on the protocol
        return "simulated"

    @property
    def limits(self) -> PlatformLimits:  # noqa: D102
        return self._limits

    def vcpus(self, memory_mb: int) -> float:
        """As on AWS Lambda."""
        return memory_mb / MB_PER_VCPU

    def bill(self) -> Bill:  # noqa: D102
        return Bill(gb_s=self._mb_ms / 1024 / 1000, requests=self._requests)

    def invoke(self, invocation: Invocation, on_done: Done) -> None:  # noqa: D102
        check_invocation(invocation, self._limits)
        if self._closed:
            raise PlatformError("the simulated platform is closed; make a new one")
        if self._busy >= self.options.concurrency:
            raise Throttled(
                f"{self._busy} simulated functions run, as many as may run at once: wait until one "
                "has ended"
            )
        if self._chance.random() < self.options.throttles:
            raise Throttled("the simulated platform refuses this invocation by chance: try again")
        call = self._calls[invocation.invocation_id] = _Call(invocation, on_done)
        self._deliver(call, wire.WorkerSpec.decode(invocation.payload))

    def cancel(self, invocation_id: str) -> None:
        """Ends all deliveries of an invocation at once."""
        call = self._calls.get(invocation_id)
        for delivery in list(call.running) if call else []:
            delivery.end("cancelled")

    def close(self) -> None:
        """Ends all functions. Idempotent."""
        self._closed = True
        for call in list(self._calls.values()):
            for delivery in list(call.running):
                delivery.end("cancelled", "the platform was closed")

    def __repr__(self) -> str:
        return f"SimulatedPlatform({self.options!r})"

    # --- deliveries -------------------------------------------------------------------------------

    def _deliver(self, call: _Call, spec: wire.WorkerSpec) -> None:
        """Runs an invocation once, or once more."""
        options, invocation = self.options, call.invocation
        number = len(call.running) + len(call.ended)
        chance = Random(f"{options.seed}/{invocation.invocation_id}/{number}")
        cold, slowness = self._instance(invocation.memory_mb, chance)
        median_s = options.cold_start_s if cold else options.warm_start_s
        start_s = median_s * math.exp(options.start_spread * chance.gauss(0.0, 1.0))
        delivery = Delivery(invocation, spec, self.time.monotonic(), slowness, self._ended)
        call.running.append(delivery)
        self._busy += 1
        self._requests += 1
        if number == 0:
            call.cold, call.start_s = cold, start_s
            if chance.random() < options.duplicates:
                again_s = chance.expovariate(1.0 / DUPLICATE_S)
                self.time.after(again_s, lambda: self._deliver_again(call, spec))
        limit = f"ran longer than its time limit of {invocation.timeout_s:g} s"
        happens: list[tuple[float, Callable[[], None]]] = [
            (start_s, lambda: self._enter(delivery)),
            (_waiting_s(options.hangs_per_hour, chance), lambda: self._hang(delivery)),
            (_waiting_s(options.crashes_per_hour, chance), lambda: delivery.end("crashed")),
            (invocation.timeout_s, lambda: delivery.end("timed_out", limit)),
        ]
        delivery.timers = [
            self.time.after(at_s, call) for at_s, call in happens if at_s <= invocation.timeout_s
        ]

    def _deliver_again(self, call: _Call, spec: wire.WorkerSpec) -> None:
        """The second delivery of an invocation; it is dropped if there is no room for it."""
        if call.running and self._busy < self.options.concurrency:
            self._deliver(call, spec)

    def _instance(self, memory_mb: int, chance: Random) -> tuple[bool, float]:
        """Takes a warm instance, else a new one: whether it is cold, and how slow it is."""
        idle = self._idle.get(memory_mb, [])
        while idle:
            until_s, slowness = idle.pop()  # the one that was used last
            if until_s >= self.time.monotonic():
                return False, slowness
        slow = chance.random() < self.options.slow_share
        return True, self.options.slow_factor if slow else 1.0

    def _enter(self, delivery: Delivery) -> None:
        """The function's code runs."""
        if delivery.hung:
            return
        spec = delivery.spec
        try:
            training = self.programs[spec.fleet, spec.job]()
            if not isinstance(training, SimulatedTraining):
                raise TypeError(  # noqa: TRY301 - the user's mistake, like the others here
                    f"a simulated training function returns a SimulatedTraining, not {training!r}"
                )
        except Exception as error:  # noqa: BLE001 - the boundary of a simulated process
            self._fail(delivery, error)
            return
        delivery.peak_mb = min(training.memory_mb, delivery.invocation.memory_mb)
        key = (spec.fleet, spec.job, spec.generation)
        generation = self._generations.get(key)
        if generation is None:
            generation = self._generations[key] = SimulatedGeneration(
                spec,
                training,
                self.time,
                self.parameter_store,
                self.objects,
                self.listeners[spec.fleet],
                self.options.progress_s,
                lambda epoch: self._pace(spec.job, epoch),
            )
        delivery.generation = generation
        generation.enter(delivery)

    def _fail(self, delivery: Delivery, error: Exception) -> None:
        spec = delivery.spec
        event = wire.Failed(
            spec.job,
            spec.generation,
            spec.rank,
            spec.incarnation,
            error=f"{type(error).__name__}: {error}",
            traceback="".join(traceback.format_exception(error)),
            by_user=True,
            retry=False,
        )
        self.listeners[spec.fleet](event)
        delivery.end("returned")

    def _pace(self, job: str, epoch: int) -> float:
        """Time per iteration over its median: the same for an epoch wherever it is trained."""
        if not self.options.pace_spread:
            return 1.0
        chance = Random(f"{self.options.seed}/{job}/epoch {epoch}")
        return math.exp(self.options.pace_spread * chance.gauss(0.0, 1.0))

    def _hang(self, delivery: Delivery) -> None:
        delivery.hung = True
        if delivery.generation is not None:
            delivery.generation.silenced(delivery)

    def _ended(self, delivery: Delivery, ending: Ending, detail: str) -> None:
        """One delivery is over: it is billed, its instance is idle, and may be used again."""
        invocation = delivery.invocation
        call = self._calls[invocation.invocation_id]
        now = self.time.monotonic()
        passed_s = min(now - delivery.started_s, invocation.timeout_s)
        billed_ms = max(1, math.ceil(round(passed_s * 1000, 6)))
        call.billed_ms += billed_ms
        self._mb_ms += billed_ms * invocation.memory_mb
        self._busy -= 1
        if ending == "returned" and self.options.keep_alive_s:
            idle = (now + self.options.keep_alive_s, delivery.slowness)
            self._idle.setdefault(invocation.memory_mb, []).append(idle)
        call.running.remove(delivery)
        call.ended.append((delivery, ending, detail))
        if delivery.generation is not None:
            delivery.generation.left(delivery)
            self._forget(delivery)
        if not call.running:
            del self._calls[invocation.invocation_id]
            call.on_done(_result(call))

    def _forget(self, delivery: Delivery) -> None:
        """A generation that nobody is left in; a function that enters later begins another."""
        spec = delivery.spec
        key = (spec.fleet, spec.job, spec.generation)
        generation = self._generations.get(key)
        if generation is delivery.generation and generation is not None and generation.over:
            del self._generations[key]


def _result(call: _Call) -> InvocationResult:
    _, ending, detail = next((e for e in call.ended if e[1] == "returned"), call.ended[-1])
    return InvocationResult(
        invocation_id=call.invocation.invocation_id,
        ending=ending,
        billed_s=call.billed_ms / 1000,
        deliveries=len(call.ended),
        cold=call.cold,
        peak_mb=max(delivery.peak_mb for delivery, _, _ in call.ended),
        start_s=call.start_s,
        detail=detail,
    )


def _waiting_s(per_hour: float, chance: Random) -> float:
    """Time until something happens that happens so often on average, seconds."""
    return chance.expovariate(per_hour / 3600.0) if per_hour else math.inf


if TYPE_CHECKING:
    from smlt_tune.backend.platforms.base import Cancels, Platform

    _: Platform = SimulatedPlatform()
    _cancels: Cancels = SimulatedPlatform()
