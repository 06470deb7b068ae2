"""What the parameter store costs while a fleet stands: reserved one billing step ahead."""

from collections.abc import Callable

from smlt_tune.backend.ledger import Ledger
from smlt_tune.backend.prices import Prices
from smlt_tune.errors import BudgetExhausted
from smlt_tune.runtime.clock import Clock


class StoreCosts:
    """Keeps the running billing step of the parameter store reserved, and settles it at its end.

    Args:
        ledger: Of the fleet.
        prices: What the store costs.
        row: Of the price list.
        clock: Time.
        out_of_money: Called when the next step cannot be reserved: the store will be given back.
    """

    def __init__(
        self,
        ledger: Ledger,
        prices: Prices,
        row: str,
        clock: Clock,
        out_of_money: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._row = row
        self._step_s = 3600.0 * float(prices.parameter_stores[row].billing_step_h)
        self._step_usd = prices.parameter_store_usd(row, self._step_s / 3600.0)
        self._out_of_money = out_of_money
        self._open: str | None = None
        self._ends_s = 0.0

    def begin(self) -> None:
        """Reserves the first step.

        Raises:
            BudgetExhausted: The budget does not cover it.
        """
        if self._step_usd:
            self._reserve()

    def tick(self) -> None:
        """Time has passed: a step that is over is settled, the next one reserved ahead of it."""
        if self._open is None or self._clock.monotonic() < self._ends_s:
            return
        self.end()
        try:
            self._reserve()
        except BudgetExhausted:
            self._out_of_money()

    def end(self) -> None:
        """Settles the running step as a whole: that is how it is billed. Idempotent."""
        if self._open is not None:
            self._ledger.settle(self._open, self._step_usd)
            self._open = None

    def _reserve(self) -> None:
        number = sum(e.entry_id.startswith("parameter-store.") for e in self._ledger.entries())
        name = f"parameter-store.{number}"
        what = f"the parameter store ({self._row}) for {self._step_s / 3600.0:g} h"
        self._ledger.reserve(name, "", self._step_usd, what)
        self._open, self._ends_s = name, self._clock.monotonic() + self._step_s
