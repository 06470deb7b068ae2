"""The end client may die at any time (invariant 6), and leaves nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

import smlt_tune as smlt
from smlt_tune.backend.embedded_store import EmbeddedStore
from smlt_tune.backend.history import History, read_history
from smlt_tune.backend.platforms.local import probe
from smlt_tune.backend.prices import load_prices, usd_to_nanos
from smlt_tune.backend.project_ledger import ProjectLedger
from smlt_tune.errors import InvalidInput
from smlt_tune.runtime.clock import SYSTEM_CLOCK
from tests import bills, jobs

CLIENT = """
import sys, json, time
import smlt_tune as smlt
from smlt_tune.backend.platforms.local import LocalPlatform
from tests import jobs

folder, notes, how = sys.argv[1:]
options = {"path": folder, "project_budget_usd": 2.0} if folder else {}
platform = LocalPlatform(concurrency=6, cores_per_vcpu=0.4)
with platform, smlt.Fleet(platform=platform, budget_usd=1.0, **options) as fleet:
    fleet.submit(jobs.train, {"epochs": 2, "pause": 0}, workers=1, name="short").result(60)
    config = {"epochs": 4, "pause": 0.05, "notes": notes}
    pins = {"memory_mb": 1769}
    running = [fleet.submit(jobs.train, config, workers=n, name=f"n{n}", **pins) for n in (1, 2)]
    next(running[0].reports())
    print("running", flush=True)
    for job in running:
        job.result(60)
    print("all done", flush=True)
"""


def started(folder, notes, mark):
    """A client of its own that has jobs running."""
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, folder, str(notes), ""],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "SMLT_TEST_MARK": mark, "TMPDIR": str(notes.parent / "tmp")},
        cwd=Path(__file__).parents[2],
        text=True,
    )
    line = client.stdout.readline()
    if line != "running\n":
        client.kill()
        raise AssertionError(client.communicate()[1])
    return client


def marked(mark):
    """Living processes that descend from the client."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                inherited = f"SMLT_TEST_MARK={mark}".encode() in (entry / "environ").read_bytes()
            except OSError:
                continue
            if inherited and jobs.alive(int(entry.name)):
                found.append(int(entry.name))
    return found


def cgroups(pids):
    """Control groups that the local platform made for any of the processes."""
    names = {str(pid) for pid in pids}
    return [
        path
        for path in Path("/sys/fs/cgroup").glob("**/smlt*")
        if path.is_dir() and names & set(path.name.replace("-", " ").replace(".", " ").split())
    ]


def left(temporary):
    """What lies in the temporary folder, but for torch's cache, which any optimizer makes."""
    return [p for p in temporary.iterdir() if not p.name.startswith("torchinductor_")]


def gone(mark, timeout_s=20.0):
    until = time.monotonic() + timeout_s
    while left := marked(mark):
        if time.monotonic() > until:
            return [(pid, Path(f"/proc/{pid}/cmdline").read_bytes()) for pid in left]
        time.sleep(0.05)
    return []


@pytest.fixture
def places(tmp_path):
    notes, temporary = tmp_path / "notes", tmp_path / "tmp"
    notes.mkdir()
    temporary.mkdir()
    return notes, temporary, uuid.uuid4().hex


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_whatever_ends_the_client(places, how):
    notes, temporary, mark = places
    client = started("", notes, mark)
    family = marked(mark)
    assert len(family) >= 5  # client, guard, server, helper, workers
    client.send_signal(how)
    client.communicate(timeout=60)
    assert client.returncode != 0
    assert gone(mark) == []
    assert cgroups(family) == []
    until = time.monotonic() + 10
    while left(temporary) and time.monotonic() < until:
        time.sleep(0.05)
    assert left(temporary) == []


def test_a_killed_clients_jobs_go_on_where_they_were(places, platform, tmp_path):
    notes, _, mark = places
    folder = tmp_path / "fleet"
    client = started(str(folder), notes, mark)
    time.sleep(0.5)
    client.kill()
    client.communicate()
    assert gone(mark) == []
    left = {e.body["entry_id"]: e.body for e in read_history(folder) if e.kind == "ledger"}
    unsettled = [name for name, entry in left.items() if entry["settled_usd"] is None]
    assert unsettled
    with smlt.Fleet.open(folder, platform=platform, budget_usd=1.0) as fleet:
        assert [job.job_id for job in fleet.jobs()] == ["short", "n1", "n2"]
        # What was under way did cost what the platform has charged for it, to the nano-dollar.
        taken_over = {e.entry_id: e.settled_usd for e in fleet.ledger.entries()}
        charged = bills.charged(folder)
        assert {name: usd_to_nanos(taken_over[name]) for name in left} == {
            name: charged.get(name, 0) for name in left
        }
        short = fleet.submit(jobs.train, {}, name="short")  # known and over: nothing runs
        assert short.result(1).status == "finished"
        outcomes = [job.result(120) for job in fleet.jobs()]
        undisturbed = [
            fleet.submit(jobs.train, {"epochs": 4, "pause": 0}, workers=n, memory_mb=1769).result(
                60
            )
            for n in (1, 2)
        ]
        for outcome, reference in zip(outcomes[1:], undisturbed, strict=True):
            assert outcome.value == reference.value
            assert [r.metrics for r in outcome.reports] == [r.metrics for r in reference.reports]
            assert [r.index for r in outcome.reports] == [0, 1, 2, 3]
            assert len(outcome.allocations) == 2
            assert outcome.allocations[1].reason == "resumed"
    with smlt.Fleet.open(folder, platform=platform) as fleet:
        again = [job.result(1) for job in fleet.jobs()]
        assert [o.value for o in again[:3]] == [o.value for o in outcomes]
        assert fleet.reserved_usd == 0
    charged = bills.charged(folder)
    assert bills.paid(folder) == charged
    with closing(ProjectLedger(folder, "another", None, SYSTEM_CLOCK)) as project:
        assert project.available() == 2 * 10**9 - sum(charged.values())


def test_what_was_lost_with_its_helper_counts_at_its_most(places, platform, tmp_path, caplog):
    notes, _, mark = places
    folder = tmp_path / "fleet"
    client = started(str(folder), notes, mark)
    bill = folder / "bills" / "0.jsonl"
    helper = json.loads(bill.read_text().splitlines()[0])["helper"]
    os.kill(helper, signal.SIGSTOP)
    client.kill()
    os.kill(helper, signal.SIGKILL)
    client.communicate()
    assert gone(mark) == []
    probe.find("auto").reap(SYSTEM_CLOCK)  # as the next start would
    lines = [json.loads(line) for line in bill.read_text().splitlines()]
    lost = {line["invocation"] for line in lines if line["line"] == "begun"}
    lost -= {line["invocation"] for line in lines if line["line"] == "ended"}
    assert lost
    at = {e.body["entry_id"]: e.at for e in reversed(read_history(folder)) if e.kind == "ledger"}
    with smlt.Fleet.open(folder, platform=platform) as fleet:
        now_at, prices = time.time(), load_prices()
        entries = {entry.entry_id: entry for entry in fleet.ledger.entries()}
        for name in lost:
            assert f"what {name} did cost is not known" in caplog.text
            most = prices.invocation_usd(1769, now_at - at[name] + platform.outlives_s)
            assert 0 < entries[name].settled_usd <= min(most, entries[name].reserved_usd)
    known = {name: nanos for name, nanos in bills.paid(folder).items() if name not in lost}
    assert known == bills.charged(folder)


def test_a_client_that_was_killed_between_reserving_and_starting(platform, tmp_path):
    pins = {"workers": 2, "memory_mb": 1769}
    with smlt.Fleet(platform=platform, path=tmp_path / "whole") as fleet:
        fleet.submit(jobs.train, {"epochs": 1, "pause": 0}, name="one", **pins).result(60)
    shutil.copytree(tmp_path / "whole" / "objects", tmp_path / "cut" / "objects")
    with History(tmp_path / "cut") as cut:
        for event in read_history(tmp_path / "whole"):
            cut.append(event.kind, event.job, event.body)
            if event.kind == "ledger":
                break  # the second function and the generation are not recorded
    with smlt.Fleet.open(tmp_path / "cut", platform=platform) as fleet:
        [job] = fleet.jobs()
        assert job.result(60).status == "finished"
        first, *others = fleet.ledger.entries()
        assert (first.entry_id, first.settled_usd) == ("one.g0.r0.i0", 0.0)
        assert [entry.entry_id for entry in others] == ["one.g1.r0.i0", "one.g1.r1.i0"]


def test_a_fleet_has_one_client(platform, tmp_path):
    with (
        smlt.Fleet(platform=platform, path=tmp_path),
        pytest.raises(InvalidInput, match=str(os.getpid())),
    ):
        smlt.Fleet.open(tmp_path, platform=platform)


def test_a_failed_job_stays_failed(platform, tmp_path):
    def fail(config):
        raise ValueError("bad luck")

    for opening in (lambda **o: smlt.Fleet(path=tmp_path, **o), partial(smlt.Fleet.open, tmp_path)):
        with (
            opening(platform=platform) as fleet,
            pytest.raises(smlt.SmltError, match="bad luck"),
        ):
            fleet.submit(fail, name="f").result(60)


def test_uploads_survive_the_client(platform, tmp_path):
    import numpy as np

    def total(config):
        session = smlt.session()
        return sum(float(x.sum()) for x in session.batches("d", 2, shuffle=False))

    with smlt.Fleet(platform=platform, path=tmp_path) as fleet:
        fleet.upload("d", np.arange(5.0))
    with smlt.Fleet.open(tmp_path, platform=platform) as fleet:
        assert fleet.submit(total, workers=1).result(60).value == 10.0


def test_history_is_json_that_people_can_read(platform, tmp_path):
    with smlt.Fleet(platform=platform, path=tmp_path) as fleet:
        fleet.submit(jobs.train, {"epochs": 1, "pause": 0}, workers=1, name="one").result(60)
    kinds = [event.kind for event in read_history(tmp_path)]
    assert kinds[0] == "fleet"
    for kind in ("job", "ledger", "generation", "report", "invocation", "ended"):
        assert kind in kinds
    json.dumps([dict(event.body) for event in read_history(tmp_path)])


def test_a_parameter_store_of_the_users_outlives_the_fleet(platform):
    with EmbeddedStore() as store:
        smlt.Fleet(platform=platform, parameter_store=store.url).close()
        smlt.Fleet(platform=platform, parameter_store=store.url).close()
