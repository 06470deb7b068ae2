"""Jobs that wait in every report until the client has consumed it."""

import os
import signal

import pytest

import smlt_tune as smlt
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
    from smlt_tune.backend.resource_manager.policy import PinnedOrDefault

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
