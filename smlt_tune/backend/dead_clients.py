"""What the functions of a client that died may have cost at most."""

from collections.abc import Sequence
from typing import Any

from smlt_tune.backend.history import HistoryEvent
from smlt_tune.backend.leases import Leases
from smlt_tune.backend.platforms.base import EndsWithClient, Platform
from smlt_tune.backend.resource_manager.observations import Allocation


def most_usd(
    events: Sequence[HistoryEvent], platform: Platform, leases: Leases, now_at: float
) -> dict[str, float]:
    """The most that reservations which were left open can have come to.

    Where functions do not outlive their client, none can have run for longer than from its
    reservation until now. Elsewhere they may have used up their leases: nothing is said of those.

    Args:
        events: Journal of the fleet, whose client is dead.
        platform: Where its functions ran.
        leases: What functions cost.
        now_at: Seconds since the Unix epoch.

    Returns:
        USD by the entry of the ledger; at most what is reserved.
    """
    if not isinstance(platform, EndsWithClient):
        return {}
    allocations: dict[str, Allocation] = {}
    unsettled: dict[str, tuple[float, dict[str, Any]]] = {}
    for event in events:
        if event.kind == "generation":
            body = event.body
            made = Allocation(body["workers"], body["memory_mb"], body["store"])
            allocations[f"{event.job}.g{body['generation']}"] = made
        elif event.kind == "ledger" and event.job:
            unsettled.setdefault(event.body["entry_id"], (event.at, dict(event.body)))
            if event.body["settled_usd"] is not None:
                del unsettled[event.body["entry_id"]]
    most = {}
    for entry_id, (at, body) in unsettled.items():
        allocation = allocations.get(entry_id.rpartition(".r")[0])
        if allocation is None:  # recorded before the first of its functions is invoked
            most[entry_id] = 0.0
            continue
        ran_s = max(0.0, now_at - at) + platform.outlives_s
        most[entry_id] = min(body["reserved_usd"], leases.worst_usd(allocation, ran_s))
    return most
