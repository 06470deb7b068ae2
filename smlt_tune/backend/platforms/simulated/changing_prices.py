"""Prices that change while a simulation goes on."""

from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from typing import Any, Self

from smlt_tune.backend.prices import Prices
from smlt_tune.runtime.clock import SYSTEM_CLOCK, Clock


@dataclass(frozen=True)
class ChangingPrices(Prices):
    """A price list whose prices of functions change at times that are known beforehand.

    What has ended is charged by the prices of that time; what is about to start may cost as much as
    by the dearest list from then on.

    Attributes:
        lists: Since when each list holds, on the clock's ``monotonic``; ascending.
        clock: Time.
    """

    lists: tuple[tuple[float, Prices], ...] = field(default=(), hash=False)
    clock: Clock = field(default=SYSTEM_CLOCK, hash=False)

    @classmethod
    def of(cls, prices: Prices, changes: tuple[tuple[float, float], ...], clock: Clock) -> Self:
        """The list of today, and what it is multiplied by later.

        Args:
            prices: That hold until the first change.
            changes: When each change comes, on the clock's ``monotonic``, and the factor that holds
                from then on; ascending.
            clock: Time.
        """
        now = {each.name: getattr(prices, each.name) for each in fields(Prices)}
        later = [(at_s, _times(prices, factor)) for at_s, factor in changes]
        return cls(**now, lists=((clock.monotonic(), prices), *later), clock=clock)

    def invocation_usd(self, *args: Any, **kwargs: Any) -> float:
        """By the list that is in force."""
        return self._from_now_on()[0].invocation_usd(*args, **kwargs)

    def worst_case_usd(self, *args: Any, **kwargs: Any) -> float:
        """By the dearest list from now on."""
        return max(prices.worst_case_usd(*args, **kwargs) for prices in self._from_now_on())

    def _from_now_on(self) -> list[Prices]:
        now = self.clock.monotonic()
        in_force = max(i for i, (since_s, _) in enumerate(self.lists) if i == 0 or since_s <= now)
        return [prices for _, prices in self.lists[in_force:]]


def _times(prices: Prices, factor: float) -> Prices:
    exact = Decimal(repr(factor))
    return replace(
        prices,
        gb_second_usd=prices.gb_second_usd * exact,
        request_usd=prices.request_usd * exact,
    )
