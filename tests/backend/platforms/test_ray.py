"""Functions as actors of a Ray cluster."""

import contextlib

import pytest

pytest.importorskip("ray")

from smlt_tune.backend.platforms.ray_cluster import RayPlatform
from tests.contracts.platform import (
    CancelContract,
    CpuShareContract,
    LogContract,
    MemoryContract,
    PlatformContract,
    ProcessContract,
    TimeLimitContract,
)
from tests.contracts.platform_functions import ENTRY

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture
def make(ray_cluster):
    """Platforms that run the functions of the tests and leave nothing behind."""
    with contextlib.ExitStack() as stack:

        def make(**options):
            defaults = {"concurrency": 3, "preload": (), "entry": ENTRY}
            return stack.enter_context(RayPlatform(**{**defaults, **options}))

        yield make


class TestRay(
    PlatformContract,
    ProcessContract,
    LogContract,
    TimeLimitContract,
    MemoryContract,
    CpuShareContract,
    CancelContract,
):
    """All that a platform can do."""
