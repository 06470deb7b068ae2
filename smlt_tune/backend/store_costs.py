"""What the stores cost a fleet: parameter stores by the hour, the object store by request."""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from smlt_tune.backend.ledger import Ledger
from smlt_tune.backend.prices import Prices
from smlt_tune.backend.resource_manager.observations import DEFAULT_STORE
from smlt_tune.errors import BudgetExhausted
from smlt_tune.runtime.clock import Clock
from smlt_tune.runtime.stores.base import Buffer, ObjectStore

#: The client's requests to the object store are reserved in blocks of so many puts and gets.
BLOCK_REQUESTS = 100


class StoreCosts:
    """Keeps the running billing step of a parameter store reserved, and settles it at its end.

    Args:
        ledger: Of the fleet.
        prices: What the store costs.
        row: Of the price list.
        clock: Time.
        out_of_money: Called when the next step cannot be reserved: the store will be given back.
        name: Of the store in the fleet.
        needed: Whether anybody uses the store; if not, it is given back at the end of a step.
    """

    def __init__(
        self,
        ledger: Ledger,
        prices: Prices,
        row: str,
        clock: Clock,
        out_of_money: Callable[[], None],
        *,
        name: str = DEFAULT_STORE,
        needed: Callable[[], bool] = lambda: True,
    ) -> None:
        self._entry = "parameter-store" if name == DEFAULT_STORE else f"parameter-store-{name}"
        self._needed = needed
        self._ledger = ledger
        self._clock = clock
        self._row = row
        self._step_s = 3600.0 * float(prices.parameter_stores[row].billing_step_h)
        self._step_usd = prices.parameter_store_usd(row, self._step_s / 3600.0)
        self._out_of_money = out_of_money
        self._open: str | None = None
        self._ends_s = 0.0
        self._given_back = False

    def begin(self) -> None:
        """Reserves the first step. Does nothing while one is running.

        Raises:
            BudgetExhausted: The budget does not cover it.
        """
        if self._step_usd and self._open is None:
            self._reserve(self._clock.monotonic())
            self._given_back = False

    def tick(self) -> None:
        """Time has passed: a step that is over is settled, the next one reserved ahead of it."""
        if self._given_back:
            self._out_of_money()  # for those who have come since
        if self._open is None or self._clock.monotonic() < self._ends_s:
            return
        self.end()
        if not self._needed():
            return
        try:
            self._reserve(self._ends_s)
        except BudgetExhausted:
            self._given_back = True
            self._out_of_money()

    def end(self) -> None:
        """Settles the running step as a whole: that is how it is billed. Idempotent."""
        if self._open is not None:
            self._ledger.settle(self._open, self._step_usd)
            self._open = None

    def _reserve(self, begins_s: float) -> None:
        number = sum(e.entry_id.startswith(f"{self._entry}.") for e in self._ledger.entries())
        name = f"{self._entry}.{number}"
        what = f"the parameter store ({self._row}) for {self._step_s / 3600.0:g} h"
        self._ledger.reserve(name, "", self._step_usd, what)
        self._open, self._ends_s = name, begins_s + self._step_s


class PaidObjectStore:
    """The client's own access to an object store that charges for requests.

    Every request is covered by a reservation before it is made; requests are reserved in blocks.
    A listing costs as much as a put, a deletion nothing. May be used from several threads.

    Args:
        inner: The store.
        ledger: Of the fleet.
        prices: What requests cost.
    """

    def __init__(self, inner: ObjectStore, ledger: Ledger, prices: Prices) -> None:
        self._inner = inner
        self._ledger = ledger
        self._prices = prices
        self._lock = threading.Lock()
        self._puts = self._gets = 0
        self._blocks: list[str] = []
        self._block_usd = prices.object_requests_usd(BLOCK_REQUESTS, BLOCK_REQUESTS)
        self._first = sum(e.entry_id.startswith("object-store.") for e in ledger.entries())

    @property
    def url(self) -> str:  # noqa: D102 - the contract stands on the protocol
        return self._inner.url

    def put(self, key: str, content: Buffer, *, if_absent: bool = False) -> bool:  # noqa: D102
        self._pay(puts=1)
        return self._inner.put(key, content, if_absent=if_absent)

    def get(self, key: str) -> bytes:  # noqa: D102
        self._pay(gets=1)
        return self._inner.get(key)

    def list(self, prefix: str) -> list[str]:  # noqa: D102
        self._pay(puts=1)
        return self._inner.list(prefix)

    def delete(self, keys: Sequence[str]) -> None:  # noqa: D102
        self._inner.delete(keys)

    def settle(self) -> None:
        """Books what the requests did cost. The store is not used any more."""
        with self._lock:
            rest = self._prices.object_requests_usd(self._puts, self._gets)
            for name in self._blocks:
                share = min(rest, self._block_usd)
                self._ledger.settle(name, share)
                rest = max(0.0, rest - share)
            self._blocks.clear()

    def _pay(self, *, puts: int = 0, gets: int = 0) -> None:
        with self._lock:
            cost = self._prices.object_requests_usd(self._puts + puts, self._gets + gets)
            while cost > len(self._blocks) * self._block_usd:
                name = f"object-store.{self._first + len(self._blocks)}"
                what = f"{BLOCK_REQUESTS} writes and reads of the object store"
                self._ledger.reserve(name, "", self._block_usd, what)
                self._blocks.append(name)
            self._puts += puts
            self._gets += gets


if TYPE_CHECKING:

    def _conforms(store: PaidObjectStore) -> ObjectStore:
        return store
