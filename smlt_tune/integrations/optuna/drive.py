"""What one call of ``optimize`` shares with the trials that it runs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from optuna import TrialPruned

from smlt_tune.errors import BudgetExhausted

if TYPE_CHECKING:
    from smlt_tune.backend.job import Job

#: Reasons after which the fleet starts nothing more.
FLEET_IS_OVER = ("budget", "deadline")

_CURRENT = threading.local()


class Drive:
    """The jobs that are followed now, and why no more may start. Safe to use from several threads.

    Attributes:
        ending: Empty while trials may start; then ``interrupted``, ``timeout``, ``budget`` or
            ``deadline``.
        refusal: The first error of a trial that the budget did not pay for.
        trained: Whether any job has reported.
    """

    def __init__(self) -> None:
        self.ending = ""
        self.refusal: BudgetExhausted | None = None
        self.trained = False
        self._lock = threading.Lock()
        self._jobs: set[Job] = set()

    @contextmanager
    def current(self) -> Iterator[None]:
        """The calls of ``run`` in this thread belong to this drive."""
        _CURRENT.drive = self
        try:
            yield
        except BudgetExhausted as error:
            self.refusal = self.refusal or error
            self.end("budget")
            raise
        finally:
            _CURRENT.drive = None

    def admit(self) -> None:
        """Returns if another job may start.

        Raises:
            KeyboardInterrupt: The driver was interrupted.
            BudgetExhausted: The budget is spent.
            TrialPruned: It is too late for another one.
        """
        if self.ending == "interrupted":
            raise KeyboardInterrupt
        if self.ending == "budget":
            raise BudgetExhausted("the budget is exhausted; the trial was not started")
        if self.ending:
            raise TrialPruned(f"not started: {self.ending}")

    @contextmanager
    def following(self, job: "Job") -> Iterator[None]:
        """While the job is followed, :meth:`stop` reaches it."""
        with self._lock:
            self._jobs.add(job)
        if self.ending and self.ending not in FLEET_IS_OVER:
            job.stop(self.ending)
        try:
            yield
        finally:
            with self._lock:
                self._jobs.discard(job)

    def end(self, reason: str) -> None:
        """No further job starts; those that run go on. An earlier reason stays."""
        with self._lock:
            self.ending = self.ending or reason

    def stop(self, reason: str) -> None:
        """No further job starts, and those that run stop now."""
        with self._lock:
            self.ending = reason
            jobs = list(self._jobs)
        for job in jobs:
            job.stop(reason)


def current_drive() -> Drive:
    """The drive of this thread; one of its own for a trial outside ``optimize``."""
    return getattr(_CURRENT, "drive", None) or Drive()
