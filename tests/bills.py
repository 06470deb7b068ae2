"""What the local platform has charged a fleet, added up from its own record and the price list."""

import json
from collections import defaultdict
from fractions import Fraction

from smlt_tune.backend.history import read_history
from smlt_tune.backend.prices import load_prices, usd_to_nanos


def ended(folder):
    """Every delivery that has ended; of several ends of one, the first."""
    found = {}
    for path in sorted(folder.glob("bills/*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            if line["line"] == "ended":
                found.setdefault((path.name, line["delivery"]), line)
    return list(found.values())


def billed_s(folder):
    """For how long all functions together are billed, seconds."""
    return sum(line["billed_ms"] for line in ended(folder)) / 1000


def charged(folder):
    """Nano-dollars by invocation."""
    prices = load_prices()
    usd = defaultdict(Fraction)
    for line in ended(folder):
        gb_s = Fraction(line["memory_mb"], 1024) * Fraction(line["billed_ms"], 1000)
        usd[line["invocation"]] += gb_s * Fraction(prices.gb_second_usd)
        usd[line["invocation"]] += Fraction(prices.request_usd)
    return {name: -(-amount * 10**9 // 1) for name, amount in usd.items()}


def paid(folder):
    """Nano-dollars by invocation, by the ledger, without those that have cost nothing."""
    settled = {
        event.body["entry_id"]: event.body["settled_usd"]
        for event in read_history(folder)
        if event.kind == "ledger" and event.job
    }
    assert None not in settled.values()
    return {name: usd_to_nanos(usd) for name, usd in settled.items() if usd}
