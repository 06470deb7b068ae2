"""NNI without the warnings of its import and with a home of its own; one platform for its tests."""

import logging
import os
import tempfile
import warnings

import pytest

# NNI keeps a list of all experiments in the home directory; it decides where when it is imported.
_HOME = tempfile.TemporaryDirectory(prefix="nni-home-")
os.environ["HOME"], _OLD_HOME = _HOME.name, os.environ["HOME"]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import nni
    import nni.nas.experiment
    import nni.nas.strategy
    import nni.runtime.log
os.environ["HOME"] = _OLD_HOME
nni.runtime.log.silence_stdout()

import smlt_tune as smlt  # noqa: E402
from smlt_tune.backend.platforms.local import LocalPlatform  # noqa: E402
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault  # noqa: E402


@pytest.fixture(scope="session")
def platform():
    with LocalPlatform(concurrency=8, cores_per_vcpu=0.4) as shared:
        yield shared


@pytest.fixture(scope="session")
def fleet(platform):
    with smlt.Fleet(platform=platform, policy=PinnedOrDefault()) as shared:
        yield shared


@pytest.fixture(autouse=True)
def nni_log(caplog):
    """NNI's logger prints to stdout and does not always pass messages on."""
    caplog.set_level(logging.INFO, logger="nni")
    return caplog
