"""What a dead client's functions did cost."""

from pathlib import Path

import pytest

from smlt_tune.backend.dead_clients import next_bill, settlements
from smlt_tune.backend.history import HistoryEvent
from smlt_tune.backend.leases import Leases
from smlt_tune.backend.ledger import Ledger
from smlt_tune.backend.platforms.base import Charge, InvocationResult, PlatformLimits
from smlt_tune.backend.prices import load_prices

PRICES = load_prices()


class Lambda:
    name = "lambda"
    limits = PlatformLimits(128, 10_240, 900.0, 1000, deliveries=2)


class Inline(Lambda):
    outlives_s = 5.0


class Local(Inline):
    name = "local"

    def __init__(self, found=None):
        self.found, self.asked = found or {}, ()

    def charged(self, bill_path, invocation_ids):
        self.asked = (bill_path, invocation_ids)
        return self.found


def journal(client):
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
    found.append((10.0, "fleet", "", {"name": "f", "bill": "bills/0.jsonl"}))
    found.append((80.0, "fleet", "", {"name": "f"} | client))
    found.sort(key=lambda event: event[0])
    return [HistoryEvent(seq, *event) for seq, event in enumerate(found, 1)]


def settled(platform, client=None, *, now_at=160.0, paid=False):
    leases = Leases(platform, PRICES, Ledger(None), paid_requests=paid)
    return settlements(journal(client or {}), Path("/fleet"), platform, leases, now_at)


LOCAL = {"platform": "local", "bill": "bills/1.jsonl"}
ENDED = Charge(512, 60.0, InvocationResult("a.g0.r0.i0", "cancelled", 3.5, deliveries=2))


@pytest.mark.parametrize(("now_at", "ran_s"), [(160.0, 65.0), (99.0, 5.0), (10**6, None)])
def test_where_functions_die_with_the_client_they_ran_until_now_at_most(now_at, ran_s, caplog):
    longest = 0.03 if ran_s is None else PRICES.worst_case_usd(1024, ran_s, 2, init_s=0.0)
    assert settled(Inline(), now_at=now_at) == {"a.g0.r0.i0": longest, "a.g1.r0.i0": 0.0}
    assert "what a.g0.r0.i0 did cost is not known" in caplog.text


def test_elsewhere_nothing_is_known(caplog):
    assert settled(Lambda()) == {"a.g1.r0.i0": 0.0}
    assert "what a.g0.r0.i0 did cost is not known" in caplog.text


def test_what_the_platform_has_written_down_is_what_it_did_cost(caplog):
    platform = Local({"a.g0.r0.i0": ENDED})
    usd = PRICES.invocation_usd(512, 3.5, 2)
    assert settled(platform, LOCAL) == {"a.g0.r0.i0": usd, "a.g1.r0.i0": 0.0}
    assert platform.asked == (Path("/fleet/bills/1.jsonl"), ["a.g0.r0.i0", "a.g1.r0.i0"])
    assert caplog.text == ""


def test_requests_that_nobody_has_counted_are_all_that_were_allowed():
    platform = Local({"a.g0.r0.i0": ENDED})
    leases = Leases(platform, PRICES, Ledger(None), paid_requests=True)
    puts, gets = leases.allowance(60.0)
    usd = PRICES.invocation_usd(512, 3.5, 2) + PRICES.object_requests_usd(2 * puts, 2 * gets)
    assert settled(platform, LOCAL, paid=True)["a.g0.r0.i0"] == pytest.approx(usd, abs=1e-12)


def test_what_never_ran_did_cost_nothing(caplog):
    platform = Local({"a.g0.r0.i0": None})
    assert settled(platform, LOCAL) == {"a.g0.r0.i0": 0.0, "a.g1.r0.i0": 0.0}
    assert caplog.text == ""


def test_what_is_not_on_the_bill_is_counted_at_its_most():
    assert settled(Local(), LOCAL) == settled(Inline())


@pytest.mark.parametrize("client", [{}, {"platform": "local"}, {"platform": "local", "bill": None}])
def test_a_client_without_a_bill_is_not_looked_up(client):
    platform = Local({"a.g0.r0.i0": ENDED})
    assert settled(platform, client) == settled(Inline())
    assert platform.asked == ()


def test_another_platform_knows_nothing_of_it():
    platform = Local()
    assert settled(platform, LOCAL | {"platform": "ray"}) == {"a.g1.r0.i0": 0.0}
    assert platform.asked == ()


def test_every_client_has_a_bill_of_its_own_where_the_platform_keeps_one():
    assert next_bill([], Local()) == "bills/0.jsonl"
    assert next_bill(journal({}), Local()) == "bills/2.jsonl"
    assert next_bill(journal({}), Inline()) is None
