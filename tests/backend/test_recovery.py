"""Training does not notice what happens to its workers (invariants 1 to 4)."""

import os
import random
import signal
import time

import numpy as np
import pytest

import smlt_tune as smlt
from smlt_tune.backend.embedded_store import EmbeddedStore
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from tests import jobs
from tests.contracts.faulty_s3 import faulty_s3

PAUSE_S = 0.04
ALL = list(range(500))


def config(folder, **changes):
    return {"epochs": 4, "pause": PAUSE_S, "notes": str(folder), **changes}


def samples(folder):
    """Samples that workers trained on, by epoch, in any order, repetitions included."""
    seen = {}
    for line in jobs.notes(folder):
        if line.startswith("saw"):
            _, epoch, *ids = line.split()
            seen.setdefault(int(epoch), []).extend(map(int, ids))
    return {epoch: sorted(ids) for epoch, ids in seen.items()}


def wait_for_notes(folder, count):
    until = time.monotonic() + 60
    while len(jobs.notes(folder)) < count:
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(platform, tmp_path_factory):
    """Outcomes of undisturbed jobs by number of workers."""
    with smlt.Fleet(policy=PinnedOrDefault(), platform=platform) as fleet:
        running = {}
        for n in (1, 2, 3, 4):
            folder = tmp_path_factory.mktemp(f"undisturbed{n}")
            running[n] = (folder, fleet.submit(jobs.train, config(folder), workers=n))
        outcomes = {}
        for n, (folder, job) in running.items():
            outcomes[n] = job.result(120)
            assert samples(folder) == {epoch: ALL for epoch in range(4)}
        return outcomes


def metrics(outcome):
    return [report.metrics for report in outcome.reports]


def same(outcome, reference):
    assert outcome.status == "finished"
    assert outcome.value == reference.value
    assert metrics(outcome) == metrics(reference)
    assert [r.index for r in outcome.reports] == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [1, 3])
def test_five_kills_at_random_moments_leave_the_bits_as_they_are(
    fleet, tmp_path, undisturbed, workers
):
    chance = random.Random(workers)
    job = fleet.submit(jobs.train, config(tmp_path), workers=workers)
    wait_for_notes(tmp_path, 2 * workers)
    for _ in range(5):
        time.sleep(chance.uniform(0.05, 0.4))
        jobs.kill_one(tmp_path, chance.choice)
    same(job.result(120), undisturbed[workers])
    assert all(set(ids) == set(ALL) for ids in samples(tmp_path).values())


@pytest.mark.parametrize("workers", [1, 3])
def test_a_time_limit_of_seconds_leaves_the_bits_as_they_are(tmp_path, undisturbed, workers):
    short = LocalPlatform(concurrency=8, cores_per_vcpu=0.4, time_limit_s=2.0)
    try:
        with smlt.Fleet(policy=PinnedOrDefault(), platform=short) as fleet:
            slow = config(tmp_path, pause=0.2)
            outcome = fleet.submit(jobs.train, slow, workers=workers).result(150)
    finally:
        short.close()
    same(outcome, undisturbed[workers])
    assert len(outcome.allocations) >= 5  # four relaunches at least
    assert {a.reason for a in outcome.allocations[1:]} == {"time limit"}
    assert samples(tmp_path) == {epoch: ALL for epoch in range(4)}  # nothing was done twice


@pytest.mark.parametrize("workers", [1, 3])
def test_double_delivery_of_everything_leaves_the_bits_as_they_are(tmp_path, undisturbed, workers):
    double = LocalPlatform(concurrency=8, cores_per_vcpu=0.3, duplicates=True)
    try:
        with smlt.Fleet(policy=PinnedOrDefault(), platform=double) as fleet:
            outcome = fleet.submit(jobs.train, config(tmp_path), workers=workers).result(120)
            assert fleet.reserved_usd == 0
    finally:
        double.close()
    same(outcome, undisturbed[workers])
    assert len(set(jobs.pids(tmp_path))) == 2 * workers


def test_the_death_of_one_of_four_restarts_nobody_else(fleet, tmp_path, undisturbed):
    job = fleet.submit(jobs.train, config(tmp_path), workers=4)
    wait_for_notes(tmp_path, 30)
    before = set(jobs.pids(tmp_path))
    dead = jobs.kill_one(tmp_path, random.Random(0).choice)
    outcome = job.result(120)
    same(outcome, undisturbed[4])
    assert len(outcome.allocations) == 1
    assert len(before) == 4
    assert len(jobs.pids(tmp_path)) == 5
    survivors = before - {dead}
    began = {pid: 0 for pid in jobs.pids(tmp_path)}
    for pid in began:
        lines = (tmp_path / f"{pid}.txt").read_text().splitlines()
        began[pid] = lines.count("began")
    assert all(began[pid] == 1 for pid in survivors)
    repeated = sum(len(ids) - len(set(ids)) for ids in samples(tmp_path).values())
    assert repeated <= 13  # one worker's part of one batch of 50


def plain(config):
    """Without random numbers: the result depends on the number of workers by rounding only."""
    import torch
    from torch.nn import functional as F

    session = smlt.session()
    data = torch.Generator().manual_seed(1)
    x_all = torch.randn(500, 16, generator=data)
    y_all, ids = x_all[:, :4].argmax(1), torch.arange(500)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = session.prepare(model, optimizer)
    for epoch in session.epochs(config["epochs"]):
        for x, y, i in session.batches((x_all, y_all, ids), batch_size=50):
            jobs.note(config, f"saw {epoch} {' '.join(map(str, i.tolist()))}")
            time.sleep(config["pause"])
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        session.report(epoch=epoch, workers=session.workers)
    return jobs.weights(model)


def test_two_then_three_then_one_worker_in_mid_epoch(fleet, tmp_path):
    job = fleet.submit(plain, config(tmp_path, pause=0.1), workers=2)
    wait_for_notes(tmp_path, 8)
    job.resize(workers=3)
    while len(job.allocations) < 2:
        time.sleep(0.01)
    wait_for_notes(tmp_path, 45)
    job.resize(workers=1)
    outcome = job.result(120)
    assert [a.workers for a in outcome.allocations] == [2, 3, 1]
    assert samples(tmp_path) == {epoch: ALL for epoch in range(4)}
    (tmp_path / "alone").mkdir()
    alone = fleet.submit(plain, config(tmp_path / "alone", pause=0), workers=1).result(120)
    np.testing.assert_allclose(outcome.value, alone.value, rtol=0, atol=1e-5)


def test_a_resize_of_memory_keeps_the_weights(fleet, tmp_path, undisturbed):
    job = fleet.submit(jobs.train, config(tmp_path), workers=2, memory_mb=1769)
    wait_for_notes(tmp_path, 8)
    job.resize(memory_mb=1024)
    outcome = job.result(120)
    same(outcome, undisturbed[2])
    assert [a.memory_mb for a in outcome.allocations] == [1769, 1024]
    assert samples(tmp_path) == {epoch: ALL for epoch in range(4)}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_parameter_store_that_is_killed_and_comes_back_empty(
    platform, tmp_path, undisturbed, workers
):
    with (
        EmbeddedStore() as store,
        smlt.Fleet(policy=PinnedOrDefault(), platform=platform, parameter_store=store.url) as fleet,
    ):
        job = fleet.submit(jobs.train, config(tmp_path), workers=workers)
        wait_for_notes(tmp_path, 12 * workers)
        os.kill(store.pid, signal.SIGKILL)
        outcome = job.result(120)
    same(outcome, undisturbed[workers])
    assert len(outcome.allocations) >= 2


@pytest.mark.parametrize("fault", ["SlowDown", "InternalError", "truncate", "reset"])
def test_an_object_store_that_fails_now_and_then(platform, tmp_path, undisturbed, fault):
    with faulty_s3() as server:
        options = {"endpoint_url": server.url, "access_key": "id", "secret_key": "secret"}
        with smlt.Fleet(
            policy=PinnedOrDefault(),
            platform=platform,
            object_store="s3://bucket/jobs",
            store_options=options,
        ) as fleet:
            server.faults += [fault, "", fault, fault, "", fault] * 5
            job = fleet.submit(jobs.train, config(tmp_path), workers=2)
            same(job.result(120), undisturbed[2])
            assert len(server.faults) < 30  # some of them happened


def test_a_worker_that_hangs_is_replaced(platform, tmp_path, undisturbed):
    with smlt.Fleet(policy=PinnedOrDefault(), platform=platform, hang_timeout_s=3.0) as fleet:
        job = fleet.submit(jobs.train, config(tmp_path), workers=2)
        wait_for_notes(tmp_path, 20)
        victim = jobs.pids(tmp_path)[0]
        os.kill(victim, signal.SIGSTOP)
        outcome = job.result(120)
        assert not jobs.alive(victim)
    same(outcome, undisturbed[2])
    assert len(outcome.allocations) == 1  # mended inside the generation


def test_shards_are_independent_of_workers(fleet, tmp_path, undisturbed):
    for shards in (1, 7):
        job = fleet.submit(jobs.train, config(tmp_path, pause=0), workers=3, shards=shards)
        same(job.result(120), undisturbed[3])
