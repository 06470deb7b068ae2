"""The board, the order of the leaderboard, and what the report does with odd values."""

import json
import math
from types import SimpleNamespace

import pytest

from smlt_tune.backend.sweeps import plots, report, words
from smlt_tune.backend.sweeps.board import Board, Point, Row, best, ranked

SWEEP = SimpleNamespace(
    name="a <b>",
    metric="accuracy",
    maximize=True,
    direction="maximize",
    trials=3,
    parallel=1,
    seed=0,
    parameters=(),
    show=(),
    budget_usd=0.5,
    platform="local",
    train_name="code.py:train",
    search="tpe, none",
)


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


class Fleet:
    budget_usd, settled_usd, reserved_usd = 0.5, 0.1, 0.2


class Job:
    job_id = "job"
    status, allocation, cost_usd = "running", SimpleNamespace(workers=3, memory_mb=512), 0.15

    def logs(self):
        return {"0.0/../x": "what it printed"}


def row(trial, state, *values):
    points = [Point(float(n), float(n), 0.1 * n, value) for n, value in enumerate(values)]
    return Row(trial, {}, state, points=points)


def a_report(index, **metrics):
    return SimpleNamespace(
        index=index, metrics=metrics, cost_usd=0.01, time_s=1.0, workers=2, memory_mb=512
    )


def test_finished_trials_come_first_then_those_cut_short_then_failures():
    rows = [
        row(0, "failed", 0.99),
        row(1, "finished", 0.5),
        row(2, "pruned", 0.9),
        row(3, "finished", 0.7),
        row(4, "finished", math.nan),
        row(5, "stopped"),
    ]
    assert [one.trial for one in ranked(rows, maximize=True)] == [3, 1, 2, 4, 5, 0]
    assert [one.trial for one in ranked(rows, maximize=False)] == [1, 3, 2, 4, 5, 0]
    assert best(rows, maximize=True) is rows[3]
    assert best(rows[4:], maximize=True) is None
    assert best([], maximize=True) is None


def test_a_row_follows_its_job():
    clock = Clock()
    board = Board(SWEEP, Fleet(), clock)
    heard = []
    board.listen(lambda event, row: heard.append((event, row.state)))
    clock.now = 2.0
    board.begin(7, {"x": 1})
    job = Job()
    job.status = "queued"
    board.watch(7, job, None)
    assert board.snapshot()[0].state == "waiting"
    job.status = "running"
    (only,) = board.snapshot()
    assert (only.state, only.workers, only.memory_mb, only.cost_usd) == ("running", 3, 512, 0.15)
    clock.now = 5.0
    assert board.seconds_of(only) == 3.0
    board.watch(7, job, a_report(0, accuracy=0.5, text="x"))
    board.watch(7, job, a_report(1, loss=1))
    assert only.value == 0.5
    board.end(7, "finished", seconds=9.0)
    assert board.seconds_of(only) == 9.0
    assert heard == [("began", "waiting"), *2 * [("reported", "running")], ("ended", "finished")]


def test_money_counts_what_running_functions_have_used():
    board = Board(SWEEP, Fleet(), Clock())
    board.begin(0, {})
    board.watch(0, Job(), None)
    money = board.money()
    assert money.spent_usd == 0.15
    assert money.held_usd == pytest.approx(0.15)


def test_what_is_not_over_when_the_sweep_ends_was_cut(tmp_path):
    board = Board(SWEEP, Fleet(), Clock())
    board.begin(0, {})
    board.close("interrupted")
    assert (board.rows[0].state, board.rows[0].why) == ("stopped", "interrupted")


def test_a_report_survives_odd_values(tmp_path):
    board = Board(SWEEP, Fleet(), Clock())
    for trial, values in enumerate([(0.9, 0.91), (math.nan,), (math.inf, 0.8), (-1e9,), ()]):
        board.begin(trial, {})
        board.watch(trial, Job(), None)
        for index, value in enumerate(values):
            board.watch(trial, Job(), a_report(index, accuracy=value))
        board.end(trial, "failed" if trial == 1 else "finished", "<script>")
    board.close()
    assert report.write(board, Fleet(), tmp_path / "deep" / "folder") == []
    folder = tmp_path / "deep" / "folder"
    told = json.loads((folder / "trials.json").read_text())
    assert told["best_trial"] == 0
    html = (folder / "report.html").read_text()
    assert "a &lt;b&gt;" in html
    assert "<script>" not in html
    assert (folder / "trial-1-0.0-..-x.log").read_text() == "what it printed"


def test_a_report_of_nothing(tmp_path):
    board = Board(SWEEP, Fleet(), Clock())
    board.close()
    report.write(board, Fleet(), tmp_path)
    assert "no trial finished" in (tmp_path / "report.html").read_text()
    assert len(plots.draw(board)) == 6


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (None, "no limit"),
        (0, "$0.0000"),
        (0.000123, "$0.000123"),
        (0.05, "$0.0500"),
        (1.5, "$1.50"),
        (12345.678, "$12,345.68"),
    ],
)
def test_dollars(amount, text):
    assert words.usd(amount) == text


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (48.2, "48 s"),
        (59.7, "1:00"),
        (185, "3:05"),
        (3599.6, "1:00:00"),
        (7385, "2:03:05"),
    ],
)
def test_durations(duration, text):
    assert words.seconds(duration) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "True"),
        ("relu", "relu"),
        (3, "3"),
        (12345, "12,345"),
        (0.5, "0.5000"),
        (0.0003, "0.0003"),
        (123456.0, "1.23e+05"),
        (0.0, "0.0000"),
        (math.nan, "nan"),
    ],
)
def test_values(value, text):
    assert words.value(value) == text
