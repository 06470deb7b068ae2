"""Fleets whose policy moves jobs, over several parameter stores, on the local platform."""

import contextlib
import importlib.util
import os
import random
import signal
import threading
import time
from dataclasses import replace

import pytest
import redis

import smlt_tune as smlt
from smlt_tune.backend.embedded_store import EmbeddedStore
from smlt_tune.backend.late_policy import LatePolicy
from smlt_tune.backend.ledger import Ledger
from smlt_tune.backend.platforms.base import PlatformLimits
from smlt_tune.backend.prices import load_prices
from smlt_tune.backend.profiles import ProfileStore
from smlt_tune.backend.resource_manager.observations import (
    Allocation,
    Decision,
    Interval,
    Plan,
    Prediction,
    Profile,
    Workload,
)
from smlt_tune.backend.resource_manager.policy import Bounds, JobFacts, PinnedOrDefault
from smlt_tune.backend.store_costs import StoreCosts
from smlt_tune.errors import BudgetExhausted, InvalidInput
from smlt_tune.runtime.features import ModelFeatures
from tests import jobs
from tests.conftest import eventually

WORKLOAD = Workload(ModelFeatures(1000, 4000), 64, 1000)
FACTS = JobFacts("a", PlatformLimits(128, 4096, 900.0, 8))


class Scripted(PinnedOrDefault):
    """The default, until a batch of some size comes."""

    def __init__(self, moves=None):
        self.moves = moves or {}
        self.asked = []

    def review(self, facts):
        self.asked.append(facts)
        allocation = facts.workload and self.moves.get(facts.workload.batch)
        return Decision(allocation, "the batch has grown") if allocation else None


def growing(config):
    """Trains on batches that double after the second epoch."""
    import torch
    from torch.nn import functional as F

    session = smlt.session()
    data = torch.Generator().manual_seed(1)
    x_all = torch.randn(400, 16, generator=data)
    y_all = x_all[:, :4].argmax(1)
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = session.prepare(model, optimizer)
    for epoch in session.epochs(5):
        batches = session.batches((x_all, y_all), lambda epoch: 25 if epoch < 2 else 50)
        for x, y in batches:
            time.sleep(0.1)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        session.report(epoch=epoch, workers=session.workers)
    return jobs.weights(model)


def test_a_batch_that_doubles_moves_the_job_within_one_chunk(platform, tmp_path):
    policy = Scripted({50: Allocation(3, 1769)})
    with smlt.Fleet(platform=platform, policy=policy, project=tmp_path) as fleet:
        job = fleet.submit(growing, memory_mb=1769)
        outcome = job.result(120)
    assert [(a.workers, a.decision) for a in outcome.allocations[1:]] == [
        (3, "the batch has grown")
    ]
    move = next(d for d in job.decisions if d.allocation.workers == 3)
    assert move.occasion == "workload"
    asked = next(facts for facts in policy.asked if facts.workload.batch == 50)
    assert asked.iterations_left >= 12  # of the three epochs of eight that were left
    assert [r.metrics["workers"] for r in outcome.reports][:2] == [2, 2]
    assert outcome.reports[-1].metrics["workers"] == 3
    with ProfileStore(tmp_path) as store:
        profiles = store.profiles(platform.fingerprint)
    assert {(p.workload.batch, p.allocation.workers) for p in profiles} >= {(25, 2), (50, 3)}
    assert {p.job_id for p in profiles} == {f"{fleet.name}/{job.job_id}"}
    assert all(p.iteration_s >= 0.1 and p.peak_mb > 0 for p in profiles)


# --- gradients through a store of their own -------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(platform):
    with smlt.Fleet(platform=platform, policy=PinnedOrDefault()) as fleet:
        return fleet.submit(jobs.train, {"epochs": 4}, workers=3, memory_mb=1769).result(120).value


@pytest.fixture
def second():
    with EmbeddedStore() as store:
        yield store


@pytest.fixture
def two_stores(platform, second):
    with smlt.Fleet(
        platform=platform, policy=PinnedOrDefault(), parameter_stores={"second": second.url}
    ) as fleet:
        yield fleet
    with contextlib.closing(redis.Redis.from_url(second.url)) as client:
        assert client.dbsize() == 0  # nothing is left behind


def submit(fleet, folder, **options):
    config = {"epochs": 4, "pause": 0.05, "notes": str(folder)}
    pins = {"workers": 3, "memory_mb": 1769, "store": "second"}
    job = fleet.submit(jobs.train, config, **{**pins, **options})
    eventually(lambda: len(jobs.notes(folder)) >= 15)
    return job


def test_gradients_through_another_store_give_the_same_bits(
    two_stores, second, tmp_path, undisturbed
):
    job = submit(two_stores, tmp_path)
    with contextlib.closing(redis.Redis.from_url(second.url)) as client:
        kept = [key.decode().rpartition(":g0:")[2] for key in client.scan_iter()]
    assert kept
    assert not {"open", "start", "events"} & set(kept)
    outcome = job.result(120)
    assert outcome.value == undisturbed
    assert [a.store for a in outcome.allocations] == ["second"]


def test_another_store_that_is_killed_and_comes_back_empty(
    two_stores, second, tmp_path, undisturbed
):
    job = submit(two_stores, tmp_path)
    other = two_stores.submit(jobs.train, {"epochs": 4, "pause": 0.1}, workers=3, memory_mb=1769)
    os.kill(second.pid, signal.SIGKILL)
    outcome = job.result(120)
    assert outcome.value == undisturbed
    assert len(outcome.allocations) >= 2
    assert len(other.result(120).allocations) == 1  # it has nothing to do with that store


class Elsewhere(PinnedOrDefault):
    """Has a liking for the second store."""

    def first(self, facts):
        decision = super().first(facts)
        return replace(decision, allocation=replace(decision.allocation, store="second"))


def test_a_job_leaves_a_store_that_does_not_answer(platform, second, tmp_path, undisturbed):
    options = {"policy": Elsewhere(), "parameter_stores": {"second": second.url}}
    with smlt.Fleet(platform=platform, **options) as fleet:
        job = submit(fleet, tmp_path, store=None)
        os.kill(second.pid, signal.SIGSTOP)
        try:
            outcome = job.result(120)
        finally:
            os.kill(second.pid, signal.SIGCONT)
    assert outcome.value == undisturbed
    assert [a.store for a in outcome.allocations] == ["second", "default"]
    assert outcome.allocations[-1].reason == "second does not answer"


def test_a_dead_worker_is_replaced_by_survivors_who_add_up_elsewhere(
    two_stores, tmp_path, undisturbed
):
    job = submit(two_stores, tmp_path)
    jobs.kill_one(tmp_path, random.Random(0).choice)
    outcome = job.result(120)
    assert outcome.value == undisturbed
    assert len(outcome.allocations) == 1


def test_a_hand_over_is_agreed_on_in_another_store(two_stores, tmp_path):
    job = submit(two_stores, tmp_path)
    job.resize(workers=2)
    outcome = job.result(120)
    assert [(a.workers, a.store) for a in outcome.allocations] == [(3, "second"), (2, "second")]
    assert len(outcome.reports) == 4


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "mistakes"),
    [
        ({"default": "redis://h"}, ["'default' cannot be the name of a store"]),
        ({"": "redis://h"}, ["'' cannot be the name of a store"]),
        ({"x": "http://h"}, ["x: unknown kind of parameter store 'http://'"]),
        ({"x": ("redis://h", "free")}, ["x: no price for the parameter store 'free'"]),
        ({"x": 5, "y": ("redis://h",)}, ["x must be a URL, or", "y must be a URL, or"]),
    ],
)
def test_parameter_stores_that_cannot_be(platform, given, mistakes):
    with pytest.raises(InvalidInput) as error:
        smlt.Fleet(platform=platform, parameter_stores=given, budget_usd=-1)
    assert error.value.mistakes[0].startswith("budget_usd")
    for found, wanted in zip(error.value.mistakes[1:], mistakes, strict=True):
        assert wanted in found


@pytest.mark.parametrize(
    ("options", "mistake"),
    [
        ({"store": "third"}, "store='third' is none of the fleet's parameter stores: default"),
        ({"workload": "large"}, "workload must be a Workload with ModelFeatures, not 'large'"),
        (
            {"workload": replace(WORKLOAD, batch=0)},
            "workload.batch must be a whole number of at least 1, not 0",
        ),
        (
            {"workload": replace(WORKLOAD, iterations=-1)},
            "workload.iterations must be a whole number of at least 1, not -1",
        ),
        ({"min_memory_mb": 2048, "max_memory_mb": 1024}, "min_memory_mb=2048 is more than"),
        ({"profiles": -2}, "profiles must be a whole number of at least 1, not -2"),
    ],
)
def test_submissions_that_cannot_be(fleet, options, mistake):
    with pytest.raises(InvalidInput, match="seed must be") as error:
        fleet.submit(jobs.train, {}, seed=-1, **options)
    assert any(found.startswith(mistake) for found in error.value.mistakes)
    assert fleet.jobs() == []


class Pessimist(Scripted):
    """A policy that can plan: everything takes an hour and costs a dollar."""

    def plan(self, facts):
        assert facts.iterations_left <= facts.workload.iterations
        at = Interval(1.0, 1.0, 1.0)
        hour = Interval(3600.0, 3600.0, 3600.0)
        chosen = Prediction(Allocation(2, 1769), at, hour, at, 1.0)
        note = "Cheapest(deadline_s=60) cannot be reached; Cheapest(deadline_s=3700) would do"
        return Plan(chosen, (chosen,), facts.goal.deadline_s > 3600, (note,), 0, 0)

    def options(self, facts):
        return ()


def test_a_goal_out_of_reach_is_refused_before_anything_is_spent(platform):
    with smlt.Fleet(platform=platform, policy=Pessimist(), budget_usd=1.0) as fleet:
        with pytest.raises(InvalidInput, match="deadline_s=3700\\) would do"):
            fleet.submit(growing, goal=smlt.Cheapest(deadline_s=60), workload=WORKLOAD)
        assert (fleet.jobs(), fleet.ledger.entries()) == ([], [])
        for goal in (smlt.Cheapest(deadline_s=4000), smlt.Cheapest()):
            fleet.submit(growing, goal=goal, workload=WORKLOAD).stop()


def test_a_goal_out_of_reach_is_logged_once_it_is_known_what_the_job_computes(platform, caplog):
    with smlt.Fleet(platform=platform, policy=Pessimist()) as fleet:
        goal = smlt.Cheapest(deadline_s=300)
        job = fleet.submit(jobs.train, {"epochs": 30, "pause": 0.1}, goal=goal)
        eventually(lambda: "cannot be reached" in caplog.text)
        job.stop()


# --- over the life of a client --------------------------------------------------------------------


def test_decisions_and_the_workload_survive_the_client(platform, tmp_path):
    policy = Scripted()
    with smlt.Fleet(platform=platform, policy=policy, path=tmp_path) as fleet:
        job = fleet.submit(growing, name="a")
        job.result(120)
        before = job.decisions
    assert [d.occasion for d in before][:1] == ["first"]
    with smlt.Fleet.open(tmp_path, platform=platform, policy=policy) as fleet:
        (again,) = fleet.jobs()
        assert again.decisions == before
        assert again._state.workload.batch == 50
    with ProfileStore(tmp_path) as store:  # the fleet's own folder is its project
        assert store.profiles(platform.fingerprint)


# --- the policy that nobody has chosen ------------------------------------------------------------


def test_a_late_policy_is_made_once_and_only_for_those_who_leave_something_open():
    made = []

    def make():
        made.append(1)
        return Scripted()

    late = LatePolicy(make)
    profile = Profile("a", WORKLOAD, Allocation(1, 512), 5, 0.1)
    late.observe(profile)
    pinned = replace(FACTS, bounds=Bounds(1, 512))
    assert late.first(pinned).allocation == Allocation(1, 512)
    assert late.review(replace(pinned, allocation=Allocation(1, 512))) is None
    assert made == []
    assert late.first(FACTS).allocation == Allocation(2, 1769)
    assert late.first(replace(pinned, stores=("default", "second"))).allocation.workers == 1
    late.observe(profile)
    assert made == [1]


def test_what_was_observed_meanwhile_is_not_lost():
    go, seen = threading.Event(), []

    class Slow(PinnedOrDefault):
        def observe(self, profile):
            seen.append(profile.job_id)

    def make():
        go.wait(30)
        return Slow()

    late = LatePolicy(make)
    maker = threading.Thread(target=late.made)
    maker.start()
    for job_id in "abc":
        late.observe(Profile(job_id, WORKLOAD, Allocation(1, 512), 5, 0.1))
    assert seen == []
    go.set()
    maker.join()
    late.observe(Profile("d", WORKLOAD, Allocation(1, 512), 5, 0.1))
    assert seen == ["a", "b", "c", "d"]


def test_a_policy_that_cannot_be_made_is_the_default(caplog):
    def make():
        raise ImportError("libcudart")

    assert LatePolicy(make).first(FACTS).allocation == Allocation(2, 1769)
    assert "libcudart" in caplog.text


@pytest.mark.parametrize("lacking", ["scipy", "threadpoolctl"])
def test_without_the_extra_the_default_sizes_are_used_and_that_is_said(
    platform, monkeypatch, caplog, lacking
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == lacking else find(name)
    )
    with smlt.Fleet(platform=platform) as fleet:
        fleet.submit(jobs.train, {"epochs": 1}, workers=1, memory_mb=1769).result(60)
        assert lacking not in caplog.text  # nothing was to be chosen
        outcome = fleet.submit(jobs.train, {"epochs": 1}).result(60)
        fleet.submit(jobs.train, {"epochs": 1}).result(60)
    assert (outcome.allocations[0].workers, outcome.allocations[0].memory_mb) == (2, 1769)
    assert caplog.text.count("pip install 'smlt-tune[gp]'") == 1


def test_with_scipy_the_resource_manager_decides(platform, tmp_path):
    pytest.importorskip("scipy")
    with smlt.Fleet(platform=platform, project=tmp_path) as fleet:
        fleet.submit(jobs.train, {"epochs": 3, "pause": 0.1}, memory_mb=1769).result(120)
        job = fleet.submit(jobs.train, {"epochs": 1}, memory_mb=1769, max_workers=4)
        job.result(120)
    assert "sibling" in job.decisions[0].reason
    assert job.decisions[0].evidence["siblings"] >= 1


def test_a_job_tries_as_many_allocations_as_were_asked_for_and_trains_meanwhile(platform):
    pytest.importorskip("scipy")
    with smlt.Fleet(platform=platform, budget_usd=1.0) as fleet:
        job = fleet.submit(growing, memory_mb=1769, max_workers=4, profiles=2)
        outcome = job.result(120)
    tried = [d for d in job.decisions if "profile 2 of 2" in d.reason]
    assert len(tried) == 1
    assert tried[0].allocation.workers != outcome.allocations[0].workers
    assert [r.metrics["epoch"] for r in outcome.reports] == [0, 1, 2, 3, 4]


# --- rented stores --------------------------------------------------------------------------------


class FakeClock:
    now = 0.0

    def monotonic(self):
        return self.now


def test_a_store_is_rented_from_its_first_use_on_and_while_it_is_used():
    clock, ledger, stopped, users = FakeClock(), Ledger(0.5), [], ["a"]
    costs = StoreCosts(
        ledger,
        load_prices(),
        "cache.m4.large",
        clock,
        lambda: stopped.append(clock.now),
        name="fast",
        needed=lambda: bool(users),
    )
    costs.tick()
    assert ledger.entries() == []
    costs.begin()
    costs.begin()
    assert ledger.reserved_usd == pytest.approx(0.156)
    clock.now = 3601.0
    costs.tick()
    assert (ledger.settled_usd, ledger.reserved_usd) == pytest.approx((0.156, 0.156))
    users.clear()
    clock.now = 7201.0
    costs.tick()
    assert (ledger.settled_usd, ledger.reserved_usd) == pytest.approx((0.312, 0.0))
    clock.now = 9000.0
    costs.begin()  # somebody wants it again
    users.append("b")
    clock.now += 3600.0
    costs.tick()
    assert stopped == [clock.now]  # a fourth hour is more than is left
    with pytest.raises(BudgetExhausted):
        costs.begin()
    costs.end()
    assert ledger.settled_usd == pytest.approx(0.468)
