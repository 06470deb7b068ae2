"""Fleets on a Ray cluster: training does not notice what happens to actors and nodes."""

import functools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("ray")

import smlt_tune as smlt
from smlt_tune.backend.platforms.base import Bill
from smlt_tune.backend.platforms.local import linux
from smlt_tune.backend.platforms.ray_cluster import RayPlatform
from smlt_tune.backend.prices import load_prices
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from tests import jobs
from tests.conftest import eventually

pytestmark = pytest.mark.xdist_group("ray")
#: Real cores behind a virtual CPU: four functions compute at once on two cores.
CORES = 0.4


@pytest.fixture(scope="module")
def platform(ray_cluster):
    with RayPlatform(concurrency=4, cores_per_vcpu=CORES) as platform:
        yield platform


@pytest.fixture(scope="module")
def undisturbed(platform, tmp_path_factory):
    """What a job of two workers gives if nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with smlt.Fleet(policy=PinnedOrDefault(), platform=platform) as fleet:
        return fleet.submit(jobs.train, config(folder), workers=2).result(120)


def config(folder, **changes):
    return {"epochs": 4, "pause": 0.04, "notes": str(folder), **changes}


def same(outcome, reference):
    assert outcome.status == "finished"
    assert outcome.value == reference.value
    assert [r.metrics for r in outcome.reports] == [r.metrics for r in reference.reports]


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def actor(pid):
    """The actor of a function: its helper's parent."""
    return parent(parent(pid))


def check_money(fleet, before):
    """Nothing is reserved any more, and what was spent is what the platform has billed since."""
    bill, prices = fleet.platform.bill(), load_prices()
    assert fleet.reserved_usd == 0
    assert fleet.ledger.overrun_usd == 0
    billed = (bill.gb_s - before.gb_s) * float(prices.gb_second_usd)
    billed += (bill.requests - before.requests) * float(prices.request_usd)
    # Each invocation is rounded up to a whole nano-dollar.
    assert -1e-12 <= fleet.settled_usd - billed <= 1e-9 * (len(fleet.ledger.entries()) + 1)


@pytest.mark.parametrize("victim_of", [lambda pid: pid, actor], ids=["function", "actor"])
def test_killed_workers_leave_the_bits_as_they_are(platform, tmp_path, undisturbed, victim_of):
    before = platform.bill()
    with smlt.Fleet(policy=PinnedOrDefault(), platform=platform, budget_usd=1.0) as fleet:
        job = fleet.submit(jobs.train, config(tmp_path), workers=2)
        eventually(lambda: len(jobs.notes(tmp_path)) > 12)
        victim = jobs.pids(tmp_path)[0]
        os.kill(victim_of(victim), signal.SIGKILL)
        outcome = job.result(120)
        assert not jobs.alive(victim)
        check_money(fleet, before)
    same(outcome, undisturbed)
    assert len(outcome.allocations) == 1  # mended inside the generation


def test_a_resize_hands_over_and_a_stop_frees_the_functions(platform, tmp_path):
    before = platform.bill()
    with smlt.Fleet(policy=PinnedOrDefault(), platform=platform, budget_usd=1.0) as fleet:
        job = fleet.submit(jobs.train, config(tmp_path, epochs=1000), workers=2)
        eventually(lambda: len(jobs.notes(tmp_path)) > 4)
        job.resize(workers=1)
        eventually(lambda: len(job.allocations) == 2)
        job.stop()
        assert job.result(60).status == "stopped"
        check_money(fleet, before)
        again = fleet.submit(jobs.train, config(tmp_path, epochs=1), workers=4)
        assert again.result(60).status == "finished"


def test_at_its_time_limit_a_job_hands_over_to_itself(ray_cluster, tmp_path):
    with (
        RayPlatform(concurrency=2, cores_per_vcpu=CORES, time_limit_s=4.0) as short,
        smlt.Fleet(policy=PinnedOrDefault(), platform=short, budget_usd=1.0) as fleet,
    ):
        before = short.bill()
        outcome = fleet.submit(jobs.train, config(tmp_path, pause=0.15), workers=1).result(150)
        check_money(fleet, before)
    assert outcome.status == "finished"
    assert len(outcome.allocations) > 1
    assert {a.reason for a in outcome.allocations[1:]} == {"time limit"}
    seen = [line for line in jobs.notes(tmp_path) if line.startswith("saw")]
    assert len(seen) == len(set(seen)) == 40  # every batch of every epoch, none twice


def hungry(config):
    """Needs 600 MB of its own."""
    return len(bytearray(b"x") * (600 << 20)) >> 20


def test_out_of_memory_is_told_with_the_peak_and_mended_with_more(platform):
    with smlt.Fleet(policy=PinnedOrDefault(), platform=platform) as fleet:
        job = fleet.submit(hungry, min_memory_mb=512, max_memory_mb=1024, workers=1)
        assert job.result(120).value == 600
        pinned = fleet.submit(hungry, memory_mb=512, workers=1)
        with pytest.raises(smlt.SmltError, match="its limit is 512 MB") as caught:
            pinned.result(120)
        assert caught.value.peak_mb > 500


_CLIENT = """
import sys
import smlt_tune as smlt
from smlt_tune.backend.platforms.ray_cluster import RayPlatform
from tests import jobs
address, notes = sys.argv[1:]
with RayPlatform(address, concurrency=2, cores_per_vcpu=0.4) as platform:
    with smlt.Fleet(platform=platform) as fleet:
        config = {"epochs": 1000, "pause": 0.05, "notes": notes}
        fleet.submit(jobs.train, config, workers=2, memory_mb=1769).result()
"""


def test_a_client_that_is_killed_leaves_no_function_behind(ray_cluster, tmp_path):
    program = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _CLIENT, ray_cluster.address, str(tmp_path)],
        cwd=Path(__file__).parents[3],
        stderr=subprocess.DEVNULL,
    )
    with program:
        eventually(lambda: len(jobs.pids(tmp_path)) == 2, timeout_s=120)
        family = {p for pid in jobs.pids(tmp_path) for p in (pid, parent(pid), actor(pid))}
        program.kill()
        program.wait()
    assert len(family) == 6  # two functions, their helpers, their actors
    assert eventually(lambda: not any(map(jobs.alive, family)))


def test_a_job_on_two_nodes_survives_the_loss_of_one(ray_cluster, redis62, tmp_path, undisturbed):
    add = functools.partial(
        ray_cluster.nodes.add_node, num_cpus=3, memory=4 << 30, object_store_memory=80 << 20
    )
    nodes = [add(), add()]
    (tmp_path / "notes").mkdir()
    try:
        with (
            # Three cores for a function: one fits on each of the new nodes, and none elsewhere.
            RayPlatform(concurrency=2, cores_per_vcpu=3.0) as platform,
            smlt.Fleet(
                policy=PinnedOrDefault(),
                platform=platform,
                budget_usd=1.0,
                parameter_store=redis62.url,
                object_store=f"file://{tmp_path}/objects",
            ) as fleet,
        ):
            settings = config(tmp_path / "notes", pause=0.1)
            job = fleet.submit(jobs.train, settings, workers=2, memory_mb=1769)
            eventually(lambda: len(jobs.notes(tmp_path / "notes")) > 12)
            before = jobs.pids(tmp_path / "notes")
            assert len({raylet(pid) for pid in before}) == 2
            ray_cluster.nodes.remove_node(nodes.pop(), allow_graceful=False)
            nodes.append(add())
            outcome = job.result(150)
            assert sum(map(jobs.alive, before)) <= 1
            check_money(fleet, Bill(0.0, 0))
        same(outcome, undisturbed)
        assert len(outcome.allocations) == 1  # the survivor helped the new worker in
    finally:
        for node in nodes:
            ray_cluster.nodes.remove_node(node)


def raylet(pid):
    """The node of a function: its actor's parent."""
    return parent(actor(pid))


_OF_ITS_OWN = """
import os
import ray
import smlt_tune as smlt
with smlt.Fleet(platform="ray") as fleet:
    print(fleet.submit(lambda config: config + 1, 41, workers=1, memory_mb=512).result(100).value)
print(ray.is_initialized())
"""


def test_a_fleet_starts_a_cluster_of_its_own_and_ends_it():
    # NOTE: not under tmp_path: the path of a Unix socket must stay below 108 bytes.
    with tempfile.TemporaryDirectory(prefix="smlt-ray-") as folder:
        said = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _OF_ITS_OWN],
            cwd=Path(__file__).parents[3],
            env={**os.environ, "RAY_TMPDIR": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=150,
            check=True,
            text=True,
        ).stdout
        assert said.split() == ["42", "False"]
        assert eventually(lambda: not linux.marked(folder))
