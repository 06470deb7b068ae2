"""Jobs that train until a metric is where it should be."""

import pytest

from smlt_tune.backend.goals import Target
from smlt_tune.backend.job import JobSpec, JobState, Report
from smlt_tune.backend.platforms.simulated import (
    SimulatedPlatform,
    SimulatedTraining,
    SimulationOptions,
)
from smlt_tune.backend.resource_manager.policy import Bounds, PinnedOrDefault
from smlt_tune.backend.simulated_fleet import SimulatedFleet
from smlt_tune.errors import InvalidInput
from smlt_tune.runtime.features import ModelFeatures
from tests.backend.scheduler_world import World

ITERATIONS = 50


def train(config):
    """Its loss is 1 / epoch; it would go on for a thousand epochs."""
    return SimulatedTraining(
        epochs=config.get("epochs", 1000),
        iterations=ITERATIONS,
        iteration_s=lambda workers, memory_mb, batch: 0.2 / workers,
        metrics=config.get("metrics", lambda epoch: {"loss": 1 / (epoch + 1)}),
        features=ModelFeatures(1000, 4000, 6000.0, 100.0),
        batch=8,
    )


class Recorder(PinnedOrDefault):
    """Stays with what there is, and remembers what it was asked."""

    def __init__(self):
        self.left, self.doubts = [], []

    def review(self, facts):
        self.left.append((facts.elapsed_s, facts.iterations_left))
        self.doubts.append((facts.elapsed_s, facts.left_sd))


def fleet_on(policy=None):
    return SimulatedFleet(SimulatedPlatform(SimulationOptions()), policy=policy or Recorder())


def test_a_job_stops_at_its_target_at_a_checkpoint():
    with fleet_on() as fleet:
        outcome = fleet.submit(train, {}, target=Target("loss", 0.05, "min", best=0)).result()
        on = fleet.submit(train, {"epochs": 21}, start_from=outcome.checkpoint, workers=1)
        following = on.result()
    assert (outcome.status, outcome.reason) == ("stopped", "target")
    assert len(outcome.reports) == 20
    assert outcome.metrics["loss"] == 0.05
    assert outcome.duration_s < 20 * ITERATIONS * 0.2 + 30  # it went no further
    assert [report.index for report in following.reports] == [20]


def test_a_job_that_ends_before_its_target_has_finished():
    with fleet_on() as fleet:
        job = fleet.submit(train, {"epochs": 5}, target=Target("loss", 0.05, "min", best=0))
        assert (job.result().status, len(job.result().reports)) == ("finished", 5)


def test_its_allocation_is_chosen_for_the_epochs_that_are_left():
    policy = Recorder()
    with fleet_on(policy) as fleet:
        job = fleet.submit(train, {}, target=Target("loss", 0.01, "min", best=0))
        outcome = job.result()
    assert len(outcome.reports) == 100
    an_epoch_s = outcome.reports[1].time_s - outcome.reports[0].time_s
    early = [left for at_s, left in policy.left if at_s < 3 * an_epoch_s]
    assert all(left > 900 * ITERATIONS for left in early)  # nothing is known yet
    late = [(at_s, left) for at_s, left in policy.left if at_s > 20 * an_epoch_s]
    for at_s, left in late:
        assert left == pytest.approx(ITERATIONS * (100 - at_s / an_epoch_s), rel=0.5)
    assert late
    doubts = [(at_s, sd) for at_s, sd in policy.doubts if at_s > 3 * an_epoch_s]
    assert {sd for at_s, sd in policy.doubts if at_s < 3 * an_epoch_s} == {0.0}  # all of it is left
    assert all(0.0 < sd < 4.0 for _, sd in doubts)
    assert doubts[-1][1] < doubts[0][1]


def test_a_forecast_knows_what_the_siblings_before_have_seen():
    """The rate falls after 40 epochs, and nothing tells that before."""

    def metrics(scale):
        return lambda epoch: {"loss": scale * (0.9 if epoch < 40 else 0.4) * 0.99**epoch}

    policy, expected = Recorder(), []
    with fleet_on(policy) as fleet:
        for scale in (1.0, 1.1, 0.95, 1.05):
            policy.left.clear()
            config = {"metrics": metrics(scale)}
            job = fleet.submit(train, config, target=Target("loss", 0.3, "min", best=0))
            reports = job.result().reports
            assert len(reports) == 41
            an_epoch_s = reports[1].time_s - reports[0].time_s
            epochs = [(at_s / an_epoch_s, left / ITERATIONS) for at_s, left in policy.left]
            expected.append([epoch + left for epoch, left in epochs if epoch < 38][-1])
    assert expected[0] > 80  # it goes on as it was
    assert expected[-1] == pytest.approx(41, rel=0.15)


def test_reports_without_the_metric_are_no_matter():
    def metrics(epoch):
        values = {0: True, 1: "none", 2: float("nan"), 6: 0.1}
        return {"loss": values[epoch]} if epoch in values else {"other": 1.0}

    with fleet_on() as fleet:
        job = fleet.submit(train, {"metrics": metrics}, target=Target("loss", 0.1, "min"))
        assert len(job.result().reports) == 7


def test_a_job_that_had_reached_its_target_when_its_client_died_ends(tmp_path):
    world = World(tmp_path)
    state = JobState(JobSpec("a", "f", "c", 0, Bounds(1, 1024), target=Target("accuracy", 0.9)))
    state.add_report(Report(0, {"accuracy": 0.91}, 0.1, 1.0, 1, 1024, 0))
    state.reports.append(Report(1, {"accuracy": 0.89}, 0.1, 1.0, 1, 1024, 0))
    world.states["a"] = state
    world.scheduler.submit(state, next_number=1)
    assert world.over("a") == ["stopped"]
    assert state.outcome.reason == "target"
    assert JobSpec.from_json(state.spec.to_json()) == state.spec


@pytest.mark.parametrize(
    ("arguments", "mistakes"),
    [
        (("", "high", "best", "top"), 4),
        (("accuracy", float("nan")), 1),
        (("accuracy", 1.1, "max", 1.0), 1),
        (("loss", -0.1, "min", 0.0), 1),
        (("loss", True), 1),
    ],
)
def test_an_impossible_target_is_refused(arguments, mistakes):
    with pytest.raises(InvalidInput) as refused:
        Target(*arguments)
    assert len(refused.value.mistakes) == mistakes
