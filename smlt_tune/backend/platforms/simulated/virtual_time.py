"""Time that passes as fast as it can be computed."""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smlt_tune.errors import UsageError

#: ``wall()`` at the beginning, seconds since the Unix epoch: 1 January 2026.
EPOCH_S = 1_767_225_600.0


@dataclass(eq=False, slots=True)
class Timer:
    """Something that will happen, unless it is cancelled."""

    call: Callable[[], None] | None

    def cancel(self) -> None:
        """It will not happen. Idempotent; harmless afterwards."""
        self.call = None


class VirtualTime:
    """A clock, and an agenda of what happens when.

    Whatever is due at one instant happens in the order in which it was put on the agenda, so that
    equal simulations are equal event for event. Not thread-safe.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._agenda: list[tuple[float, int, Timer]] = []
        self._number = 0
        self._inside = False

    def monotonic(self) -> float:
        """Seconds since the beginning of the simulation."""
        return self._now

    def wall(self) -> float:
        """As if the simulation had begun at ``EPOCH_S``."""
        return EPOCH_S + self._now

    def sleep(self, seconds: float) -> None:
        """Lets happen what is due in the meantime.

        Raises:
            UsageError: Something that happens wants to sleep: it has to put itself on the agenda.
        """
        until = self._now + max(0.0, seconds)
        while self._agenda and self._agenda[0][0] <= until:
            self.step()
        self._now = until

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Puts something on the agenda.

        Args:
            seconds: From now; at once if not positive, never if infinite.
            call: What happens then.
        """
        timer = Timer(call)
        if seconds < math.inf:
            self._number += 1
            entry = (self._now + max(0.0, seconds), self._number, timer)
            heapq.heappush(self._agenda, entry)
        return timer

    def step(self) -> bool:
        """Lets the next thing happen; False if there is nothing.

        Raises:
            UsageError: Called by something that happens.
        """
        if self._inside:
            raise UsageError(
                "virtual time cannot pass while something happens: call run(), result(), sleep() "
                "from outside of the simulation, or put on the agenda what shall follow"
            )
        while self._agenda:
            due_s, _, timer = heapq.heappop(self._agenda)
            call, timer.call = timer.call, None
            if call is not None:
                self._now = due_s
                self._inside = True
                try:
                    call()
                finally:
                    self._inside = False
                return True
        return False


if TYPE_CHECKING:
    from smlt_tune.runtime.clock import Clock

    _: Clock = VirtualTime()
