"""Jobs that begin with the state of another job, and with their own configuration."""

import pytest

import smlt_tune as smlt
from smlt_tune.errors import InvalidInput, TrainingFunctionError
from tests import jobs
from tests.conftest import eventually


def train(config):
    """Reports the settings at the end of an epoch, and how its state was when it began."""
    import torch

    session = smlt.session()
    x = torch.arange(24.0).reshape(12, 2) / 10
    model = torch.nn.Linear(2, config.get("outputs", 1))
    optimizer = torch.optim.SGD(
        model.parameters(), config["lr"], momentum=0.9, weight_decay=config.get("decay", 0.0)
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, config.get("gamma", 0.5))
    if config.get("scheduled"):
        model, optimizer, scheduler = session.prepare(model, optimizer, scheduler)
    else:
        model, optimizer = session.prepare(model, optimizer)
    for epoch in session.epochs(config["epochs"]):
        [group] = optimizer.param_groups
        with torch.no_grad():
            before = sum(p.sum().item() for p in model.parameters())
        moments = [s["momentum_buffer"].sum().item() for s in optimizer.state.values()]
        for (batch,) in session.batches((x,), 4):
            jobs.note(config, f"saw {epoch}")
            loss = model(batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if config.get("scheduled"):
            scheduler.step()
        settings = {name: group[name] for name in ("lr", "weight_decay", "momentum")}
        with torch.no_grad():
            after = sum(p.sum().item() for p in model.parameters())
        session.report(epoch=epoch, before=before, after=after, moments=sum(moments), **settings)
    return jobs.digest(model)


@pytest.fixture
def donor(fleet):
    """A job in lockstep that waits after its second report."""
    job = fleet.submit(train, {"lr": 0.01, "epochs": 4}, workers=1, lockstep=True)
    job.acknowledge(1)
    eventually(lambda: len(job._state.reports) == 2)
    return job


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("lockstep", [False, True])
def test_a_fork_goes_on_where_its_donor_was_with_its_own_settings(fleet, donor, workers, lockstep):
    config = {"lr": 0.02, "epochs": 4, "decay": 0.1}
    last = donor._state.reports[-1]
    fork = fleet.submit(
        train, config, workers=workers, lockstep=lockstep, start_from=last.checkpoint, seed=5
    )
    donor.stop()
    if lockstep:
        for report in fork.reports():
            fork.acknowledge(report.index + 1)
    outcome = fork.result(60)
    assert [r.index for r in outcome.reports] == [2, 3]
    assert [r.metrics["epoch"] for r in outcome.reports] == [2, 3]
    first = outcome.reports[0].metrics
    assert first["before"] == last.metrics["after"]
    assert first["moments"] != 0.0
    assert (first["lr"], first["weight_decay"], first["momentum"]) == (0.02, 0.1, 0.9)
    assert fork.allocations[0].reason == "first"


def test_a_fork_of_the_same_seed_and_settings_is_its_donor(fleet, donor):
    """Also if it is killed before it has saved anything, and paused."""
    url = donor._state.reports[-1].checkpoint
    fork = fleet.submit(train, {"lr": 0.01, "epochs": 4}, workers=1, lockstep=True, start_from=url)
    for job in (donor, fork):
        eventually(lambda j=job: j._state.reports)
        job.pause()
        eventually(lambda j=job: j.status == "paused")
        job.resume()
    for job in (donor, fork):
        for report in job.reports():
            job.acknowledge(report.index + 1)
    assert fork.result(60).value == donor.result(60).value
    assert [r.metrics for r in fork.result().reports] == [
        r.metrics for r in donor.result().reports[2:]
    ]


def test_a_fork_that_dies_before_it_has_begun_begins_again_at_its_donor(fleet, donor, tmp_path):
    url = donor._state.reports[-1].checkpoint
    config = {"lr": 0.01, "epochs": 4, "notes": str(tmp_path)}
    fork = fleet.submit(train, config, workers=1, lockstep=True, start_from=url)
    eventually(lambda: jobs.notes(tmp_path))
    jobs.kill_one(tmp_path, lambda living: living[0])
    for report in fork.reports():
        fork.acknowledge(report.index + 1)
    donor.acknowledge(4)
    assert fork.result(60).value == donor.result(60).value
    assert [r.index for r in fork.result().reports] == [2, 3]


def test_a_schedule_goes_on_from_the_new_initial_learning_rate(fleet):
    schedule = {"scheduled": True, "epochs": 4}
    donor = fleet.submit(train, {"lr": 0.01, **schedule, "epochs": 2}, workers=1)
    url = donor.result(60).checkpoint
    fork = fleet.submit(train, {"lr": 0.08, "gamma": 0.1, **schedule}, workers=1, start_from=url)
    rates = [report.metrics["lr"] for report in fork.result(60).reports]
    assert rates == pytest.approx([0.08 * 0.5**2 * 0.1, 0.08 * 0.5**2 * 0.1**2])


def test_a_fork_of_another_architecture_says_what_does_not_fit(fleet, donor):
    url = donor._state.reports[-1].checkpoint
    for changes, message in (
        ({"outputs": 3}, r"does not fit object 0 of prepare\(\), a Linear: .*size mismatch"),
        ({"scheduled": True}, r"the checkpoint holds 2 objects, but prepare\(\) was given 3"),
    ):
        fork = fleet.submit(train, {"lr": 0.1, "epochs": 4, **changes}, workers=1, start_from=url)
        with pytest.raises(TrainingFunctionError, match=f"(?s){message}"):
            fork.result(60)


def test_start_from_takes_checkpoints_of_this_fleet_only(fleet, donor):
    url = donor._state.reports[-1].checkpoint
    place = url.partition("/jobs/")[0]
    for wrong, message in (
        (3, "is no checkpoint of this fleet"),
        ("s3://bucket/jobs/x/checkpoints/e000001-l00000-i0000000000-00000000.safetensors", "is no"),
        (f"{place}/jobs/{donor.job_id}/log", "is no checkpoint of this fleet: give Report.check"),
        (url.replace(donor.job_id, "stranger"), "which this fleet does not know"),
        (url.replace("-l0", "-l1"), "does not exist .any more.: a job keeps its newest checkpoint"),
    ):
        with pytest.raises(InvalidInput, match=f"start_from=.*{message}") as refused:
            fleet.submit("no function", lockstep="yes", start_from=wrong)
        assert len(refused.value.mistakes) == 3  # all at once
        with pytest.raises(InvalidInput, match=message):
            fleet.keep_checkpoint(wrong)


def test_checkpoints_of_the_last_reports_outlive_the_job(fleet, donor):
    for report in donor.reports():
        donor.acknowledge(report.index + 1)
    outcome = donor.result(60)
    for report in outcome.reports[-3:]:
        fork = fleet.submit(
            train, {"lr": 0.01, "epochs": 4}, workers=1, start_from=report.checkpoint
        )
        assert fork.result(60).value == outcome.value
    with pytest.raises(InvalidInput, match="does not exist"):
        fleet.submit(train, {}, start_from=outcome.reports[0].checkpoint)


def test_a_kept_checkpoint_stays_what_it_was_until_it_is_released(fleet, donor):
    url = donor._state.reports[0].checkpoint
    content = fleet.read_checkpoint(url)
    fleet.keep_checkpoint(url)
    for report in donor.reports():
        donor.acknowledge(report.index + 1)
    donor.result(60)
    fleet.object_store.delete([url.removeprefix(f"{fleet.object_store.url}/")])
    fleet.keep_checkpoint(url)
    assert fleet.read_checkpoint(url) == content
    fork = fleet.submit(train, {"lr": 0.01, "epochs": 4}, workers=1, start_from=url)
    assert fork.result(60).value == donor.result().value
    for _ in range(2):
        fleet.release_checkpoint(url)
        with pytest.raises(InvalidInput, match="does not exist"):
            fleet.read_checkpoint(url)
    assert fleet.object_store.list("kept/") == []
