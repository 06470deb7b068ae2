"""The only module that reads the time or sleeps.

Everything else takes a :class:`Clock`, so that a simulated platform can run the same scheduler in
virtual time and no test has to sleep.
"""

import time
from typing import Protocol


class Clock(Protocol):
    """A source of time. Safe to use from several threads."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary origin; never goes back. For durations and time-outs."""

    def wall(self) -> float:
        """Seconds since the Unix epoch. For records that people read."""

    def sleep(self, seconds: float) -> None:
        """Returns after ``seconds``; at once if that is not positive."""


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:  # noqa: D102 - the contract stands on the protocol
        return time.monotonic()

    def wall(self) -> float:  # noqa: D102
        return time.time()

    def sleep(self, seconds: float) -> None:  # noqa: D102
        if seconds > 0:
            time.sleep(seconds)


SYSTEM_CLOCK = SystemClock()
