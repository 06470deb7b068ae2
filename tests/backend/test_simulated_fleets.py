"""Fleets in virtual time: nothing is different but the speed, and never one cent over."""

import os
import random
from collections import Counter
from fractions import Fraction
from math import ceil

import pytest

import smlt_tune as smlt
from smlt_tune.backend.history import read_history
from smlt_tune.backend.leases import SHORTEST_LEASE_S
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
from tests import jobs

PRICES = load_prices()
FEATURES = ModelFeatures(1_000, 4_000, 6e3, 1e2)
#: More of them were run, too; these take some seconds.
SWEEPS = int(os.environ.get("SMLT_TEST_SWEEPS", "40"))


def describe(config):
    """A training of which everything may be said."""
    wanted = {"epochs": 3, "iterations": 20, "second": 2.0, **(config or {})}
    seconds, loss = wanted.pop("second"), wanted.pop("loss", 1.0)
    return SimulatedTraining(
        iteration_s=lambda workers, memory_mb, batch: seconds / workers,
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
    submitted = []
    for _ in range(8):
        config = {
            "epochs": chance.choice([2, 5, 12]),
            "second": chance.uniform(0.5, 6),
            "memory_mb": chance.choice([100.0, 100.0, 100.0, 700.0]),
            "features": chance.choice([None, FEATURES]),
        }
        most = min(3, fleet.platform.limits.functions)
        job = fleet.submit(
            describe,
            config,
            workers=chance.randint(1, most),
            min_memory_mb=512,
            max_memory_mb=1769,
            memory_mb=chance.choice([512, 1024, None]),
        )
        submitted.append((job, config["second"]))
    for _ in range(6):
        until_s = fleet.now_s + chance.uniform(0, 90)
        fleet.run_until(lambda until_s=until_s: fleet.now_s >= until_s)
        (job, _), what = chance.choice(submitted), chance.random()
        if what < 0.15:
            job.stop("chance")
        elif what < 0.5:
            job.resize(workers=chance.randint(1, most))
        elif what < 0.8:
            job.pause()
            fleet.run_until(lambda until_s=until_s + 60: fleet.now_s >= until_s)
            job.resume()
    fleet.run_until_idle()
    return submitted


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


def least_useful_usd(platform, job, second):
    """What has to be reserved to start a job, get an iteration done, and hand over."""
    options, bounds = platform.options, job._state.spec.bounds
    slower = options.slow_factor if options.slow_share else 1.0
    slower *= 2.0 if options.pace_spread else 1.0
    needed_s = 1.6 * options.cold_start_s + 4.0 * slower * second / bounds.workers + 1.0
    lease_s = 1.02 * max(SHORTEST_LEASE_S, needed_s)
    memory_mb = job.allocations[-1].memory_mb if job.allocations else bounds.memory_mb or 1769
    worst = PRICES.worst_case_usd(memory_mb, lease_s, platform.limits.deliveries, init_s=0.0)
    return bounds.workers * max([1.0, *(by for _, by in options.price_changes)]) * worst


@pytest.mark.parametrize("first", range(0, SWEEPS, 10))
def test_a_sweep_never_costs_more_than_its_budget_and_uses_it(first):
    for seed in range(first, first + 10):
        chance = random.Random(seed)
        platform = a_platform(chance)
        budget_usd = chance.choice([0.003, 0.01, 0.03, 1.0])
        options = {"metric": chance.choice([None, "loss"]), "mode": "min", "tick_s": 0.5}
        with fleet_on(platform, budget_usd=budget_usd, **options) as fleet:
            submitted = quarrel(fleet, chance)
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
        assert told == {job.job_id: 1 for job, _ in submitted}, who
        cut = {e.job for e in history if e.kind == "ended" and e.body["reason"] == "budget"}
        if cut:  # no work is left that what is left could do
            useful = [least_useful_usd(platform, *one) for one in submitted if one[0].job_id in cut]
            unused_usd = budget_usd - ledger.settled_usd
            assert unused_usd <= max(0.05 * budget_usd, min(useful)), who


@pytest.mark.parametrize(("lease_s", "enough"), [(None, False), (80.0, True)])
def test_what_a_job_does_not_need_is_not_kept_from_the_others(lease_s, enough):
    """Eight jobs of 60 s, of which the first could reserve a quarter of what there is."""
    with fleet_on(SimulatedPlatform(), budget_usd=0.015) as fleet:
        for _ in range(8):
            config = {"epochs": 1, "iterations": 30}
            fleet.submit(describe, config, workers=1, memory_mb=1024, lease_s=lease_s)
        fleet.run_until_idle()
        assert {job.status for job in fleet.jobs()} == {"finished"}
        hand_overs = sum(len(job.allocations) - 1 for job in fleet.jobs())
        assert (hand_overs == 0) == enough


def test_a_job_that_needs_more_than_was_reserved_hands_over():
    with fleet_on(SimulatedPlatform(), budget_usd=0.03) as fleet:
        config = {"epochs": 1, "iterations": 100}
        job = fleet.submit(describe, config, workers=1, memory_mb=1024, lease_s=50.0)
        assert job.result().status == "finished"
        assert [a.reason for a in job.allocations] == ["first", *["time limit"] * 4]


# --- nothing is different -------------------------------------------------------------------------

UNRELIABLE = SimulationOptions(
    seed=3,
    concurrency=8,
    crashes_per_hour=20,
    hangs_per_hour=30,
    throttles=0.1,
    duplicates=0.2,
    pace_spread=0.2,
    time_limit_s=100.0,
)


def history_on(options, prepare=lambda platform: None):
    platform = SimulatedPlatform(options)
    with fleet_on(platform) as fleet:
        prepare(platform)
        for workers in (1, 2, 4):
            fleet.submit(describe, {"epochs": 5}, workers=workers, memory_mb=1024)
        fleet.run_until_idle()
        return fleet.history.read()


def test_equal_simulations_are_equal_event_for_event():
    history = history_on(UNRELIABLE)
    assert history == history_on(UNRELIABLE)
    assert {e.body["ending"] for e in history if e.kind == "invocation"} >= {"crashed", "cancelled"}
    assert history != history_on(SimulationOptions(**{**vars(UNRELIABLE), "seed": 4}))


def test_workers_say_nothing_that_real_ones_could_not_send():
    def send(platform):
        hear = platform.listeners["simulated"]
        platform.listeners["simulated"] = lambda event: hear(
            wire.WorkerEvent.decode(event.encode())
        )

    assert history_on(UNRELIABLE, send) == history_on(UNRELIABLE)


def journal(history):
    """Kinds of events in the order in which they first came, and what their bodies hold."""
    return {event.kind: sorted(event.body) for event in history}


def moved(job):
    """Resizes a job after its first report and waits for its end."""
    for report in job.reports():
        if report.index == 0:
            job.resize(workers=2)
    return job.result()


def test_a_job_passes_through_the_same_events_as_a_real_one(platform, tmp_path):
    with smlt.Fleet(platform=platform, policy=PinnedOrDefault(), path=tmp_path) as fleet:
        config = {"epochs": 8, "batch": 50, "pause": 0.05}
        real = moved(fleet.submit(jobs.train, config, workers=1, memory_mb=1769))
    features = ModelFeatures(600, 2400, 3600.0, 100.0)
    with fleet_on(SimulatedPlatform()) as fleet:
        config = {"epochs": 8, "iterations": 10, "second": 0.1, "features": features}
        simulated = moved(fleet.submit(describe, config, workers=1, memory_mb=1769))
        history = fleet.history.read()
    assert list(journal(history)) == list(journal(read_history(tmp_path)))
    assert journal(history) == journal(read_history(tmp_path))
    for outcome in (real, simulated):
        assert [a.reason for a in outcome.allocations] == ["first", "resize"]
        assert [a.workers for a in outcome.allocations] == [1, 2]
        assert [r.index for r in outcome.reports] == list(range(8))
        assert {r.workers for r in outcome.reports} == {1, 2}


# --- what a driver can do -------------------------------------------------------------------------


def test_time_and_cost_are_those_of_the_model():
    platform = SimulatedPlatform(SimulationOptions(cold_start_s=1.0, start_spread=0.0))
    with fleet_on(platform) as fleet:
        config = {"epochs": 2, "iterations": 10, "second": 4.0, "evaluation_s": 1.0, "save_s": 0.0}
        outcome = fleet.submit(describe, config, workers=2, memory_mb=1024).result()
    # Start, load, 2 epochs of 10 iterations of 2 s and an evaluation of 1 s.
    assert outcome.duration_s == pytest.approx(1.0 + 0.1 + 2 * (10 * 2.0 + 1.0))
    assert outcome.cost_usd == 2 * PRICES.invocation_usd(1024, 43.1)
    assert [r.time_s for r in outcome.reports] == pytest.approx([22.1, 43.1])


def test_a_job_that_reaches_its_time_limit_hands_over():
    with fleet_on(SimulatedPlatform(SimulationOptions(time_limit_s=50.0))) as fleet:
        outcome = fleet.submit(describe, {"epochs": 2, "iterations": 50}, workers=1).result()
        endings = {e.body["ending"] for e in fleet.history.read() if e.kind == "invocation"}
    assert {a.reason for a in outcome.allocations[1:]} == {"time limit"}
    assert len(outcome.reports) == 2
    assert endings == {"returned"}


def test_a_job_is_paused_and_goes_on_where_it_was(fleet):
    job = fleet.submit(describe, {"epochs": 2, "iterations": 100}, workers=2)
    fleet.run_until(lambda: fleet.now_s > 50)
    job.pause()
    fleet.run_until_idle()
    assert job.status == "paused"
    requests = fleet.platform.bill().requests
    with pytest.raises(UsageError, match="paused"):
        job.result()
    job.resume()
    outcome = job.result()
    assert outcome.status == "finished"
    assert fleet.platform.bill().requests == requests + 2
    # Nothing is computed twice: two starts, one hand-over.
    assert outcome.duration_s < 200 + 10


def test_a_job_begins_where_another_one_ended(fleet):
    first = fleet.submit(describe, {"epochs": 2, "loss": 1.0}, workers=1).result()
    config = {"epochs": 4, "loss": 8.0}
    second = fleet.submit(describe, config, workers=2, start_from=first.checkpoint).result()
    assert [(r.index, r.metrics["loss"]) for r in second.reports] == [(2, 8 / 3), (3, 2.0)]


def test_in_lockstep_nothing_is_trained_beyond_a_report(fleet):
    job = fleet.submit(describe, {"epochs": 3}, workers=2, lockstep=True)
    fleet.run_until(lambda: fleet.now_s > 1500)  # beyond a time limit
    assert len(job.allocations) > 1
    given = []
    for report in job.reports():
        given.append((report.index, report.checkpoint is not None))
        before_s = fleet.now_s
        fleet.run_until(lambda until_s=before_s + 100: fleet.now_s > until_s)
        job.acknowledge(report.index + 1)
    assert given == [(0, True), (1, True), (2, True)]
    assert job.result().status == "finished"


def test_no_time_passes_until_the_driver_asks_for_the_next_change(fleet):
    with fleet.changes() as changes:
        fleet.submit(describe, {"epochs": 9, "iterations": 20}, workers=1, name="bad")
        while (change := changes.next()).report is None:
            pass
        seen_s = fleet.now_s
        change.job.stop("pruned")
        assert changes.next(timeout_s=0.0) is None  # that takes a moment, and none has passed
        assert changes.next().status == "stopped"
        assert fleet.now_s == seen_s
        with pytest.raises(UsageError, match="nothing goes on"):
            changes.next()


def broken(config):
    raise ValueError("no such luck")


@pytest.mark.parametrize(
    ("train", "config", "sizes", "error", "message"),
    [
        (broken, None, {}, TrainingFunctionError, "no such luck"),
        (dict, {}, {}, TrainingFunctionError, "returns a SimulatedTraining"),
        (describe, {"epochs": 0}, {}, TrainingFunctionError, "epochs=0: must be a whole number"),
        (describe, {"memory_mb": 700.0}, {"memory_mb": 512}, OutOfMemory, "limit is 512 MB"),
    ],
)
def test_a_job_that_cannot_work_fails_alone(fleet, train, config, sizes, error, message):
    bad = fleet.submit(train, config, workers=2, **sizes)
    good = fleet.submit(describe, workers=1)
    with pytest.raises(error, match=message):
        bad.result()
    assert good.result().status == "finished"


def test_a_job_gets_more_memory_when_it_runs_out(fleet):
    outcome = fleet.submit(describe, {"memory_mb": 3000.0}, workers=2).result()
    assert [a.memory_mb for a in outcome.allocations] == [1769, 3538]


def test_at_the_deadline_everything_is_over():
    with fleet_on(SimulatedPlatform(), deadline_s=100) as fleet:
        outcome = fleet.submit(describe, {"epochs": 50}, workers=1).result()
    assert (outcome.status, outcome.reason) == ("stopped", "deadline")
    assert outcome.duration_s == pytest.approx(100, abs=1)


def test_the_store_is_rented_by_the_hour_of_virtual_time():
    options = {"parameter_store_price": "cache.m4.large", "tick_s": 1.0}
    with fleet_on(SimulatedPlatform(), **options) as fleet:
        fleet.submit(describe, {"epochs": 50, "iterations": 100}, workers=1).result()
        assert fleet.now_s > 2 * 3600
    rented = [e for e in fleet.ledger.entries() if e.entry_id.startswith("parameter-store")]
    hour_usd = float(PRICES.parameter_stores["cache.m4.large"].hour_usd)
    assert [e.settled_usd for e in rented] == [hour_usd] * 3


def test_the_resource_manager_works_in_virtual_time():
    pytest.importorskip("scipy")
    features = ModelFeatures(1_000_000, 4_000_000, 6e6, 1e4)
    config = {"epochs": 8, "iterations": 100, "second": 0.5, "batch": 256, "features": features}
    with SimulatedFleet(SimulatedPlatform(SimulationOptions(concurrency=16))) as fleet:
        job = fleet.submit(describe, config, goal=smlt.Fastest())
        assert job.result().status == "finished"
    assert {d.occasion for d in job.decisions} > {"first", "measured"}
    assert job.decisions[-1].evidence


def test_a_history_is_kept_in_a_folder(tmp_path):
    with fleet_on(SimulatedPlatform(), path=tmp_path) as fleet:
        fleet.submit(describe, workers=1).result()
        kept = fleet.history.read()
        assert read_history(tmp_path) == kept
    assert kept[-1].kind == "ended"
    with pytest.raises(InvalidInput, match="earlier fleet"):
        fleet_on(SimulatedPlatform(), path=tmp_path)


def test_a_closed_fleet_has_stopped_its_jobs_and_takes_no_more(fleet):
    job = fleet.submit(describe, workers=1)
    fleet.run_until(lambda: fleet.now_s > 10)
    fleet.close()
    fleet.close()
    assert (job.status, job.result().reason) == ("stopped", "the fleet was closed")
    with pytest.raises(FleetClosed):
        fleet.submit(describe)


def test_every_mistake_is_listed(fleet):
    with pytest.raises(InvalidInput) as refused:
        fleet_on(fleet.platform, tick_s=0, deadline_s=-1, hang_timeout_s=0.1)
    assert len(refused.value.mistakes) == 4
    job = fleet.submit(describe, workers=1, name="one")
    with pytest.raises(InvalidInput) as refused:
        fleet.submit("train", workers=0, name="one", start_from="simulated://memory/jobs/x")
    assert len(refused.value.mistakes) == 4
    with pytest.raises(InvalidInput, match="workers"):
        job.resize(workers=10**6)
