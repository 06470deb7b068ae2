"""Studies on the real fleet, on the local platform."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import optuna
import pytest
from optuna.trial import TrialState

import smlt_tune as smlt
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.errors import BudgetExhausted, TrainingFunctionError
from smlt_tune.integrations import optuna as smlt_optuna
from tests import bills

optuna.logging.set_verbosity(optuna.logging.CRITICAL)

DRIVER = """\
import sys, time
import optuna
import smlt_tune as smlt
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.integrations import optuna as smlt_optuna

def train(config):
    session = smlt.session()
    for epoch in session.epochs(8):
        time.sleep(0.25)
        session.report(epoch=epoch, accuracy=config["x"] * (epoch + 1))

def storage(path):
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path))

def drive(fleet, folder, n_trials):
    study = optuna.create_study(
        study_name="crash", storage=storage(folder + "/study.log"), load_if_exists=True,
        direction="maximize", pruner=optuna.pruners.NopPruner(),
    )
    def objective(trial):
        config = {"x": trial.suggest_float("x", 0, 1)}
        outcome = smlt_optuna.run(
            trial, train, config, fleet=fleet, metric="accuracy", workers=1, memory_mb=1769
        )
        return outcome.metrics["accuracy"]
    smlt_optuna.optimize(study, objective, n_trials=n_trials, fleet=fleet, max_parallel=3)
    return study

if __name__ == "__main__":
    folder = sys.argv[1]
    with smlt.Fleet(path=folder + "/fleet", platform=LocalPlatform(concurrency=3)) as fleet:
        drive(fleet, folder, 6)
"""


@pytest.fixture(scope="module")
def fleet():
    with smlt.Fleet(platform=LocalPlatform(concurrency=3)) as fleet:
        yield fleet


def train(config):
    import smlt_tune as smlt

    session = smlt.session()
    for epoch in session.epochs(config["epochs"]):
        session.report(epoch=epoch, accuracy=session.mean(config["x"] * (epoch + 1)))
        if config["x"] < 0:
            raise ValueError("x is negative")


def new_study(**options):
    options.setdefault("direction", "maximize")
    options.setdefault("pruner", optuna.pruners.NopPruner())
    return optuna.create_study(**options)


def run(trial, fleet, **config):
    return smlt_optuna.run(
        trial, train, {"epochs": 3} | config, fleet=fleet, metric="accuracy", workers=1,
        memory_mb=1769,
    )  # fmt: skip


def test_trials_cost_what_the_fleet_settles(fleet):
    before = fleet.settled_usd

    def objective(trial):
        return run(trial, fleet, x=trial.suggest_float("x", 0, 1)).metrics["accuracy"]

    study = new_study()
    smlt_optuna.optimize(study, objective, n_trials=4, fleet=fleet, max_parallel=2)
    for trial in study.trials:
        assert trial.state == TrialState.COMPLETE
        assert list(trial.intermediate_values) == [0, 1, 2]
        assert (trial.user_attrs["smlt_workers"], trial.user_attrs["smlt_memory_mb"]) == (1, 1769)
        assert trial.user_attrs["smlt_seconds"] > 0
    costs = [trial.user_attrs["smlt_cost_usd"] for trial in study.trials]
    assert min(costs) > 0
    assert sum(costs) <= fleet.settled_usd - before + 1e-9


def test_pruning_ends_the_job_and_frees_its_reservation(fleet):
    study = new_study(pruner=optuna.pruners.ThresholdPruner(upper=1.0))

    def objective(trial):
        return run(trial, fleet, x=0.4, epochs=100_000).metrics["accuracy"]

    smlt_optuna.optimize(study, objective, n_trials=1, fleet=fleet)
    (trial,) = study.trials
    assert trial.state == TrialState.PRUNED
    assert list(trial.intermediate_values) == [0, 1, 2]
    assert trial.user_attrs["smlt_cost_usd"] > 0
    assert fleet.reserved_usd == 0


def test_the_user_sees_the_error_of_the_training_function(fleet):
    study = new_study()
    trial = study.ask()
    with pytest.raises(TrainingFunctionError, match="x is negative"):
        run(trial, fleet, x=-1.0)
    assert trial.user_attrs["smlt_cost_usd"] > 0


def test_a_budget_below_one_function_is_refused():
    with smlt.Fleet(platform=LocalPlatform(concurrency=1), budget_usd=1e-9) as fleet:
        study = new_study()
        with pytest.raises(BudgetExhausted):
            smlt_optuna.optimize(
                study, lambda t: run(t, fleet, x=1.0).value, n_trials=2, fleet=fleet
            )
        assert fleet.settled_usd == 0


def test_a_killed_driver_is_continued_and_nothing_runs_twice(tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    sys.path.insert(0, str(tmp_path))
    try:
        import driver
    finally:
        sys.path.remove(str(tmp_path))
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=env)
    try:
        deadline = time.monotonic() + 60
        while count_reports(driver, tmp_path) < 6:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = optuna.load_study(study_name="crash", storage=driver.storage(f"{tmp_path}/study.log"))
    assert any(trial.state == TrialState.RUNNING for trial in left.trials)
    jobs = {trial.number: trial.user_attrs.get("smlt_job") for trial in left.trials}

    with smlt.Fleet.open(tmp_path / "fleet", platform=LocalPlatform(concurrency=3)) as fleet:
        study = driver.drive(fleet, str(tmp_path), n_trials=2)
        assert all(trial.state == TrialState.COMPLETE for trial in study.trials)
        for trial in study.trials[: len(jobs)]:
            assert trial.user_attrs["smlt_job"] == jobs[trial.number]
        for trial in study.trials:
            assert list(trial.intermediate_values) == list(range(8))
            x = trial.params["x"]
            assert list(trial.intermediate_values.values()) == [x * (n + 1) for n in range(8)]
        assert len(fleet.jobs()) == len(study.trials)
    assert bills.paid(fleet.path) == bills.charged(fleet.path)


def count_reports(driver, folder):
    try:
        study = optuna.load_study(study_name="crash", storage=driver.storage(f"{folder}/study.log"))
    except KeyError:
        return 0
    return sum(len(trial.intermediate_values) for trial in study.trials)
