"""What the functions of a client that died did cost."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smlt_tune.backend.history import HistoryEvent
from smlt_tune.backend.leases import Leases
from smlt_tune.backend.platforms.base import Charge, EndsWithClient, KeepsBills, Platform
from smlt_tune.backend.resource_manager.observations import Allocation

_LOG = logging.getLogger(__name__)


def next_bill(events: Sequence[HistoryEvent], platform: Platform) -> str | None:
    """Where a platform shall write down what it charges the next client of a fleet.

    Args:
        events: Journal of the fleet.
        platform: Where functions of that client will run.

    Returns:
        A file of its own, relative to the fleet's folder; None if the platform keeps no bills.
    """
    if not isinstance(platform, KeepsBills):
        return None
    return f"bills/{sum(event.kind == 'fleet' for event in events)}.jsonl"


def settlements(
    events: Sequence[HistoryEvent], folder: Path, platform: Platform, leases: Leases, now_at: float
) -> dict[str, float]:
    """What reservations that were left open have come to.

    That is what the platform has written down, where it does. Of an invocation whose end nobody has
    seen it is the most that it can have cost: where functions do not outlive their client, it ran
    from its reservation until now. Elsewhere it may have used up its lease: nothing is said of it.

    Args:
        events: Journal of the fleet, whose client is dead.
        folder: Of the fleet.
        platform: Where its functions ran.
        leases: What functions cost.
        now_at: Seconds since the Unix epoch.

    Returns:
        USD by the entry of the ledger.
    """
    left = _Left()
    for event in events:
        left.read(event)
    same = left.client.get("platform", platform.name) == platform.name
    bill = left.client.get("bill")
    charged: dict[str, Charge | None] = {}
    if left.entries and same and bill and isinstance(platform, KeepsBills):
        charged = platform.charged(folder / bill, list(left.entries))
    usd: dict[str, float] = {}
    for entry_id, (at, reserved_usd) in left.entries.items():
        allocation = left.allocations.get(entry_id.rpartition(".r")[0])
        if allocation is None:  # recorded before the first of its functions is invoked
            usd[entry_id] = 0.0
        elif entry_id in charged:
            usd[entry_id] = _charged_usd(charged[entry_id], leases)
        else:
            _LOG.warning("what %s did cost is not known: it counts at its most", entry_id)
            if same and isinstance(platform, EndsWithClient):
                ran_s = max(0.0, now_at - at) + platform.outlives_s
                usd[entry_id] = min(reserved_usd, leases.worst_usd(allocation, ran_s))
    return usd


@dataclass
class _Left:
    """What a dead client has left, from its journal.

    Attributes:
        client: What it has recorded of itself.
        allocations: By generation, as ``JOB.gN``.
        entries: Of the ledger, for functions, still open: when they were made, and USD reserved.
    """

    client: Mapping[str, Any] = field(default_factory=dict)
    allocations: dict[str, Allocation] = field(default_factory=dict)
    entries: dict[str, tuple[float, float]] = field(default_factory=dict)

    def read(self, event: HistoryEvent) -> None:
        """Takes the next event of the journal in."""
        body = event.body
        if event.kind == "fleet":
            self.client = body
        elif event.kind == "generation":
            made = Allocation(body["workers"], body["memory_mb"], body["store"])
            self.allocations[f"{event.job}.g{body['generation']}"] = made
        elif event.kind == "ledger" and event.job:
            if body["settled_usd"] is None:
                self.entries[body["entry_id"]] = (event.at, body["reserved_usd"])
            else:
                self.entries.pop(body["entry_id"], None)


def _charged_usd(charge: Charge | None, leases: Leases) -> float:
    if charge is None:
        return 0.0
    return leases.billed_usd(charge.memory_mb, charge.timeout_s, charge.result, ())
