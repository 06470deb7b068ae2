"""Sweep files as studies: samplers, pruners, candidates, and sweeps that are continued."""

from dataclasses import replace

import pytest

from smlt_tune.backend.sweeps import target
from smlt_tune.backend.sweeps.board import Board
from smlt_tune.backend.sweeps.sweep import load
from smlt_tune.integrations.optuna.journal import study_of
from smlt_tune.integrations.optuna.sweeps import run_sweep
from tests.integrations.optuna.fake_fleet import FakeFleet

SPACE = """\
  x: {float: [0, 1]}
  depth: {int: [1, 3]}
  kind: {categorical: [a, b]}
"""


def train(config, job):
    for epoch in range(config["epochs"]):
        job.report(accuracy=config.get("x", 0) + epoch / 100)


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(target, "load", lambda name, folder: train)

    def make(text, space=SPACE, train_with=train):
        monkeypatch.setattr(target, "load", lambda name, folder: train_with)
        path = tmp_path / "sweep.yaml"
        space = f"space:\n{space}" if space else ""
        head = "name: s\ntrain: code.py:train\nmetric: accuracy\nparallel: 1\n"
        path.write_text(f"{head}{space}config: {{epochs: 3}}\n{text}\n")
        return load(path)

    return make


def run(sweep, fleet, journal=None):
    board = Board(sweep, fleet)
    run_sweep(sweep, fleet, board, journal)
    board.close()
    return board.snapshot()


SAMPLERS = [
    "random",
    "{name: grid, points: 2}",
    "qmc",
    "{name: tpe, startup: 3, ei_candidates: 8}",
    "{name: gp, startup: 3}",
    "{name: nsgaii, population: 3}",
]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sweep_that_is_continued_draws_what_it_would_have_drawn(sweep, tmp_path, sampler):
    if "gp" in sampler:
        pytest.importorskip("torch")
    whole = sweep(f"trials: 8\nsampler: {sampler}")
    expected = run(whole, FakeFleet(tmp_path / "whole"))
    fleet = FakeFleet(tmp_path / "parts")
    for trials in (1, 5, 8):
        rows = run(replace(whole, trials=trials), fleet, tmp_path / "study.log")
        assert len(rows) == trials
    assert [row.params for row in rows] == [row.params for row in expected]
    assert [row.state for row in rows] == ["finished"] * 8
    assert len(fleet.jobs()) == 8
    assert len({tuple(row.params.values()) for row in rows}) >= 4


def test_a_study_is_read_although_its_last_line_is_not_whole(sweep, tmp_path):
    fleet, journal = FakeFleet(tmp_path / "f"), tmp_path / "study.log"
    run(sweep("trials: 2\nsampler: random"), fleet, journal)
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"worker')
    rows = run(sweep("trials: 3\nsampler: random"), fleet, journal)
    assert [row.state for row in rows] == ["finished"] * 3


def test_a_trial_that_was_left_before_it_had_a_job_is_taken_up(sweep, tmp_path):
    fleet, journal = FakeFleet(tmp_path / "f"), tmp_path / "study.log"
    made = sweep("trials: 3\nsampler: random")
    study = study_of(made, fleet, journal)
    study.ask().suggest_float("x", 0, 1)  # and then the client was killed
    rows = run(made, fleet, journal)
    assert [row.trial for row in rows] == [0, 1, 2]
    assert [row.params for row in rows] == made.configurations()


def test_how_trials_ended_is_known_to_the_next_client(sweep, tmp_path):
    def differ(config, job):
        train(config, job)
        if config["how"] == "fail":
            raise ZeroDivisionError("division by zero")

    candidates = "candidates: [{how: end, x: 1}, {how: fail, x: 1}, {how: pruned, x: 0}]\n"
    made = sweep(f"{candidates}pruner: {{name: median, startup: 1}}", "", differ)
    fleet, journal = FakeFleet(tmp_path / "f"), tmp_path / "study.log"
    first = run(made, fleet, journal)
    assert [row.state for row in first] == ["finished", "failed", "pruned"]
    assert [row.params["how"] for row in first] == ["end", "fail", "pruned"]
    again = run(made, fleet, journal)
    assert [(row.state, row.why, row.params) for row in again] == [
        (row.state, row.why, row.params) for row in first
    ]
    assert "ZeroDivisionError" in again[1].why
    assert len(fleet.jobs()) == 3


PRUNERS = [  # and after how many reports a trial that is always worse than the first two ends
    ("{name: median, startup: 1}", 1),
    ("{name: median, startup: 1, warmup: 2}", 3),
    ("{name: percentile, percentile: 50, startup: 1, warmup: 1, interval: 3}", 2),
    ("asha", 1),
    ("{name: asha, min_reports: 2, factor: 2}", 2),
    ("{name: asha, min_reports: 1, factor: 2, early_stopping_rate: 2}", 4),
    ("{name: hyperband, max_reports: 1}", 1),
    ("{name: patient, patience: 2}", 4),
    ("{name: threshold, lower: 0, warmup: 1}", 2),
    ("none", 6),
]


@pytest.mark.parametrize(("pruner", "reports"), PRUNERS)
def test_pruners_count_reports_from_one(sweep, tmp_path, pruner, reports):
    def steadily(config, job):
        for epoch in range(6):
            job.report(accuracy=config["x"] * (1 + epoch / 100))

    made = sweep(f"candidates: [{{x: 1}}, {{x: 1}}, {{x: -1}}]\npruner: {pruner}", "", steadily)
    rows = run(made, FakeFleet(tmp_path / "f"))
    assert len(rows[2].points) == reports
    assert rows[2].state == ("finished" if reports == 6 else "pruned")
