"""smlt plan: what it prints and writes, every mistake at once, and that nothing is spent."""

import json
import re
import textwrap

import numpy as np
import pytest

from smlt_tune import cli
from smlt_tune.backend import planning
from smlt_tune.backend.platforms.inline import InlinePlatform
from smlt_tune.backend.profiles import ProfileStore
from smlt_tune.backend.resource_manager.observations import Allocation, Profile, Workload
from smlt_tune.backend.sweeps import plots
from smlt_tune.errors import TrainingFunctionError
from smlt_tune.runtime.features import ModelFeatures

SWEEP = """\
name: tiny
train: code.py:train
metric: accuracy
trials: 8
parallel: 2
space:
  width: {int: [8, 32]}
  lr: {float: [1e-3, 0.1], log: true}
config: {epochs: 3}
platform: inline
"""

really_measure = planning.measure


class Watched(InlinePlatform):
    """Remembers its instances, to look at their bills."""

    made = ()

    def __init__(self, **options):
        super().__init__(**options)
        type(self).made = (*self.made, self)
        self.closed = False

    def close(self):
        super().close()
        self.closed = True


def measure(train, config, *, datasets, timeout_s):
    """A network whose size and length follow from its configuration."""
    parameters = 1000 * config.get("width", 8)
    features = ModelFeatures(parameters, 4 * parameters, 600.0 * parameters, 1e4)
    return Workload(features, 64, config.get("iterations", 2000))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project with a training function and a sweep; nothing is known of the machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMLT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Watched, "made", ())
    monkeypatch.setattr("smlt_tune.backend.platforms.inline.InlinePlatform", Watched)
    monkeypatch.setattr(planning, "measure", measure)
    (tmp_path / "code.py").write_text("def train(config): ...\nnumber = 3\n")
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    yield tmp_path
    assert all(platform.bill().requests == 0 for platform in Watched.made)
    assert all(platform.closed for platform in Watched.made)


def plan(*arguments):
    return cli.main(["plan", *arguments])


def function(*arguments):
    return plan("code.py:train", "--platform", "inline", *arguments)


def test_a_function_gets_a_recommendation_and_a_front(folder, capsys):
    assert function("--config", '{"width": 20}', "--out", "plan.json") == 0
    out = capsys.readouterr().out
    told = json.loads((folder / "plan.json").read_text())
    assert "code.py:train: cheapest" in out
    assert "20,000 parameters" in out
    assert "2,000 iterations of 64 samples" in out
    assert "no earlier job is known" in out
    assert len(Watched.made) == 1
    assert told["feasible"]
    assert told["features"]["parameters"] == 20_000
    assert len([line for line in out.splitlines() if line.startswith(">")]) == 1
    chosen = told["chosen"]
    assert {"low", "mid", "high"} == set(chosen["time_s"]) == set(chosen["cost_usd"])
    assert chosen["time_s"]["low"] < chosen["time_s"]["mid"] < chosen["time_s"]["high"]
    assert f"{chosen['fits']:.0%}" in out
    assert "wrote plan.json" in out
    assert [one["time_s"]["mid"] for one in told["front"]] == sorted(
        one["time_s"]["mid"] for one in told["front"]
    )


REAL = """\
import torch
import smlt_tune as smlt

def train(config):
    session = smlt.session()
    model = helper(config["width"])
    model, optimizer = session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in session.epochs(3):
        for (x,) in session.batches((torch.zeros(80, 4),), batch_size=20):
            model(x).sum().backward()
            optimizer.step()

def helper(width):
    return torch.nn.Linear(4, width)
"""


def test_a_function_of_a_file_is_run_dry_and_nothing_else(folder, monkeypatch, capsys):
    monkeypatch.setattr(planning, "measure", really_measure)
    (folder / "real.py").write_text(REAL)
    assert plan("real.py:train", "--config", '{"width": 7}', "--platform", "inline") == 0
    out = capsys.readouterr().out
    assert "35 parameters" in out
    assert "12 iterations of 20 samples" in out
    assert plan("real.py:train", "--platform", "inline") == 1
    err = capsys.readouterr().err
    assert 'model = helper(config["width"])' in err
    assert "smlt: TrainingFunctionError: KeyError: 'width'" in err


def test_a_file_that_cannot_be_written_is_an_error(folder, capsys):
    (folder / "plan.json").mkdir()
    assert function("--out", "plan.json") == 2
    assert "--out plan.json: cannot be written: Is a directory" in capsys.readouterr().err


def test_pins_and_bounds_hold(folder):
    function("--workers", "1", "--memory-mb", "2000", "--out", "plan.json")
    chosen = json.loads((folder / "plan.json").read_text())["chosen"]
    assert chosen["allocation"] == {"workers": 1, "memory_mb": 2000, "store": "default"}


@pytest.mark.parametrize(
    ("arguments", "goal"),
    [
        ([], "cheapest"),
        (["--deadline", "8h"], "cheapest within 8:00:00"),
        (["--goal", "fastest"], "fastest"),
        (["--budget", "9"], "fastest for at most $9.00"),
        (["--goal", "fastest", "--budget", "9"], "fastest for at most $9.00"),
    ],
)
def test_a_limit_says_which_goal_is_meant(folder, capsys, arguments, goal):
    assert function(*arguments) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"code.py:train: {goal}"


@pytest.mark.parametrize("limit", [["--deadline", "0.001s"], ["--budget", "0.0000001"]])
def test_a_goal_out_of_reach_names_the_nearest_and_ends_with_2(folder, capsys, limit):
    assert function(*limit) == 2
    out = capsys.readouterr().out
    assert re.search(r"note: (Cheapest|Fastest)\(.*cannot be reached.*would do", out)
    assert out.count(">") == 1


def test_measurements_of_earlier_jobs_are_counted(folder, capsys):
    with ProfileStore(folder / "project") as store:
        for number in range(3):
            workload = measure(None, {"width": 10 + number}, datasets=None, timeout_s=1)
            profile = Profile(f"job-{number}", workload, Allocation(1, 1769), 100, 0.2)
            store.add(profile, InlinePlatform().fingerprint)
    assert function("--project", "project") == 0
    assert "predicted from 3 measurements of earlier jobs" in capsys.readouterr().out


def test_a_sweep_is_planned_as_a_whole(folder, capsys):
    assert plan("sweep.yaml", "--out", "plan.json", "--budget", "50", "--deadline", "9h") == 0
    captured = capsys.readouterr()
    told = json.loads((folder / "plan.json").read_text())
    assert "tiny: 8 trials, 2 at once" in captured.out
    assert "the budget of $50.00 pays for 8 trials" in captured.out
    assert "within 9:00:00 there end 8 trials" in captured.out
    assert "smlt: lowest: width=8" in captured.err
    assert [one["target"] for one in told["samples"]][:2] == ["lowest", "highest"]
    assert [one["params"]["width"] for one in told["samples"]][:2] == [8, 32]
    drawn = [one["chosen"]["cost_usd"]["mid"] for one in told["samples"][2:]]
    assert told["chosen"]["cost_usd"]["mid"] == pytest.approx(8 * sum(drawn) / len(drawn))
    # The platform runs one function at a time: the trials go one after another.
    times = [one["chosen"]["time_s"]["mid"] for one in told["samples"][2:]]
    assert told["chosen"]["time_s"]["mid"] == pytest.approx(8 * sum(times) / len(times))


def test_a_sweep_out_of_reach_says_what_the_budget_buys_and_ends_with_2(folder, capsys):
    (folder / "sweep.yaml").write_text(SWEEP + "budget_usd: 0.000001\ndeadline: 1s\n")
    assert plan("sweep.yaml") == 2
    out = capsys.readouterr().out
    assert "pays for about 0 of 8 trials" in out
    assert "about 0 of 8 trials end within 1.0 s" in out


@pytest.mark.parametrize("arguments", [["code.py:train", "--platform", "inline"], ["sweep.yaml"]])
def test_pictures_are_drawn(folder, arguments):
    pytest.importorskip("matplotlib")
    assert plan(*arguments, "--out", "a.png", "--out", "b.svg") == 0
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    svg = (folder / "b.svg").read_text()
    assert svg.count("<path") > 20


@pytest.mark.parametrize("target", [["code.py:train", "--platform", "inline"], ["sweep.yaml"]])
def test_data_sets_come_from_files(folder, monkeypatch, target):
    seen = []

    def look(train, config, *, datasets, timeout_s):
        seen.append((datasets, timeout_s))
        return measure(train, config, datasets=datasets, timeout_s=timeout_s)

    monkeypatch.setattr(planning, "measure", look)
    np.save(folder / "one.npy", np.arange(6))
    np.savez(folder / "two.npz", np.arange(4), np.ones(4))
    files = ["--data", "digits=one.npy", "--data", "pairs=two.npz", "--dry-run-timeout", "10m"]
    assert plan(*target, *files) == 0
    datasets, timeout_s = seen[0]
    assert timeout_s == 600
    assert datasets["digits"].tolist() == list(range(6))
    assert [array.tolist() for array in datasets["pairs"]] == [[0, 1, 2, 3], [1, 1, 1, 1]]


def test_an_error_of_the_function_is_shown_with_its_traceback(folder, capsys, monkeypatch):
    def fails(*_, **__):
        raise TrainingFunctionError("KeyError: 'lr'", worker_traceback="Traceback\n  line 3\n")

    monkeypatch.setattr(planning, "measure", fails)
    assert function() == 1
    err = capsys.readouterr().err
    assert err.splitlines() == [
        "Traceback",
        "  line 3",
        "smlt: TrainingFunctionError: KeyError: 'lr'",
    ]


BAD = [
    (["code.py:trian"], ["code.py has no function 'trian'; did you mean 'train'?"]),
    (["coda.py:train"], ["there is no file"]),
    (["code.py:number"], ["code.py:number is no function"]),
    (["code.py"], ["expected file.py:function or package.module:function"]),
    (["no_such_module:f"], ["ModuleNotFoundError"]),
    (["none.yaml"], ["cannot be read: No such file or directory"]),
    (["code.py:train", "--config", "{lr: 1}"], ["--config must be JSON such as '{\"lr\": 0.1}'"]),
    (["code.py:train", "--project", "none"], ["there are no profiles in none"]),
    (["code.py:train", "--workers", "2"], ["workers=2 is more than the platform can run"]),
    (["code.py:train", "--memory-mb", "1"], ["memory_mb=1 is not among what the platform offers"]),
    (["code.py:train", "--goal", "fastest", "--deadline", "1m"], ["--deadline is a limit for"]),
    (["code.py:train", "--goal", "cheapest", "--budget", "1"], ["--budget is a limit for"]),
    (["code.py:train", "--budget", "1", "--deadline", "1m"], ["has one limit"]),
    (["code.py:train", "--data", "digits"], ["--data digits: expected NAME=FILE"]),
    (["code.py:train", "--data", "a=b.npz"], ["--data a=b.npz: b.npz is no .npy or .npz file"]),
    (["code.py:train", "--data", "a=code.py"], ["code.py is no .npy or .npz file"]),
    (["code.py:train", "--out", "plan.txt"], ["--out plan.txt: the name must end in one of"]),
    (["code.py:train", "--out", "no/plan.png"], ["there is no folder no"]),
    (["sweep.yaml", "--config", "{}"], ["--config is for a training function"]),
    (["sweep.yaml", "--workers", "2"], ["sweep.yaml: workers=2 is more than"]),
    (
        ["code.py:trian", "--config", "[", "--memory-mb", "1", "--out", "x", "--project", "no"],
        ["--out x", "no function 'trian'", "--config must be JSON", "memory_mb=1", "no profiles"],
    ),
]


@pytest.mark.parametrize(("arguments", "mistakes"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_mistakes_are_told_all_at_once_one_a_line(folder, capsys, arguments, mistakes):
    where = [] if arguments[0] == "sweep.yaml" else ["--platform", "inline"]
    assert plan(*arguments, *where) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(mistakes)
    assert all(part in line for part, line in zip(mistakes, lines, strict=True)), lines


def test_all_mistakes_of_a_sweep_file_come_with_their_lines(folder, capsys):
    bad = "train: code.py:trian\nmetric: accuracy\ntrials: 0\nspace: {x: {int: [2, 1]}}\n"
    (folder / "sweep.yaml").write_text(textwrap.dedent(bad))
    assert plan("sweep.yaml", "--out", "x") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[2] for line in lines[1:]] == ["1", "3", "4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers: expected a whole number of at least 1, not 0"),
        (["--max-workers", "-1"], "--max-workers: expected a whole number of at least 1"),
        (["--memory-mb", "1.5"], "--memory-mb: expected a whole number of at least 1"),
        (["--budget", "0"], "--budget: expected a number above 0"),
        (["--deadline", "-3"], "--deadline: expected a time such as"),
        (["--goal", "best"], "--goal: invalid choice: 'best'"),
        (["--platform", "moon"], "--platform: invalid choice: 'moon'"),
    ],
)
def test_wrong_arguments(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        plan("code.py:train", *arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_damaged_measurements_are_an_error(folder, capsys):
    (folder / "project").mkdir()
    (folder / "project" / "profiles.sqlite3").write_bytes(b"no database" * 999)
    assert function("--project", "project") == 1
    assert "is damaged" in capsys.readouterr().err


def test_without_an_extra_it_says_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    assert function("--out", "a.png") == 2
    assert "pip install 'smlt-tune[report]'" in capsys.readouterr().err
    find = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "scipy" else find(name))
    assert function() == 2
    assert "smlt plan needs scipy: pip install 'smlt-tune[gp]'" in capsys.readouterr().err
    extra = {"scipy", "threadpoolctl"}
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in extra else find(name))
    assert function() == 2
    told = "smlt plan needs scipy and threadpoolctl: pip install 'smlt-tune[gp]'"
    assert told in capsys.readouterr().err


def test_stages_are_planned_together(folder, capsys):
    text = SWEEP.replace("trials: 8\n", "trials: 8\nstages: {count: 3}\n")
    (folder / "sweep.yaml").write_text(text)
    assert plan("sweep.yaml", "--budget", "9", "--out", "plan.json") == 0
    told = json.loads((folder / "plan.json").read_text())
    assert [stage["trials"] for stage in told["stages"]] == [8, 4, 2]
    assert told["cost_usd"] == pytest.approx(sum(one["cost_usd"] for one in told["stages"]))
    assert told["time_s"] == pytest.approx(sum(one["time_s"] for one in told["stages"]))
    out = capsys.readouterr().out
    assert "tiny: 8 trials in 3 stages" in out
    for number, (trials, rung) in enumerate([(8, 1), (4, 2), (2, 4)], 1):
        assert re.search(rf"^ *{number} +{trials} +{rung} +\d", out, re.MULTILINE)
    assert plan("sweep.yaml", "--budget", "1e-6", "--out", "plan.json") == 2
    assert not json.loads((folder / "plan.json").read_text())["feasible"]
    assert "note: " in capsys.readouterr().out
    assert plan("sweep.yaml", "--out", "plan.png") == 2
    assert "pictures of all sweeps but those in stages" in capsys.readouterr().err


@pytest.mark.parametrize("stages", ["", "stages: {count: 3}\n"])
def test_a_sweep_is_run_in_virtual_time(folder, capsys, stages):
    (folder / "sweep.yaml").write_text(SWEEP + stages)
    assert plan("sweep.yaml", "--simulate") == 0
    assert re.search(r"^simulated: .* and \$\d", capsys.readouterr().out, re.MULTILINE)
    assert plan("sweep.yaml", "--simulate", "--budget", "1e-6") == 2
    assert re.search("simulated: .*(not started|budget)", capsys.readouterr().out)
    assert function("--simulate") == 2
    assert "--simulate is for a sweep file" in capsys.readouterr().err
