"""Plans: bad input, what the policy is told, and what a sweep makes of single predictions."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlt_tune.backend import planning
from smlt_tune.backend.artifact_manager import ArtifactManager
from smlt_tune.backend.goals import Cheapest, Fastest
from smlt_tune.backend.platforms.base import PlatformLimits
from smlt_tune.backend.platforms.inline import InlinePlatform
from smlt_tune.backend.profiles import ProfileStore
from smlt_tune.backend.resource_manager.observations import (
    Allocation,
    Interval,
    Plan,
    Prediction,
    Profile,
    Workload,
)
from smlt_tune.backend.resource_manager.policy import Bounds
from smlt_tune.backend.sweeps.drawing import quantile
from smlt_tune.backend.sweeps.plan import DRAWN, configurations_of, plan_sweep
from smlt_tune.backend.sweeps.space import Categorical, FloatParameter, IntParameter
from smlt_tune.backend.sweeps.sweep import load
from smlt_tune.errors import InvalidInput, ObjectDamaged, TrainingFunctionError, UsageError
from smlt_tune.runtime.features import ModelFeatures
from smlt_tune.runtime.stores.directory import DirectoryStore

LIMITS = PlatformLimits(
    min_memory_mb=128, max_memory_mb=10_240, time_limit_s=900, concurrency=6, max_workers=6
)
WORKLOAD = Workload(ModelFeatures(1000, 4000, 1e6, 1e3), 64, 500)


def about(mid, by=1.25):
    return Interval(mid / by, mid, mid * by)


def prediction(workers, time_s, cost_usd):
    allocation = Allocation(workers, 1769)
    return Prediction(allocation, about(time_s / 500), about(time_s), about(cost_usd), 0.99)


class Fixed:
    """A policy that says the same of every job, and notes what it was asked."""

    def __init__(self, *options, notes=()):
        self.options, self.notes, self.asked = options, notes, []

    def plan(self, facts):
        self.asked.append(facts)
        front = tuple(sorted(self.options, key=lambda one: one.time_s.mid))
        return Plan(self.options[0], front, True, self.notes, 0, 0)


def train(config):
    """Never called: what it computes is given."""


@pytest.fixture
def measured(monkeypatch):
    """Configurations that were run dry."""
    seen = []

    def measure(train, config, *, datasets, timeout_s):
        seen.append(config)
        return WORKLOAD

    monkeypatch.setattr(planning, "measure", measure)
    return seen


@pytest.fixture
def sweep(tmp_path):
    (tmp_path / "code.py").write_text("def train(config): ...\n")

    def write(text="", space="depth: {int: [1, 8]}\n  lr: {float: [1e-3, 0.1], log: true}"):
        file = tmp_path / "sweep.yaml"
        head = "train: code.py:train\nmetric: accuracy\ntrials: 8\nparallel: 2\n"
        file.write_text(f"{head}space:\n  {space}\n{text}")
        return load(file)

    return write


# --- one job


def test_the_policy_is_asked_about_what_the_function_computes(measured):
    policy, bounds = Fixed(prediction(2, 60, 0.01)), Bounds(max_workers=4)
    job = planning.plan_job(
        train, {"lr": 1}, policy=policy, limits=LIMITS, goal=Fastest(0.5), bounds=bounds
    )
    [facts] = policy.asked
    assert measured == [{"lr": 1}]
    assert (facts.workload, facts.iterations_left) == (WORKLOAD, 500)
    assert (facts.goal, facts.bounds, facts.limits) == (Fastest(0.5), bounds, LIMITS)
    assert (facts.allocation, facts.functions) == (None, 6)
    assert (job.workload, job.goal) == (WORKLOAD, Fastest(0.5))
    assert job.plan.chosen.allocation == Allocation(2, 1769)


def asks_for_data(config):
    """Two epochs over an uploaded data set."""
    import torch

    import smlt_tune as smlt

    session = smlt.session()
    model = torch.nn.Linear(5, config["out"])
    model, optimizer = session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in session.epochs(2):
        for (x,) in session.batches("digits", batch_size=10):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_what_a_function_computes_is_found_out_elsewhere(tmp_path):
    datasets = {"digits": (np.zeros((95, 5), np.float32),)}
    found = planning.measure(asks_for_data, {"out": 3}, datasets=datasets)
    assert (found.features.parameters, found.features.gradient_bytes) == (18, 72)
    assert (found.batch, found.iterations) == (10, 20)
    stored = ArtifactManager(DirectoryStore(tmp_path)).store_code(asks_for_data, "a function")
    assert found.function == stored  # so that jobs of a fleet are its siblings


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        (asks_for_data, TrainingFunctionError, "TypeError: 'NoneType' object"),
        (train, UsageError, "has ended without training"),
    ],
)
def test_a_function_that_cannot_be_measured_says_why(train, error, message):
    with pytest.raises(error, match=message):
        planning.measure(train)


@pytest.mark.parametrize(
    ("train", "goal", "bounds", "mistakes"),
    [
        (3, None, Bounds(), ["the training function must be callable"]),
        (train, "soon", Bounds(), ["goal must be Cheapest"]),
        (train, Cheapest, Bounds(), ["goal must be made first"]),
        (train, None, Bounds(workers=7), ["workers=7 is more than the platform can run"]),
        (train, None, Bounds(memory_mb=64), ["memory_mb=64 is not among"]),
        (train, None, Bounds(workers=0, memory_mb=-1), ["workers must be", "memory_mb must be"]),
        (train, None, Bounds(min_workers=5, max_workers=2), ["min_workers=5 is more than max"]),
        (None, 3, Bounds(workers=-2), ["must be callable", "goal must be", "workers must be"]),
    ],
)
def test_every_mistake_is_told_before_anything_runs(measured, train, goal, bounds, mistakes):
    policy = Fixed(prediction(2, 60, 0.01))
    with pytest.raises(InvalidInput) as caught:
        planning.plan_job(train, policy=policy, limits=LIMITS, goal=goal, bounds=bounds)
    told = caught.value.mistakes
    assert len(told) == len(mistakes)
    assert all(start in one for start, one in zip(mistakes, told, strict=True))
    assert measured == policy.asked == []


def test_profiles_of_the_project_enter(tmp_path, measured):
    platform = InlinePlatform()
    with ProfileStore(tmp_path) as store:
        for name, where in (("a", platform.fingerprint), ("b", "elsewhere")):
            store.add(Profile(name, WORKLOAD, Allocation(1, 1769), 50, 0.5), where)
    for project, siblings in ((tmp_path, 1), (None, 0)):
        policy = planning.resource_manager(platform, project=project)
        job = planning.plan_job(train, policy=policy, limits=platform.limits)
        assert job.plan.siblings == siblings
    assert platform.bill().requests == 0


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, InvalidInput, "there are no profiles in .*: it holds no profiles.sqlite3"),
        (b"no database" * 999, ObjectDamaged, "is damaged"),
    ],
)
def test_profiles_that_cannot_be_read_are_an_error(tmp_path, content, error, message):
    if content is not None:
        (tmp_path / "profiles.sqlite3").write_bytes(content)
    with pytest.raises(error, match=message):
        planning.resource_manager(InlinePlatform(), project=tmp_path)
    if content is None:
        assert list(tmp_path.iterdir()) == []


# --- configurations of a space

PARAMETERS = [
    FloatParameter("x", -1.0, 2.0),
    FloatParameter("x", 1e-4, 1.0, log=True),
    FloatParameter("x", 0.0, 1.0, step=0.25),
    IntParameter("x", 3, 3),
    IntParameter("x", 1, 9, step=4),
    IntParameter("x", 1, 1000, log=True),
    Categorical("x", ("a", "b", None)),
    Categorical("x", (64, 16, 32)),
]


@pytest.mark.parametrize("parameter", PARAMETERS, ids=str)
@given(u=st.floats(0, 1), v=st.floats(0, 1))
def test_quantiles_lie_in_the_space_in_order(parameter, u, v):
    low, high = (quantile(parameter, min(u, v)), quantile(parameter, max(u, v)))
    if isinstance(parameter, Categorical):
        assert {low, high} <= set(parameter.choices)
        return
    assert parameter.low <= low <= high <= parameter.high
    assert isinstance(low, type(parameter.low))
    if parameter.step not in (None, 1):
        assert (low - parameter.low) % parameter.step == 0


def test_the_ends_of_a_space_are_its_corners():
    assert [(quantile(one, 0.0), quantile(one, 1.0)) for one in PARAMETERS] == [
        (-1.0, 2.0),
        (1e-4, 1.0),
        (0.0, 1.0),
        (3, 3),
        (1, 9),
        (1, 1000),
        ("a", None),
        (16, 64),
    ]


def test_what_is_drawn_covers_every_setting_and_depends_on_the_seed_alone(sweep):
    plan = configurations_of(sweep())
    assert [name for name, _ in plan][:3] == ["lowest", "highest", "drawn 1"]
    assert plan == configurations_of(sweep())
    assert plan != configurations_of(sweep("seed: 1\n"))
    for name, span in (("depth", 8), ("lr", None)):
        values = [params[name] for kind, params in plan if kind.startswith("drawn")]
        u = [(v - 1) / span if span else math.log(v / 1e-3) / math.log(100) for v in values]
        assert Counter(int(one * DRAWN) for one in u) == dict.fromkeys(range(DRAWN), 1)


# --- whole sweeps


@pytest.mark.parametrize(
    ("workers", "parallel", "concurrency", "waves"),
    [
        (1, 2, 6, 4),  # two trials at once are allowed
        (3, 8, 6, 4),  # two fit
        (4, 8, 6, 8),  # one fits
        (2, 8, 6, 3),  # three fit: 3 + 3 + 2
        (1, 8, 8, 1),
    ],
)
def test_trials_take_turns(measured, sweep, workers, parallel, concurrency, waves):
    policy = Fixed(prediction(workers, 60, 0.01))
    limits = replace(LIMITS, concurrency=concurrency)
    plan = plan_sweep(replace(sweep(), parallel=parallel), policy=policy, limits=limits)
    assert plan.chosen.time_s.mid == pytest.approx(60 * waves)
    assert plan.chosen.time_s.high == pytest.approx(75 * waves)
    assert plan.chosen.cost_usd.low == pytest.approx(8 * 0.008)
    assert plan.chosen.cost_usd.mid == pytest.approx(8 * 0.01)
    assert plan.feasible
    assert (plan.affordable, plan.in_time, plan.notes) == (None, None, ())
    assert len(measured) == len(plan.samples) == DRAWN + 2
    fair = max(1, concurrency // parallel)
    assert {facts.functions for facts in policy.asked} == {fair}


class ByDepth(Fixed):
    """Jobs that differ."""

    def plan(self, facts):
        said = super().plan(facts)
        scale = 1 + len(self.asked) % 4
        return replace(said, chosen=prediction(1, 60.0 * scale, 0.01 * scale), front=())


def test_trials_that_differ_widen_the_interval(measured, sweep):
    same = plan_sweep(sweep(), policy=Fixed(prediction(1, 150, 0.025)), limits=LIMITS).chosen
    differ = plan_sweep(sweep(), policy=ByDepth(prediction(1, 1, 1)), limits=LIMITS).chosen
    assert differ.cost_usd.mid == pytest.approx(same.cost_usd.mid)
    assert differ.cost_usd.low < same.cost_usd.low
    assert differ.cost_usd.high > same.cost_usd.high
    assert differ.time_s.high / differ.time_s.mid > 1.25


def test_candidates_are_planned_as_they_are_listed(measured, tmp_path):
    (tmp_path / "code.py").write_text("def train(config): ...\n")
    base = "train: code.py:train\nmetric: accuracy\ncandidates: "

    def listed(depths):
        path = tmp_path / "sweep.yaml"
        path.write_text(base + repr([{"depth": depth} for depth in depths]))
        return plan_sweep(load(path), policy=ByDepth(prediction(1, 1, 1)), limits=LIMITS)

    few = listed([1, 5, 9])
    assert [one.name for one in few.samples] == ["candidate 1", "candidate 2", "candidate 3"]
    cost = few.chosen.cost_usd  # all are known: no error of drawing
    assert (cost.low / cost.mid, cost.high / cost.mid) == pytest.approx((0.8, 1.25))
    many = listed(range(1, 21))
    assert [one.params["depth"] for one in many.samples] == [1, 7, 14, 20]
    cost = many.chosen.cost_usd
    assert cost.low / cost.mid < 0.75


@pytest.mark.parametrize(
    ("limit", "feasible", "affordable", "in_time"),
    [
        ("budget_usd: 1\n", True, 8, None),
        ("budget_usd: 0.05\n", False, 5, None),
        ("budget_usd: 0.001\n", False, 0, None),
        ("deadline: 4m\n", True, None, 8),
        ("deadline: 2m\n", False, None, 4),
        ("deadline: 30s\n", False, None, 0),
        ("budget_usd: 0.05\ndeadline: 2m\n", False, 5, 4),
    ],
)
def test_what_budget_and_deadline_buy(measured, sweep, limit, feasible, affordable, in_time):
    fast = prediction(3, 30, 0.02)
    policy = Fixed(prediction(1, 60, 0.01), fast)
    plan = plan_sweep(sweep(limit), policy=policy, limits=LIMITS)
    assert plan.feasible == feasible
    assert (plan.affordable and plan.affordable.mid) == affordable
    assert (plan.in_time and plan.in_time.mid) == in_time
    notes = " ".join(plan.notes)
    assert ("pays for about" in notes) == (affordable is not None and affordable < 8)
    assert ("at best 2:00 for $0.16" in notes) == (in_time is not None and in_time < 8)


def test_nothing_beats_a_point_of_the_front(measured, sweep):
    options = [prediction(1, 60, 0.01), prediction(2, 40, 0.012), prediction(6, 35, 0.02)]
    plan = plan_sweep(sweep(), policy=Fixed(*options), limits=LIMITS)
    points = [(one.time_s.mid, one.cost_usd.mid) for one in plan.front]
    assert points == sorted(points)
    assert [cost for _, cost in points] == sorted((c for _, c in points), reverse=True)
    assert pytest.approx((160, 0.096)) in points  # two workers each: two trials at once
    assert all(time_s < 280 for time_s, _ in points)  # six would go one after another


def test_what_the_file_fixes_and_the_platform_cannot_is_told_at_once(measured, sweep):
    bad = sweep("workers: {from: depth, map: {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 9}}\n")
    with pytest.raises(InvalidInput) as caught:
        plan_sweep(replace(bad, memory_mb=1), policy=Fixed(), limits=LIMITS)
    assert [one.split(": ")[1].split("=")[0] for one in caught.value.mistakes] == [
        "memory_mb",
        "workers",
    ]
    assert measured == []


def test_notes_on_single_configurations_and_pruning_are_passed_on(measured, sweep):
    policy = Fixed(prediction(1, 60, 0.01), notes=("its length is not known",))
    plan = plan_sweep(sweep("pruner: median\n"), policy=policy, limits=LIMITS)
    assert plan.feasible
    assert "the pruner" in plan.notes[0]
    assert plan.notes[1:] == ("its length is not known",)  # of all of them


def test_a_space_of_one_configuration_is_run_dry_once(measured, sweep):
    policy = Fixed(prediction(1, 60, 0.01))
    plan_sweep(sweep(space="depth: {int: [2, 2]}"), policy=policy, limits=LIMITS)
    assert measured == [{"depth": 2}]
