"""A local Ray, and a fleet that all tests of a process share."""

import shutil
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("ray.tune")

import ray
from ray import tune

import smlt_tune as smlt
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from smlt_tune.integrations.ray import register_smlt, unregister_smlt
from tests.conftest import eventually

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


@pytest.fixture(scope="module")
def cluster():
    """Ray in this process: the one that is there, or one of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        if ray.is_initialized():
            yield
            return
        folder = tempfile.mkdtemp(prefix="smlt-ray-")  # a short path: it holds Unix sockets
        try:
            ray.init(
                num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder,
                logging_level="ERROR",
            )  # fmt: skip
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ray_folder():
    """Where drivers of their own keep their clusters: a short path, which holds Unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="smlt-ray-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def platform():
    """Functions for all trials of a module."""
    shared = LocalPlatform(concurrency=6, cores_per_vcpu=0.4)
    yield shared
    shared.close()


@pytest.fixture(scope="module")
def fleet(cluster, platform):
    """A fleet that is registered; no trial may leave anything of its own in it."""
    with smlt.Fleet(policy=PinnedOrDefault(), platform=platform) as fleet:
        register_smlt(fleet)
        yield fleet
        unregister_smlt()


@pytest.fixture
def fit(fleet, tmp_path):
    """Runs a trainable under Tune; gives its results, which lie in the test's folder."""

    def fit(trainable, resources="smlt", *, space=None, stop=None, **tuning):
        tuner = tune.Tuner(
            trainable if resources is None else tune.with_resources(trainable, resources),
            param_space={"x": 1} if space is None else space,
            tune_config=tune.TuneConfig(**tuning),
            run_config=tune.RunConfig(storage_path=str(tmp_path), name="it", verbose=0, stop=stop),
        )
        return tuner.fit()

    yield fit
    eventually(lambda: not {"queued", "running", "paused"} & {j.status for j in fleet.jobs()})
    assert fleet.reserved_usd == 0
