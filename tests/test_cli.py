"""The smlt command: arguments, exit codes, what it prints and writes."""

import csv
import json
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import smlt_tune
from smlt_tune import cli
from smlt_tune.backend.sweeps import target
from smlt_tune.backend.sweeps.sweep import load
from tests.integrations.optuna.fake_fleet import FakeFleet, FakeJob

SWEEP = """\
name: tiny
train: code.py:train
metric: accuracy
trials: 4
parallel: 2
space:
  x: {float: [0.1, 0.9]}
  kind: {categorical: [plain, broken, slow]}
config: {epochs: 3}
budget_usd: 1
show: [parameters]
"""


def train(config, job):
    if config["kind"] == "broken":
        raise ZeroDivisionError("division by zero")
    for epoch in range(config["epochs"]):
        job.report(accuracy=config["x"] + epoch / 100, parameters=12_345, epoch=epoch)
    if config["kind"] == "slow" and config.get("wait"):
        job.wait(60)


class LedgerFleet(FakeFleet):
    """The fake fleet with what the command asks a fleet for."""

    path = None
    made = ()

    def __init__(self, *, platform, budget_usd, deadline_s, project=None, **options):
        platform.close()
        super().__init__(self.path, budget_steps=budget_usd and int(budget_usd / 0.001))
        self.options = options
        self.budget_usd, self.deadline_s, self.project = budget_usd, deadline_s, project
        type(self).made = (*self.made, self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for job in self.jobs():
            job.stop("closed")
        self.closed = True


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LedgerFleet, "path", tmp_path / "fleet")
    monkeypatch.setattr(LedgerFleet, "made", ())
    monkeypatch.setattr("smlt_tune.backend.fleet.Fleet", LedgerFleet)
    monkeypatch.setattr(FakeJob, "logs", lambda job: {"0.0": "a log"}, raising=False)
    monkeypatch.setattr(target, "load", lambda name, folder: train)
    (tmp_path / "sweep.yaml").write_text(SWEEP + "platform: inline\n")
    return tmp_path


def test_a_sweep_ends_with_a_leaderboard_a_bill_and_a_report(folder, capsys):
    assert cli.main(["sweep", "sweep.yaml", "--trials", "9", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "leaderboard" in out
    assert "12,345" in out
    assert re.search(r"trials  \d finished, \d failed", out)
    assert re.search(r"bill    \$0\.\d+ settled of \$1\.00 \(\d%\), \$0\.0000 still reserved", out)
    assert "failed  JobError: ZeroDivisionError('division by zero')" in out
    report = folder / "tiny-report"
    html = (report / "report.html").read_text()
    assert html.count("<svg") == 6
    assert not re.search(r"""(src|href)=["'](?!#)""", html)  # nothing is loaded from elsewhere
    with (report / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    finished = [float(row["accuracy"]) for row in rows if row["state"] == "finished"]
    assert finished == sorted(finished, reverse=True)
    told = json.loads((report / "trials.json").read_text())
    assert told["best_trial"] == int(rows[0]["trial"])
    assert told["settled_usd"] == pytest.approx(sum(float(row["cost_usd"]) for row in rows))
    failed = next(row["trial"] for row in rows if row["state"] == "failed")
    assert (report / f"trial-{failed}-0.0.log").read_text() == "a log"


def test_the_same_seed_draws_the_same_configurations(folder):
    drawn = []
    for out in ("a", "b"):
        (folder / "sweep.yaml").write_text(SWEEP + "sampler: random\nplatform: inline\n")
        assert cli.main(["sweep", "sweep.yaml", "--seed", "3", "--out", out]) == 0
        with (folder / out / "trials.csv").open() as file:
            drawn.append(sorted((row["x"], row["kind"]) for row in csv.DictReader(file)))
    assert drawn[0] == drawn[1]


def test_arguments_override_the_file(folder):
    given = ["--budget", "0.5", "--deadline", "2m", "--trials", "1", "--project", "kept"]
    cli.main(["sweep", "sweep.yaml", *given])
    (fleet,) = LedgerFleet.made
    assert (fleet.budget_usd, fleet.deadline_s, fleet.project) == (0.5, 120, folder / "kept")
    assert len(fleet.jobs()) == 1
    assert fleet.closed


def test_a_folder_keeps_the_sweep_as_it_was_started(folder, capsys):
    (folder / "sweep.yaml").write_text(SWEEP + "platform: inline\nproject: measured\n")
    given = ["--budget", "0.5", "--deadline", "2m", "--trials", "3", "--seed", "5"]
    assert cli.main(["sweep", "sweep.yaml", "--path", "kept", *given]) == 0
    assert LedgerFleet.made[0].options["path"] == Path("kept")
    assert (folder / "kept" / "report" / "report.html").exists()
    kept = load(folder / "kept" / "sweep.yaml")
    first = load(folder / "sweep.yaml", budget_usd=0.5, deadline=120, trials=3, seed=5)
    assert kept.train_name == f"{folder / 'code.py'}:train"
    assert kept.project == folder / "measured"
    same = {"path": None, "train_name": "", "document": {}, "project": None}
    assert replace(kept, **same) == replace(first, **same)
    assert cli.main(["sweep", "sweep.yaml", "--path", "kept"]) == 2
    assert "there is a sweep in kept: smlt resume kept goes on with it" in capsys.readouterr().err
    (folder / "kept" / "sweep.yaml").unlink()
    (folder / "kept" / "history.sqlite3").touch()
    assert cli.main(["sweep", "sweep.yaml", "--path", "kept"]) == 2
    assert "there is a fleet in kept: choose another folder" in capsys.readouterr().err
    assert cli.main(["resume", "kept"]) == 2
    assert "there is no sweep in kept: smlt sweep FILE --path kept" in capsys.readouterr().err
    (folder / "file").touch()
    assert cli.main(["sweep", "sweep.yaml", "--path", "file"]) == 2
    assert "cannot use the folder file: " in capsys.readouterr().err


def test_the_budget_ends_a_sweep_with_what_there_is(folder, capsys):
    assert cli.main(["sweep", "sweep.yaml", "--budget", "0.008", "--trials", "40"]) == 0
    out = capsys.readouterr().out
    assert "stopped  budget" in out


def test_a_budget_that_pays_for_nothing_is_an_error(folder, capsys):
    assert cli.main(["sweep", "sweep.yaml", "--budget", "0.0001"]) == 1
    captured = capsys.readouterr()
    assert "BudgetExhausted: the rest of the budget does not pay for a step" in captured.err
    assert "leaderboard" in captured.out
    assert (folder / "tiny-report" / "report.html").exists()


def test_what_is_known_is_told_before_a_crash(folder, capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("smlt_tune.integrations.optuna.sweeps.run_sweep", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["sweep", "sweep.yaml"])
    assert "no trial was started" in capsys.readouterr().out
    assert LedgerFleet.made[0].closed


def test_no_trial_that_finishes_is_an_error(folder):
    text = SWEEP.replace("[plain, broken, slow]", "[broken]")
    (folder / "sweep.yaml").write_text(text + "platform: inline\n")
    assert cli.main(["sweep", "sweep.yaml"]) == 1


def test_a_metric_that_nobody_reports_is_told_at_once(folder, capsys):
    (folder / "sweep.yaml").write_text(
        SWEEP.replace("accuracy", "acuracy").replace("[plain, broken, slow]", "[plain]")
    )
    assert cli.main(["sweep", "sweep.yaml"]) == 2
    assert "did you mean 'accuracy'?" in capsys.readouterr().err
    assert LedgerFleet.made[0].closed


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_it_with_a_leaderboard(folder, capsys, number, code):
    text = SWEEP.replace("[plain, broken, slow]", "[slow]").replace(
        "epochs: 3", "epochs: 3, wait: 1"
    )
    (folder / "sweep.yaml").write_text(text + "platform: inline\n")

    def send():
        while not LedgerFleet.made or sum(len(j.seen) for j in LedgerFleet.made[0].jobs()) < 6:
            time.sleep(0.01)
        for _ in range(3):  # people press it more than once
            signal.pthread_kill(threading.main_thread().ident, number)
            time.sleep(0.01)

    before = signal.getsignal(number)
    threading.Thread(target=send).start()
    assert cli.main(["sweep", "sweep.yaml"]) == code
    out = capsys.readouterr().out
    assert "2 stopped" in out
    assert f"ended by {number.name}" in out
    assert {job.reason for job in LedgerFleet.made[0].jobs()} == {"interrupted"}
    assert signal.getsignal(number) is before


def test_the_live_table_fits_any_width(folder):
    from rich.console import Console

    from smlt_tune.backend.sweeps.board import Board
    from smlt_tune.backend.sweeps.terminal import Terminal
    from smlt_tune.integrations.optuna.sweeps import run_sweep

    sweep = load(folder / "sweep.yaml")
    with LedgerFleet(platform=sweep.open_platform(), budget_usd=1, deadline_s=None) as fleet:
        board = Board(sweep, fleet)
        run_sweep(sweep, fleet, board)
        board.begin(99, {"x": 0.5, "kind": "plain"})
        for width in (60, 80, 120, 200):
            console = Console(width=width, force_terminal=True, record=True, quiet=False)
            with console.capture() as capture:
                console.print(Terminal(board, fleet, console).picture())
            lines = re.sub(r"\x1b\[[0-9;]*m", "", capture.get()).splitlines()
            assert max(map(len, lines)) <= width
            assert "…" not in "".join(lines)
            assert any("waiting" in line for line in lines)


def test_without_matplotlib_there_is_a_report_without_plots(folder, monkeypatch, capsys):
    monkeypatch.setattr("smlt_tune.backend.sweeps.plots.available", lambda: False)
    assert cli.main(["sweep", "sweep.yaml", "--trials", "3"]) == 0
    assert "plots need matplotlib: pip install 'smlt-tune[report]'" in capsys.readouterr().out
    assert "<svg" not in (folder / "tiny-report" / "report.html").read_text()


def test_without_optuna_it_says_what_to_install(folder, monkeypatch, capsys):
    find = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "optuna" else find(name))
    assert cli.main(["sweep", "sweep.yaml"]) == 2
    assert (
        capsys.readouterr().err
        == "smlt: smlt sweep needs optuna: pip install 'smlt-tune[optuna]'\n"
    )


def test_mistakes_in_the_file_are_printed_one_a_line(folder, capsys):
    (folder / "sweep.yaml").write_text("trials: 0\nmetric: accuracy\nspace: {}\n")
    assert cli.main(["sweep", "sweep.yaml"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "smlt: sweep.yaml:1: train is missing",
        "smlt: sweep.yaml:1: trials: expected a whole number of at least 1, not 0",
        "smlt: sweep.yaml:3: space: expected at least one parameter, such as "
        "lr: {float: [0.001, 0.1]}",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0"], "argument --budget: expected a number above 0, not '0'"),
        (["--budget", "ten"], "argument --budget: expected a number, not 'ten'"),
        (["--deadline", "soon"], "argument --deadline: expected a time such as 90s, 10m or 1h30m"),
        (["--trials", "0"], "argument --trials: expected a whole number of at least 1, not 0"),
        (["--trials", "1.5"], "argument --trials: expected a whole number of at least 1"),
        (["--seed", "-1"], "argument --seed: expected a whole number of at least 0, not -1"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_wrong_arguments(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(["sweep", "sweep.yaml", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_no_command_and_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"smlt {smlt_tune.__version__}\n"
