"""Trials of ASHA and Hyperband under a budget: who goes on moves to what the promotions choose."""

import math
from types import SimpleNamespace

import optuna
import pytest

from smlt_tune.backend.resource_manager.observations import Allocation, Option
from smlt_tune.backend.sweeps import target
from smlt_tune.backend.sweeps.board import Board
from smlt_tune.backend.sweeps.halving_rules import Schedule
from smlt_tune.backend.sweeps.promotion import Promotions
from smlt_tune.backend.sweeps.search import Choice
from smlt_tune.backend.sweeps.sweep import load
from smlt_tune.integrations.optuna import promoting as promoting_module
from smlt_tune.integrations.optuna.promoting import Promoting, promoting
from smlt_tune.integrations.optuna.pruners import bracket_of, pruner, rungs
from smlt_tune.integrations.optuna.sweeps import run_sweep
from tests.integrations.optuna.fake_fleet import FakeFleet, FakeJob

CHEAP, FAST = Allocation(1, 1769), Allocation(4, 1769)
SCHEDULE = Schedule("accuracy", maximize=True, rungs=(1, 2, 4), factor=2)
SWEEP = """\
name: s
train: code.py:train
metric: accuracy
trials: 6
space: {x: {float: [0, 1]}}
sampler: random
"""


def options(share):
    return [Option(CHEAP, 100 * share, 0.1 * share), Option(FAST, 30 * share, 0.15 * share)]


def train(config, job):
    for epoch in range(4):
        job.report(accuracy=config["x"] + epoch / 100)


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(target, "load", lambda name, folder: train)

    def make(text):
        (tmp_path / "sweep.yaml").write_text(SWEEP + text)
        return load(tmp_path / "sweep.yaml")

    return make


@pytest.fixture
def moved(monkeypatch):
    """The jobs that were resized, with where they went."""
    found = []
    monkeypatch.setattr(FakeJob, "reported", (), raising=False)  # none beyond what was told
    monkeypatch.setattr(
        FakeJob, "resize", lambda job, **to: found.append((job.job_id, to)), raising=False
    )
    return found


@pytest.mark.parametrize(
    ("text", "divided"),
    [
        ("pruner: {name: asha, max_reports: 4}\nbudget_usd: 1\n", True),
        ("pruner: {name: asha, max_reports: 4}\n", False),
        ("pruner: asha\nbudget_usd: 1\n", False),
        ("pruner: {name: asha, max_reports: 4, early_stopping_rate: 1}\nbudget_usd: 1\n", True),
        ("pruner: {name: hyperband, max_reports: 9}\nbudget_usd: 1\n", True),
        ("pruner: {name: hyperband, max_reports: 9}\n", False),
        ("pruner: {name: percentile, percentile: 25}\nbudget_usd: 1\n", False),
    ],
)
def test_a_budget_is_divided_where_the_rungs_are_known(sweep, tmp_path, monkeypatch, text, divided):
    fleet = FakeFleet(tmp_path / "fleet")
    monkeypatch.setattr(promoting_module, "options_of", lambda sweep, fleet, say: options)
    assert (promoting(sweep(text), fleet, print) is not None) == divided
    monkeypatch.setattr(promoting_module, "options_of", lambda sweep, fleet, say: None)
    assert promoting(sweep(text), fleet, print) is None


def test_a_budget_that_is_not_divided_for_want_of_max_reports_is_said(sweep, tmp_path):
    said = []
    fleet = FakeFleet(tmp_path / "fleet")
    assert promoting(sweep("pruner: asha\nbudget_usd: 1\n"), fleet, said.append) is None
    assert "max_reports" in said[0]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice("asha", {"max_reports": 20}), [(1, 4, 16, 20)]),
        (Choice("asha", {"max_reports": 16, "min_reports": 2, "factor": 2}), [(2, 4, 8, 16)]),
        (Choice("asha", {"max_reports": 9, "early_stopping_rate": 1}), [(4, 9)]),
        (Choice("asha", {"max_reports": 1}), [(1,)]),
        (Choice("hyperband", {"max_reports": 9}), [(1, 3, 9), (3, 9), (9,)]),
        (
            Choice("hyperband", {"max_reports": 20, "min_reports": 2}),
            [(2, 6, 18, 20), (6, 18, 20), (18, 20)],
        ),
        (Choice("hyperband", {"max_reports": 4, "factor": 2}), [(1, 2, 4), (2, 4), (4,)]),
    ],
)
def test_rungs_are_those_of_the_pruner(choice, expected):
    assert rungs(choice) == expected


@pytest.mark.parametrize(("factor", "most"), [(2, 4), (3, 9), (3, 80), (4, 100)])
def test_trials_are_in_the_bracket_in_which_optuna_judges_them(factor, most):
    choice = Choice("hyperband", {"factor": factor, "max_reports": most, "min_reports": 1})
    study = optuna.create_study(study_name="name of it", pruner=pruner(choice))
    brackets = len(rungs(choice))
    judged = {}
    for number in range(200):
        trial = study.ask()
        for step in (factor**k for k in range(brackets)):
            # It is judged first at the first rung of its bracket: that leaves a trace.
            trial.report(float(number), step)
            trial.should_prune()
            if study.get_trials(deepcopy=False)[number].system_attrs:
                judged[number] = round(math.log(step, factor))
                break
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    assert judged == {n: bracket_of("name of it", brackets, factor, n) for n in range(200)}
    assert set(judged.values()) == set(range(brackets))


@pytest.mark.parametrize(("parallel", "place"), [(2, FAST), (3, CHEAP)])
def test_trials_share_the_functions(sweep, tmp_path, monkeypatch, parallel, place):
    monkeypatch.setattr(promoting_module, "options_of", lambda sweep, fleet, say: options)
    made = sweep(f"pruner: {{name: asha, max_reports: 4}}\nbudget_usd: 99\nparallel: {parallel}\n")
    assert promoting(made, FakeFleet(tmp_path / "fleet"), print).begins(0) == place


@pytest.mark.parametrize("name", ["asha", "hyperband"])
def test_survivors_are_moved_once_and_those_that_end_are_not(
    sweep, tmp_path, monkeypatch, moved, name
):
    monkeypatch.setattr(promoting_module, "options_of", lambda sweep, fleet, say: options)
    text = f"pruner: {{name: {name}, factor: 2, max_reports: 4}}\nbudget_usd: 0.38\nparallel: 1\n"
    made = sweep(text)
    fleet = FakeFleet(tmp_path / "fleet")
    board = Board(made, fleet)
    run_sweep(made, fleet, board)
    board.close()
    rows = {row.trial: row for row in board.snapshot()}
    assert {row.state for row in rows.values()} == {"finished", "pruned"}
    assert {job.allocation.workers for job in fleet.jobs()} <= {1, 4}
    assert moved  # somebody was
    ended = {f"s-{trial}-" for trial, row in rows.items() if len(row.points) == 1}
    assert not [job for job, _ in moved if any(job.startswith(one) for one in ended)]


def test_of_trials_that_fail_only_what_they_have_cost_counts(sweep, tmp_path, monkeypatch, moved):
    def fails(config, job):
        job.report(accuracy=config["x"])
        raise ValueError("no more")

    monkeypatch.setattr(target, "load", lambda name, folder: fails)
    monkeypatch.setattr(promoting_module, "options_of", lambda sweep, fleet, say: options)
    left = []
    monkeypatch.setattr(Promotions, "leaves", lambda self, *told: left.append(told))
    text = "pruner: {name: asha, factor: 2, min_reports: 2, max_reports: 4}\nbudget_usd: 1\n"
    made = sweep(text)
    fleet = FakeFleet(tmp_path / "fleet")
    board = Board(made, fleet)
    run_sweep(made, fleet, board)
    costs = {int(job.job_id.split("-")[1]): job.cost_usd for job in fleet.jobs()}
    assert {row.state for row in board.snapshot()} == {"failed"}
    assert sorted(left) == sorted(costs.items())
    again = Promotions([SCHEDULE], 6, options, 1.0)
    for row in board.snapshot():
        Promoting(again).restore(row)
    assert len(left) == 2 * len(costs)  # a later client is told, too


def test_what_was_judged_for_an_earlier_client_moves_nobody_but_counts():
    asked = []
    promotions = SimpleNamespace(
        begins=lambda trial: CHEAP,
        goes_on=lambda *told: asked.append(("goes on", *told)) or FAST,
        ends=lambda *told: asked.append(("ends", *told)),
        leaves=lambda *told: asked.append(("leaves", *told)),
        schedule_of=lambda trial: SCHEDULE,
    )
    places = Promoting(promotions)
    resized = []
    job = SimpleNamespace(reported=[1, 2], allocation=CHEAP, resize=lambda **to: resized.append(to))

    def report(index, value):
        return SimpleNamespace(index=index, metrics={"accuracy": value}, cost_usd=0.1)

    places.judged(0, job, report(0, 0.5), False)
    assert (asked, resized) == ([("goes on", 0, 0, 0.5, 0.1)], [])
    places.judged(0, job, report(1, float("nan")), False)
    assert asked[1] == ("goes on", 0, 1, float("-inf"), 0.1)
    assert resized == [{"workers": 4, "memory_mb": 1769}]
    places.judged(0, job, report(2, 0.7), False)  # no rung
    places.judged(1, job, report(0, 0.1), True)
    assert asked[2:] == [("ends", 1, 0, 0.1, 0.1)]
    points = [SimpleNamespace(value=0.3, cost_usd=0.2), SimpleNamespace(value=0.4, cost_usd=0.3)]
    places.restore(SimpleNamespace(trial=7, state="pruned", points=points, cost_usd=0.4))
    ended = [("goes on", 7, 0, 0.3, 0.2), ("ends", 7, 1, 0.4, 0.3), ("leaves", 7, 0.4)]
    assert asked[3:] == ended


def test_the_promotions_of_a_restored_sweep_know_what_was_spent():
    places = Promoting(Promotions([SCHEDULE], 4, options, 0.3))
    points = [SimpleNamespace(value=0.3, cost_usd=0.29)]
    places.restore(SimpleNamespace(trial=0, state="pruned", points=points, cost_usd=0.29))
    assert places.begins(1) == CHEAP  # next to nothing is left
