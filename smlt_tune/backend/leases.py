"""How long functions may run, and what that may cost: the money of invocations."""

import math
from collections.abc import Sequence

from smlt_tune.backend.generations import Record
from smlt_tune.backend.ledger import Ledger
from smlt_tune.backend.platforms.base import InvocationResult, Platform
from smlt_tune.backend.prices import Prices
from smlt_tune.backend.resource_manager.observations import Allocation
from smlt_tune.errors import BudgetExhausted
from smlt_tune.runtime import wire
from smlt_tune.runtime.session import TIME_LIMIT_MARGIN_S

#: Largest share of the free budget that one generation may reserve.
LEASE_SHARE = 0.25
#: Shortest lease worth starting a function for while nothing is known of its job, in seconds.
SHORTEST_LEASE_S = 3.0
#: A lease that has ended without any progress was too short: the next has to be so much longer.
GROWTH = 2.0
#: Leases are not made shorter than this while there is money for it, in seconds.
USEFUL_LEASE_S = 20.0
#: Requests to an object store that charges for them which an invocation may make in any case, ...
FREE_REQUESTS = 50
#: ... and how often it may save a checkpoint there, in seconds.
PAID_CHECKPOINT_S = 5.0


class Leases:
    """Of all invocations of a fleet.

    Args:
        platform: Where functions run.
        prices: What they cost.
        ledger: Knows what is free.
        paid_requests: Whether the object store charges for requests.
    """

    def __init__(
        self, platform: Platform, prices: Prices, ledger: Ledger, *, paid_requests: bool
    ) -> None:
        self._platform = platform
        self._prices = prices
        self._ledger = ledger
        self._paid_requests = paid_requests

    def length_s(self, job: Record, allocation: Allocation) -> float:
        """How long functions of a job may run: up to the time limit, less if money is short.

        Raises:
            BudgetExhausted: There is not enough for a lease that is worth it.
        """
        limit_s = self._platform.limits.time_limit_s
        available_usd = self._ledger.available_usd
        if math.isinf(available_usd):
            return limit_s
        wanted_s, known_s = job.state.spec.bounds.lease_s, _shortest_s(job)
        if wanted_s is not None:
            limit_s = min(limit_s, max(wanted_s, known_s))
        at_once = self.worst_usd(allocation, 0.0) * allocation.workers
        hour = self.worst_usd(allocation, 3600.0) * allocation.workers
        per_s = (hour - at_once) / 3600.0
        free = max(0.0, available_usd - at_once)
        affordable_s = 0.99 * free / per_s if per_s else limit_s
        if wanted_s is not None and affordable_s >= limit_s:
            return limit_s  # it is not meant to need more: nothing is kept from others
        shortest_s = min(limit_s, known_s)
        useful_s = min(max(USEFUL_LEASE_S, shortest_s, GROWTH * job.fruitless_s), affordable_s)
        lease_s = min(limit_s, max(LEASE_SHARE * affordable_s, useful_s))
        if lease_s < shortest_s:
            raise BudgetExhausted(
                f"{allocation.workers} functions of {allocation.memory_mb} MB cost "
                f"{per_s:.9f} USD per second, and need {shortest_s:.1f} s at least; of the budget "
                f"{available_usd:.9f} USD are free"
            )
        return lease_s

    def worst_usd(self, allocation: Allocation, lease_s: float) -> float:
        """The most that one function of a generation can cost, USD."""
        limits = self._platform.limits
        puts, gets = self.allowance(lease_s)
        return self._prices.worst_case_usd(
            allocation.memory_mb,
            lease_s,
            limits.deliveries,
            object_puts=puts * limits.deliveries,
            object_gets=gets * limits.deliveries,
            init_s=limits.init_s,
        )

    def allowance(self, lease_s: float) -> tuple[int, int]:
        """How many puts and gets of a paid object store one delivery may make."""
        if not self._paid_requests:
            return 0, 0
        return FREE_REQUESTS + int(lease_s / PAID_CHECKPOINT_S), 4 * FREE_REQUESTS

    def billed_usd(
        self,
        memory_mb: int,
        lease_s: float,
        result: InvocationResult,
        said: Sequence[wire.Requests],
    ) -> float:
        """What an invocation did cost, USD.

        Args:
            memory_mb: Of its function, MB.
            lease_s: Its lease, seconds.
            result: How it ended.
            said: What its deliveries have said of their requests; if one could not, all that it
                was allowed counts.
        """
        puts, gets = (allowed * result.deliveries for allowed in self.allowance(lease_s))
        if len(said) == result.deliveries:
            puts = sum(requests.puts for requests in said)
            gets = sum(requests.gets for requests in said)
        usd = self._prices.invocation_usd(memory_mb, result.billed_s, result.deliveries)
        return usd + self._prices.object_requests_usd(puts, gets)


def _shortest_s(job: Record) -> float:
    """What a function of a job needs to start, to get one iteration done, and to hand over.

    As long as no iteration was seen, all that is known is what was not enough.
    """
    known_s = job.boot_s + job.step_s + TIME_LIMIT_MARGIN_S if job.boot_s else 0.0
    return max(SHORTEST_LEASE_S, known_s, 0.0 if job.step_s else GROWTH * job.fruitless_s)
