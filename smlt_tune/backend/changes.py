"""What happens to the jobs of a fleet, for clients that follow many of them.

The fleet's scheduler puts every change into the queue of each follower and never waits for one; so
one thread of the client follows all jobs, real ones and simulated ones alike::

    with fleet.changes() as changes:
        jobs = [fleet.submit(train, config, lockstep=True) for config in configs]
        for change in changes:
            if change.report is not None:
                change.job.acknowledge(change.report.index + 1)
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from smlt_tune.backend.job import Job, Report


@dataclass(frozen=True)
class Change:
    """A job has reported, or has another status.

    Attributes:
        job: Which one. It may have changed further since.
        status: Of the job then.
        report: What it has reported; None if its status has changed.
    """

    job: Job
    status: str
    report: Report | None


class Changes:
    """The changes of all jobs of a fleet from the moment on at which it is made, in their order.

    For one thread; as a context manager it ends by itself.

    Args:
        condition: Whoever waits for a change waits for this.
        end: Called at the end; the fleet tells no more.
    """

    def __init__(self, condition: threading.Condition, end: Callable[["Changes"], None]) -> None:
        self._condition = condition
        self._end = end
        self._waiting: deque[Change] = deque()
        self._over = False

    def next(self, timeout_s: float | None = None) -> Change | None:
        """The next change; waits for it.

        Args:
            timeout_s: How long to wait, seconds; None for as long as it takes.

        Returns:
            None after that time, or if the fleet was closed and everything was told.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._waiting or self._over, timeout_s)
            return self._waiting.popleft() if self._waiting else None

    def __iter__(self) -> Iterator[Change]:
        """Every change until the fleet is closed."""
        while (change := self.next()) is not None:
            yield change

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Follows no more. Idempotent."""
        self._end(self)
        self.over()

    # --- for the fleet ----------------------------------------------------------------------------

    def tell(self, change: Change) -> None:
        """Adds a change, and wakes up whoever waits for one."""
        with self._condition:
            self._waiting.append(change)
            self._condition.notify_all()

    def over(self) -> None:
        """No more will come."""
        with self._condition:
            self._over = True
            self._condition.notify_all()
