"""Successive halving of real jobs: on other functions after every stage, and after a SIGKILL."""

import signal
import subprocess
import sys
from pathlib import Path

import smlt_tune as smlt
from smlt_tune.backend.history import read_history
from smlt_tune.backend.resource_manager.observations import Allocation, Option
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from smlt_tune.backend.sweeps.halving import run_halving
from smlt_tune.backend.sweeps.halving_rules import Schedule
from smlt_tune.backend.sweeps.stage_allocations import StageAllocations
from tests import jobs
from tests.conftest import eventually

SCHEDULE = Schedule("accuracy", maximize=True, rungs=(1, 2, 4), factor=2)
ITERATIONS = 10  # per epoch
PINS = {"workers": 1, "memory_mb": 1769}

CLIENT = """
import sys
import smlt_tune as smlt
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.backend.sweeps.halving import run_halving
from tests import jobs
from tests.backend.sweeps.test_halving_fleet import PINS, SCHEDULE, configs

folder, notes = sys.argv[1:]
platform = LocalPlatform(concurrency=6, cores_per_vcpu=0.4)
with platform, smlt.Fleet(platform=platform, budget_usd=1.0, path=folder) as fleet:
    given = configs(notes, pause=0.02)
    run_halving(fleet, jobs.train, given, schedule=SCHEDULE, **PINS)
"""


def configs(notes, **changes):
    """All alike: then the first ones are the best."""
    return [{"epochs": 4, "pause": 0.0, "notes": str(notes), **changes} for _ in range(4)]


def epochs_of(result):
    return [len(job.reported) for job in result.jobs]


def test_trials_go_on_where_they_were_on_what_is_planned_for_the_stage(platform, tmp_path):
    def options(share):
        return [Option(Allocation(2 if share == 0.5 else 1, 1769), 10.0 * share, 1e-4)]

    allocations = StageAllocations(options, smlt.Fastest(1.0))
    with smlt.Fleet(platform=platform, policy=PinnedOrDefault(), budget_usd=1.0) as fleet:
        result = run_halving(
            fleet, jobs.train, configs(tmp_path), schedule=SCHEDULE, allocations=allocations
        )
        assert fleet.reserved_usd == 0
    assert (result.best, result.complete, result.notes) == (0, True, ())
    assert epochs_of(result) == [4, 2, 1, 1]
    assert [stage.allocation.workers for stage in result.stages] == [1, 1, 2]
    saw = [line for line in jobs.notes(tmp_path) if line.startswith("saw")]
    assert len(saw) == ITERATIONS * (4 * 1 + 2 * 1 + 2 * 2), "of both workers in the last stage"
    assert result.jobs[0].result().value is not None, "the best one was trained to its end"


def test_a_client_that_was_killed_is_replaced(platform, tmp_path):
    (tmp_path / "notes").mkdir()
    with smlt.Fleet(platform=platform, policy=PinnedOrDefault()) as fleet:
        alone = fleet.submit(jobs.train, {"epochs": 4, "pause": 0.0}, **PINS).result(60)
    folder = tmp_path / "fleet"
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(folder), str(tmp_path / "notes")],
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    try:
        eventually(lambda: client.poll() is not None or in_second_stage(folder))
        assert client.poll() is None, client.stderr.read()
    finally:
        client.send_signal(signal.SIGKILL)
        client.communicate()
    with smlt.Fleet.open(folder, platform=platform, policy=PinnedOrDefault()) as fleet:
        given = configs(tmp_path / "notes", pause=0.02)
        result = run_halving(fleet, jobs.train, given, schedule=SCHEDULE, **PINS)
    assert (result.best, epochs_of(result)) == (0, [4, 2, 1, 1])
    assert result.jobs[0].result().value == alone.value
    for job in result.jobs:
        seen = [report.metrics for report in job.reported]
        assert seen == [report.metrics for report in alone.reports[: len(seen)]]


def in_second_stage(folder):
    """Whether a trial goes on after a pause."""
    if not (folder / "history.sqlite3").exists():
        return False
    return any(event.kind == "resumed" for event in read_history(folder))
