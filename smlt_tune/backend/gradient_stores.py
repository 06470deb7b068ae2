"""The parameter stores of a fleet beside its own: gradients of jobs may go through them."""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial

from smlt_tune.backend.ledger import Ledger
from smlt_tune.backend.prices import Prices
from smlt_tune.backend.resource_manager.observations import DEFAULT_STORE
from smlt_tune.backend.store_costs import StoreCosts
from smlt_tune.errors import InvalidInput, StoreUnavailable
from smlt_tune.runtime.clock import Clock
from smlt_tune.runtime.stores.base import ParameterStore
from smlt_tune.runtime.stores.opening import open_parameter_store

_LOG = logging.getLogger(__name__)

#: A store has lost what it held, does not answer, or answers again with all that it held.
RESTARTED, GONE, BACK = "restarted", "gone", "back"
#: How long a request of the client may take before the store counts as out of reach, in seconds.
RETRY_S = 3.0


class GradientStores:
    """Further parameter stores: who uses them, whether they still are what they were, their costs.

    A store with a price is rented when the first job is about to use it, and for as long as one
    does.

    Args:
        given: URL and row of the price list of each, by name.
        ledger: Of the fleet.
        prices: What stores cost.
        clock: Time.
        users: Jobs that use a store.
        stop: Called with a job when the store that it uses cannot be paid any more.
        stack: Closes the connections.

    Raises:
        StoreUnavailable: A store does not answer.
    """

    def __init__(
        self,
        given: Mapping[str, tuple[str, str]],
        ledger: Ledger,
        prices: Prices,
        clock: Clock,
        users: Callable[[str], list[str]],
        stop: Callable[[str], None],
        stack: ExitStack,
    ) -> None:
        self._users = users
        self._stop = stop
        self.urls = {name: url for name, (url, _) in given.items()}
        self.connections: dict[str, ParameterStore] = {}
        self._servers: dict[str, str] = {}
        self._silent: set[str] = set()
        self._costs: dict[str, StoreCosts] = {}
        for name, (url, row) in given.items():
            store = stack.enter_context(closing(open_parameter_store(url, retry_s=RETRY_S)))
            try:
                self._servers[name] = store.server_id()
            except StoreUnavailable as error:
                raise StoreUnavailable(f"parameter store {name!r}: {error}") from error
            self.connections[name] = store
            self._costs[name] = StoreCosts(
                ledger,
                prices,
                row,
                clock,
                partial(self._out_of_money, name),
                name=name,
                needed=partial(self._in_use, name),
            )

    def rent(self, name: str) -> None:
        """Before a generation uses a store. Raises BudgetExhausted if it cannot be paid."""
        if name in self._costs:
            self._costs[name].begin()

    def tick(self) -> None:
        """Time has passed."""
        for costs in self._costs.values():
            costs.tick()

    def end(self) -> None:
        """Nobody uses them any more. Idempotent."""
        for costs in self._costs.values():
            costs.end()

    def changes(self) -> list[tuple[str, str]]:
        """What has happened to stores since the last call: name and one of the three constants."""
        found = []
        for name, store in self.connections.items():
            try:
                server = store.server_id()
            except StoreUnavailable:
                if name not in self._silent:
                    self._silent.add(name)
                    found.append((name, GONE))
                continue
            if server != self._servers[name]:
                found.append((name, RESTARTED))
            elif name in self._silent:
                found.append((name, BACK))
            self._servers[name] = server
            self._silent.discard(name)
        return found

    def clean_up(self, prefix: str) -> None:
        """Deletes what a fleet has left there."""
        for name, store in self.connections.items():
            try:
                store.delete_prefix(prefix)
            except StoreUnavailable as error:
                _LOG.warning("could not clean up the parameter store %s: %s", name, error)

    def _in_use(self, name: str) -> bool:
        return bool(self._users(name))

    def _out_of_money(self, name: str) -> None:
        for job_id in self._users(name):
            self._stop(job_id)


def read_given(
    given: Mapping[str, str | tuple[str, str]], prices: Prices | None
) -> dict[str, tuple[str, str]]:
    """URL and row of the price list of each store, from what the user gave.

    Raises:
        InvalidInput: Lists every mistake.
    """
    mistakes: list[str] = []
    found: dict[str, tuple[str, str]] = {}
    for name, value in given.items():
        url, row = (value, "own") if isinstance(value, str) else _pair(value)
        if name in ("", DEFAULT_STORE):
            mistakes.append(
                f"parameter_stores: {name!r} cannot be the name of a store; "
                f"{DEFAULT_STORE!r} is the one that parameter_store= names"
            )
        elif not url:
            mistakes.append(
                f"parameter_stores: {name} must be a URL, or a URL and a row of the price list"
            )
        else:
            found[name] = (url, row)
            mistakes += _store_mistakes(name, url, row, prices)
    if mistakes:
        raise InvalidInput(mistakes)
    return found


def _pair(value: object) -> tuple[str, str]:
    match value:
        case (str(url), str(row)):
            return url, row
    return "", ""


def _store_mistakes(name: str, url: str, row: str, prices: Prices | None) -> list[str]:
    mistakes: list[str] = []
    try:
        open_parameter_store(url, retry_s=0.0).close()
    except InvalidInput as error:
        mistakes += [f"parameter_stores: {name}: {mistake}" for mistake in error.mistakes]
    if prices is not None:
        try:
            prices.parameter_store_usd(row, 1.0)
        except InvalidInput as error:
            mistakes += [f"parameter_stores: {name}: {mistake}" for mistake in error.mistakes]
    return mistakes
