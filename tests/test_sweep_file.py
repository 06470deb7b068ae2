"""The sweep file: what it says, and every mistake in it with its line."""

import textwrap
from pathlib import Path

import pytest

from smlt_tune.backend.sweeps.space import Categorical, FloatParameter, IntParameter
from smlt_tune.backend.sweeps.sweep import load
from smlt_tune.errors import InvalidInput

GOOD = """\
train: code.py:train
metric: accuracy
trials: 5
space:
  lr: {float: [1e-3, 0.1], log: true}
  depth: {int: [1, 3]}
  kernel: {categorical: [3, 5]}
"""


@pytest.fixture
def sweep_file(tmp_path):
    (tmp_path / "code.py").write_text("def train(config): ...\nnumber = 3\n")

    def write(text):
        path = tmp_path / "sweep.yaml"
        path.write_text(textwrap.dedent(text))
        return path

    return write


def mistakes_of(path):
    with pytest.raises(InvalidInput) as caught:
        load(path)
    return [mistake.removeprefix(f"{path}:") for mistake in caught.value.mistakes]


def test_the_least_that_a_file_says(sweep_file):
    sweep = load(sweep_file(GOOD))
    assert sweep.name == "sweep"
    assert sweep.train.__name__ == "train"
    assert sweep.space == (
        FloatParameter("lr", 0.001, 0.1, log=True),
        IntParameter("depth", 1, 3),
        Categorical("kernel", (3, 5)),
    )
    assert (sweep.direction, sweep.parallel, sweep.seed) == ("maximize", 4, 0)
    assert (sweep.sampler.name, sweep.pruner.name) == ("tpe", "none")
    assert (sweep.budget_usd, sweep.deadline_s, sweep.workers) == (None, None, None)


def test_the_most_that_a_file_says(sweep_file):
    sweep = load(
        sweep_file(
            GOOD
            + """\
name: my-search
direction: minimize
parallel: 2
config: {epochs: 3}
sampler: {name: tpe, startup: 3}
pruner: {name: asha, min_reports: 2, factor: 3}
seed: 4
workers: {from: kernel, map: {3: 1, 5: 2}}
max_workers: 8
memory_mb: 1769
budget_usd: 0.5
deadline: 1h30m
platform: inline
show: [loss]
"""
        )
    )
    assert sweep.workers_of({"kernel": 5}) == 2
    assert sweep.deadline_s == 5400
    assert sweep.sampler.options == {"startup": 3}
    assert sweep.pruner.options == {"min_reports": 2, "factor": 3}
    assert not sweep.maximize
    assert sweep.show == ("loss",)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5m", 90), ("8h", 28800), ("1d", 86400), ("1h30m", 5400)],
)
def test_times(sweep_file, text, seconds):
    assert load(sweep_file(GOOD + f"deadline: {text}\n")).deadline_s == seconds


def test_a_platform_may_have_options(sweep_file):
    sweep = load(sweep_file(GOOD + "platform: {name: local, concurrency: 3}\n"))
    assert (sweep.platform, sweep.platform_options) == ("local", {"concurrency": 3})


def test_workers_may_be_a_parameter(sweep_file):
    sweep = load(sweep_file(GOOD + "workers: {from: depth}\n"))
    assert sweep.workers_of({"depth": 3}) == 3


def test_candidates_are_all_trained_in_their_order(sweep_file):
    text = """
        train: code.py:train
        metric: accuracy
        candidates:
          - {layers: [64, 32], workers: 2}
          - {layers: [128], workers: 1, dropout: 0.5}
        workers: {from: workers}
    """
    sweep = load(sweep_file(text))
    assert (sweep.trials, sweep.parameters) == (2, ("layers", "workers", "dropout"))
    assert sweep.configurations() == [dict(one) for one in sweep.candidates]
    first, second = sweep.candidates
    assert sweep.config_of(first) == {"layers": [64, 32]}
    assert [sweep.workers_of(one) for one in (first, second)] == [2, 1]


def test_a_grid_has_every_combination_once(sweep_file):
    text = """
        train: code.py:train
        metric: accuracy
        space:
          lr: {float: [0.01, 1], log: true}
          drop: {float: [0, 0.5], step: 0.25}
          depth: {int: [1, 5], step: 2}
          kind: {categorical: [a, null]}
        sampler: {name: grid, points: 3}
    """
    drawn = load(sweep_file(text)).configurations()
    assert len({tuple(one.values()) for one in drawn}) == len(drawn) == 3 * 3 * 3 * 2
    assert sorted({one["lr"] for one in drawn}) == pytest.approx([0.01, 0.1, 1.0])
    assert {one["drop"] for one in drawn} == {0.0, 0.25, 0.5}
    assert {one["depth"] for one in drawn} == {1, 3, 5}
    assert {one["kind"] for one in drawn} == {"a", None}
    assert load(sweep_file(text), trials=7).configurations() == drawn[:7]
    assert load(sweep_file(text), seed=1).configurations() != drawn


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_what_is_drawn_lies_in_the_space_and_depends_on_the_seed_alone(sweep_file, sampler):
    pytest.importorskip("scipy")
    path = sweep_file(GOOD + f"sampler: {sampler}\n")
    drawn = load(path, trials=40).configurations()
    assert all(0.001 <= one["lr"] <= 0.1 for one in drawn)
    assert {one["depth"] for one in drawn} == {1, 2, 3}
    assert {one["kernel"] for one in drawn} == {3, 5}
    assert load(path).configurations() == drawn[:5]  # more trials do not change the first ones
    assert load(path, seed=7).configurations() != drawn[:5]


def test_stages_halve_the_trials(sweep_file):
    sweep = load(sweep_file(GOOD + "stages: {first: 2, factor: 3, count: 2}\n"))
    assert [sweep.stages.reports(stage) for stage in range(2)] == [2, 6]
    assert [sweep.stages.trials(stage, sweep.trials) for stage in range(2)] == [5, 1]
    assert sweep.sampler.name == "random"
    assert len(sweep.configurations()) == sweep.trials


def test_what_is_given_beside_the_file_replaces_its_settings(sweep_file):
    path = sweep_file(GOOD + "budget_usd: 3\n")
    sweep = load(path, trials=2, deadline=60.0, seed=None)
    assert (sweep.trials, sweep.deadline_s, sweep.budget_usd, sweep.seed) == (2, 60.0, 3, 0)
    assert sweep.document["trials"] == 2
    assert mistakes_of_given(path, trials=0) == ["3: trials: expected a whole number of at least 1"]


def mistakes_of_given(path, **given):
    with pytest.raises(InvalidInput) as caught:
        load(path, **given)
    return [one.removeprefix(f"{path}:").rpartition(",")[0] for one in caught.value.mistakes]


BAD = [
    ("trials: 0", "trials", "expected a whole number of at least 1, not 0"),
    ("trials: many", "trials", "expected a whole number of at least 1, not 'many'"),
    ("parallel: true", "parallel", "expected a whole number of at least 1, not True"),
    ("seed: -1", "seed", "expected a whole number of at least 0, not -1"),
    ("budget_usd: 0", "budget_usd", "expected a number above 0, not 0"),
    ("budget_usd: .nan", "budget_usd", "expected a number, not nan"),
    ("budget_usd: free", "budget_usd", "expected a number, not 'free'"),
    ("deadline: 8x", "deadline", "expected a time such as 90s, 10m or 1h30m, not '8x'"),
    ("deadline: -5", "deadline", "expected a time such as 90s, 10m or 1h30m, not -5"),
    ("metric: 3", "metric", "expected text, not 3"),
    ("name: a/b", "name", "expected letters, digits, - and _, not 'a/b'"),
    (
        "direction: maximise",
        "direction",
        "expected one of maximize, minimize, not 'maximise'; did you mean 'maximize'?",
    ),
    (
        "sampler: tbe",
        "sampler",
        "expected one of random, grid, qmc, tpe, gp, nsgaii, not 'tbe'; did you mean 'tpe'?",
    ),
    ("sampler: {startup: 3}", "sampler.name", "is missing"),
    (
        "pruner: {name: asha, warmup: 1}",
        "unknown setting pruner.warmup",
        "known: early_stopping_rate, factor, max_reports, min_reports, name",
    ),
    ("pruner: {name: asha, factor: 1}", "pruner.factor", "expected a whole number of at least 2"),
    (
        "pruner: {name: asha, min_reports: 2, max_reports: 1}",
        "pruner",
        "max_reports 1 is below min",
    ),
    ("pruner: {name: percentile}", "pruner.name", "percentile needs percentile"),
    ("pruner: {name: percentile, percentile: 101}", "pruner.percentile", "a number from 0 to 100"),
    ("pruner: hyperband", "pruner", "hyperband needs max_reports: {name: hyperband, max_reports"),
    ("pruner: {name: patient, patience: 0}", "pruner.patience", "of at least 1, not 0"),
    ("pruner: {name: patient, patience: 1, min_delta: -1}", "pruner.min_delta", "at least 0, not"),
    ("pruner: {name: threshold}", "pruner.name", "threshold needs lower or upper"),
    ("pruner: 3", "pruner", "expected one of median, percentile, asha, hyperband, patient,"),
    ("sampler: {name: nsgaii, population: 1}", "sampler.population", "at least 2, not 1"),
    ("sampler: grid", "sampler", "a grid needs points: N, or a step of every float; without: lr"),
    ("sampler: {name: gp, startup: 0}", "sampler.startup", "of at least 1, not 0"),
    ("sampler: {name: tpe, multivariate: 1}", "sampler.multivariate", "true or false, not 1"),
    ("stages: 3", "stages", "expected {first: 1, factor: 2, count: 4}"),
    ("stages: {first: 1}", "stages.count", "is missing"),
    ("stages: {first: 0, count: 2}", "stages.first", "of at least 1, not 0"),
    ("stages: {factor: 1, count: 2}", "stages.factor", "of at least 2, not 1"),
    ("stages: {count: 4}", "stages", "4 stages that keep one in 2 need at least 8 trials, not 5"),
    ("stages: {count: 2, reports: 3}", "unknown setting stages.reports", "known: count, factor,"),
    ("candidates: []", "candidates", "expected a list of configurations such as [{depth: 2}]"),
    ("candidates: [{x: 1}, 2, {}]", "candidates", "not so: number 2, 3"),
    ("project_budget_usd: 3", "project_budget_usd", "there is no project"),
    ("project: 3", "project", "expected text, not 3"),
    ("pruner: {name: median, warmup: -1}", "pruner.warmup", "expected a whole number of at least"),
    ("platform: loca", "platform", "expected one of inline, local, ray, not 'loca'; did you mean"),
    ("platform: {name: local, concurency: 3}", "unknown setting platform.concurency", "did you"),
    ("platform: {concurrency: 3}", "platform.name", "is missing"),
    ("show: accuracy", "show", "expected a list of names, not 'accuracy'"),
    ("config: 3", "config", "expected settings, not 3"),
    ("config: {lr: 3}", "config", "'lr' is in the space too"),
    ("bugdet_usd: 1", "unknown setting bugdet_usd", "did you mean 'budget_usd'?"),
    ("workers: 0", "workers", "expected a whole number of at least 1, not 0"),
    ("workers: {}", "workers.from", "is missing"),
    ("workers: {from: x}", "workers.from", "'x' is no categorical or int parameter of the space"),
    ("workers: {from: lr}", "workers.from", "'lr' is no categorical or int parameter of the space"),
    ("workers: {from: kernel, map: {3: 1}}", "workers.map", "says nothing about 5"),
    ("workers: {from: kernel, map: {3: 0, 5: 1}}", "workers.map", "at least 1, not 0"),
    ("space: {}", "space", "expected at least one parameter"),
    ("space: {x: 3}", "space.x", "expected one of {float: [low, high]}, {int: [low, high]}"),
    ("space: {x: {flot: [0, 1]}}", "space.x", "expected one of {float: [low, high]}"),
    ("space: {x: {float: [1, 0]}}", "space.x.float", "low 1.0 is above high 0.0"),
    ("space: {x: {float: 1}}", "space.x.float", "expected [low, high], not 1"),
    ("space: {x: {int: [1.5, 2]}}", "space.x.int", "expected a whole number, not 1.5"),
    ("space: {x: {int: [0, 2], log: true}}", "space.x.int", "a log scale needs a low above 0"),
    ("space: {x: {int: [1, 9], log: true, step: 2}}", "space.x.step", "a log scale has no step"),
    ("space: {x: {int: [1, 9], log: 1}}", "space.x.log", "expected true or false, not 1"),
    ("space: {x: {float: [1, 9], step: 0}}", "space.x.step", "expected a number above 0, not 0"),
    ("space: {x: {categorical: []}}", "space.x.categorical", "expected a list of values, not []"),
    ("space: {x: {categorical: [[1]]}}", "space.x.categorical", "[1] is no plain value"),
    (
        "space: {x: {int: [1, 2], lgo: true}}",
        "unknown setting space.x.lgo",
        "did you mean 'log'?",
    ),
    ("train: code.py", "train", "expected file.py:function or package.module:function"),
    ("train: coda.py:train", "train", "there is no file"),
    (
        "train: code.py:trian",
        "train",
        "code.py has no function 'trian'; did you mean 'train'?",
    ),
    ("train: code.py:number", "train", "code.py:number is no function"),
    ("train: no_such_module:f", "train", "ModuleNotFoundError: No module named 'no_such_module'"),
]


CONTRADICTIONS = [
    ("sampler: tpe", "candidates: [{x: 1}, {x: 2}]", "sampler", "there is nothing to sample"),
    ("candidates: [{x: 1}]", "space: {x: {int: [1, 2]}}", "candidates", "there is a space too"),
    ("trials: 3", "candidates: [{x: 1}, {x: 2}]", "trials", "there are 2 candidates, not 3"),
    ("config: {x: 1}", "candidates: [{x: 1}]", "config", "'x' is in the candidates too"),
    ("workers: {from: x}", "candidates: [{x: 1}, {y: 1}]", "workers.from", "in every candidate"),
    (
        "workers: {from: x}",
        "candidates: [{x: a}]",
        "workers.from",
        "that are no numbers of workers",
    ),
    (
        "trials: 5",
        "sampler: grid\nspace: {x: {int: [1, 2]}, y: {categorical: [a, b]}}",
        "trials",
        "there are 4 configurations in the grid, not 5",
    ),
    ("pruner: median", "STAGES", "pruner", "stages end trials themselves: leave the pruner out"),
    ("sampler: tpe", "STAGES", "sampler", "stages start all trials before anything is known"),
    ("workers: {from: x}", "STAGES", "workers", "in stages all trials have the same number"),
]


@pytest.mark.parametrize(("line", "with_", "where", "message"), CONTRADICTIONS)
def test_settings_that_exclude_each_other_are_told(sweep_file, line, with_, where, message):
    base = "train: code.py:train\nmetric: accuracy\n"
    stages = "trials: 4\nstages: {count: 2}\nspace: {x: {int: [1, 2]}}"
    found = mistakes_of(sweep_file(f"{base}{line}\n{with_.replace('STAGES', stages)}\n"))
    assert found == [f"3: {where}: {found[0].partition(f'{where}: ')[2]}"]
    assert message in found[0]


@pytest.mark.parametrize(("line", "where", "message"), BAD, ids=[line for line, _, _ in BAD])
def test_a_mistake_is_told_with_its_line(sweep_file, line, where, message):
    key = line.split(":")[0]
    good = GOOD.split("space:")[0] if key == "space" else GOOD
    kept = [one for one in good.splitlines() if not one.startswith(f"{key}:")]
    found = mistakes_of(sweep_file("\n".join([*kept, line, ""])))
    assert len(found) == 1
    assert found[0].startswith(f"{len(kept) + 1}: {where}")
    assert message in found[0]


def test_a_file_that_cannot_be_imported_says_why(sweep_file, tmp_path):
    (tmp_path / "code.py").write_text("import nothing_of_that_name\n")
    (mistake,) = mistakes_of(sweep_file(GOOD))
    assert mistake.endswith(
        "cannot be imported: ModuleNotFoundError: No module named 'nothing_of_that_name'"
    )


def test_all_mistakes_come_in_one_error_in_the_order_of_the_file(sweep_file):
    found = mistakes_of(
        sweep_file(
            """\
            train: code.py:trian
            trials: 0
            space:
              lr: {float: [2, 1]}
              lr: {float: [1, 2]}
            sampelr: tpe
            """
        )
    )
    assert [mistake.split(":")[0] for mistake in found] == ["1", "1", "2", "5", "6"]
    assert "metric is missing" in found[1] + found[0]
    assert "space.lr appears twice, first in line 4" in found[3]


def test_what_is_no_sweep_file(sweep_file, tmp_path):
    assert mistakes_of(sweep_file("- a\n- b\n")) == ["1: expected settings such as 'trials: 20'"]
    assert mistakes_of(sweep_file("")) == ["1: expected settings such as 'trials: 20'"]
    assert mistakes_of(sweep_file("a: [1\nb: 2\n"))[0].startswith("2: not YAML:")
    assert mistakes_of(tmp_path / "none.yaml") == [" cannot be read: No such file or directory"]
    assert mistakes_of(tmp_path) == [" cannot be read: Is a directory"]


def test_the_examples_are_right():
    examples = Path(__file__).parents[1] / "examples"
    sweep = load(examples / "sweep.yaml")
    assert sweep.trials >= 12
    assert {sweep.workers_of({"batch_size": size}) for size in (32, 64, 128)} == {1, 2, 4}
    staged = load(examples / "sweep_stages.yaml")
    assert staged.trials == 16
    assert staged.stages.reports(staged.stages.count - 1) == staged.config["epochs"]
