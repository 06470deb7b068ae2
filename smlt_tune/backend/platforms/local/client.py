"""AWS Lambda on one Linux machine: what the end client talks to."""

# ruff: noqa: D102 - the contracts stand on the protocols

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smlt_tune.backend.platforms.base import (
    Bill,
    Charge,
    Done,
    Invocation,
    InvocationResult,
    PlatformLimits,
    check_invocation,
    processor,
)
from smlt_tune.backend.platforms.local import bills, channel, isolation, probe
from smlt_tune.backend.platforms.local.launch import END_S, Helper
from smlt_tune.backend.platforms.local.options import (
    PRELOAD,
    Billing,
    Options,
    billed_ms,
    check_delivery,
)
from smlt_tune.backend.platforms.local.supervisor import Settings
from smlt_tune.errors import InvalidInput, PlatformError, Throttled
from smlt_tune.runtime.clock import SYSTEM_CLOCK, Clock

#: Functions end this long after the client at the latest, in seconds.
OUTLIVES_S = 5.0

_log = logging.getLogger(__name__)


class LocalPlatform:
    """Functions as limited processes of this machine, faithful to AWS Lambda.

    Memory gives the CPU share (1,769 MB = 1 virtual CPU, scaled to the machine). Memory, CPU share
    and time limit are enforced. There are cold and warm starts, a concurrency limit that throttles,
    double delivery if wanted, and billing per millisecond.

    A helper process, started at once, imports the modules that functions need and forks functions
    from itself: they start within milliseconds and share that memory. It counts towards the memory
    of each function nevertheless, as it would on Lambda. Functions end with the client, however it
    ends. Safe to use from several threads; a forked child of the client must not use it.

    Args:
        concurrency: How many functions may run at once, warm ones that wait included.
        time_limit_s: Longest time an invocation may ask for, seconds.
        cores_per_vcpu: Real cores behind one virtual CPU. None: the cores of this machine less 0.3,
            divided by ``concurrency``, at most 1.
        billing: ``wall``: by the time that passes. ``cpu``: by the CPU time used, divided by the
            cores that the function may use: the same while it computes, and blind to other load.
        keep_alive_s: How long an idle instance stays warm, seconds.
        duplicates: Whether everything is delivered twice, at the same time, if there is room.
        isolation: How limits are enforced: by control groups or, without any privilege, by a
            watchdog. ``auto`` takes the first of cgroup1, cgroup2, watchdog that works.
        entry: Function that is run with the payload, as ``package.module:function``.
        preload: Modules that the helper imports; those that are not installed are left out.
        clock: Source of time.

    Raises:
        InvalidInput: Options are wrong; lists every mistake.
        PlatformError: The isolation that was asked for does not work on this machine.
    """

    name = "local"
    outlives_s = OUTLIVES_S

    def __init__(
        self,
        *,
        concurrency: int = 8,
        time_limit_s: float = 900.0,
        cores_per_vcpu: float | None = None,
        billing: Billing = "wall",
        keep_alive_s: float = 60.0,
        duplicates: bool = False,
        isolation: probe.IsolationName = "auto",
        entry: str = "smlt_tune.runtime.worker:run",
        preload: Sequence[str] = PRELOAD,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._options = Options(
            concurrency=concurrency,
            time_limit_s=time_limit_s,
            cores_per_vcpu=cores_per_vcpu,
            billing=billing,
            keep_alive_s=keep_alive_s,
            duplicates=duplicates,
            isolation=isolation,
            entry=entry,
            preload=preload,
        )
        self._limits = self._options.limits()
        self._isolation = probe.find(isolation)
        self._usable_cores = probe.usable_cores()
        self._scale = self._options.scale(self._usable_cores)
        self._clock = clock
        self._owner = os.getpid()
        self._numbers = itertools.count(1)
        # The state; nobody waits for another process while it is held.
        self._lock = threading.Lock()
        self._executions: dict[str, _Execution] = {}
        self._deliveries: dict[int, _Delivery] = {}
        self._mb_ms = 0
        self._requests = 0
        self._closed = False
        # Held while something is sent, so that a cancellation cannot overtake its invocation.
        # Taken before the state's, never after it, and never by the reader of events.
        self._sending = threading.Lock()
        self._results: queue.SimpleQueue[tuple[Done, InvocationResult] | None] = queue.SimpleQueue()
        self._teller = threading.Thread(
            target=self._tell_results, name="smlt-local-results", daemon=True
        )
        self._reader: threading.Thread | None = None
        self._helper: Helper | None = None
        self._opened: set[Path] = set()  # bills that name the helper
        self._ready = False
        self._start_helper()
        self._teller.start()

    @property
    def isolation(self) -> str:
        """How limits are enforced: ``cgroup1``, ``cgroup2`` or ``watchdog``."""
        return self._isolation.name

    @property
    def fingerprint(self) -> str:
        cores = f"{self._usable_cores:g}cores:{self._scale:.4g}"
        return f"local:{self._isolation.name}:{cores}:{processor()}"

    @property
    def limits(self) -> PlatformLimits:
        return self._limits

    def vcpus(self, memory_mb: int) -> float:
        return isolation.vcpus(memory_mb)

    def cores(self, memory_mb: int) -> float:
        """Real cores that a function of that size may use."""
        return isolation.cores(memory_mb, self._scale, self._usable_cores)

    def bill(self) -> Bill:
        with self._lock:
            return Bill(gb_s=self._mb_ms / 1024 / 1000, requests=self._requests)

    def charged(self, bill_path: Path, invocation_ids: Collection[str]) -> dict[str, Charge | None]:
        return bills.read(bill_path, invocation_ids, self._clock)

    def invoke(self, invocation: Invocation, on_done: Done) -> None:
        check_invocation(invocation, self._limits)
        check_delivery(invocation)
        with self._sending:
            with self._lock:
                helper, orders = self._admit(invocation, on_done)
            for order in orders:
                _send(helper, order, invocation.payload)

    def _admit(self, invocation: Invocation, on_done: Done) -> tuple[Helper, list[channel.Message]]:
        name = invocation.invocation_id
        if self._closed:
            raise PlatformError("the local platform is closed; make a new one")
        if name in self._executions:
            raise InvalidInput(f"invocation_id={name!r}: an invocation of that name is running")
        room = self._limits.concurrency - len(self._deliveries)
        if room < 1:
            raise Throttled(
                f"{len(self._deliveries)} functions are running, concurrency="
                f"{self._limits.concurrency} allows no more: wait until one has ended"
            )
        helper = self._helper or self._start_helper()
        bill = invocation.bill_path.absolute() if invocation.bill_path else None
        if bill is not None and bill not in self._opened:
            try:
                bills.write_opened(bill, helper.pid)
            except OSError as error:
                raise PlatformError(f"cannot write the bill: {error}") from error
            self._opened.add(bill)
        deliveries = min(room, self._limits.deliveries)
        order = {
            "do": "run",
            "invocation": name,
            "deliveries": deliveries,
            "memory_mb": invocation.memory_mb,
            "cores": self.cores(invocation.memory_mb),
            "timeout_s": min(invocation.timeout_s, self._limits.time_limit_s),
            "log": str(invocation.log_path.absolute()) if invocation.log_path else None,
            "bill": str(bill) if bill else None,
        }
        execution = _Execution(invocation, on_done, self._clock.monotonic())
        self._executions[name] = execution
        orders = []
        for number in itertools.islice(self._numbers, deliveries):
            orders.append({**order, "delivery": number})
            self._deliveries[number] = _Delivery(execution, orders[-1])
            execution.running.add(number)
            self._requests += 1
        return helper, orders

    def cancel(self, invocation_id: str) -> None:
        """Ends it at once; ``on_done`` follows with ``cancelled``. Unknown ids are ignored."""
        with self._sending:
            with self._lock:
                execution = self._executions.get(invocation_id)
                numbers = sorted(execution.running) if execution else []
                helper = self._helper
                if not self._ready:  # the helper still preloads and has started nothing yet
                    for number in numbers:
                        self._end_here(number, "cancelled", "cancelled before it ran")
            if helper is not None:
                for number in numbers:
                    _send(helper, {"do": "cancel", "delivery": number})

    def close(self) -> None:
        """Ends all functions, waits for them, frees everything. Idempotent.

        Functions that are still running end as ``cancelled``.
        """
        if os.getpid() != self._owner:  # a forked child: nothing here is its own
            return
        with self._sending:
            with self._lock:
                already, self._closed = self._closed, True
                helper, ready, reader = self._helper, self._ready, self._reader
            if helper is not None and not already:
                if ready:
                    helper.end()
                else:  # still preloading: it has started nothing yet
                    helper.kill()
        here = threading.current_thread()
        if reader is not None and helper is not None:
            reader.join(END_S)
            helper.kill()  # nothing, unless it hangs
            reader.join()
        if not already:
            self._results.put(None)
        if self._teller is not here:
            self._teller.join()

    def __enter__(self) -> LocalPlatform:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"LocalPlatform(isolation={self.isolation!r}, concurrency={self._limits.concurrency})"
        )

    # The helper

    def _start_helper(self) -> Helper:
        options = self._options
        settings = Settings(
            client=self._owner,
            entry=options.entry,
            concurrency=options.concurrency,
            billing=options.billing,
            keep_alive_s=float(options.keep_alive_s),
            isolation=self._isolation.name,
            preload=list(options.preload),
        )
        try:
            helper = Helper(settings)
        except OSError as error:
            raise PlatformError(f"cannot start the helper process: {error}") from error
        self._helper, self._ready = helper, False
        self._opened.clear()
        self._reader = threading.Thread(
            target=self._read_events, args=(helper,), name="smlt-local-events", daemon=True
        )
        self._reader.start()
        return helper

    def _read_events(self, helper: Helper) -> None:
        while (frame := channel.receive(helper.control)) is not None:
            event = frame[0]
            with self._lock:
                if event["event"] == "ready":
                    self._ready = True
                elif event["delivery"] not in self._deliveries:
                    pass  # cancelled before the helper was ready: that was told already
                elif event["event"] == "running":
                    self._deliveries[event["delivery"]].started = self._clock.monotonic()
                else:
                    self._on_ended(event)
        how = helper.bury()
        try:
            self._isolation.reap(self._clock)
        except OSError as error:
            _log.warning("control groups are left behind: %s", error)
        with self._lock:
            self._helper = None
            if not self._closed:
                _log.error("the helper process that runs functions died (%s)", how)
            for number in list(self._deliveries):
                self._on_lost(number, how)
        with self._sending:
            helper.control.close()

    def _on_lost(self, number: int, how: str) -> None:
        started = self._deliveries[number].started
        wall_s = 0.0 if started is None else self._clock.monotonic() - started
        if self._closed:
            self._end_here(number, "cancelled", "the platform was closed", wall_s)
        else:
            detail = f"the helper process that runs functions died ({how})"
            self._end_here(number, "crashed", detail, wall_s)

    def _end_here(self, number: int, ending: str, detail: str, wall_s: float = 0.0) -> None:
        """Ends a delivery of which the helper cannot tell anything."""
        order = self._deliveries[number].order
        billed = billed_ms(self._options.billing, wall_s, 0.0, order["cores"], order["timeout_s"])
        try:
            bills.write_ended(order, ending, billed)
        except OSError as error:
            _log.warning("could not write the bill: %s", error)
        self._on_ended(
            {
                "delivery": number,
                "ending": ending,
                "detail": detail,
                "cold": True,
                "billed_ms": billed,
                "cpu_s": 0.0,
                "peak_mb": 0.0,
            }
        )

    def _on_ended(self, event: dict[str, Any]) -> None:
        delivery = self._deliveries.pop(event["delivery"])
        execution = delivery.execution
        execution.running.discard(event["delivery"])
        self._mb_ms += event["billed_ms"] * execution.invocation.memory_mb
        started = delivery.started
        execution.results.append(
            InvocationResult(
                invocation_id=execution.invocation.invocation_id,
                ending=event["ending"],
                billed_s=event["billed_ms"] / 1000,
                cold=event["cold"],
                peak_mb=event["peak_mb"],
                start_s=0.0 if started is None else started - execution.called,
                cpu_s=event["cpu_s"],
                detail=event["detail"],
            )
        )
        if not execution.running:
            del self._executions[execution.invocation.invocation_id]
            self._results.put((execution.on_done, bills.together(execution.results)))

    def _tell_results(self) -> None:
        while (item := self._results.get()) is not None:
            on_done, result = item
            try:
                on_done(result)
            except Exception:  # noqa: BLE001 - the caller's code; results of others must go on
                _log.exception("on_done of %s raised", result.invocation_id)


@dataclass
class _Execution:
    """One invocation with all its deliveries."""

    invocation: Invocation
    on_done: Done
    called: float
    running: set[int] = field(default_factory=set)
    results: list[InvocationResult] = field(default_factory=list)


@dataclass
class _Delivery:
    """One run of an invocation, as it was ordered; ``started`` when the function's code began."""

    execution: _Execution
    order: channel.Message
    started: float | None = None


def _send(helper: Helper, message: channel.Message, payload: bytes = b"") -> None:
    try:
        channel.send(helper.control, message, payload)
    except OSError:
        return  # it is dead: whoever reads its events reports what it was running
    except BaseException:  # Ctrl-C: half a frame may have been sent, the next would be misread
        helper.kill()
        raise


if TYPE_CHECKING:
    from smlt_tune.backend.platforms.base import (
        Cancels,
        EndsWithClient,
        KeepsBills,
        Platform,
        Scales,
    )

    _: Platform = LocalPlatform()
    _cancels: Cancels = LocalPlatform()
    _ends: EndsWithClient = LocalPlatform()
    _keeps: KeepsBills = LocalPlatform()
    _scales: Scales = LocalPlatform()
