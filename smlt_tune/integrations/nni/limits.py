"""How many candidates may start, how long, and for how much."""

from typing import TYPE_CHECKING

from smlt_tune.integrations.nni.metrics import LOG
from smlt_tune.runtime.clock import SYSTEM_CLOCK, Clock

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet

#: Reasons after which a fleet starts nothing more.
FLEET_IS_OVER = ("budget", "deadline")


class Limits:
    """What ends a search. Not safe to use from several threads.

    Args:
        concurrency: Most candidates at once.
        candidates: Most candidates; None for no limit.
        seconds: Time after which no further candidate starts; None for no limit.
        clock: Time.
    """

    def __init__(
        self,
        concurrency: int,
        candidates: int | None = None,
        seconds: float | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.concurrency = concurrency
        self._candidates, self._seconds, self._clock = candidates, seconds, clock
        self._started_s = clock.monotonic()
        self._costs: list[float] = []
        self._reason = ""

    def seconds(self) -> float:
        """How long the search has lasted, earlier drivers included."""
        return self._clock.monotonic() - self._started_s

    def add_seconds(self, seconds: float) -> None:
        """An earlier driver has searched so long."""
        self._started_s -= seconds

    def seconds_left(self) -> float | None:
        """Time in which further candidates may start; None for ever."""
        return None if self._seconds is None else max(0.0, self._seconds - self.seconds())

    def ended(self, cost_usd: float, reason: str) -> None:
        """A candidate has ended; why, if it did not train to its end."""
        self._costs.append(cost_usd)
        if reason in FLEET_IS_OVER:
            self._end(f"the fleet's {reason} is reached")

    def reached(self, candidates: int, fleet: "Fleet") -> bool:
        """Whether no further candidate may start. Once it is so, it stays so.

        Args:
            candidates: How many were submitted.
            fleet: Where they run.
        """
        budget, spent = fleet.budget_usd, fleet.settled_usd
        if fleet.closed:
            self._end("the fleet is closed")
        if self._candidates is not None and candidates >= self._candidates:
            self._end(f"all {self._candidates} candidates were submitted")
        if self.seconds_left() == 0.0:
            self._end(f"max_experiment_duration ({self._seconds:g} s) is over")
        if budget is not None and spent + self._estimate_usd() >= budget:
            self._end(
                f"the budget of {budget:g} USD does not pay for another candidate: {spent:.6f} USD "
                f"are spent, and one costs about {self._estimate_usd():.6f} USD"
            )
        return bool(self._reason)

    def can_pay(self, busy: int, fleet: "Fleet") -> bool:
        """Whether what is not reserved is enough for one more; if not, some will be freed."""
        return busy == 0 or fleet.available_usd >= self._estimate_usd()

    def _estimate_usd(self) -> float:
        """What candidates have cost on average."""
        return sum(self._costs) / len(self._costs) if self._costs else 0.0

    def _end(self, reason: str) -> None:
        if not self._reason:
            self._reason = reason
            LOG.info("no further candidates: %s", reason)
