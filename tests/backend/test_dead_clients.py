"""What a dead client's functions may have cost at most."""

import pytest

from smlt_tune.backend.dead_clients import most_usd
from smlt_tune.backend.history import HistoryEvent
from smlt_tune.backend.leases import Leases
from smlt_tune.backend.ledger import Ledger
from smlt_tune.backend.platforms.base import PlatformLimits
from smlt_tune.backend.prices import load_prices

PRICES = load_prices()


class Lambda:
    limits = PlatformLimits(128, 10_240, 900.0, 1000, deliveries=2)


class Local(Lambda):
    outlives_s = 5.0


def journal():
    """Two workers of a generation, one of which has ended; a third that was never invoked."""
    generation = {"generation": 0, "workers": 2, "memory_mb": 1024, "store": "default"}
    entries = [
        ("a.g0.r0.i0", 100.0, None),
        ("a.g0.r1.i0", 100.0, None),
        ("a.g0.r1.i0", 130.0, 0.001),
        ("a.g1.r0.i0", 140.0, None),
    ]
    found = [
        (at, "ledger", "a", {"entry_id": name, "reserved_usd": 0.03, "settled_usd": settled})
        for name, at, settled in entries
    ]
    found.append((101.0, "generation", "a", generation))
    store = {"entry_id": "parameter-store.0", "reserved_usd": 0.156, "settled_usd": None}
    found.append((90.0, "ledger", "", store))
    found.sort(key=lambda event: event[0])
    return [HistoryEvent(seq, *event) for seq, event in enumerate(found, 1)]


@pytest.mark.parametrize(("now_at", "ran_s"), [(160.0, 65.0), (99.0, 5.0), (10**6, None)])
def test_where_functions_die_with_the_client_they_ran_until_now_at_most(now_at, ran_s):
    leases = Leases(Local(), PRICES, Ledger(None), paid_requests=False)
    most = most_usd(journal(), Local(), leases, now_at)
    longest = 0.03 if ran_s is None else PRICES.worst_case_usd(1024, ran_s, 2, init_s=0.0)
    assert most == {"a.g0.r0.i0": longest, "a.g1.r0.i0": 0.0}


def test_elsewhere_nothing_is_known():
    leases = Leases(Lambda(), PRICES, Ledger(None), paid_requests=False)
    assert most_usd(journal(), Lambda(), leases, 160.0) == {}
