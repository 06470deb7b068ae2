"""Functions as limited processes of this machine, once for every way to limit them."""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smlt_tune.backend.platforms.base import Invocation
from smlt_tune.backend.platforms.local import LocalPlatform, isolation, linux, probe
from smlt_tune.backend.platforms.local.cgroup1 import Cgroup1
from smlt_tune.backend.platforms.local.cgroup2 import Cgroup2
from smlt_tune.backend.platforms.local.isolation import Share, quota_us
from smlt_tune.errors import InvalidInput, PlatformError
from smlt_tune.runtime.clock import SYSTEM_CLOCK
from tests.contracts.platform import (
    PATIENCE_S,
    Call,
    CancelContract,
    CpuShareContract,
    DuplicateContract,
    LogContract,
    MemoryContract,
    PlatformContract,
    ProcessContract,
    TimeLimitContract,
    call,
)
from tests.contracts.platform_functions import ENTRY, order

ROOT = Path(__file__).parents[3]


def why_not(name):
    try:
        probe.find(name)
    except PlatformError as error:
        return str(error)
    return ""


WAYS = {name: why_not(name) for name in probe.NAMES[1:]}


@pytest.fixture(params=[name for name, reason in WAYS.items() if not reason])
def way(request):
    """A way to limit functions that works on this machine."""
    return request.param


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_limit_functions_is_tested(name):
    if WAYS[name]:
        pytest.skip(WAYS[name])


@pytest.fixture
def make(way):
    """Platforms that run the functions of the tests and leave nothing behind."""
    with contextlib.ExitStack() as stack:

        def make(**options):
            defaults = {"concurrency": 3, "cores_per_vcpu": 1.0, "preload": (), "entry": ENTRY}
            platform = LocalPlatform(isolation=way, **{**defaults, **options})
            return stack.enter_context(platform)

        yield make


def eventually(holds):
    """Waits until something is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return True


def gone(pid):
    fields = linux.stat_fields(pid)
    return not fields or fields[0] in "ZX"


def groups_of(pid):
    """Control groups that a helper process has made; those of other tests come and go meanwhile."""
    every = (Path(at) / name for at, names, _ in os.walk("/sys/fs/cgroup") for name in names)
    return [path for path in every if path.match(f"smlt-*-{pid}-*")]


def ids(path, lines=1):
    """The process ids that functions have written, once that many lines are there."""
    eventually(lambda: path.exists() and path.read_text().count("\n") >= lines)
    return [[int(word) for word in line.split()] for line in path.read_text().splitlines()]


class TestLocal(
    PlatformContract,
    ProcessContract,
    LogContract,
    TimeLimitContract,
    MemoryContract,
    CpuShareContract,
    CancelContract,
    DuplicateContract,
):
    """All that a platform can do."""


class TestWarm:
    """Instances are used again."""

    def test_the_same_size_is_warm(self, make, tmp_path):
        platform = make()
        path = tmp_path / "ids"
        cold = [call(platform, "write_ids", path=str(path)).result().cold for _ in range(3)]
        assert cold == [True, False, False]
        assert len({pid for pid, _ in ids(path)}) == 1

    def test_another_size_is_cold_and_takes_the_place_of_a_warm_one(self, make, tmp_path):
        platform = make(concurrency=1)
        path = tmp_path / "ids"
        for memory_mb in (256, 512):
            assert call(platform, "write_ids", path=str(path), memory_mb=memory_mb).result().cold
        assert eventually(lambda: gone(ids(path)[0][0]))
        assert not gone(ids(path)[1][0])
        assert call(platform, "nothing", memory_mb=256).result().cold

    def test_an_idle_instance_is_frozen_and_ends_after_its_time(self, make, tmp_path):
        platform = make(keep_alive_s=0.5)
        path = tmp_path / "ids"
        call(platform, "write_ids", path=str(path)).result()
        pid = ids(path)[0][0]
        assert eventually(lambda: gone(pid) or linux.stat_fields(pid)[0] == "T")
        assert eventually(lambda: gone(pid))
        assert call(platform, "nothing").result().cold

    def test_none_is_kept_if_not_wanted(self, make):
        platform = make(keep_alive_s=0)
        assert all(call(platform, "nothing").result().cold for _ in range(3))

    def test_an_instance_that_died_in_its_sleep_is_replaced(self, make, tmp_path):
        platform = make()
        path = tmp_path / "ids"
        call(platform, "write_ids", path=str(path)).result()
        pid = ids(path)[0][0]
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: gone(pid))
        assert call(platform, "nothing").result().cold

    def test_the_peak_is_that_of_the_invocation(self, make):
        platform = make()
        first = call(platform, "grow", mb=100).result()
        second = call(platform, "nothing").result()
        assert not second.cold
        assert second.peak_mb < first.peak_mb - 50


class TestMoney:
    """Billing by the clock of the CPU."""

    def test_cpu_time_is_billed_as_if_the_function_had_been_alone(self, make):
        platform = make(billing="cpu", cores_per_vcpu=1.0)
        result = call(platform, "compute", cpu_s=0.1, memory_mb=1769).result()
        assert result.cpu_s >= 0.1
        assert platform.cores(1769) == 1.0
        assert result.billed_s == pytest.approx(result.cpu_s, abs=0.0011)
        assert call(platform, "wait", seconds=0.3, memory_mb=1769).result().billed_s < 0.2

    def test_it_is_capped_too(self, make):
        platform = make(billing="cpu", cores_per_vcpu=1.0)
        result = call(platform, "burn", seconds=60, timeout_s=0.4, memory_mb=442).result()
        assert result.ending == "timed_out"
        assert result.billed_s <= 0.4


class TestNothingStays:
    """No process and no control group, whatever happens."""

    def test_after_close(self, make, tmp_path):
        platform = make()
        path = tmp_path / "ids"
        call(platform, "leave_behind", path=str(path), then="return").result()
        call(platform, "leave_behind", path=str(path))
        pids = [pid for line in ids(path, 2) for pid in line]
        platform.close()
        assert all(gone(pid) for pid in pids)
        assert groups_of(pids[-1]) == []

    def test_close_while_the_helper_is_still_preloading(self, make):
        platform = make(preload=("json", "asyncio", "unittest.mock"))
        waiting = call(platform, "nothing")
        platform.close()
        assert waiting.result().ending in {"returned", "cancelled"}

    @pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGINT", "fork"])
    def test_after_the_death_of_the_client(self, way, how, tmp_path):
        path = tmp_path / "ids"
        client = subprocess.Popen(
            [sys.executable, "-c", _CLIENT, way, str(path), how],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with client:
            pids = [pid for line in ids(path, 2) for pid in line]
            forked = int(client.stdout.readline())
            client.send_signal(signal.SIGKILL if how == "fork" else signal.Signals[how])
            client.wait(PATIENCE_S)
            try:
                assert eventually(lambda: all(gone(pid) for pid in pids))
            finally:
                if forked:
                    os.kill(forked, signal.SIGKILL)
        assert groups_of(pids[-1]) == []

    def test_after_the_death_of_the_helper(self, make, tmp_path, caplog):
        platform = make()
        path = tmp_path / "ids"
        running = [call(platform, "leave_behind", path=str(path)) for _ in range(2)]
        helper = ids(path, 2)[0][-1]
        os.kill(helper, signal.SIGKILL)
        for each in running:
            result = each.result()
            assert result.ending == "crashed"
            assert result.detail == "the helper process that runs functions died (signal 9)"
        assert all(eventually(lambda pid=pid: gone(pid)) for line in ids(path) for pid in line)
        assert groups_of(helper) == []
        assert "died (signal 9)" in caplog.text
        assert call(platform, "nothing").result().ending == "returned"
        assert platform.bill().requests == 3

    def test_after_the_death_of_client_and_helper_the_next_start_cleans_up(self, make, tmp_path):
        found = probe.find("auto")
        if not isinstance(found, Cgroup1 | Cgroup2):
            pytest.skip(f"the isolation of this machine, {found.name}, leaves nothing on disk")
        script = (
            "import os\n"
            "from smlt_tune.backend.platforms.local import probe, linux\n"
            "i = probe.find('auto'); i.open(); print(os.getpid())\n"
            "i.cage(1, probe_share)\n"
        ).replace(
            "probe_share",
            "__import__('smlt_tune.backend.platforms.local.isolation', fromlist=['Share'])"
            ".Share(128, 0.1, linux.Resident(0, 0))",
        )
        out = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
        )
        owner = int(out.stdout)
        assert groups_of(owner)
        found.reap(SYSTEM_CLOCK)
        assert groups_of(owner) == []


_CLIENT = """
import os, sys, time
from pathlib import Path
from smlt_tune.backend.platforms.base import Invocation
from smlt_tune.backend.platforms.local import LocalPlatform
from tests.contracts.platform_functions import ENTRY, order
way, path, how = sys.argv[1:]
platform = LocalPlatform(isolation=way, entry=ENTRY, preload=(), concurrency=2)
for name in "ab":
    platform.invoke(
        Invocation(name, 256, 60.0, order("leave_behind", path=path)), lambda result: None
    )
forked = os.fork() if how == "fork" else 0  # holds a copy of the socket to the helper
if how == "fork" and not forked:
    time.sleep(120)
print(forked, flush=True)
time.sleep(120)
"""


class TestPreloading:
    """The helper imports the heavy modules once."""

    def test_a_forked_function_trains(self, tmp_path):
        pytest.importorskip("torch")
        log = tmp_path / "log"
        with LocalPlatform(entry=ENTRY, concurrency=2, cores_per_vcpu=0.8) as platform:
            result = call(platform, "train", threads=2, memory_mb=1769, log_path=log).result()
            assert (result.ending, result.detail) == ("returned", "")
            assert 150 < result.peak_mb < 900
            again = call(platform, "train", threads=2, memory_mb=1770, log_path=log).result()
            assert again.cold
            (policy, threads, seed), other = (line.split() for line in log.read_text().splitlines())
            assert (policy, threads) == ("PASSIVE", "2")
            assert seed != other[-1]  # as in processes that do not share an ancestor
            small = call(platform, "nothing", memory_mb=128).result()
            assert small.ending == "out_of_memory"
            assert small.peak_mb > 128
            assert re.fullmatch(
                r"the preloaded modules alone take \d+ MB of the function's 128 MB: "
                r"give it more memory, or preload less",
                small.detail,
            )

    def test_what_is_not_installed_is_left_out(self, make):
        platform = make(preload=("json", "no_such_module_anywhere"))
        assert call(platform, "nothing").result().ending == "returned"

    def test_an_entry_that_does_not_exist_is_a_crash(self, make):
        platform = make(entry="no_such_module_anywhere:run")
        result = call(platform, "nothing").result()
        assert result.ending == "crashed"
        assert result.detail.startswith("ModuleNotFoundError: No module named")


class TestOptions:
    """Mistakes are refused at once, all of them."""

    def test_lists_every_mistake(self):
        with pytest.raises(InvalidInput) as caught:
            LocalPlatform(
                concurrency=0,
                time_limit_s=-1,
                cores_per_vcpu=0,
                billing="free",
                keep_alive_s=float("nan"),
                duplicates="often",
                isolation="docker",
                entry="run",
                preload="torch",
            )
        assert caught.value.mistakes == (
            "concurrency=0: must be an integer of at least 1",
            "time_limit_s=-1: must be a positive number of seconds",
            "cores_per_vcpu=0: must be a positive number of cores, or None to share the machine "
            "evenly",
            "keep_alive_s=nan: must be a number of seconds, 0 to keep none",
            "billing='free': must be one of 'wall', 'cpu'",
            "isolation='docker': must be one of 'auto', 'cgroup1', 'cgroup2', 'watchdog'",
            "duplicates='often': must be one of False, True",
            "entry='run': must be 'package.module:function'",
            "preload='torch': must be a sequence of module names",
        )

    def test_an_isolation_that_does_not_work_here_says_why(self):
        missing = [reason for reason in WAYS.values() if reason]
        for reason in missing:
            assert re.match(r"isolation='cgroup\d' cannot be used on this machine \(.+\); ", reason)

    def test_refuses_invocations_that_cannot_be_handed_over(self, make, tmp_path):
        platform = make()
        missing = tmp_path / "no" / "log"
        with pytest.raises(InvalidInput) as caught:
            Call(platform, b"x" * (6 * 1024 * 1024 + 1), log_path=missing)
        assert caught.value.mistakes == (
            "the payload has 6291457 bytes: at most 6291456 fit, put more into the object store",
            f"log_path='{missing}': its folder does not exist",
        )

    def test_refuses_the_name_of_a_running_invocation(self, make):
        platform = make()
        Call(platform, order("wait"), name="same")
        with pytest.raises(InvalidInput, match="invocation_id='same': an invocation of that name"):
            Call(platform, order("wait"), name="same")

    def test_close_from_on_done(self, make):
        platform = make()
        told = queue.Queue()

        def done(result):
            platform.close()
            told.put(result)

        platform.invoke(Invocation("x", 256, 60.0, order("nothing")), done)
        assert told.get(timeout=PATIENCE_S).ending == "returned"


class TestShares:
    """The arithmetic of CPU shares."""

    @pytest.mark.parametrize(
        ("cores", "expected"),
        [
            (1.0, (20_000, 20_000)),
            (2.5, (50_000, 20_000)),
            (0.05, (1_000, 20_000)),
            (0.01, (1_000, 100_000)),
            (0.0001, (1_000, 1_000_000)),
        ],
    )
    def test_quota(self, cores, expected):
        assert quota_us(cores) == expected

    @pytest.mark.parametrize(
        ("memory_mb", "cores"), [(1769, 0.2), (884, 0.1), (3008, 0.2), (3538, 0.4), (10_240, 1.0)]
    )
    def test_cores_follow_the_threads_that_can_use_them(self, memory_mb, cores):
        assert isolation.cores(memory_mb, 0.2, 16) == pytest.approx(cores, rel=0.01)

    def test_no_function_has_more_than_the_machine(self):
        assert isolation.cores(10_240, 1.0, 2.0) == 2.0

    def test_the_machine_is_shared_evenly(self):
        with LocalPlatform(concurrency=7, preload=(), isolation="watchdog") as platform:
            expected = min(1.0, (probe.usable_cores() - 0.3) / 7)
            assert platform.cores(1769) == pytest.approx(expected)


class FakeGroups:
    """A tree of plain files in place of the kernel's."""

    def __init__(self, root):
        self.proc = root / "proc"
        self.mount = root / "cgroup"
        self.own = self.mount / "user" / "session"
        self.proc.mkdir()
        self.own.mkdir(parents=True)
        (self.proc / "cgroup").write_text("0::/user/session\n")
        (self.proc / "mountinfo").write_text(
            f"30 20 0:26 / {self.mount} rw,nosuid - cgroup2 cgroup2 rw\n"
            "31 20 0:27 / /elsewhere rw - tmpfs tmpfs rw\n"
        )

    def offer(self, group, controllers, handed_on=""):
        (group / "cgroup.controllers").write_text(controllers)
        (group / "cgroup.subtree_control").write_text(handed_on)
        (group / "cgroup.procs").write_text("")


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Version 2 groups as a user's session sees them; files appear in new directories."""
    fake = FakeGroups(tmp_path)
    real = Path.mkdir

    def mkdir(self, *args, **kwargs):
        real(self, *args, **kwargs)
        if self.is_relative_to(fake.mount):
            for name, text in {
                "cpu.max": "max 100000",
                "memory.max": "max",
                "cgroup.controllers": "cpu memory",
                "cgroup.subtree_control": "",
                "cgroup.procs": "",
            }.items():
                (self / name).write_text(text)

    def rmdir(path, *args, **kwargs):
        for file in Path(path).iterdir():
            if file.is_file():
                file.unlink()
        os_rmdir(path, *args, **kwargs)

    os_rmdir = os.rmdir
    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "rmdir", lambda self: rmdir(self))
    monkeypatch.setattr(os, "rmdir", rmdir)
    return fake


class TestCgroup2:
    """Version 2 against a tree of files; the real one is tested above where there is one."""

    def test_takes_the_nearest_group_that_can_hand_on_cpu_and_memory(self, groups):
        groups.offer(groups.own, "memory")
        groups.offer(groups.own.parent, "cpu memory pids", "memory")
        found = Cgroup2.find(groups.proc)
        assert isinstance(found, Cgroup2)
        assert (groups.own.parent / "cgroup.subtree_control").read_text() == "+cpu"
        assert [p.name for p in groups.own.parent.iterdir() if p.is_dir()] == ["session"]

    def test_says_why_there_is_none(self, groups):
        for group in (groups.own, groups.own.parent, groups.mount):
            groups.offer(group, "memory pids")
        assert Cgroup2.find(groups.proc) == "; ".join(
            f"{group}: the controllers cpu are not available"
            for group in (groups.own, groups.own.parent, groups.mount)
        )
        (groups.proc / "mountinfo").write_text("")
        assert Cgroup2.find(groups.proc) == "no version 2 hierarchy is mounted"

    def test_writes_the_limits(self, groups):
        groups.offer(groups.own, "cpu memory", "cpu memory")
        found = Cgroup2.find(groups.proc)
        found.open()
        preloaded = linux.Resident(100 * linux.MB, 50 * linux.MB)
        cage = found.cage(1, Share(512, 0.01, preloaded))
        (group,) = groups.own.glob("smlt-*/1")
        assert (group.parent / "cgroup.subtree_control").read_text() == "+cpu +memory"
        assert (group / "cpu.max").read_text() == "1000 100000"
        assert (group / "memory.max").read_text() == str(412 * linux.MB)
        assert (group / "memory.swap.max").read_text() == "0"
        assert (group / "memory.oom.group").read_text() == "1"
        found.cage(2, Share(512, 0.01, preloaded)).remove()
        assert (group.parent / "cpu.weight").read_text() == "200"
        cage.enter()
        assert (group / "cgroup.procs").read_text() == "0"
        assert cage.exceeded_mb(0) == 0
        (group / "memory.events").write_text("oom 2\noom_kill 1\n")
        (group / "memory.peak").write_text(str(412 * linux.MB))
        assert cage.exceeded_mb(0) == 512
        cage.kill()
        assert (group / "cgroup.kill").read_text() == "1"
        assert cage.remove()
        assert cage.remove()
        found.close()
        assert [p.name for p in groups.own.iterdir() if p.is_dir()] == []

    def test_groups_of_the_living_and_of_other_containers_stay(self, groups):
        groups.offer(groups.own, "cpu memory", "cpu memory")
        found = Cgroup2.find(groups.proc)
        found.open()
        space = linux.pid_namespace()
        for name in (f"smlt-{space}-{2**22 - 1}-5", "smlt-1-1-1", f"smlt-{space}-{os.getpid()}-5"):
            (groups.own / name).mkdir()
        found.reap(SYSTEM_CLOCK)
        left = {p.name for p in groups.own.iterdir() if p.is_dir()}
        assert left == {"smlt-1-1-1", isolation.owner_name()}

    def test_the_quota_of_the_own_group_bounds_the_cores(self, groups):
        groups.offer(groups.own, "cpu memory")
        (groups.own / "cpu.max").write_text("50000 100000\n")
        assert probe.usable_cores(groups.proc) == 0.5
        (groups.own / "cpu.max").write_text("max 100000\n")
        assert probe.usable_cores(groups.proc) == len(os.sched_getaffinity(0))


def test_a_payload_never_appears_in_a_command_line_or_repr(make, tmp_path):
    platform = make()
    path = tmp_path / "ids"
    running = call(platform, "wait", path=str(path))
    secret = json.loads(running.invocation.payload)["path"]
    helper = ids(path)[0][1]
    for pid in (helper, ids(path)[0][0]):
        assert secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert secret not in repr(running.invocation)
    assert secret not in repr(platform)
