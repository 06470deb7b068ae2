"""One budget over the fleets of a project, whatever happens to their processes."""

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

import smlt_tune as smlt
from smlt_tune.backend.ledger import Entry, Ledger, Totals
from smlt_tune.backend.prices import nanos_to_usd
from smlt_tune.backend.project_ledger import FILE, ProjectLedger
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from smlt_tune.errors import BudgetExhausted, InvalidInput, ObjectDamaged
from smlt_tune.runtime.clock import SYSTEM_CLOCK
from tests import jobs
from tests.backend.scheduler_world import FakeClock

USD = 10**9
#: More of them were run, too.
KILLS = int(os.environ.get("SMLT_TEST_ROUNDS", "4"))


@pytest.fixture
def project(tmp_path):
    """Opens the ledgers of fleets of one project."""
    opened = []

    def ledger(fleet, budget_usd=None, record=None, own_usd=None, clock=SYSTEM_CLOCK):
        budget = None if budget_usd is None else round(budget_usd * USD)
        shared = ProjectLedger(tmp_path, fleet, budget, clock)
        opened.append(shared)
        return Ledger(own_usd, record, project=shared, clock=clock)

    yield ledger
    for shared in opened:
        shared.close()


def test_fleets_reserve_from_one_budget(project, tmp_path):
    a, b = project("a", 1.0), project("b")
    a.reserve("a-1", "job", 0.7, "invocation 1")
    assert (a.available_usd, b.available_usd) == (0.3, 0.3)
    message = (
        "invocation 1 of job may cost 0.400000000 USD, but only 0.300000000 USD of the budget of "
        f"the project in {tmp_path} are available: its fleets have settled 0.000000000 USD and "
        "reserved 0.700000000 USD"
    )
    with pytest.raises(BudgetExhausted, match=f"^{re.escape(message)}$"):
        b.reserve("b-1", "job", 0.4, "invocation 1")
    assert b.entries() == []
    a.settle("a-1", 0.2)
    b.reserve("b-1", "job", 0.8, "invocation 1")
    assert (a.available_usd, a.totals(), b.totals().reserved) == (0, Totals(None, USD // 5, 0), 8e8)
    b.release("b-1")
    assert a.available_usd == 0.8


def test_whichever_budget_leaves_less_counts(project):
    a, b = project("a", 1.0, own_usd=0.4), project("b")
    assert (a.available_usd, b.available_usd) == (0.4, 1.0)
    with pytest.raises(BudgetExhausted, match=r"of the budget of 0\.40 USD"):
        a.reserve("a-1", "job", 0.5, "invocation 1")
    b.reserve("b-1", "job", 0.9, "invocation 1")
    assert a.available_usd == 0.1


def test_the_budget_stays_with_the_project_until_another_is_named(project, tmp_path):
    assert ProjectLedger.open(tmp_path / "other", "a", None, SYSTEM_CLOCK) is None
    assert not (tmp_path / "other").exists()
    a = project("a", 1.0)
    a.reserve("a-1", "job", 0.7, "invocation 1")
    with closing(ProjectLedger.open(tmp_path, "b", None, SYSTEM_CLOCK)) as found:
        assert found.available() == 3 * USD // 10
    lower = project("b", 0.5)
    assert (a.available_usd, lower.available_usd) == (-0.2, -0.2)
    with pytest.raises(BudgetExhausted, match=r"only -0\.200000000 USD"):
        lower.reserve("b-1", "job", 0.0, "invocation 1")


def test_a_reservation_that_the_journal_refused_is_taken_back(project):
    def record(entry):
        raise OSError("disk")

    a = project("a", 1.0, record)
    with pytest.raises(OSError, match="disk"):
        a.reserve("a-1", "job", 0.7, "invocation 1")
    assert a.available_usd == 1.0


def test_what_a_dead_fleet_held_counts_until_it_is_opened_again(project):
    journal = []
    a, b = project("a", 1.0, journal.append), project("b")
    a.reserve("a-1", "job", 0.3, "invocation 1")
    a.settle("a-1", 0.1)
    a.reserve("a-2", "job", 0.6, "invocation 2")
    del a
    assert b.available_usd == 0.3
    project("a").restore(journal, settle_at={"a-2": 0.25})
    assert b.available_usd == 0.65


def test_others_are_waited_for_only_while_their_functions_may_run(project):
    clock = FakeClock()
    a, b = project("a", 1.0, clock=clock), project("b", clock=clock)
    assert not b.others_hold
    a.reserve("a-1", "job", 0.3, "invocation 1", lasts_s=60)
    a.reserve("a-2", "job", 0.3, "invocation 2", lasts_s=20)
    assert (a.others_hold, b.others_hold) == (False, True)
    clock.now += 59
    assert b.others_hold
    clock.now += 2
    assert not b.others_hold


def test_a_ledger_that_is_damaged_or_none_is_refused_and_left_alone(project, tmp_path):
    project("a", 1.0).reserve("a-1", "job", 0.3, "invocation 1")
    with closing(sqlite3.connect(tmp_path / FILE)) as connection, connection:
        connection.execute("UPDATE fleets SET reserved = 0")
    with pytest.raises(ObjectDamaged, match="the sums of a are not what was written"):
        project("b").reserve("b-1", "job", 0.3, "invocation 1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / FILE).write_bytes(b"no database" * 100)
    with pytest.raises(InvalidInput, match=r"ledger\.sqlite3 is damaged"):
        smlt.Fleet(project=tmp_path / "other", platform="inline")


SPENDER = """
import json, os, random, sys
from smlt_tune.backend.ledger import Entry, Ledger
from smlt_tune.backend.project_ledger import ProjectLedger
from smlt_tune.errors import BudgetExhausted
from smlt_tune.runtime.clock import SYSTEM_CLOCK

folder, name, seed = sys.argv[1:]
chance = random.Random(seed)
path = f"{folder}/{name}.journal"
journal = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
known = [Entry(**json.loads(line)) for line in open(path)]
ledger = Ledger(
    None,
    lambda entry: os.write(journal, (json.dumps(vars(entry)) + "\\n").encode()),
    project=ProjectLedger(folder, name, None, SYSTEM_CLOCK),
)
truth = {entry.entry_id: 0.01 * entry.reserved_usd for entry in known}
ledger.restore(known, settle_at=truth)
held, number = [], max((int(entry_id) for entry_id in truth), default=0)
while True:
    number += 1
    if held and chance.random() < 0.5:
        entry_id, usd = held.pop(chance.randrange(len(held)))
        ledger.settle(entry_id, usd * chance.choice([0.0, 0.01]))
    else:
        usd = chance.uniform(0, 0.2)
        try:
            ledger.reserve(str(number), "job", usd, "a function")
            held.append((str(number), usd))
        except BudgetExhausted:
            pass
"""

#: Keeps what all fleets held after every transaction.
AUDIT = """
CREATE TABLE audit (total INTEGER);
CREATE TRIGGER watch AFTER INSERT ON fleets BEGIN
    INSERT INTO audit SELECT sum(settled + reserved) FROM fleets;
END;
"""


def audited(folder):
    """How many transactions there were, and the most that was held after one, nano-dollars."""
    with closing(sqlite3.connect(folder / FILE, timeout=30)) as connection:
        return connection.execute("SELECT count(*), max(total) FROM audit").fetchone()


def test_processes_that_are_killed_never_exceed_the_budget(project, tmp_path):
    project("nobody", 1.0)
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.executescript(AUDIT)
    chance = random.Random(1)
    running = {}

    def start(name):
        command = [sys.executable, "-c", SPENDER, str(tmp_path), name, str(chance.random())]
        running[name] = subprocess.Popen(command)

    def kill(name):
        running[name].send_signal(signal.SIGKILL)
        assert running.pop(name).wait(30) == -signal.SIGKILL

    try:
        for name in "abc":
            start(name)
        for _ in range(KILLS):
            until = audited(tmp_path)[0] + 150
            while audited(tmp_path)[0] < until:
                assert all(process.poll() is None for process in running.values())
            name = chance.choice("abc")
            kill(name)
            start(name)
    finally:
        for name in list(running):
            kill(name)
    _, most = audited(tmp_path)
    assert 0.9 * USD < most <= USD
    # Nothing is lost or held for ever: once every fleet was opened again, the sums are theirs.
    total = 0
    for name in "abc":
        lines = (tmp_path / f"{name}.journal").read_text().splitlines()
        ledger = project(name)
        ledger.restore(Entry(**json.loads(line)) for line in lines)
        assert ledger.totals().reserved == 0
        total += ledger.totals().settled
    assert project("d").available_usd == nanos_to_usd(USD - total)


def test_jobs_of_two_fleets_share_the_budget_of_their_project(platform, tmp_path):
    options = {"platform": platform, "project": tmp_path, "policy": PinnedOrDefault()}
    with smlt.Fleet(**options, project_budget_usd=0.0005) as a, smlt.Fleet(**options) as b:
        endless = {"epochs": 1000, "pause": 0.02}
        greedy = a.submit(jobs.train, endless, workers=1)  # so little is leased out as a whole
        next(greedy.reports())
        waiting = b.submit(jobs.train, {"epochs": 1, "pause": 0}, workers=1)
        with pytest.raises(TimeoutError):
            waiting.result(1.0)
        assert waiting.status == "queued"
        greedy.stop()
        assert waiting.result(60).status == "finished"
        last = b.submit(jobs.train, endless, workers=1).result(120)
        assert (last.status, last.reason) == ("stopped", "budget")
        assert 0.9 * 0.0005 < a.settled_usd + b.settled_usd <= 0.0005


@pytest.mark.parametrize("budget", [-1, float("nan"), "5"])
def test_an_impossible_budget_is_refused(budget, tmp_path):
    message = f"project_budget_usd must be a finite number of at least 0, or None, not {budget!r}"
    with pytest.raises(InvalidInput, match=re.escape(message)):
        smlt.Fleet(platform="inline", project=tmp_path, project_budget_usd=budget)
    with pytest.raises(InvalidInput, match="project_budget_usd needs project="):
        smlt.Fleet(platform="inline", project_budget_usd=1)
    assert not (tmp_path / FILE).exists()
