"""One thread follows all jobs of a fleet."""

import pytest

import smlt_tune as smlt
from smlt_tune.backend.job import JobSpec, JobState
from smlt_tune.errors import InvalidInput
from tests import jobs

PINS = {"workers": 1, "memory_mb": 1769}


def test_whoever_follows_a_fleet_hears_of_reports_and_ends_until_it_is_closed(platform):
    told = []
    with smlt.Fleet(platform=platform) as fleet:
        changes = fleet.changes()
        config = {"epochs": 2, "pause": 0.0}
        for name in "ab":
            fleet.submit(jobs.train, config, name=name, lockstep=True, **PINS)
        for change in changes:
            what = change.status if change.report is None else change.report.index
            told.append((change.job.job_id, what))
            if change.report is not None and change.job.job_id == "a":
                change.job.acknowledge(change.report.index + 1)
            if ("a", "finished") in told and ("b", 0) in told:
                break
        assert changes.next(timeout_s=0.0) is None, "b waits"
    assert [change.status for change in changes] == ["stopped"], "what was told before the end"
    assert [what for name, what in told if name == "a"] == ["running", 0, 1, "finished"]
    assert [what for name, what in told if name == "b"] == ["running", 0]


def test_who_follows_no_more_is_not_told(platform):
    with (
        smlt.Fleet(platform=platform) as fleet,
        fleet.changes() as changes,
        fleet.changes() as others,
    ):
        changes.close()
        fleet.submit(jobs.train, {"epochs": 1, "pause": 0.0}, **PINS).result(60)
        assert changes.next() is None
        assert others.next(timeout_s=30).status == "running"
    assert fleet.changes().next() is None


def test_what_was_asked_of_a_job_outlives_the_client():
    state = JobState(JobSpec("a", "f", "c"))
    state.restore_change("resize", {"workers": 3, "lease_s": 20.0})
    state.restore_change("resize", {"memory_mb": 2048})
    state.restore_change("paused", {})
    bounds = state.spec.bounds
    assert (bounds.workers, bounds.memory_mb, bounds.lease_s) == (3, 2048, 20.0)
    assert state.paused


@pytest.mark.parametrize("lease_s", [0, -1.0, "long", float("nan"), float("inf")])
def test_a_lease_has_to_be_a_time(platform, lease_s):
    with (
        smlt.Fleet(platform=platform) as fleet,
        pytest.raises(InvalidInput, match="lease_s must be a number of seconds above 0"),
    ):
        fleet.submit(jobs.train, lease_s=lease_s, **PINS)
