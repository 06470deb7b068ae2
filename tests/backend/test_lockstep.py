"""Jobs that wait in every report until the client has consumed it."""

import os
import shutil
import signal
import sqlite3
from contextlib import closing

import pytest

import smlt_tune as smlt
from smlt_tune.backend.embedded_store import EmbeddedStore
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from smlt_tune.errors import InvalidInput
from tests import jobs
from tests.conftest import eventually

EPOCHS = 4
ITERATIONS = 10  # per epoch


def config(folder, **changes):
    return {"epochs": EPOCHS, "pause": 0.0, "notes": str(folder), **changes}


def steps(folder):
    """How many training iterations were begun, of all workers together."""
    return sum(line.startswith("saw") for line in jobs.notes(folder))


def reported(job, count):
    """Waits until so many reports have come; returns all."""
    eventually(lambda: len(job._state.reports) >= count or job._state.over)
    assert len(job._state.reports) >= count, job
    return job._state.reports


@pytest.fixture(scope="module")
def undisturbed(platform):
    """The outcome of the same job without lockstep, by number of workers."""
    with smlt.Fleet(policy=PinnedOrDefault(), platform=platform) as fleet:
        running = [
            fleet.submit(jobs.train, {"epochs": EPOCHS, "pause": 0}, workers=n) for n in (1, 2)
        ]
        return {n: job.result(60) for n, job in zip((1, 2), running, strict=True)}


def same(outcome, reference):
    assert outcome.status == "finished"
    assert outcome.value == reference.value
    assert [r.metrics for r in outcome.reports] == [r.metrics for r in reference.reports]
    assert [r.index for r in outcome.reports] == list(range(len(reference.reports)))


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_trained_beyond_a_report_that_was_not_consumed(
    fleet, tmp_path, undisturbed, workers
):
    job = fleet.submit(jobs.train, config(tmp_path), workers=workers, lockstep=True)
    for count in range(1, EPOCHS + 1):
        report = reported(job, count)[-1]
        assert report.index == count - 1
        assert steps(tmp_path) == count * ITERATIONS * workers
        assert report.checkpoint.startswith("file:///")
        job.acknowledge(count)
        job.acknowledge(count - 1)  # changes nothing
    same(job.result(60), undisturbed[workers])


def test_a_job_that_is_stopped_at_a_report_has_trained_up_to_it(fleet, tmp_path):
    job = fleet.submit(jobs.train, config(tmp_path), workers=1, lockstep=True)
    reported(job, 1)
    job.acknowledge(1)
    reported(job, 2)
    job.stop("pruned")
    assert job.result(60).status == "stopped"
    assert steps(tmp_path) == 2 * ITERATIONS
    assert fleet.reserved_usd == 0


def test_a_client_may_let_a_job_run_ahead(fleet, tmp_path, undisturbed):
    job = fleet.submit(jobs.train, config(tmp_path), workers=1, lockstep=True)
    job.acknowledge(EPOCHS)
    same(job.result(60), undisturbed[1])


@pytest.mark.parametrize("count", [-1, 1.0, True, "1"])
def test_acknowledge_refuses_what_is_no_count(fleet, count):
    job = fleet.submit(jobs.train, {"epochs": 0})
    with pytest.raises(InvalidInput) as refused:
        job.acknowledge(count)
    assert refused.value.mistakes == (
        f"acknowledge() needs a whole number of at least 0, not {count!r}",
        f"job {job.job_id} does not wait for that: submit it with lockstep=True",
    )


def finish(job):
    """Acknowledges every report as it comes, up to the end."""
    for report in job.reports():
        job.acknowledge(report.index + 1)
    return job.result(1)


def has_paused(job):
    job.pause()
    eventually(lambda: job.status == "paused")


@pytest.mark.parametrize("lockstep", [False, True])
def test_twenty_pauses_leave_the_bits_as_they_are(platform, tmp_path, lockstep):
    longer = config(tmp_path, epochs=10, size=200, pause=0.01)
    with smlt.Fleet(policy=PinnedOrDefault(), platform=platform, budget_usd=1.0) as fleet:
        reference = fleet.submit(jobs.train, {**longer, "notes": None}, workers=1).result(60)
        job = fleet.submit(jobs.train, longer, workers=1, lockstep=lockstep)
        consumed = 0
        for nth in range(20):
            if lockstep and nth % 2:
                consumed += 1
                reported(job, consumed)
                has_paused(job)  # while it waits in a report
                job.acknowledge(consumed)
            else:
                before = steps(tmp_path)
                eventually(lambda n=before: steps(tmp_path) > n or job.status != "running")
                has_paused(job)
            assert fleet.reserved_usd == 0
            if job.status != "paused":
                break
            job.resume()
        same(finish(job) if lockstep else job.result(60), reference)
        assert len(job.allocations) > 10
        assert steps(tmp_path) == 10 * 4  # nothing was done twice
        assert job.cost_usd + reference.cost_usd == pytest.approx(fleet.settled_usd)


def test_two_workers_pause_in_a_report(fleet, tmp_path, undisturbed):
    job = fleet.submit(jobs.train, config(tmp_path), workers=2, lockstep=True)
    for count in range(1, EPOCHS):
        reported(job, count)
        has_paused(job)
        job.resume()
        job.acknowledge(count)
    same(finish(job), undisturbed[2])
    assert [a.reason for a in job.allocations[1:]] == ["resumed"] * (EPOCHS - 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_killed_while_they_wait_in_a_report(fleet, tmp_path, undisturbed, workers):
    job = fleet.submit(jobs.train, config(tmp_path), workers=workers, lockstep=True)
    for count in range(1, EPOCHS + 1):
        reported(job, count)
        victim = jobs.kill_one(tmp_path, lambda living, n=count: living[n % len(living)])
        if count % 2:  # else between the acknowledgement and the next iteration
            eventually(lambda v=victim: not jobs.alive(v))
            eventually(lambda n=count: len(jobs.pids(tmp_path)) > n + workers - 1)
        job.acknowledge(count)
    same(job.result(60), undisturbed[workers])
    assert steps(tmp_path) <= (EPOCHS * ITERATIONS + EPOCHS) * workers


def test_a_resize_and_a_time_limit_while_a_report_waits(tmp_path, undisturbed):
    short = LocalPlatform(concurrency=4, cores_per_vcpu=0.4, time_limit_s=2.0)
    with short, smlt.Fleet(policy=PinnedOrDefault(), platform=short) as fleet:
        job = fleet.submit(jobs.train, config(tmp_path), workers=1, lockstep=True)
        reported(job, 1)
        eventually(lambda: len(job.allocations) >= 3)  # it waits for longer than a function lives
        job.resize(memory_mb=2048)
        eventually(lambda: job.allocation.memory_mb == 2048)
        job.acknowledge(1)
        same(finish(job), undisturbed[1])
    assert steps(tmp_path) == EPOCHS * ITERATIONS


def test_the_parameter_store_restarts_while_a_report_waits(platform, tmp_path, undisturbed):
    with EmbeddedStore() as store:
        options = {"policy": PinnedOrDefault(), "platform": platform}
        with smlt.Fleet(parameter_store=store.url, **options) as fleet:
            job = fleet.submit(jobs.train, config(tmp_path), workers=1, lockstep=True)
            reported(job, 1)
            os.kill(store.pid, signal.SIGKILL)
            # More than one if its function gives up before the client knows of the restart.
            eventually(lambda: len(job.allocations) >= 2 or job._state.over)
            same(finish(job), undisturbed[1])


def reports_alone(config):
    session = smlt.session()
    for step in range(config):
        session.report(step=step)
    return config


def test_a_function_that_keeps_no_state_waits_too(fleet):
    job = fleet.submit(reports_alone, 3, workers=1, lockstep=True)
    assert reported(job, 1)[-1].checkpoint is None
    job.acknowledge(1)
    reported(job, 2)
    has_paused(job)
    assert [report.metrics["step"] for report in job._state.reports] == [0, 1]
    job.resume()
    outcome = finish(job)
    assert (outcome.value, len(outcome.reports)) == (3, 3)


def reports_in_the_loop(config):
    """After every step, and once more before the loop."""
    import torch

    session = smlt.session()
    x = torch.arange(24.0).reshape(12, 2)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    model, optimizer = session.prepare(model, optimizer)
    session.report(before=True)
    for epoch in range(2):
        for nth, (batch,) in enumerate(session.batches((x,), 4)):
            jobs.note(config, f"saw {epoch}")
            loss = model(batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.report(epoch=epoch, nth=nth, loss=loss)
    return jobs.digest(model)


@pytest.mark.parametrize("disturb", ["pause", "kill"])
@pytest.mark.parametrize("workers", [1, 2])
def test_reports_between_a_step_and_the_next(fleet, tmp_path, workers, disturb):
    reference = fleet.submit(reports_in_the_loop, {}, workers=workers).result(60)
    told = {"notes": str(tmp_path)}
    job = fleet.submit(reports_in_the_loop, told, workers=workers, lockstep=True)
    for count in range(1, len(reference.reports) + 1):
        reported(job, count)
        assert job._state.reports[-1].checkpoint is not None
        assert workers > 1 or steps(tmp_path) == count - 1
        if count in (1, 4):
            if disturb == "pause":
                has_paused(job)
                job.resume()
            elif len(jobs.pids(tmp_path)):
                jobs.kill_one(tmp_path, lambda living: living[-1])
        job.acknowledge(count)
    outcome = job.result(60)
    assert outcome.value == reference.value
    values = [[r.metrics.get("loss") for r in each.reports] for each in (outcome, reference)]
    assert values[0] == values[1]


def left_behind(folder, copy):
    """What a client that dies right now leaves behind: a copy of its folder."""
    shutil.copytree(folder / "objects", copy / "objects")
    with (
        closing(sqlite3.connect(folder / "history.sqlite3")) as source,
        closing(sqlite3.connect(copy / "history.sqlite3")) as target,
    ):
        source.backup(target)
    return copy


def test_a_paused_job_is_paused_for_the_next_client_too(platform, tmp_path, undisturbed):
    options = {"policy": PinnedOrDefault(), "platform": platform, "path": tmp_path / "f"}
    notes = tmp_path / "notes"
    notes.mkdir()
    fleet = smlt.Fleet(**options)
    job = fleet.submit(jobs.train, config(notes), workers=1, lockstep=True, name="j")
    queued = fleet.submit(jobs.train, config(notes), workers=1, lockstep=True, name="q")
    queued.pause()
    reported(job, 1)
    job.acknowledge(1)
    reported(job, 2)
    has_paused(job)
    with fleet:
        options["path"] = left_behind(options["path"], tmp_path / "copy")
    with smlt.Fleet.open(**options) as fleet:
        job, queued = fleet.jobs()
        eventually(lambda: job.status == queued.status == "paused")
        assert fleet.reserved_usd == 0
        before = steps(notes)
        job.resume()
        eventually(lambda: job.status == "running")
        assert steps(notes) == before  # whoever follows has to acknowledge again
        same(finish(job), undisturbed[1])
        assert queued.status == "paused"
        queued.resume()
        same(finish(queued), undisturbed[1])
