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
        "expected one of tpe, random, not 'tbe'; did you mean 'tpe'?",
    ),
    ("sampler: {startup: 3}", "sampler.name", "is missing"),
    (
        "pruner: {name: asha, warmup: 1}",
        "unknown setting pruner.warmup",
        "known: factor, min_reports, name",
    ),
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


def test_the_example_is_right():
    sweep = load(Path(__file__).parents[1] / "examples" / "sweep.yaml")
    assert sweep.trials >= 12
    assert {sweep.workers_of({"batch_size": size}) for size in (32, 64, 128)} == {1, 2, 4}
