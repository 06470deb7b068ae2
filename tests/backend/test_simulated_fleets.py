"""Fleets in virtual time: nothing is different but the speed, and never one cent over."""

import json
import os
import random
from collections import Counter
from fractions import Fraction
from math import ceil

import pytest

import smlt_tune as smlt
from smlt_tune.backend.platforms.simulated import (
    SimulatedPlatform,
    SimulatedTraining,
    SimulationOptions,
)
from smlt_tune.backend.prices import load_prices, usd_to_nanos
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from smlt_tune.backend.simulated_fleet import SimulatedFleet
from smlt_tune.errors import (
    FleetClosed,
    InvalidInput,
    OutOfMemory,
    TrainingFunctionError,
    UsageError,
)
from smlt_tune.runtime import wire
from smlt_tune.runtime.features import ModelFeatures

PRICES = load_prices()
#: More of them were run, too; these take some seconds.
SWEEPS = int(os.environ.get("SMLT_TEST_SWEEPS", "40"))


def describe(config):
    """A training of which everything may be said."""
    wanted = {"epochs": 3, "iterations": 20, "second": 2.0, **(config or {})}
    seconds, loss = wanted.pop("second"), wanted.pop("loss", 1.0)
    return SimulatedTraining(
        iteration_s=lambda workers, memory_mb: seconds / workers,
        metrics=lambda epoch: {"epoch": epoch, "loss": loss / (epoch + 1)},
        **wanted,
    )


class Watched(SimulatedPlatform):
    """Keeps a bill of its own."""

    def __init__(self, options):
        super().__init__(options)
        self.results = []

    def invoke(self, invocation, on_done):
        def done(result):
            self.results.append((self.time.monotonic(), invocation, result))
            on_done(result)

        super().invoke(invocation, done)

    def charged_nanos(self):
        """To the nano-dollar, at the prices of the time when each invocation ended."""
        total = 0
        for at_s, invocation, result in self.results:
            factor = [1.0, *(by for since_s, by in self.options.price_changes if since_s <= at_s)]
            gb_s = Fraction(round(result.billed_s * 1000), 1000) * invocation.memory_mb / 1024
            usd = gb_s * Fraction(PRICES.gb_second_usd)
            usd += result.deliveries * Fraction(PRICES.request_usd)
            total += ceil(usd * Fraction(repr(factor[-1])) * 10**9)
        return total


def fleet_on(platform, **options):
    return SimulatedFleet(platform, **{"policy": PinnedOrDefault(), **options})


@pytest.fixture
def fleet():
    with fleet_on(SimulatedPlatform()) as fleet:
        yield fleet


def kinds(history):
    """Kinds of events, in their order, each once in a row."""
    found = [event.kind for event in history]
    return [kind for kind, before in zip(found, ["", *found], strict=False) if kind != before]


# --- the budget -----------------------------------------------------------------------------------


def a_platform(chance):
    """Nothing on it can be relied on."""
    changes = sorted((chance.uniform(0, 900), chance.uniform(0.3, 3)) for _ in range(2))
    return Watched(
        SimulationOptions(
            seed=chance.randrange(10**6),
            concurrency=chance.choice([6, 10, 30]),
            time_limit_s=chance.choice([40.0, 200.0, 900.0]),
            cold_start_s=chance.choice([0.1, 1.5]),
            pace_spread=chance.choice([0.0, 0.3]),
            slow_share=chance.choice([0.0, 0.2]),
            crashes_per_hour=chance.choice([0.0, 0.0, 10.0, 60.0]),
            hangs_per_hour=chance.choice([0.0, 0.0, 5.0]),
            throttles=chance.choice([0.0, 0.2]),
            duplicates=chance.choice([0.0, 0.0, 0.3]),
            price_changes=tuple(changes) if chance.random() < 0.4 else (),
            progress_s=5.0,
        )
    )


def quarrel(fleet, chance):
    """Random jobs, and somebody who cannot make up their mind."""
    jobs = []
    for _ in range(8):
        config = {
            "epochs": chance.choice([2, 5, 12]),
            "second": chance.uniform(0.5, 6),
            "memory_mb": chance.choice([100.0, 100.0, 100.0, 700.0]),
        }
        most = min(3, fleet.platform.limits.functions)
        jobs.append(
            fleet.submit(
                describe,
                config,
                workers=chance.randint(1, most),
                min_memory_mb=512,
                max_memory_mb=1769,
                memory_mb=chance.choice([512, 1024, None]),
            )
        )
    for _ in range(6):
        until_s = fleet.now_s + chance.uniform(0, 90)
        fleet.run_until(lambda until_s=until_s: fleet.now_s >= until_s)
        job, what = chance.choice(jobs), chance.random()
        if what < 0.15:
            job.stop("chance")
        elif what < 0.5:
            job.resize(workers=chance.randint(1, most))
        elif what < 0.8:
            job.pause()
            fleet.run_until(lambda until_s=until_s + 60: fleet.now_s >= until_s)
            job.resume()
    fleet.run_until_idle()
    return jobs


def highest_nanos(history):
    """The most that was settled and reserved at once."""
    held, most = {}, 0
    total = 0
    for event in history:
        if event.kind == "ledger":
            usd = event.body["settled_usd"]
            usd = event.body["reserved_usd"] if usd is None else usd
            before = held.get(event.body["entry_id"], 0)
            held[event.body["entry_id"]] = usd_to_nanos(usd)
            total += usd_to_nanos(usd) - before
            most = max(most, total)
    return most


@pytest.mark.parametrize("first", range(0, SWEEPS, 10))
def test_a_sweep_never_costs_more_than_its_budget_and_uses_it(first):
    for seed in range(first, first + 10):
        chance = random.Random(seed)
        platform = a_platform(chance)
        budget_usd = chance.choice([0.003, 0.01, 0.03, 1.0])
        with fleet_on(platform, budget_usd=budget_usd, tick_s=0.5) as fleet:
            jobs = quarrel(fleet, chance)
            history = fleet.history.read()
            ledger = fleet.ledger
        who = f"seed {seed}: {platform.options}"
        assert highest_nanos(history) <= usd_to_nanos(budget_usd), who
        assert ledger.totals().settled == platform.charged_nanos(), who
        assert ledger.totals().reserved == 0
        assert ledger.overrun_usd == 0
        results = [result for _, _, result in platform.results]
        assert platform.bill().requests == sum(result.deliveries for result in results)
        told = Counter(event.job for event in history if event.kind == "ended")
        assert told == {job.job_id: 1 for job in jobs}, who
        reasons = {e.body["reason"] for e in history if e.kind == "ended"}
        if "budget" in reasons:  # there was useful work left
            assert ledger.settled_usd >= 0.95 * budget_usd, who
