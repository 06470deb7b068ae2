"""The demo at tiny size, as users run it: a process, a file, a terminal or none."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("optuna")

ROOT = Path(__file__).parents[2]
SWEEP = f"""\
name: small
train: {ROOT}/examples/fashion.py:train
metric: accuracy
trials: 2
parallel: 2
space:
  lr: {{float: [0.001, 0.01], log: true}}
  batch_size: {{categorical: [32, 64]}}
config: {{depth: 1, width: 4, kernel: 3, epochs: EPOCHS, train_samples: 200, test_samples: 100}}
workers: {{from: batch_size, map: {{32: 1, 64: 2}}}}
memory_mb: 1769
budget_usd: 0.05
seed: 1
platform: {{name: local, concurrency: 4}}
show: [test_accuracy]
"""


def start(folder, epochs):
    (folder / "sweep.yaml").write_text(SWEEP.replace("EPOCHS", str(epochs)))
    (folder / "tmp").mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "smlt_tune.cli", "sweep", "sweep.yaml"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def descendants(root):
    """Process id -> time of start, of everything below a process."""
    parents, starts = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
        starts[int(stat.parent.name)] = fields[19]
    found, fresh = {}, {root}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh}
        found |= {pid: starts[pid] for pid in fresh}
    return found


def alive(processes):
    left = {}
    for pid, begin in processes.items():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[19] == begin and fields[0] != "Z":
            left[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:80]
    return left


def test_the_demo_runs_and_writes_its_report(tmp_path):
    process = start(tmp_path, epochs=2)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, out + errors
    assert errors == ""
    assert list((tmp_path / "tmp").glob("smlt-*")) == []
    assert "leaderboard" in out
    assert "2 finished" in out
    with (tmp_path / "small-report" / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["state"] for row in rows} == {"finished"}
    assert all(0 <= float(row["test_accuracy"]) <= 1 for row in rows)
    assert all(float(row["cost_usd"]) > 0 for row in rows)
    assert (tmp_path / "small-report" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_process_behind(tmp_path, number, code):
    process = start(tmp_path, epochs=1000)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "report 2" in line:
            break
    below = descendants(process.pid)
    assert len(below) >= 3  # the store, the platform, functions
    # Ctrl-C goes to the whole group of processes that the terminal runs.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == code, "".join(lines) + out + errors
    assert errors == ""
    assert "leaderboard" in out
    assert f"ended by {number.name}" in out
    for _ in range(100):
        if not alive(below):
            break
        time.sleep(0.1)
    assert alive(below) == {}
    assert list((tmp_path / "tmp").glob("smlt-*")) == []
