"""SmltEnas over a real fleet."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import ModelStatus, SimplifiedModelSpace
from nni.nas.strategy.middleware import Chain, Deduplication
from nni.tools.nnictl.constants import NNI_HOME_DIR

import smlt_tune as smlt
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from smlt_tune.errors import InvalidInput
from smlt_tune.integrations.nni.enas import SharedWeights, SmltEnas
from smlt_tune.runtime.shared import SharedTensors
from tests.conftest import eventually
from tests.integrations.nni.enas_spaces import Small
from tests.integrations.nni.searches import experiment, run

#: How much every candidate adds to every parameter that it has.
STEP = 1.0
NAMES = ["hidden.weight", "hidden.bias", "out.weight", "out.bias"]


def add(model, folder=""):
    """Adds a number to every parameter, and reports the width; may hang before it does."""
    session = smlt.session()
    weights = SharedWeights(model)
    session.prepare(model, weights)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += STEP
    weights.push()
    number = int(session._home.spec.job.rpartition("-")[2])
    if folder:
        (Path(folder) / f"began-{number}").touch()
        while (Path(folder) / f"wait-{number}").exists():
            time.sleep(0.01)
    session.report(accuracy=float(model.hidden.out_features))


def shared(fleet, search):
    return SharedTensors(fleet.name, search, fleet._store, fleet._objects)


def test_every_child_is_a_job_that_passes_its_weights_on(fleet, tmp_path):
    done = run(
        SmltEnas(seed=1), add, tmp_path, fleet=fleet, space=Small(), trials=20, concurrency=4,
        metric="accuracy",
    )  # fmt: skip
    candidates = done.candidates()
    assert len({c.name for c in candidates}) == 20
    assert [c.status for c in candidates] == [ModelStatus.Trained] * 20
    assert all(c.metric == c.sample["width"] for c in candidates)
    found = shared(fleet, done.id).read([*NAMES, "op.norm.weight"])
    assert [found[name].version for name in NAMES] == [20] * 4
    assert found["op.norm.weight"].version == sum(c.sample["op"] == "norm" for c in candidates)
    assert found["hidden.weight"].value.shape == (max(c.sample["width"] for c in candidates), 4)


def test_one_after_the_other_each_adds_to_what_it_inherits(fleet, tmp_path):
    done = run(
        SmltEnas(seed=1), add, tmp_path, fleet=fleet, space=Small(), trials=5, concurrency=1,
        metric="accuracy",
    )  # fmt: skip
    found = shared(fleet, done.id).read(["out.bias"])["out.bias"].value
    assert np.all(np.abs(found - 5 * STEP) < 1)  # the first one began with random numbers below 1


def fail_or_diverge(model):
    """Fails with a width of 8, diverges with one of 4."""
    weights, width = SharedWeights(model), model.hidden.out_features
    if width == 8:
        raise ValueError("too wide")
    if width == 4:
        torch.nn.init.constant_(model.out.bias, float("nan"))
    weights.push()
    smlt.session().report(accuracy=float(width) if width == 2 else float("nan"))


def test_from_children_that_fail_or_diverge_nothing_is_learnt(fleet, tmp_path):
    strategy = SmltEnas(seed=1)
    done = run(
        strategy, fail_or_diverge, tmp_path, fleet=fleet, space=Small(), trials=9,
        metric="accuracy",
    )  # fmt: skip
    widths = [c.sample["width"] for c in done.candidates()]
    assert set(widths) == {2, 4, 8}
    assert all(
        (c.status == ModelStatus.Failed) == (c.sample["width"] == 8) for c in done.candidates()
    )
    assert strategy._controller.rewards == widths.count(2)
    assert shared(fleet, done.id).read(["out.bias"])["out.bias"].version == widths.count(2)


def test_below_middlewares_it_finds_the_fleet(fleet, tmp_path):
    strategy = Chain(SmltEnas(seed=1), Deduplication(action="replay"))
    done = run(strategy, add, tmp_path, fleet=fleet, space=Small(), trials=4, metric="accuracy")
    assert len(done.candidates()) == 4
    assert shared(fleet, done.id).read(["out.bias"])["out.bias"].version == 4


def test_without_a_fleet_it_says_what_to_use():
    space = SimplifiedModelSpace.from_model(Small(), FunctionalEvaluator(add))
    with pytest.raises(InvalidInput, match="SmltNasExperiment"):
        SmltEnas().initialize(space, SequentialExecutionEngine())


DRIVER = """\
import sys, warnings
warnings.simplefilter("ignore")
from tests.integrations.nni.test_enas_search import search
search(sys.argv[1]).run()
"""


def search(folder, fleet=None, strategy=None):
    return experiment(
        strategy or SmltEnas(seed=1), add, folder, fleet=fleet, space=Small(), trials=8,
        concurrency=2, id="killed", metric="accuracy", arguments={"folder": str(folder)},
    )  # fmt: skip


@pytest.mark.timeout(300)
def test_after_its_driver_was_killed_a_search_goes_on_with_controller_and_weights(
    platform, tmp_path
):
    (tmp_path / "wait-4").touch()
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "HOME": str(Path(NNI_HOME_DIR).parent)}
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    driver = subprocess.Popen(command, env=environment)
    try:
        # Four have ended or are about to; one has pushed and hangs before its report.
        eventually(lambda: driver.poll() is not None or (tmp_path / "began-4").exists(), 170)
        assert driver.poll() is None
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    (tmp_path / "wait-4").unlink()
    options = {"platform": platform, "policy": PinnedOrDefault()}
    with smlt.Fleet.open(tmp_path / "killed" / "fleet", **options) as fleet:
        strategy = SmltEnas(seed=2)  # what differs from the first one comes from the checkpoint
        again = search(tmp_path, fleet, strategy)
        again.resume()
        again.stop()
        candidates = again.candidates()
        assert [c.status for c in candidates] == [ModelStatus.Trained] * 8
        found = shared(fleet, "killed").read(NAMES)
        assert [found[name].version for name in NAMES] == [8] * 4
    assert strategy._controller.rewards == 8
