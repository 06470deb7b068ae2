"""Functions as actors of a Ray cluster."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

from smlt_tune.backend.platforms.local import linux
from smlt_tune.backend.platforms.ray_cluster import RayPlatform
from smlt_tune.backend.platforms.ray_cluster.options import ACTOR_MB
from smlt_tune.errors import InvalidInput, PlatformError, Throttled
from tests.conftest import eventually
from tests.contracts.platform import (
    Call,
    CancelContract,
    CpuShareContract,
    LogContract,
    MemoryContract,
    PlatformContract,
    ProcessContract,
    TimeLimitContract,
    call,
)
from tests.contracts.platform_functions import ENTRY, order

pytestmark = pytest.mark.xdist_group("ray")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def make(ray_cluster):
    """Platforms that run the functions of the tests and leave nothing behind."""
    with contextlib.ExitStack() as stack:

        def make(**options):
            defaults = {"concurrency": 3, "preload": (), "entry": ENTRY}
            return stack.enter_context(RayPlatform(**{**defaults, **options}))

        yield make


def gone(pid):
    fields = linux.stat_fields(pid)
    return not fields or fields[0] in "ZX"


def parent(pid):
    return int(linux.stat_fields(pid)[1])


def ids(path, lines=1):
    """The process ids that functions have written, once that many lines are there."""
    eventually(lambda: path.exists() and path.read_text().count("\n") >= lines)
    return [[int(word) for word in line.split()] for line in path.read_text().splitlines()]


def client(ray_cluster, program, *arguments, cwd=ROOT, **options):
    """Another program that uses the cluster; Ray adds its folder to the path of its workers."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, ray_cluster.address, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        **options,
    )


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


class TestWarm:
    """Actors are used again."""

    def test_the_same_size_is_warm_and_another_takes_the_place_of_an_idle_one(self, make, tmp_path):
        platform, path = make(concurrency=1), tmp_path / "ids"
        sizes = (256, 256, 512, 256)
        cold = [
            call(platform, "write_ids", path=str(path), memory_mb=mb).result().cold for mb in sizes
        ]
        assert cold == [True, False, True, True]
        first, again, *_ = (pid for pid, _ in ids(path, 4))
        assert first == again
        assert eventually(lambda: gone(first))

    @pytest.mark.parametrize("keep_alive_s", [0, 0.2])
    def test_an_idle_actor_ends_after_its_time(self, make, tmp_path, keep_alive_s):
        platform, path = make(keep_alive_s=keep_alive_s), tmp_path / "ids"
        call(platform, "leave_behind", path=str(path), then="return").result()
        child, function, helper = ids(path)[0]
        assert eventually(lambda: all(map(gone, (child, function, helper))))
        assert call(platform, "nothing").result().ending == "returned"


class TestResources:
    """What Ray reserves is what a function may use, and what there is not is not promised."""

    def test_a_function_reserves_its_share_of_a_node(self, make, tmp_path):
        import ray

        platform = make(cores_per_vcpu=0.5)
        running = call(platform, "wait_for", path=str(tmp_path / "gate"), memory_mb=1769)

        def taken(name):
            return ray.cluster_resources()[name] - ray.available_resources().get(name, 0)

        assert eventually(lambda: taken("CPU") == pytest.approx(0.5, abs=1e-3))
        assert taken("memory") == (1769 + ACTOR_MB) << 20
        assert platform.cores(1769) == 0.5
        (tmp_path / "gate").touch()
        assert running.result().ending == "returned"

    def test_without_room_it_throttles_and_idle_actors_make_room(self, make, tmp_path):
        platform = make(concurrency=10)
        two_cores = 2 * 1769
        assert call(platform, "nothing", memory_mb=256).result().cold
        gates = [tmp_path / name for name in "ab"]
        running = [
            call(platform, "wait_for", path=str(gate), memory_mb=two_cores) for gate in gates
        ]
        with pytest.raises(Throttled, match=r"no CPU left for another: wait until one has ended"):
            call(platform, "nothing", memory_mb=256)
        for gate, each in zip(gates, running, strict=True):
            gate.touch()
            assert each.result().ending == "returned"
        assert call(platform, "nothing", memory_mb=256).result().cold

    def test_functions_have_a_share_of_a_gpu(self, make, tmp_path):
        platform, log = make(gpus=0.5), tmp_path / "log"
        name = "CUDA_VISIBLE_DEVICES"
        call(platform, "say_environment", name=name, log_path=log).result()
        assert log.read_text() == "0\n"
        running = [call(platform, "wait") for _ in range(2)]
        with pytest.raises(Throttled, match="no GPU left"):
            call(platform, "nothing")
        assert "0.5gpus" in platform.fingerprint
        del running
        with pytest.raises(InvalidInput, match="gpus=2: the largest node of the cluster has 1"):
            make(gpus=2)

    def test_an_autoscaling_cluster_is_asked_for_room_for_all(self, make):
        platform = make(concurrency=10, autoscaling=True, cores_per_vcpu=2.0)
        assert platform.elsewhere
        assert asked() == []
        running = [call(platform, "wait", memory_mb=1769) for _ in range(2)]
        assert asked() == []
        with pytest.raises(Throttled, match="wait until the autoscaler, which was asked, has"):
            call(platform, "nothing", memory_mb=1769)
        one = {"CPU": 2.0, "memory": float((1769 + ACTOR_MB) << 20)}
        assert asked() == [one] * 4  # two that run, and as many again
        platform.cancel(running[0].invocation.invocation_id)
        assert running[0].result().ending == "cancelled"
        assert eventually(lambda: asked() in ([one], [one] * 2))  # its actor may live on
        platform.close()
        assert asked() == []


def asked():
    """What the autoscaler is asked for, as it reads it itself."""
    from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
    from ray.experimental.internal_kv import _internal_kv_get

    return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or b"[]")


class TestDeath:
    """Whatever dies, what belongs to it ends, and the client is told."""

    def test_a_killed_actor_is_a_crash_and_takes_everything_along(self, make, tmp_path):
        platform, path = make(), tmp_path / "ids"
        running = call(platform, "leave_behind", path=str(path))
        child, function, helper = ids(path)[0]
        os.kill(parent(helper), signal.SIGKILL)
        result = running.result()
        assert result.ending == "crashed"
        assert result.detail.startswith("the function's actor died: ActorDiedError: ")
        assert result.billed_s > 0.001
        assert platform.bill().gb_s == pytest.approx(result.billed_s / 4)
        assert eventually(lambda: all(map(gone, (child, function, helper))))
        assert call(platform, "nothing").result().cold

    def test_a_function_that_waits_for_its_actor_can_be_cancelled(self, make):
        platform = make()
        victim = call(platform, "wait")
        platform.cancel(victim.invocation.invocation_id)
        result = victim.result()
        assert (result.ending, result.detail) == ("cancelled", "cancelled")
        assert call(platform, "nothing").result().ending == "returned"

    def test_an_actor_that_does_not_answer_is_given_up(self, make, tmp_path, monkeypatch):
        monkeypatch.setattr("smlt_tune.backend.platforms.ray_cluster.client.END_S", 0.2)
        platform, path = make(), tmp_path / "ids"
        deaf = call(platform, "wait", path=str(path))
        actor = parent(ids(path)[0][1])
        os.kill(actor, signal.SIGSTOP)
        try:
            platform.cancel(deaf.invocation.invocation_id)
            assert deaf.result().ending == "cancelled"
            assert call(platform, "nothing").result().cold
        finally:
            os.kill(actor, signal.SIGCONT)
        assert eventually(lambda: all(map(gone, [actor, *ids(path)[0]])))

    def test_close_takes_along_what_functions_have_left_behind(self, make, tmp_path):
        platform, path = make(), tmp_path / "ids"
        call(platform, "leave_behind", path=str(path), then="return").result()
        running = call(platform, "leave_behind", path=str(path))
        pids = [pid for line in ids(path, 2) for pid in line]
        actor = parent(pids[-1])
        platform.close()
        assert running.result().ending == "cancelled"
        assert all(map(gone, pids))
        assert eventually(lambda: gone(actor))

    def test_actors_end_with_a_client_that_is_killed(self, ray_cluster, tmp_path):
        path = tmp_path / "ids"
        with client(ray_cluster, _CLIENT, path, stderr=subprocess.DEVNULL) as program:
            pids = [pid for line in ids(path, 2) for pid in line]
            pids += {parent(helper) for _, _, helper in ids(path)}
            program.kill()
            program.wait()
        assert len(set(pids)) == 2 * 4  # actor, its helper, the function and what that has started
        assert eventually(lambda: all(map(gone, pids)))


_CLIENT = """
import sys, threading
from smlt_tune.backend.platforms.base import Invocation
from smlt_tune.backend.platforms.ray_cluster import RayPlatform
from tests.contracts.platform_functions import ENTRY, order
address, path = sys.argv[1:]
platform = RayPlatform(address, entry=ENTRY, preload=(), concurrency=2)
for name in "ab":
    payload = order("leave_behind", path=path)
    platform.invoke(Invocation(name, 256, 60.0, payload), lambda result: None)
threading.Event().wait(120)
"""


class TestNodes:
    """Nodes must be able to run functions; that is known before the first is invoked."""

    def test_the_package_may_travel_and_a_node_that_cannot_import_it_is_refused(
        self, ray_cluster, tmp_path
    ):
        package = tmp_path / "nodes" / "smlt_tune"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('not on this node')")
        with client(
            ray_cluster, _TRAVELS, package, tmp_path / "log", cwd=tmp_path, stdout=subprocess.PIPE
        ) as program:
            refused, *_, hint, ending = program.stdout.read().splitlines()
        assert refused.startswith("node ")
        assert "cannot run functions" in refused
        assert "not on this node" in refused
        assert hint.startswith("Install the same release of smlt_tune on every node")
        assert ending == "returned"
        assert "runtime_resources" in (tmp_path / "log").read_text()

    def test_a_runtime_environment_is_for_those_who_connect(self, make):
        with pytest.raises(InvalidInput, match=r"give it to ray\.init there"):
            make(runtime_env={"env_vars": {"A": "b"}})

    def test_all_nodes_are_this_machine(self, make):
        assert not make().elsewhere

    def test_a_process_that_has_left_the_cluster_is_not_given_a_new_one(self, make, monkeypatch):
        platform = make()
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        with pytest.raises(PlatformError, match="has left the Ray cluster"):
            call(platform, "nothing")

    def test_says_that_ray_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(PlatformError, match=r"Ray cannot be imported .*: pip install"):
            RayPlatform()


_TRAVELS = """
import sys
from pathlib import Path
import queue
import smlt_tune
import tests
from smlt_tune.backend.platforms.base import Invocation
from smlt_tune.backend.platforms.ray_cluster import RayPlatform
from smlt_tune.errors import PlatformError
from tests.contracts.platform_functions import ENTRY, order
address, package, log = sys.argv[1:]
try:
    RayPlatform(address, runtime_env={"py_modules": [package]})
except PlatformError as error:
    print(error)
told = queue.Queue()
with RayPlatform(
    address, runtime_env={"py_modules": [smlt_tune, tests]}, entry=ENTRY, preload=()
) as platform:
    payload = order("say_where", module="smlt_tune")
    platform.invoke(Invocation("a", 256, 60.0, payload, Path(log)), told.put)
    print(told.get(timeout=60).ending)
"""


class TestOptions:
    """Mistakes are refused at once, all of them."""

    def test_lists_every_mistake(self):
        with pytest.raises(InvalidInput) as caught:
            RayPlatform(
                "ray://head:10001",
                time_limit_s=-1,
                cores_per_vcpu=0,
                gpus=1.5,
                autoscaling=True,
                keep_alive_s=float("nan"),
                isolation="docker",
                entry="run",
                preload="torch",
                runtime_env="torch",
            )
        assert caught.value.mistakes == (
            "address='ray://head:10001': Ray Client cannot stream what functions say; run this "
            "program on the cluster (ray job submit) with address='auto'",
            "concurrency=None: a cluster that grows has no size of its own, say how many functions "
            "may run at once",
            "time_limit_s=-1: must be a positive number of seconds",
            "cores_per_vcpu=0: must be a positive number of cores",
            "gpus=1.5: must be 0, a share of one GPU from 0.0001 to 1, or a whole number of them",
            "keep_alive_s=nan: must be a number of seconds, 0 to keep none",
            "isolation='docker': must be one of 'auto', 'cgroup1', 'cgroup2', 'watchdog'",
            "preload='torch': must be a sequence of module names",
            "runtime_env='torch': must be a mapping as ray.init takes it, or None",
            "entry='run': must be 'package.module:function'",
        )
        with pytest.raises(InvalidInput) as caught:
            RayPlatform("", concurrency=0, autoscaling="often", gpus=True)
        assert [mistake.partition("=")[0] for mistake in caught.value.mistakes] == [
            *("address", "concurrency", "gpus", "autoscaling")
        ]

    def test_by_default_the_cluster_bounds_functions_and_sizes(self, make):
        limits = make(concurrency=None).limits
        assert limits.concurrency == 4  # the node has four CPUs, and memory for more
        assert limits.max_memory_mb == 5 * 1769 - 1  # one more would have five threads
        assert make(cores_per_vcpu=0.1).limits.max_memory_mb == 10_240

    def test_refuses_the_name_of_a_running_invocation_and_a_log_without_folder(
        self, make, tmp_path
    ):
        platform = make()
        Call(platform, order("wait"), name="same")
        with pytest.raises(InvalidInput, match="invocation_id='same': an invocation of that name"):
            Call(platform, order("wait"), name="same")
        with pytest.raises(InvalidInput, match="its folder does not exist"):
            call(platform, "nothing", log_path=tmp_path / "no" / "log")


def test_a_payload_appears_in_no_log_of_ray_and_in_no_command_line(make, ray_cluster, tmp_path):
    platform = make()
    secret = secrets.token_hex(16)
    path = tmp_path / "ids"
    running = call(platform, "wait", path=str(path), secret=secret)
    result = call(platform, "fail", message="no luck", secret=secret).result()
    assert result.ending == "crashed"
    for pid in {*ids(path)[0], parent(ids(path)[0][1])}:
        assert secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    os.kill(parent(ids(path)[0][1]), signal.SIGKILL)  # Ray writes about that at length
    assert secret not in running.result().detail
    assert secret not in f"{running.invocation!r} {platform!r} {result!r}"
    for file in Path(ray_cluster.folder).rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), file
