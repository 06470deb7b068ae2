"""Kills, freezes, short time limits and double deliveries at once, in random mixtures."""

import contextlib
import os
import random
import signal
import time

import pytest

import smlt_tune as smlt
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from tests import jobs


@pytest.fixture(scope="module")
def undisturbed(platform):
    with smlt.Fleet(policy=PinnedOrDefault(), platform=platform) as fleet:
        quick = {"epochs": 4, "pause": 0}
        running = {n: fleet.submit(jobs.train, quick, workers=n) for n in (1, 2, 3, 4)}
        return {n: job.result(120) for n, job in running.items()}


def disturb(folder, chance):
    """Kills or freezes one or two living workers at a random moment."""
    time.sleep(chance.uniform(0, 0.5))
    for _ in range(chance.choice([1, 1, 2])):
        living = [pid for pid in jobs.pids(folder) if jobs.alive(pid)]
        if living:
            with contextlib.suppress(ProcessLookupError):
                how = chance.choice([signal.SIGKILL] * 3 + [signal.SIGSTOP])
                os.kill(chance.choice(living), how)


@pytest.mark.parametrize("seed", range(6))
def test_the_bits_and_the_reports_are_those_of_an_undisturbed_run(tmp_path, undisturbed, seed):
    chance = random.Random(seed)
    workers = 1 + seed % 4
    with (
        LocalPlatform(
            concurrency=8,
            cores_per_vcpu=0.3,
            time_limit_s=chance.choice([900.0, 2.0, 3.0]),
            duplicates=seed >= 4,
        ) as platform,
        smlt.Fleet(policy=PinnedOrDefault(), platform=platform, hang_timeout_s=5) as fleet,
    ):
        config = {"epochs": 4, "pause": 0.05, "notes": str(tmp_path)}
        job = fleet.submit(jobs.train, config, workers=workers)
        until = time.monotonic() + 60
        # Once its pace is known: before that a frozen worker is waited for as for a slow start.
        while len(jobs.notes(tmp_path)) < 4 * workers and time.monotonic() < until:
            time.sleep(0.01)
        for _ in range(3):
            disturb(tmp_path, chance)
        outcome = job.result(120)
    reference = undisturbed[workers]
    assert outcome.value == reference.value
    assert [r.metrics for r in outcome.reports] == [r.metrics for r in reference.reports]
