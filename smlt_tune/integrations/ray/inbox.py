"""From the threads that follow jobs to the thread of Tune's loop."""

import threading
from collections import deque
from collections.abc import Callable

Event = Callable[[], None]


class Inbox:
    """What is to happen on Tune's thread, in order. Filled from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: deque[Event] = deque()

    def put(self, event: Event, *, first: bool = False) -> None:
        """Adds an event, at the front if it must not wait for the others."""
        with self._changed:
            (self._events.appendleft if first else self._events.append)(event)
            self._changed.notify()

    def get(self, timeout_s: float | None) -> Event | None:
        """The next event; None if there is none in time.

        Args:
            timeout_s: How long to wait, seconds; None for as long as it takes.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._events, timeout_s)
            return self._events.popleft() if self._events else None
