"""Sweeps in stages on a real fleet, and what the board says of them."""

import pytest

import smlt_tune as smlt
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.backend.sweeps.board import Board, best
from smlt_tune.backend.sweeps.staged import run_stages
from smlt_tune.backend.sweeps.sweep import load
from smlt_tune.backend.watching.past import past_of
from smlt_tune.backend.watching.reading import Watch
from smlt_tune.errors import InvalidInput

CODE = """\
import smlt_tune as smlt

def train(config):
    session = smlt.session()
    for epoch in session.epochs(4):
        if config["x"] == 4 and epoch == 1:
            raise ValueError("four is too much")
        session.report(accuracy=config["x"] + epoch / 100)
"""
SWEEP = """\
train: code.py:train
metric: METRIC
candidates: [{x: 1}, {x: 4}, {x: 3}, {x: 2}]
stages: {first: 1, factor: 2, count: 3}
workers: 1
memory_mb: 1769
"""


@pytest.fixture(scope="module")
def platform():
    with LocalPlatform(concurrency=3, cores_per_vcpu=0.3) as platform:
        yield platform


@pytest.fixture
def sweep(tmp_path):
    (tmp_path / "code.py").write_text(CODE)

    def make(metric="accuracy"):
        (tmp_path / "sweep.yaml").write_text(SWEEP.replace("METRIC", metric))
        return load(tmp_path / "sweep.yaml")

    return make


def test_the_best_go_on_and_the_board_says_so(sweep, platform, tmp_path):
    made, kept = sweep(), tmp_path / "fleet"
    with smlt.Fleet(platform=platform, path=kept) as fleet:
        board = Board(made, fleet)
        run_stages(made, fleet, board, say=print)
        rows = board.snapshot()
    assert [row.params["x"] for row in rows] == [1, 4, 3, 2]
    assert [row.state for row in rows] == ["pruned", "failed", "finished", "pruned"]
    assert [len(row.points) for row in rows] == [1, 1, 4, 1]
    assert "four is too much" in rows[1].why
    assert rows[0].why == "not among the best of stage 1"
    assert best(rows, maximize=True).trial == 2
    # Another client finds everything over, and knows as much.
    past = past_of(Watch(kept).snapshot(), "accuracy", now_at=0.0)
    with smlt.Fleet.open(kept, platform=platform) as fleet:
        board = Board(made, fleet, past=past)
        run_stages(made, fleet, board, say=print)
        again = board.snapshot()
    for before, now in zip(rows, again, strict=True):
        assert (now.state, now.why, now.params) == (before.state, before.why, before.params)
        assert [one.value for one in now.points] == [one.value for one in before.points]
        assert now.cost_usd == pytest.approx(before.cost_usd)
        assert (now.workers, now.memory_mb) == (1, 1769)


def test_a_metric_that_nobody_reports_is_told_at_once(sweep, platform):
    made = sweep("acuracy")
    with (
        smlt.Fleet(platform=platform) as fleet,
        pytest.raises(InvalidInput, match="reports no metric 'acuracy'; it reports: accuracy"),
    ):
        run_stages(made, fleet, Board(made, fleet), say=print)
