"""The client of a sweep that is killed at any moment, and resumed: nothing is lost or paid twice.

SMLT_TEST_ROUNDS=20 kills at 20 random moments.
"""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import pytest

from smlt_tune.backend.history import read_history
from smlt_tune.backend.ledger import Entry
from smlt_tune.backend.prices import load_prices, usd_to_nanos
from smlt_tune.backend.sweeps.sweep import load
from tests import bills
from tests.backend.test_crash import gone
from tests.conftest import eventually

ROUNDS = int(os.environ.get("SMLT_TEST_ROUNDS", "2"))
TRIALS, STEPS, STEP_S, PARALLEL = 4, 5, 0.2, 2

CODE = f"""\
import time
from pathlib import Path
import smlt_tune as smlt

def train(config):
    import torch
    session = smlt.session()
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
    model, optimizer = session.prepare(model, optimizer)
    for epoch in session.epochs({STEPS}):
        for (x,) in session.batches((torch.ones(2, 1),), batch_size=2):
            with Path(config["notes"]).open("a") as notes:
                notes.write(f"{{config['lr']!r}} {{epoch}}\\n")
            time.sleep({STEP_S})
            optimizer.zero_grad()
            (-model(x)).mean().backward()
            optimizer.step()
        session.report(epoch=epoch, weight=model.weight.item())
"""
SWEEP = f"""\
train: code.py:train
metric: weight
trials: {TRIALS}
parallel: {PARALLEL}
space:
  lr: {{float: [0.1, 1.0]}}
config: {{notes: NOTES}}
sampler: random
workers: 1
memory_mb: 1769
budget_usd: 1
deadline: 1h
platform: {{name: local, concurrency: {PARALLEL}, cores_per_vcpu: 0.4}}
"""
#: The command; at its end it tells what the platform has charged.
CLIENT = """\
import sys
from smlt_tune import cli
from smlt_tune.backend.platforms.local import LocalPlatform
close = LocalPlatform.close
def told(platform):
    close(platform)
    print("BILL", platform.bill().gb_s, platform.bill().requests, flush=True)
LocalPlatform.close = told
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def place(tmp_path):
    """A folder with a sweep, and where it keeps everything."""
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("NOTES", str(tmp_path / "notes")))
    return tmp_path


class Client:
    """A process that runs or resumes a sweep."""

    def __init__(self, place, *arguments):
        self.mark = uuid.uuid4().hex
        environment = {"SMLT_TEST_MARK": self.mark, "PYTHONPATH": str(Path(__file__).parents[3])}
        self.output = place / f"{self.mark}.log"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CLIENT, *map(str, arguments)],
                env=os.environ | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def end(self, number):
        """Sends a signal; whether that has ended it, or it had ended by itself."""
        self.process.send_signal(number)
        return self.process.wait(60) != 0


def begun_or_resumed(place, kept):
    if (kept / "sweep.yaml").exists():
        return Client(place, "resume", kept)
    return Client(place, "sweep", place / "sweep.yaml", "--path", kept)


def trained(place):
    notes = place / "notes"
    return notes.read_text().splitlines() if notes.exists() else []


def at_random(chance, place, client):
    """Returns at some moment between the client's start and its end."""
    further = len(trained(place)) + chance.randrange(8)
    if chance.random() < 0.2:
        time.sleep(4 * chance.random())  # most likely nothing runs yet
    else:
        eventually(lambda: len(trained(place)) >= further or client.process.poll() is not None, 120)
        time.sleep(0.4 * chance.random())


def check(place, kept, last, kills, lasted_s):
    """What is true of a sweep that was killed so many times."""
    known = load(kept / "sweep.yaml").configurations()
    with (kept / "report" / "trials.csv").open() as file:
        rows = {int(row["trial"]): row for row in csv.DictReader(file)}
    assert sorted(rows) == list(range(TRIALS))
    assert {row["why"] for row in rows.values() if row["state"] != "finished"} == set()
    for trial, row in rows.items():
        assert float(row["lr"]) == known[trial]["lr"]
        assert float(row["weight"]) == pytest.approx(STEPS * known[trial]["lr"])
        assert int(row["reports"]) == STEPS
    told = json.loads((kept / "report" / "trials.json").read_text())
    assert told["best_trial"] == max(rows, key=lambda trial: known[trial]["lr"])
    assert told["reserved_usd"] == 0
    # At most the iteration that ran, of each job, each time.
    counts = Counter(trained(place))
    assert set(counts) == {f"{one['lr']!r} {step}" for one in known for step in range(STEPS)}
    for one in known:
        assert sum(counts[f"{one['lr']!r} {step}"] - 1 for step in range(STEPS)) <= kills
    # What all clients have paid is what the platform has charged them, to the nano-dollar.
    paid = bills.paid(kept)
    assert paid == bills.charged(kept)
    assert usd_to_nanos(told["settled_usd"]) == sum(paid.values())
    # It has charged for what did run: a step that was cut short may have begun just before.
    whole_steps = len(trained(place)) - PARALLEL * kills
    assert whole_steps * STEP_S <= bills.billed_s(kept) <= PARALLEL * lasted_s
    # The last client's platform has said the same to its client.
    events = read_history(kept)
    opened = max(event.seq for event in events if event.kind == "fleet")
    entries = {
        event.body["entry_id"]: Entry(**event.body) for event in events if event.kind == "ledger"
    }
    mine = {
        event.body["entry_id"]
        for event in events
        if event.kind == "ledger" and event.seq > opened and event.job
    }
    [bill] = [line.split() for line in last.splitlines() if line.startswith("BILL")]
    prices = load_prices()
    charged = float(bill[1]) * float(prices.gb_second_usd) + int(bill[2]) * float(
        prices.request_usd
    )
    paid_last = sum(entries[name].settled_usd for name in mine)
    assert 0 <= paid_last - charged <= 1e-9 * (len(mine) + 1)
    assert told["settled_usd"] <= 1
    # The deadline counts from the first start.
    left = [event.body["deadline_s"] for event in events if event.kind == "fleet"]
    assert left[0] == 3600
    assert left == sorted(set(left), reverse=True)


@pytest.mark.timeout(150 + 60 * ROUNDS)
def test_a_sweep_is_killed_and_resumed(place):
    chance = random.Random(int(os.environ.get("SMLT_TEST_SEED", "1")))
    killed = number = 0
    while killed < ROUNDS:
        (place / "notes").unlink(missing_ok=True)
        kept, kills = place / f"kept-{number}", 0
        number, began_s = number + 1, time.monotonic()
        client = begun_or_resumed(place, kept)
        while killed < ROUNDS:
            at_random(chance, place, client)
            if not client.end(signal.SIGKILL):
                break
            kills, killed = kills + 1, killed + 1
            before = client
            client = begun_or_resumed(place, kept)
            # Within 10 s of its machine's time; this one is busy, and a helper loads torch first.
            assert gone(before.mark, 30.0) == []
        assert client.process.wait(120) == 0, client.output.read_text()
        check(place, kept, client.output.read_text(), kills, time.monotonic() - began_s)
        assert gone(client.mark) == []


def test_ctrl_c_leaves_what_can_be_resumed_in_stages_too(place):
    text = (place / "sweep.yaml").read_text()
    (place / "sweep.yaml").write_text(text + "stages: {first: 1, factor: 2, count: 3}\n")
    kept = place / "kept"
    client = Client(place, "sweep", place / "sweep.yaml", "--path", kept)
    eventually(lambda: len(trained(place)) >= TRIALS + 1, 120)
    assert client.end(signal.SIGINT)
    assert client.process.returncode == 130
    assert f"ended by SIGINT; smlt resume {kept} goes on" in client.output.read_text()
    assert gone(client.mark, 10.0) == []
    again = Client(place, "resume", kept)
    assert again.process.wait(120) == 0, again.output.read_text()
    known = [one["lr"] for one in load(kept / "sweep.yaml").configurations()]
    best = sorted(range(TRIALS), key=lambda trial: -known[trial])
    with (kept / "report" / "trials.csv").open() as file:
        rows = {int(row["trial"]): row for row in csv.DictReader(file)}
    assert [rows[trial]["state"] for trial in best] == ["finished"] + ["pruned"] * 3
    assert [int(rows[trial]["reports"]) for trial in best[1:]] == [2, 1, 1]
    counts = Counter(trained(place))
    for lr in known:  # none was trained further than to its rung
        repeated = [times for line, times in counts.items() if line.startswith(f"{lr!r} ")]
        assert sum(repeated) - len(repeated) <= 1
    assert [
        sum(f"{known[trial]!r} {step}" in counts for step in range(STEPS)) for trial in best[1:]
    ] == [2, 1, 1]
