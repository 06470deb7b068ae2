"""Functions in this process, one at a time, for debuggers."""

from __future__ import annotations

import logging
import math
import os
import threading
import traceback
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
    load_entry,
    mistakes_in_entry,
    processor,
)
from smlt_tune.errors import InvalidInput, PlatformError, Throttled
from smlt_tune.runtime.clock import SYSTEM_CLOCK, Clock

_log = logging.getLogger(__name__)


class InlinePlatform:
    """Runs each function in a thread of this process, so that breakpoints in it work.

    One at a time. Nothing is enforced: neither memory, nor CPU share, nor the time limit, because
    nobody wants to be killed while looking at a variable. Nothing can end a thread from outside, so
    there is no ``cancel``. The function's output goes where this process writes it;
    ``Invocation.log_path`` is ignored. Billed by the time that passes, per millisecond, at most the
    time-out.

    Args:
        entry: Function that is run with the payload, as ``package.module:function``.
        clock: Source of time.

    Raises:
        InvalidInput: The entry is not written like that.
    """

    name = "inline"
    outlives_s = 0.0

    def __init__(
        self, *, entry: str = "smlt_tune.runtime.worker:run", clock: Clock = SYSTEM_CLOCK
    ) -> None:
        if mistakes := mistakes_in_entry(entry):
            raise InvalidInput(mistakes)
        self._entry = entry
        self._clock = clock
        self._cores = os.cpu_count() or 1
        self._limits = PlatformLimits(
            min_memory_mb=128,
            max_memory_mb=10_240,
            time_limit_s=900.0,
            concurrency=1,
            max_workers=1,
        )
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._running = ""
        self._mb_ms = 0
        self._requests = 0
        self._closed = False

    @property
    def fingerprint(self) -> str:  # noqa: D102 - the contract stands on the protocol
        return f"inline:{self._cores}cores:{processor()}"

    @property
    def limits(self) -> PlatformLimits:  # noqa: D102
        return self._limits

    def vcpus(self, memory_mb: int) -> float:
        """As on AWS Lambda, so that functions choose the same number of threads. Not enforced."""
        return memory_mb / MB_PER_VCPU

    def cores(self, memory_mb: int) -> float:
        """One for each thread that a function of that size computes with, as far as there are."""
        return float(min(max(1, int(self.vcpus(memory_mb))), self._cores))

    def bill(self) -> Bill:  # noqa: D102
        with self._lock:
            return Bill(gb_s=self._mb_ms / 1024 / 1000, requests=self._requests)

    def invoke(self, invocation: Invocation, on_done: Done) -> None:  # noqa: D102
        check_invocation(invocation, self._limits)
        with self._lock:
            if self._closed:
                raise PlatformError("the inline platform is closed; make a new one")
            if self._running:
                raise Throttled(
                    f"the inline platform runs one function at a time and {self._running!r} is "
                    "running: wait until it has ended"
                )
            self._running = invocation.invocation_id
            self._requests += 1
            self._thread = threading.Thread(
                target=self._run,
                args=(invocation, on_done, self._clock.monotonic()),
                name=f"smlt-inline-{invocation.invocation_id}",
                daemon=True,  # Ctrl-C must end the program even while a function runs
            )
            self._thread.start()

    def close(self) -> None:
        """Waits for the function that is running: nothing can end it. Idempotent."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def __enter__(self) -> InlinePlatform:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return "InlinePlatform()"

    def _run(self, invocation: Invocation, on_done: Done, called: float) -> None:
        started = self._clock.monotonic()
        ending: Ending = "returned"
        detail = ""
        try:
            load_entry(self._entry)(invocation.payload)
        except BaseException as error:  # noqa: BLE001 - SystemExit too ends the function only
            ending, detail = "crashed", _describe(error)
        passed_s = self._clock.monotonic() - started
        billed_ms = max(1, math.ceil(min(passed_s, invocation.timeout_s) * 1000))
        with self._lock:
            self._mb_ms += billed_ms * invocation.memory_mb
            self._running = ""
        result = InvocationResult(
            invocation_id=invocation.invocation_id,
            ending=ending,
            billed_s=billed_ms / 1000,
            cold=False,
            start_s=started - called,
            detail=detail,
        )
        try:
            on_done(result)
        except Exception:  # noqa: BLE001 - the caller's code, and nobody above to tell
            _log.exception("on_done of %s raised", invocation.invocation_id)


def _describe(error: BaseException) -> str:
    """The error on a line of its own, then the traceback."""
    summary = "".join(traceback.format_exception_only(error)).strip()
    return f"{summary}\n{''.join(traceback.format_exception(error))}"


if TYPE_CHECKING:
    from smlt_tune.backend.platforms.base import EndsWithClient, Platform, Scales

    _: Platform = InlinePlatform()
    _ends: EndsWithClient = InlinePlatform()
    _scales: Scales = InlinePlatform()
