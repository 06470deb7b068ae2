"""A Ray cluster of one node that all tests of a module share: it takes seconds to start."""

import shutil
import tempfile
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")  # a process is connected to one cluster: others want theirs
def ray_cluster():
    """``ray.cluster_utils.Cluster`` that this process is connected to; nothing of it stays.

    ``.address`` is where other programs find it, ``.folder`` is where it keeps its logs.
    """
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # NOTE: not under tmp_path: the path of a Unix socket must stay below 108 bytes.
    folder = tempfile.mkdtemp(prefix="smlt-ray-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)  # logs, sockets, the address of the current cluster
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a FutureWarning
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 4,
                "num_gpus": 1,
                "memory": 16 << 30,
                "include_dashboard": False,
            },
        )
        try:
            ray.init(address=cluster.address, log_to_driver=False)
            yield SimpleNamespace(nodes=cluster, address=cluster.address, folder=folder)
        finally:
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
