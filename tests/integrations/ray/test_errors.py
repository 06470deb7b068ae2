"""What goes wrong says which trial it was, what has happened, and what to do."""

import functools
import re
import threading

import pytest

pytest.importorskip("ray.tune")

import ray
from ray import tune

import smlt_tune as smlt
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from smlt_tune.errors import (
    BudgetExhausted,
    InvalidInput,
    SmltError,
    TrainingFunctionError,
)
from smlt_tune.integrations.ray import SmltResources, register_smlt, unregister_smlt

pytestmark = pytest.mark.xdist_group("ray")


def reports(config):
    for step in range(3):
        tune.report({"score": step})


def raises(config):
    tune.report({"score": 1})
    raise ValueError("the data is wrong")


def returns_a_list(config):
    return [1]


def error_of(results):
    [result] = results
    return result.error, result


TRIAL = r"trial \S+_\w+: "


@pytest.mark.parametrize(
    ("trainable", "resources", "kind", "message"),
    [
        (raises, "smlt", TrainingFunctionError, "ValueError: the data is wrong"),
        (returns_a_list, "smlt", TrainingFunctionError, "returned or yielded a list"),
        (reports, SmltResources(workers=2), TrainingFunctionError, "work with one worker"),
        (reports, SmltResources(workers=99, memory_mb=1), InvalidInput, "workers=99(.|\n)*memory"),
    ],
)
def test_an_error_of_one_trial_is_its_own(fit, trainable, resources, kind, message):
    error, result = error_of(fit(trainable, resources))
    assert isinstance(error.cause, kind)
    assert re.match(TRIAL, str(error))
    assert re.search(message, str(error))
    assert (result.metrics or {}).get("score") == (1 if trainable is raises else None)


def test_what_cannot_be_sent_is_refused_by_name(fit):
    lock, ref = threading.Lock(), ray.put([1])
    with pytest.raises(TypeError, match="lock"):  # of Tune itself
        fit(lambda config: lock)
    cases = [
        (lambda config: ref, "ref is an ObjectRef"),
        (
            functools.partial(lambda config, data: data, data={"x": [ref]}),
            r"data\['x'\]\[0\] is an",
        ),
    ]
    for trainable, message in cases:
        with pytest.raises(InvalidInput, match=f"{TRIAL}.*{message}"):
            fit(trainable)


def test_an_object_ref_in_a_configuration_is_refused(fit):
    error, _ = error_of(fit(reports, space={"data": ray.put([1])}))
    assert "config['data'] is an ObjectRef" in str(error)


def test_without_a_fleet_the_first_trial_says_so(cluster, fleet, tmp_path):
    def train(config):
        yield 1

    try:
        unregister_smlt()
        with pytest.raises(
            InvalidInput, match=r'trial train_.* asks for "smlt".*register_smlt first'
        ):
            tune.run(
                train, resources_per_trial=SmltResources(), storage_path=str(tmp_path), verbose=0
            )
    finally:
        register_smlt(fleet)


def test_a_budget_that_is_spent_ends_a_trial_with_what_it_had(cluster, fleet, platform, tmp_path):
    def train(config):
        session = smlt.session()
        for epoch in session.epochs(10_000):
            session.report(score=epoch)

    try:
        register_smlt(platform=platform, policy=PinnedOrDefault(), budget_usd=0.0006)
        tuner = tune.Tuner(
            tune.with_resources(train, SmltResources(workers=1)),
            run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
        )
        error, result = error_of(tuner.fit())
        assert isinstance(error.cause, BudgetExhausted)
        assert "stopped after" in str(error)
        assert "resume_errored=True" in str(error)
        assert 0 < result.metrics["smlt/cost_usd"] <= 0.0006
    finally:
        register_smlt(fleet)


def test_mistakes_at_registration_are_told_there(fleet):
    platform = LocalPlatform
    with pytest.raises(InvalidInput) as caught:
        register_smlt(platform="lokal", budget_usd=-1.0)
    assert "lokal" in str(caught.value)
    with pytest.raises(InvalidInput, match=r"budget_usd(.|\n)*deadline_s"):
        register_smlt(platform=fleet.platform, budget_usd=-1.0, deadline_s=0)
    with pytest.raises(InvalidInput, match="budgt"):
        register_smlt(platform=fleet.platform, budgt=1)
    with pytest.raises(InvalidInput, match=r"path out(.|\n)*platform out"):
        register_smlt(fleet, path="/tmp", platform=platform)
    with pytest.raises(SmltError, match=r"127\.0\.0\.1:1"):
        register_smlt(platform=fleet.platform, parameter_store="redis://127.0.0.1:1/0")
    closed = smlt.Fleet(platform=fleet.platform)
    closed.close()
    with pytest.raises(InvalidInput, match="the fleet is closed"):
        register_smlt(closed)
