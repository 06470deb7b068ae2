"""Whatever Tune takes for a trainable, and however resources are asked for."""

import functools
import os
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("ray.tune")

from ray import tune
from ray.tune import with_resources
from ray.tune.execution import tune_controller

import smlt_tune as smlt
from smlt_tune.errors import InvalidInput
from smlt_tune.integrations.ray import SmltResources, register_smlt, unregister_smlt

pytestmark = pytest.mark.xdist_group("ray")


def with_session(config):
    session = smlt.session()
    for epoch in session.epochs(3):
        session.report(epoch=epoch, score=config["x"] * (epoch + 1))


def with_files(config):
    checkpoint = tune.get_checkpoint()
    start = int(Path(checkpoint.path, "step").read_text()) + 1 if checkpoint else 0
    for step in range(start, 3):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "step").write_text(str(step))
            score = config["x"] * (step + 1)
            tune.report({"score": score}, checkpoint=tune.Checkpoint.from_directory(folder))


def yields(config):
    for step in range(3):
        yield {"score": config["x"] * (step + 1)}


def reports_and_returns(config, factor=1):
    for step in range(2):
        tune.report({"score": config["x"] * (step + 1) * factor, "nested": {"list": [1, step]}})
    return {"score": config["x"] * 3 * factor}


def imports_late(config):
    from ray import tune as late

    for step in range(3):
        late.report({"score": config["x"] * (step + 1), "trial": late.get_context().get_trial_id()})


class Stepper(tune.Trainable):
    def setup(self, config, factor=1):
        self.value, self.factor = 0, factor

    def step(self):
        self.value += self.config["x"] * self.factor
        assert self.iteration == self.value / (self.config["x"] * self.factor) - 1
        return {"score": self.value, "done": self.value == 3 * self.config["x"] * self.factor}

    def save_checkpoint(self, folder):
        return {"value": self.value}

    def load_checkpoint(self, state):
        self.value = state["value"]


class Owner:
    def method(self, config):
        yield from yields(config)


KINDS = {
    "session": with_session,
    "files": with_files,
    "generator": yields,
    "returns": reports_and_returns,
    "late import": imports_late,
    "partial": functools.partial(reports_and_returns, factor=1),
    "method": Owner().method,
    "lambda": lambda config: reports_and_returns(config),
    "class": Stepper,
}


@pytest.mark.parametrize("kind", KINDS)
def test_trainables_run_on_functions_unchanged(fit, kind):
    results = fit(KINDS[kind], space={"x": tune.grid_search([2, 3])})
    for result, x in zip(results, (2, 3), strict=True):
        assert result.error is None
        metrics = result.metrics
        assert (metrics["score"], metrics["training_iteration"]) == (3 * x, 3)
        assert metrics["config"] == {"x": x}
        assert metrics["done"] is True
        assert metrics["smlt/cost_usd"] > 0
        assert metrics["smlt/workers"] == (2 if kind == "session" else 1)
        assert metrics["smlt/memory_mb"] == 1769
        assert metrics.get("nested") in (None, {"list": [1, 1]})
        assert metrics.get("trial", metrics["trial_id"]) == metrics["trial_id"]
        assert metrics["time_total_s"] > 0
        if kind in ("files", "class"):
            names = {"files": {"step"}, "class": {"_dict_checkpoint.pkl", "smlt_trainable.json"}}
            assert set(os.listdir(result.checkpoint.path)) == {"smlt.json"} | names[kind]


@pytest.mark.parametrize("trainable", [reports_and_returns, Stepper])
def test_values_of_with_parameters_travel(fit, trainable):
    [result] = fit(tune.with_parameters(trainable, factor=5))
    assert result.metrics["score"] == 15


def test_the_number_that_a_function_returns_is_its_metric(fit):
    [result] = fit(lambda config: config["x"] + 1)
    assert result.metrics["_metric"] == 2


def test_a_function_without_ray_does_not_load_it(fit):
    def train(config):
        return {"ray": "ray" in sys.modules, "score": 1}

    [result] = fit(train, SmltResources(memory_mb=999))  # no function of that size is warm
    assert result.metrics["ray"] is False


class Modest(Stepper):
    @classmethod
    def default_resource_request(cls, config):
        return "smlt"


def test_every_way_of_asking(fleet, fit, tmp_path):
    def train(config):
        yield from yields(config)

    options = {"storage_path": str(tmp_path), "verbose": 0, "config": {"x": 1}}
    tune.register_trainable("registered", train)
    runs = [
        tune.run(train, resources_per_trial="smlt", **options),
        tune.run("registered", resources_per_trial=SmltResources(memory_mb=1024), **options),
        tune.run(Modest, **options),
    ]
    experiment = tune.Experiment(
        "experiment", train, resources_per_trial="smlt", config={"x": 1},
        storage_path=str(tmp_path),
    )  # fmt: skip
    trials = [run.trials[0] for run in runs] + tune.run_experiments(experiment, verbose=0)
    results = [trial.last_result for trial in trials]
    results.append(fit(with_resources(train, lambda _: "smlt"), None)[0].metrics)
    assert [result["score"] for result in results] == [3] * 5
    assert [result["smlt/memory_mb"] for result in results] == [1769, 1024, 1769, 1769, 1769]


def test_trials_with_actors_run_beside(fit):
    def where(config):
        return SmltResources() if config["x"] else tune.PlacementGroupFactory([{"CPU": 1}])

    results = fit(reports_and_returns, where, space={"x": tune.grid_search([0, 1, 2])})
    assert [result.metrics["score"] for result in results] == [0, 3, 6]
    assert ["smlt/workers" in result.metrics for result in results] == [False, True, True]


def test_a_typo_is_told_at_once(fit):
    with pytest.raises(InvalidInput, match="'smtl' are unknown; did you mean 'smlt'"):
        with_resources(with_files, "smtl")
    with pytest.raises(InvalidInput, match="'smtl' are unknown"):
        tune.run(lambda config: 1, resources_per_trial="smtl", verbose=0)


def test_resources_compare_by_what_was_asked_for():
    assert SmltResources(workers=2) == SmltResources(workers=2) != SmltResources(workers=3)
    assert hash(SmltResources(workers=2)) == hash(SmltResources(workers=2))
    assert repr(SmltResources(workers=2)) == "SmltResources(workers=2)"


def test_ray_is_left_as_it_was(fleet):
    virtual = tune_controller.RayActorManager
    try:
        register_smlt(fleet)
        assert tune_controller.RayActorManager is virtual
        unregister_smlt()
        unregister_smlt()
        assert tune_controller.RayActorManager is not virtual
        with pytest.raises(ValueError, match="Invalid resource type"):
            with_resources(with_files, "smlt")
        SmltResources()
        assert tune_controller.RayActorManager is virtual
    finally:
        register_smlt(fleet)
