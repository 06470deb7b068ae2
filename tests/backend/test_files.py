"""Jobs that keep their state in files of their own."""

import pytest

import smlt_tune as smlt
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from smlt_tune.errors import TrainingFunctionError
from tests import jobs
from tests.conftest import eventually


def train(config):
    """Counts; every ``every``-th report has files. ``total`` is never the same if one is lost."""
    import tempfile
    import time
    from pathlib import Path

    session = smlt.session()
    folder = Path(tempfile.mkdtemp())
    step, total = 0, 0
    if session.restored_files(folder):
        step, total = map(int, (folder / "state" / "count.txt").read_text().split())
    jobs.note(config, f"began {step}")
    while step < config["steps"]:
        time.sleep(config.get("pause", 0.0))
        step += 1
        total += step * config.get("factor", 1)
        jobs.note(config, f"step {step}")
        metrics = {"step": step, "total": total}
        if step % config.get("every", 1):
            session.report_files(metrics, None)
        else:
            (folder / "state").mkdir(exist_ok=True)
            (folder / "state" / "count.txt").write_text(f"{step} {total}")
            session.report_files(metrics, folder)
    return total


def steps(folder):
    return [int(line.split()[1]) for line in jobs.notes(folder) if line.startswith("step")]


def totals(job):
    return [(r.index, r.metrics["step"], r.metrics["total"]) for r in job._state.reports]


EXPECTED = [(i, i + 1, (i + 1) * (i + 2) // 2) for i in range(6)]


def reported(job, count):
    eventually(lambda: len(job._state.reports) >= count or job._state.over)
    return job._state.reports[count - 1]


def pause(job):
    job.pause()
    eventually(lambda: job.status == "paused")
    job.resume()


def kill(job, folder):
    before = len(job.allocations)
    jobs.kill_one(folder, lambda living: living[0])
    eventually(lambda: len(job.allocations) > before)


def finish(job):
    for report in job.reports():
        job.acknowledge(report.index + 1)
    return job.result(1)


@pytest.mark.parametrize("disturb", [lambda job, folder: pause(job), kill])
def test_every_report_with_files_is_a_boundary(fleet, tmp_path, disturb):
    config = {"steps": 6, "notes": str(tmp_path)}
    job = fleet.submit(train, config, workers=1, lockstep=True)
    for count in range(1, 7):
        assert reported(job, count).checkpoint is not None
        assert sorted(steps(tmp_path)) == list(
            range(1, count + 1)
        )  # nothing is done ahead, or twice
        if count in (1, 3, 4):
            disturb(job, tmp_path)
        job.acknowledge(count)
    outcome = job.result(60)
    assert outcome.value == 21
    assert totals(job) == EXPECTED
    assert outcome.checkpoint == outcome.reports[-1].checkpoint


def test_reports_without_files_are_made_again(fleet, tmp_path):
    config = {"steps": 6, "every": 3, "notes": str(tmp_path)}
    job = fleet.submit(train, config, workers=1, lockstep=True)
    for count in range(1, 6):
        assert (reported(job, count).checkpoint is None) == (count != 3)
        if count == 5:
            pause(job)
        job.acknowledge(count)
    assert finish(job).value == 21
    assert totals(job) == EXPECTED  # and told once
    assert sorted(steps(tmp_path)) == [1, 2, 3, 4, 4, 5, 5, 6]


def other_results(config):
    """Reports another word each time it runs."""
    import uuid

    session, word = smlt.session(), uuid.uuid4().hex
    for step in range(3):
        session.report_files({"step": step, "word": word}, None)


def test_what_is_reported_again_takes_the_place_of_the_old(fleet):
    job = fleet.submit(other_results, workers=1, lockstep=True)
    first = reported(job, 1).metrics
    job.acknowledge(1)
    reported(job, 2)
    pause(job)
    seen = []
    for report in job.reports():
        seen.append(report.index)
        job.acknowledge(report.index + 1)
    assert seen == [0, 1, 2]
    newest = [report.metrics for report in job.result(1).reports]
    assert [each["step"] for each in newest] == [0, 1, 2]
    assert len({each["word"] for each in newest}) == 1
    assert first["word"] != newest[0]["word"]


def test_without_lockstep_nobody_waits_and_time_limits_are_survived(tmp_path):
    config = {"steps": 6, "pause": 0.4, "notes": str(tmp_path)}
    short = LocalPlatform(concurrency=4, cores_per_vcpu=0.4, time_limit_s=2.0)
    with short, smlt.Fleet(policy=PinnedOrDefault(), platform=short) as fleet:
        job = fleet.submit(train, config, workers=1)
        assert job.result(60).value == 21
        assert totals(job) == EXPECTED
        assert len(job.allocations) > 1
        assert {a.reason for a in job.allocations[1:]} == {"time limit"}
    assert sorted(steps(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_a_fork_begins_with_the_files_of_its_donor(fleet):
    donor = fleet.submit(train, {"steps": 6}, workers=1, lockstep=True)
    donor.acknowledge(2)
    url = reported(donor, 3).checkpoint
    fork = fleet.submit(
        train, {"steps": 6, "factor": 100}, workers=1, lockstep=True, start_from=url
    )
    donor.stop()
    assert finish(fork).value == 6 + 100 * (4 + 5 + 6)
    assert [(r.index, r.metrics["step"]) for r in fork._state.reports] == [(3, 4), (4, 5), (5, 6)]


def both(config):
    import torch

    session = smlt.session()
    if config == "files first":
        session.restored_files("/nonexistent")
    session.prepare(torch.nn.Linear(1, 1))
    session.report_files({"x": 1}, None)


@pytest.mark.parametrize(
    ("function", "config", "workers", "message"),
    [
        (both, "files first", 1, r"it cannot give it to prepare\(\) too"),
        (both, "", 1, r"the state of this job was given to prepare\(\)"),
        (train, {"steps": 1}, 2, r"work with one worker, and the job has 2: submit\(..., workers"),
        (lambda _: smlt.session().report_files({}, None), None, 1, "at least one metric"),
        (lambda _: smlt.session().report_files({"x": []}, None), None, 1, "a list is no metric"),
    ],
)
def test_what_cannot_be_is_refused(fleet, function, config, workers, message):
    with pytest.raises(TrainingFunctionError, match=message):
        fleet.submit(function, config, workers=workers).result(60)


def test_alone_nothing_is_kept(tmp_path):
    assert train({"steps": 3}) == 6
    assert smlt.Session().restored_files(tmp_path / "x") is False
