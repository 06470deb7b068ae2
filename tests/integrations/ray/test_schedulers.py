"""Schedulers and searchers stop, pause, fork and resize trials; what was trained is what counts.

SMLT_TEST_ROUNDS=10 repeats what depends on how things interleave.
"""

import os
import random
import time
from pathlib import Path

import pytest

pytest.importorskip("ray.tune")

from ray import tune
from ray.train._internal.session import _TrainingResult
from ray.tune import TuneError, schedulers
from ray.tune.schedulers import TrialScheduler
from ray.tune.schedulers.pb2 import PB2
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

import smlt_tune as smlt
from smlt_tune.integrations.ray import SmltResources, virtual_trial
from tests.conftest import eventually

pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore:Consider boosting PBT performance:UserWarning"),
]

ON_ONE = SmltResources(workers=1)
STEPS = 8
ROUNDS = int(os.environ.get("SMLT_TEST_ROUNDS", "1"))


def train(config):
    """One step of gradient descent per report; the weight says how many there were, at which lr."""
    import torch

    session = smlt.session()
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
    model, optimizer = session.prepare(model, optimizer)
    for epoch in session.epochs(STEPS):
        for (x,) in session.batches((torch.ones(2, 1),), batch_size=2):
            with Path(config["notes"]).open("a") as notes:
                notes.write(f"{epoch} {session.rank}\n")
            optimizer.zero_grad()
            (-model(x)).mean().backward()  # the weight grows by lr
            optimizer.step()
        session.report(
            epoch=epoch, score=model.weight.item() * config["sign"], weight=model.weight.item()
        )


def steps(notes):
    """Numbers of the steps that were trained, those of several workers once."""
    return sorted(
        int(line.split()[0]) for line in notes.read_text().splitlines() if line[-1] == "0"
    )


@pytest.fixture
def search(fit, tmp_path):
    """Six trials under a scheduler; gives their results and every step that was trained."""

    def search(scheduler=None, resources=ON_ONE, *, space=None, **options):
        notes = tmp_path / "notes"
        space = {"lr": tune.grid_search([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])} if space is None else space
        results = fit(
            train, resources, space={"notes": str(notes), "sign": 1, **space},
            scheduler=scheduler, **{"metric": "score", "mode": "max", **options},
        )  # fmt: skip
        assert results.num_errors == 0
        return results, steps(notes)

    return search


REPORTS = {"time_attr": "training_iteration", "perturbation_interval": 2}
MUTATIONS = {"hyperparam_mutations": {"lr": tune.uniform(0.1, 0.6)}}
SCHEDULERS = {
    "FIFO": lambda: None,
    "ASHA": lambda: schedulers.ASHAScheduler(max_t=STEPS, grace_period=2, reduction_factor=2),
    "HyperBand": lambda: schedulers.HyperBandScheduler(max_t=4, reduction_factor=2),
    "median": lambda: schedulers.MedianStoppingRule(
        "training_iteration", grace_period=2, min_samples_required=2
    ),
    "PBT": lambda: schedulers.PopulationBasedTraining(**REPORTS, **MUTATIONS),
    "PBT in step": lambda: schedulers.PopulationBasedTraining(**REPORTS, **MUTATIONS, synch=True),
    "PB2": lambda: PB2(**REPORTS, hyperparam_bounds={"lr": [0.1, 0.6]}),
}


@pytest.fixture
def slow_saves(monkeypatch):
    """Saves and reads of checkpoints take Tune's thread and the trials' a while."""
    chance = random.Random(1)

    def slowly(action):
        def act(*args):
            time.sleep(chance.uniform(0.0, 0.3))
            return action(*args)

        return act

    monkeypatch.setattr(virtual_trial, "write_checkpoint", slowly(virtual_trial.write_checkpoint))
    monkeypatch.setattr(smlt.Fleet, "read_checkpoint", slowly(smlt.Fleet.read_checkpoint))


@pytest.mark.parametrize("attempt", range(ROUNDS))
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of PB2's model
def test_no_step_is_trained_that_no_scheduler_consumes(search, fleet, slow_saves, name, attempt):
    results, trained = search(SCHEDULERS[name]())
    told = [result.metrics["training_iteration"] for result in results]
    if name in ("FIFO", "ASHA", "HyperBand", "median"):
        assert trained == sorted(step for count in told for step in range(count))
    for result in results:
        metrics = result.metrics
        assert metrics["training_iteration"] == metrics["epoch"] + 1
        assert Path(metrics["smlt/checkpoint"].removeprefix("file://")).exists()
        assert result.checkpoint is not None
    assert max(told) == (4 if name == "HyperBand" else STEPS)
    if name in ("ASHA", "median"):
        assert min(told) < STEPS
    assert fleet.object_store.list("kept/") == []


def test_an_exploited_trial_goes_on_from_the_donors_weights(search):
    scheduler = schedulers.PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=3,
        synch=True,
        quantile_fraction=0.5,
        resample_probability=1.0,
        hyperparam_mutations={"lr": [0.0]},
    )
    results, _ = search(scheduler, space={"lr": tune.grid_search([0.1, 0.5])})
    forked = [result.metrics for result in results if result.metrics["config"]["lr"] == 0.0]
    assert forked
    for metrics in forked:  # the six steps that the donor had trained, then its own of length 0
        assert metrics["weight"] == pytest.approx(6 * 0.5)
        assert (metrics["training_iteration"], metrics["epoch"]) == (STEPS, STEPS - 1)


def test_a_donor_may_have_trained_on_for_long(search):
    """A job keeps its last three checkpoints; the donor is five reports beyond what it gave."""

    class Late(schedulers.FIFOScheduler):
        given = None

        def on_trial_result(self, controller, trial, result):
            name, done = result["config/lr"], result["training_iteration"]
            if name == 0.5 and done == 2:
                self.given = controller._schedule_trial_save(trial, result=result)
            if name == 0.5 and done == STEPS - 1:
                Late.metrics = self.given.resolve().metrics
            first = name == 0.1 and done == 1
            return TrialScheduler.PAUSE if first else TrialScheduler.CONTINUE

        def choose_trial_to_run(self, controller):
            for trial in controller.get_trials():
                if trial.status == "PENDING":
                    return trial
                if trial.status == "PAUSED" and hasattr(Late, "metrics"):
                    manager = trial.run_metadata.checkpoint_manager
                    manager._latest_checkpoint_result = _TrainingResult(None, Late.metrics)
                    return trial
            return None

    results, _ = search(Late(), space={"lr": tune.grid_search([0.5, 0.1])})
    forked = results[1].metrics
    assert forked["weight"] == pytest.approx(2 * 0.5 + (STEPS - 2) * 0.1)
    assert forked["training_iteration"] == STEPS


@pytest.mark.parametrize(
    "searcher", [OptunaSearch, lambda: ConcurrencyLimiter(OptunaSearch(), max_concurrent=2)]
)
def test_searchers_hear_of_every_trial(search, searcher):
    results, trained = search(
        space={"lr": tune.uniform(0.1, 0.6)}, search_alg=searcher(), num_samples=4
    )
    assert trained == sorted([*range(STEPS)] * 4)
    assert len({result.config["lr"] for result in results}) == 4


@pytest.mark.parametrize("attempt", range(ROUNDS))
def test_resources_change_while_a_trial_runs(search, slow_saves, attempt):
    def two_from_the_fourth_on(controller, trial, result, scheduler):
        return SmltResources(workers=2) if result["training_iteration"] >= 3 else None

    scheduler = schedulers.ResourceChangingScheduler(None, two_from_the_fourth_on)
    results, trained = search(scheduler, space={"lr": 0.1})
    assert trained == [*range(STEPS)]
    assert results[0].metrics["smlt/workers"] == 2
    assert results[0].metrics["weight"] == pytest.approx(STEPS * 0.1)


def test_resources_of_the_cluster_are_refused_for_a_trial_on_a_fleet(search):
    with pytest.raises(TuneError, match=r"trial train_\w+ runs on a fleet, and its scheduler now"):
        search(schedulers.ResourceChangingScheduler(), space={"lr": 0.1})


def test_a_stopper_ends_trials_and_cached_actors_are_reused(search):
    results, trained = search(reuse_actors=True, max_concurrent_trials=2)
    assert trained == sorted([*range(STEPS)] * 6)
    assert len({result.metrics["smlt/job"] for result in results}) == 6


SEEN = {}  # what the scheduler below, which Tune pickles, shares with its test


class Pauses(schedulers.FIFOScheduler):
    """Pauses the first trial after its second report until the other one has ended."""

    first = None

    def on_trial_result(self, controller, trial, result):
        self.first = self.first or trial
        if trial is self.first:
            second = result["training_iteration"] == 2
            return TrialScheduler.PAUSE if second else TrialScheduler.CONTINUE
        if self.first.status == "PAUSED" and "asleep" not in SEEN:
            [job] = [j for j in SEEN["fleet"].jobs() if self.first.trial_id in j.job_id]
            SEEN["asleep"] = eventually(lambda: job.status == "paused")
            SEEN["reserved"] = SEEN["fleet"].ledger.job_reserved_usd(job.job_id)
        return TrialScheduler.CONTINUE

    def choose_trial_to_run(self, controller):
        trials = controller.get_trials()
        others = [trial for trial in trials if trial is not self.first]
        if self.first and self.first.status == "PAUSED" and all(t.is_finished() for t in others):
            return self.first
        return next((trial for trial in trials if trial.status == "PENDING"), None)


def test_a_paused_trial_takes_nothing_and_goes_on_where_it_was(search, fleet):
    SEEN["fleet"] = fleet
    results, trained = search(Pauses(), space={"lr": tune.grid_search([0.1, 0.2])})
    assert trained == sorted([*range(STEPS)] * 2)
    assert (SEEN["asleep"], SEEN["reserved"]) == (True, 0)
    assert [result.metrics["training_iteration"] for result in results] == [STEPS] * 2
