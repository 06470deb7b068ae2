"""One run of an invocation on a simulated instance."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from smlt_tune.backend.platforms.base import Ending, Invocation
from smlt_tune.backend.platforms.simulated.virtual_time import Timer
from smlt_tune.runtime import wire


class Members(Protocol):
    """What a delivery knows of its generation."""

    @property
    def over(self) -> bool:
        """Whether nobody is left in it."""

    def left(self, worker: "Delivery") -> None:
        """A function has ended, whatever the reason."""

    def silenced(self, worker: "Delivery") -> None:
        """A function has fallen silent."""


@dataclass(eq=False)
class Delivery:
    """One run of an invocation.

    Attributes:
        invocation: What was asked for.
        spec: Its payload.
        started_s: When it began; it is billed from then on.
        slowness: Times as long as on another instance.
        on_end: Called at its end, with what the platform says of it.
        peak_mb: Highest resident memory so far, MB.
        timers: What may still happen to it.
        generation: That it has entered.
        hung: It has fallen silent.
        over: It has ended.
    """

    invocation: Invocation
    spec: wire.WorkerSpec
    started_s: float
    slowness: float
    on_end: Callable[["Delivery", Ending, str], None]
    peak_mb: float = 0.0
    timers: list[Timer] = field(default_factory=list)
    generation: "Members | None" = None
    hung: bool = False
    over: bool = False

    @property
    def ends_s(self) -> float:
        """When the platform ends it, if it has not ended before."""
        return self.started_s + self.invocation.timeout_s

    def end(self, ending: Ending, detail: str = "") -> None:
        """It is over. Does nothing to what is."""
        if self.over:
            return
        self.over = True
        for timer in self.timers:
            timer.cancel()
        self.on_end(self, ending, detail)
