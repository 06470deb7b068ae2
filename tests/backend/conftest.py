"""A local platform that all tests of a process share: its helper takes seconds to start."""

import pytest

import smlt_tune as smlt
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault


@pytest.fixture(scope="session")
def platform():
    shared = LocalPlatform(concurrency=12, cores_per_vcpu=0.4)
    yield shared
    shared.close()


@pytest.fixture
def fleet(platform):
    with smlt.Fleet(policy=PinnedOrDefault(), platform=platform) as fleet:
        yield fleet
