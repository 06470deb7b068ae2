"""The budget is a hard wall (invariant 5), whatever happens."""

import contextlib
import os
import random
import subprocess
import time

import pytest

import smlt_tune as smlt
from smlt_tune.backend.history import read_history
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.backend.prices import load_prices, usd_to_nanos
from smlt_tune.errors import BudgetExhausted, SmltError
from smlt_tune.runtime.checkpoint import Checkpoints
from smlt_tune.runtime.stores.directory import DirectoryStore
from tests import jobs

OVER = ("finished", "stopped", "failed")


def replayed(folder):
    """(settled, reserved) in nano-dollars after every event of the ledger."""
    entries = {}
    for event in read_history(folder):
        if event.kind == "ledger":
            entries[event.body["entry_id"]] = event.body
            settled = sum(
                usd_to_nanos(e["settled_usd"])
                for e in entries.values()
                if e["settled_usd"] is not None
            )
            reserved = sum(
                usd_to_nanos(e["reserved_usd"])
                for e in entries.values()
                if e["settled_usd"] is None
            )
            yield settled, reserved


def quarrel(fleet, folder, seed):
    """Random jobs, kills, stops, resizes and failures until everything is over."""
    chance = random.Random(seed)
    running = []
    for number in range(10):
        wrong = chance.random() < 0.15
        config = {
            "epochs": chance.choice([1, 3, 8]),
            "pause": chance.choice([0, 0.02, 0.05]),
            "notes": str(folder),
            "size": 3 if wrong else 300,  # three samples: batch norm cannot train on one of them
        }
        running.append(
            fleet.submit(
                jobs.train,
                config,
                workers=chance.choice([1, 1, 2, 3]),
                memory_mb=chance.choice([512, 1024, 1769]),
                name=f"job{number}",
            )
        )
    until = time.monotonic() + 120
    while not all(job.status in OVER for job in running):
        assert time.monotonic() < until
        time.sleep(chance.uniform(0.02, 0.2))
        what = chance.random()
        if what < 0.25:
            living = [pid for pid in jobs.pids(folder) if jobs.alive(pid)]
            if living:
                jobs.kill_one(folder, chance.choice)
        elif what < 0.3:
            chance.choice(running).stop("chance")
        elif what < 0.4:
            chance.choice(running).resize(workers=chance.choice([1, 2, 3]))
        elif what < 0.5:
            chance.choice(running).pause()
        elif what < 0.65:
            chance.choice(running).resume()
    return running


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_never_over_the_budget_and_equal_to_the_platforms_bill(tmp_path, seed):
    notes = tmp_path / "notes"
    notes.mkdir()
    budget_usd = 0.0015
    prices = load_prices()
    with LocalPlatform(concurrency=6, cores_per_vcpu=0.3, duplicates=seed == 3) as platform:
        with smlt.Fleet(platform=platform, budget_usd=budget_usd, path=tmp_path / "f") as fleet:
            quarrel(fleet, notes, seed)
            assert fleet.reserved_usd == 0
            settled = fleet.ledger.totals().settled
            assert sum(usd_to_nanos(j.cost_usd) for j in fleet.jobs()) == settled
            assert fleet.ledger.overrun_usd == 0
            entries = len(fleet.ledger.entries())
        bill = platform.bill()
    cost = bill.gb_s * float(prices.gb_second_usd) + bill.requests * float(prices.request_usd)
    # Each invocation is rounded up to a whole nano-dollar.
    assert 0 <= settled - cost * 1e9 <= entries + 1
    steps = list(replayed(tmp_path / "f"))
    assert len(steps) >= 2 * entries > 10  # each was reserved, then settled
    assert all(s + r <= usd_to_nanos(budget_usd) for s, r in steps)


def test_a_budget_that_pays_for_nothing(platform):
    with smlt.Fleet(platform=platform, budget_usd=0.0) as fleet:
        outcome = fleet.submit(jobs.train, {"epochs": 1}).result(30)
        assert (outcome.status, outcome.reason, outcome.cost_usd) == ("stopped", "budget", 0.0)
        assert outcome.allocations == ()


def test_when_money_runs_out_a_job_stops_at_a_checkpoint(platform, tmp_path):
    with smlt.Fleet(platform=platform, budget_usd=0.0003) as fleet:
        endless = {"epochs": 1000, "pause": 0.02, "notes": str(tmp_path)}
        outcome = fleet.submit(jobs.train, endless, workers=1).result(60)
        assert (outcome.status, outcome.reason) == ("stopped", "budget")
        assert outcome.checkpoint is not None
        assert len(outcome.reports) > 0
        assert 0.0002 < outcome.cost_usd <= 0.0003


def test_a_small_budget_is_leased_out_in_pieces(platform):
    """Whoever comes first does not get everything: the second job starts before the first ends."""
    with smlt.Fleet(platform=platform, budget_usd=0.01) as fleet:
        first = fleet.submit(jobs.train, {"epochs": 1000, "pause": 0.02}, workers=2)
        next(first.reports())
        second = fleet.submit(jobs.train, {"epochs": 1, "pause": 0}, workers=2)
        assert second.result(60).status == "finished"
        assert first.status == "running"
        first.stop()


def test_a_parameter_store_that_costs_by_the_hour(platform):
    with smlt.Fleet(
        platform=platform, budget_usd=1.0, parameter_store_price="cache.m4.large"
    ) as fleet:
        assert fleet.reserved_usd == pytest.approx(0.156)
        ledger = fleet.ledger
        fleet.submit(jobs.train, {"epochs": 1, "pause": 0}, workers=1).result(60)
    assert ledger.reserved_usd == 0
    assert ledger.settled_usd > 0.156  # a begun hour is a whole hour


def test_a_parameter_store_beyond_the_budget_is_refused(platform):
    with pytest.raises(BudgetExhausted, match=r"the parameter store \(cache.m4.large\) for 1 h"):
        smlt.Fleet(platform=platform, budget_usd=0.1, parameter_store_price="cache.m4.large")


def test_requests_to_s3_are_paid(platform, seaweed):
    with smlt.Fleet(
        platform=platform,
        budget_usd=1.0,
        object_store=seaweed.url,
        store_options=seaweed.options,
    ) as fleet:
        ledger = fleet.ledger
        job = fleet.submit(jobs.train, {"epochs": 3, "pause": 0.02}, workers=2, memory_mb=1769)
        outcome = job.result(90)
        assert outcome.status == "finished"
        assert outcome.checkpoint.startswith(seaweed.url)
        functions = platform_cost(fleet, outcome)
        assert outcome.cost_usd > functions + 5e-6  # one put at least
    assert ledger.reserved_usd == 0
    blocks = [e for e in ledger.entries() if e.entry_id.startswith("object-store.")]
    assert blocks
    assert all(0 < e.settled_usd <= e.reserved_usd for e in blocks)


def platform_cost(fleet, outcome):
    prices = load_prices()
    events = [e for e in fleet._history.read() if e.kind == "invocation"]
    return sum(
        prices.invocation_usd(1769, e.body["billed_s"]) for e in events if e.job == outcome.job_id
    )


def test_s3_out_of_reach_is_said_clearly(platform, seaweed):
    options = {**seaweed.options, "secret_key": "wrong"}
    with (
        pytest.raises(SmltError) as refused,
        smlt.Fleet(platform=platform, object_store=seaweed.url, store_options=options) as fleet,
    ):
        fleet.submit(jobs.train, {"epochs": 1}).result(60)
    assert "wrong" not in str(refused.value)
    assert "credentials" in str(refused.value) or "access" in str(refused.value).lower()


def fill(path):
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(file, b"x" * 4096)
    os.close(file)


def test_a_full_disk_is_a_clear_error_and_damages_nothing(platform, tmp_path):
    """The objects lie on a file system of 3 MB that fills up in mid-job."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode:
        pytest.skip("this machine does not let us mount a small file system")
    try:
        with smlt.Fleet(platform=platform, object_store=f"file://{disk}") as fleet:
            job = fleet.submit(jobs.train, {"epochs": 1000, "pause": 0.02}, workers=1)
            next(r for r in job.reports() if r.index == 4)
            fill(disk / "ballast")
            with pytest.raises(SmltError, match=r"(?i)no space"):
                job.result(120)
            (disk / "ballast").unlink()
            store = DirectoryStore(str(disk))
            left = store.list(f"jobs/{job.job_id}/checkpoints/")
            checkpoints = Checkpoints(store, job.job_id)
            assert left
            assert all(checkpoints.load(key) for key in left)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
