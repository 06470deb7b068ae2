"""optimize(): a whole study on a fleet."""

import signal
import threading
import time

import optuna
import pytest
from optuna.trial import TrialState

from smlt_tune.errors import BudgetExhausted, FleetClosed, InvalidInput, JobError
from smlt_tune.integrations import optuna as smlt_optuna
from smlt_tune.integrations.optuna.adoption import claim, release
from tests.integrations.optuna.fake_fleet import FakeFleet

optuna.logging.set_verbosity(optuna.logging.CRITICAL)


@pytest.fixture
def fleet(tmp_path):
    return FakeFleet(tmp_path / "fleet")


@pytest.fixture(params=["memory", "sqlite", "journal"])
def storage(request, tmp_path):
    if request.param == "memory":
        return optuna.storages.InMemoryStorage()
    if request.param == "sqlite":
        return optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/study.db")
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log"))
    return optuna.storages.JournalStorage(backend)


def train(config, job):
    for epoch in range(3):
        job.report(accuracy=config["x"] * (epoch + 1))


def endless(config, job):
    job.report(accuracy=config["x"])
    job.wait(60)


def objective_of(fleet, train=train):
    def objective(trial):
        config = {"x": trial.suggest_float("x", 0, 1)}
        outcome = smlt_optuna.run(trial, train, config, fleet=fleet, metric="accuracy")
        return outcome.metrics["accuracy"]

    return objective


def states(study):
    return [trial.state for trial in study.trials]


def new_study(**options):
    options.setdefault("direction", "maximize")
    return optuna.create_study(
        sampler=optuna.samplers.RandomSampler(seed=1), pruner=optuna.pruners.NopPruner(), **options
    )


def test_trials_run_in_parallel_and_finish_in_every_storage(fleet, storage):
    study = new_study(storage=storage)
    seen = []
    smlt_optuna.optimize(
        study, objective_of(fleet), n_trials=6, fleet=fleet, max_parallel=3,
        callbacks=[lambda study, trial: seen.append(trial.number)],
    )  # fmt: skip
    assert states(study) == [TrialState.COMPLETE] * 6
    assert sorted(seen) == list(range(6))
    assert len(fleet.jobs()) == 6
    assert study.best_value == pytest.approx(3 * study.best_params["x"])


def test_sampler_and_pruner_are_untouched(fleet):
    study = new_study()
    sampler, pruner = study.sampler, study.pruner
    smlt_optuna.optimize(study, objective_of(fleet), n_trials=1, fleet=fleet)
    assert study.sampler is sampler
    assert study.pruner is pruner
    assert "ask" not in vars(study)


def test_failed_jobs_fail_their_trial_only_if_caught(fleet):
    def broken(config, job):
        raise ZeroDivisionError

    study = new_study()
    smlt_optuna.optimize(
        study, objective_of(fleet, broken), n_trials=3, fleet=fleet, catch=JobError
    )
    assert states(study) == [TrialState.FAIL] * 3
    with pytest.raises(JobError):
        smlt_optuna.optimize(study, objective_of(fleet, broken), n_trials=9, fleet=fleet)


def test_the_study_ends_cleanly_when_the_budget_is_spent(tmp_path):
    fleet = FakeFleet(tmp_path / "fleet", budget_steps=8)
    study = new_study()
    smlt_optuna.optimize(study, objective_of(fleet), n_trials=50, fleet=fleet, max_parallel=1)
    assert states(study)[:3] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]
    assert study.trials[2].user_attrs["smlt_stopped"] == "budget"
    assert len(study.trials) <= 4


def test_the_deadline_of_the_fleet_ends_the_study(fleet):
    def until_the_deadline(config, job):
        job.report(accuracy=config["x"])
        job.stop("deadline")
        job.wait(60)

    study = new_study()
    smlt_optuna.optimize(study, objective_of(fleet, until_the_deadline), fleet=fleet)
    assert set(states(study)) == {TrialState.PRUNED}
    assert {trial.user_attrs["smlt_stopped"] for trial in study.trials} == {"deadline"}
    assert len(study.trials) <= 16


def test_a_budget_that_pays_for_nothing_is_an_error(tmp_path):
    fleet = FakeFleet(tmp_path / "fleet", budget_steps=0)
    with pytest.raises(BudgetExhausted, match="does not pay for a step"):
        smlt_optuna.optimize(new_study(), objective_of(fleet), n_trials=5, fleet=fleet)


def test_the_timeout_stops_running_jobs(fleet):
    study = new_study()
    smlt_optuna.optimize(study, objective_of(fleet, endless), fleet=fleet, timeout=0.5)
    assert set(states(study)) == {TrialState.PRUNED}
    assert {job.reason for job in fleet.jobs()} == {"timeout"}


def test_ctrl_c_stops_everything_at_once(fleet):
    study = new_study()
    main = threading.main_thread().ident

    def interrupt():
        while sum(len(job.seen) for job in fleet.jobs()) < 4:
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        smlt_optuna.optimize(
            study, objective_of(fleet, endless), n_trials=100, fleet=fleet, max_parallel=4
        )
    assert states(study) == [TrialState.FAIL] * 4
    assert {job.status for job in fleet.jobs()} == {"stopped"}
    assert {trial.user_attrs["smlt_stopped"] for trial in study.trials} == {"interrupted"}


def test_plain_study_optimize_works(fleet):
    study = new_study()
    study.optimize(objective_of(fleet), n_trials=4, n_jobs=2)
    assert states(study) == [TrialState.COMPLETE] * 4


def test_study_stop_works_in_a_callback_while_trials_are_adopted(fleet):
    study = new_study()
    leave_behind(study, fleet)
    smlt_optuna.optimize(
        study, objective_of(fleet), n_trials=50, fleet=fleet, max_parallel=1,
        callbacks=[lambda inner, trial: study._thread_local and inner.stop()],
    )  # fmt: skip
    assert states(study) == [TrialState.COMPLETE]


def leave_behind(study, fleet, x=0.25, submit=True):
    """What a driver leaves that dies while a trial runs."""
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    name, _ = claim(trial, fleet)
    if submit:
        job = fleet.submit(train, {"x": x}, name=name)
        job.result(5)
        trial.report(job.seen[0].metrics["accuracy"], 0)
    release(name)  # the process that followed it is gone
    return name


def test_trials_of_a_dead_driver_are_completed_and_none_runs_twice(fleet, storage):
    study = new_study(storage=storage, study_name="crashed")
    names = [leave_behind(study, fleet), leave_behind(study, fleet, submit=False)]

    study = optuna.load_study(study_name="crashed", storage=storage)
    smlt_optuna.optimize(study, objective_of(fleet), n_trials=4, fleet=fleet, max_parallel=2)
    assert states(study) == [TrialState.COMPLETE] * 4
    assert [trial.user_attrs["smlt_job"] for trial in study.trials[:2]] == names
    assert study.trials[0].value == 0.75  # of the job that was there, not of a new one
    assert list(study.trials[0].intermediate_values) == [0, 1, 2]
    assert len(fleet.jobs()) == 4


def test_jobs_whose_trial_was_given_up_by_others_are_stopped(fleet):
    study = new_study()
    trial = study.ask()
    name, _ = claim(trial, fleet)
    job = fleet.submit(endless, {"x": 1}, name=name)
    release(name)
    study.tell(trial, state=TrialState.FAIL)
    smlt_optuna.optimize(study, objective_of(fleet), n_trials=1, fleet=fleet)
    assert job.result(5).reason == "its trial is over"


def test_trials_of_another_fleet_are_left_alone(fleet, tmp_path, storage):
    study = new_study(storage=storage)
    leave_behind(study, FakeFleet(tmp_path / "other"))
    smlt_optuna.optimize(study, objective_of(fleet), n_trials=2, fleet=fleet)
    assert states(study) == [TrialState.RUNNING, TrialState.COMPLETE, TrialState.COMPLETE]


def test_two_drivers_of_one_fleet_in_one_process_share_no_trial(fleet):
    storage = optuna.storages.InMemoryStorage()
    new_study(storage=storage, study_name="s")
    gate = threading.Barrier(3, timeout=10)

    def slow(config, job):
        job.report(accuracy=0.1)
        gate.wait()

    def drive():
        study = optuna.load_study(study_name="s", storage=storage)
        smlt_optuna.optimize(study, objective_of(fleet, slow), n_trials=1, fleet=fleet)

    first = threading.Thread(target=drive)
    first.start()
    while not any(job.seen for job in fleet.jobs()):
        time.sleep(0.01)
    second = threading.Thread(target=drive)
    second.start()
    gate.wait()
    first.join()
    second.join()
    study = optuna.load_study(study_name="s", storage=storage)
    assert states(study) == [TrialState.COMPLETE] * 2
    assert len(fleet.jobs()) == 2


@pytest.mark.filterwarnings("ignore")  # heartbeats are experimental
def test_adoption_comes_before_stale_trials_are_failed(fleet, tmp_path):
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{tmp_path}/study.db", heartbeat_interval=1, grace_period=2
    )
    study = new_study(storage=storage)
    leave_behind(study, fleet)
    storage.record_heartbeat(study.trials[0]._trial_id)
    time.sleep(3)
    smlt_optuna.optimize(study, objective_of(fleet), n_trials=2, fleet=fleet, max_parallel=1)
    assert states(study) == [TrialState.COMPLETE] * 2


def test_accuracy_against_cost_under_a_budget_constraint(fleet):
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=optuna.samplers.TPESampler(seed=3)
    )

    def epochs(config, job):
        for _ in range(config["epochs"]):
            job.report(accuracy=config["epochs"] / 10)

    def objective(trial):
        config = {"epochs": trial.suggest_int("epochs", 1, 9)}
        outcome = smlt_optuna.run(trial, epochs, config, fleet=fleet, metric="accuracy")
        trial.set_constraint("cost", outcome.cost_usd - 0.005)
        return outcome.metrics["accuracy"], outcome.cost_usd

    smlt_optuna.optimize(study, objective, n_trials=20, fleet=fleet, max_parallel=2)
    assert all(trial.values[1] <= 0.005 for trial in study.best_trials)
    assert any(trial.values[1] > 0.005 for trial in study.trials)


def test_hyperband_works_with_adopted_trials(fleet):
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.HyperbandPruner())
    leave_behind(study, fleet)
    smlt_optuna.optimize(study, objective_of(fleet), n_trials=4, fleet=fleet)
    assert TrialState.RUNNING not in states(study)


def test_many_parallel_trials_on_sqlite_are_warned_of(fleet, tmp_path):
    study = new_study(storage=f"sqlite:///{tmp_path}/study.db")
    with pytest.warns(UserWarning, match="SQLite with 17 parallel trials is slow"):
        smlt_optuna.optimize(study, objective_of(fleet), n_trials=2, fleet=fleet, max_parallel=17)


BAD = [
    ({"study": "s"}, "study is a str: expected an optuna.Study"),
    ({"objective": None}, "objective is None: expected a function of the trial"),
    ({"fleet": "local"}, "fleet is a str: expected a smlt_tune.Fleet"),
    ({"fleet": FakeFleet}, "fleet is a type: expected a smlt_tune.Fleet"),
    ({"n_trials": 0}, "n_trials is 0: expected at least 1, or None for no limit"),
    ({"n_trials": True}, "n_trials is True: expected at least 1, or None for no limit"),
    ({"n_trials": 1.5}, "n_trials is 1.5: expected at least 1, or None for no limit"),
    ({"max_parallel": 0}, "max_parallel is 0: expected at least 1"),
    ({"max_parallel": -1}, "max_parallel is -1: expected at least 1"),
    ({"timeout": -1}, "timeout is -1: expected seconds above 0, or None for no limit"),
    ({"catch": (3,)}, "catch is (3,): expected classes of exceptions"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[str(wrong) for wrong, _ in BAD])
def test_bad_input(fleet, wrong, message):
    good = {"study": new_study(), "objective": objective_of(fleet), "fleet": fleet}
    with pytest.raises(InvalidInput) as caught:
        smlt_optuna.optimize(**(good | wrong))
    assert caught.value.mistakes == (message,)


def test_all_mistakes_come_in_one_error():
    with pytest.raises(InvalidInput) as caught:
        smlt_optuna.optimize(1, 2, fleet=3, n_trials=-1, max_parallel=0, timeout="x", catch=1)
    assert len(caught.value.mistakes) == 7


def test_a_closed_fleet_is_refused(fleet):
    fleet.closed = True
    study = new_study()
    with pytest.raises(FleetClosed):
        smlt_optuna.optimize(study, objective_of(fleet), n_trials=1, fleet=fleet)
    assert study.trials == []
