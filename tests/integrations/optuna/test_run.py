"""run(): one trial as one job."""

import math
import re
import threading

import optuna
import pytest

from smlt_tune.errors import BudgetExhausted, FleetClosed, InvalidInput, JobError
from smlt_tune.integrations import optuna as smlt_optuna
from tests.integrations.optuna.fake_fleet import STEP_USD, FakeFleet

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture
def fleet(tmp_path):
    return FakeFleet(tmp_path / "fleet")


def train(config, job):
    for epoch in range(config.get("epochs", 3)):
        job.report(epoch=epoch, accuracy=config["x"] + epoch / 10)
    return "done"


def new_study(**options):
    return optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner(), **options)


def test_a_trial_carries_its_reports_and_what_it_took(fleet):
    study = new_study(study_name="s")
    trial = study.ask()
    outcome = smlt_optuna.run(trial, train, {"x": 0.5}, fleet=fleet, metric="accuracy", workers=3)
    study.tell(trial, outcome.metrics["accuracy"])

    frozen = study.trials[0]
    assert outcome.value == "done"
    assert frozen.intermediate_values == {0: 0.5, 1: 0.6, 2: 0.7}
    assert frozen.value == 0.7
    attrs = frozen.user_attrs
    assert attrs["smlt_cost_usd"] == pytest.approx(3.5 * STEP_USD)
    assert (attrs["smlt_workers"], attrs["smlt_memory_mb"]) == (3, 1769)
    assert attrs["smlt_seconds"] == 3.0
    assert attrs["smlt_job"].startswith("s-0-")
    assert attrs["smlt_checkpoint"] == f"ckpt/{attrs['smlt_job']}"
    assert "smlt_stopped" not in attrs


def test_the_lease_is_recorded_before_the_job_is_submitted(fleet):
    study = new_study()
    trial = study.ask()
    seen = {}
    submit = fleet.submit

    def spy(*args, **kwargs):
        seen.update(study.trials[0].user_attrs, name=kwargs["name"])
        return submit(*args, **kwargs)

    fleet.submit = spy
    smlt_optuna.run(trial, train, {"x": 0.5}, fleet=fleet, metric="accuracy")
    assert seen["smlt_job"] == seen["name"]
    assert seen["smlt_fleet"] == fleet.name


def test_any_study_name_makes_a_plain_name_of_a_job(fleet):
    study = new_study(study_name="my study/été: " + 60 * "x")
    smlt_optuna.run(study.ask(), train, {"x": 0.5}, fleet=fleet, metric="accuracy")
    assert re.fullmatch(r"my-study-t-x{29}-0-[0-9a-f]{8}", fleet.jobs()[0].job_id)


def test_a_pruned_trial_stops_its_job_at_once(fleet):
    study = optuna.create_study(
        direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=0.2)
    )
    trial = study.ask()
    running = threading.Event()

    def endless(config, job):
        job.report(accuracy=0.3)
        job.report(accuracy=0.1)
        running.set()
        job.wait(60)

    with pytest.raises(optuna.TrialPruned, match=r"pruned at report 1 with accuracy 0\.1"):
        smlt_optuna.run(trial, endless, {}, fleet=fleet, metric="accuracy")
    (job,) = fleet.jobs()
    assert (job.status, job.reason) == ("stopped", "pruned")
    assert trial.user_attrs["smlt_stopped"] == "pruned"
    assert trial.user_attrs["smlt_cost_usd"] == pytest.approx(2.5 * STEP_USD)


def test_a_reported_number_may_be_the_step(fleet):
    study = new_study()
    trial = study.ask()

    def sparse(config, job):
        for epoch in (5, 10):
            job.report(epoch=epoch, accuracy=epoch / 100)

    smlt_optuna.run(trial, sparse, {}, fleet=fleet, metric="accuracy", step="epoch")
    study.tell(trial, 1.0)
    assert study.trials[0].intermediate_values == {5: 0.05, 10: 0.1}


def test_several_jobs_of_one_trial_add_up(fleet):
    study = new_study()
    trial = study.ask()
    for x in (0.1, 0.2):
        smlt_optuna.run(trial, train, {"x": x}, fleet=fleet, metric="accuracy")
    study.tell(trial, 1.0)
    frozen = study.trials[0]
    assert list(frozen.intermediate_values) == [0, 1, 2, 3, 4, 5]
    assert frozen.user_attrs["smlt_cost_usd"] == pytest.approx(7 * STEP_USD)
    assert len(fleet.jobs()) == 2


def test_several_objectives_have_no_reports_and_no_pruning(fleet):
    study = optuna.create_study(directions=["maximize", "minimize"])
    trial = study.ask()
    outcome = smlt_optuna.run(trial, train, {"x": 0.5}, fleet=fleet, metric="accuracy")
    study.tell(trial, (outcome.metrics["accuracy"], outcome.cost_usd))
    assert study.trials[0].values == [0.7, pytest.approx(3.5 * STEP_USD)]
    assert study.trials[0].intermediate_values == {}


def test_a_fixed_trial_runs_for_debugging(fleet):
    trial = optuna.trial.FixedTrial({"x": 0.5})
    outcome = smlt_optuna.run(trial, train, {"x": 0.5}, fleet=fleet, metric="accuracy")
    assert outcome.metrics["accuracy"] == 0.7


def test_a_failed_job_raises_our_error_and_says_what_it_cost(fleet):
    study = new_study()
    trial = study.ask()

    def broken(config, job):
        job.report(accuracy=0.1)
        raise ZeroDivisionError("oops")

    with pytest.raises(JobError, match="oops"):
        smlt_optuna.run(trial, broken, {}, fleet=fleet, metric="accuracy")
    assert trial.user_attrs["smlt_cost_usd"] == pytest.approx(1.5 * STEP_USD)


def test_the_budget_prunes_a_trial_that_has_reported(tmp_path):
    fleet = FakeFleet(tmp_path / "fleet", budget_steps=2)
    trial = new_study().ask()
    with pytest.raises(optuna.TrialPruned, match="stopped after 2 reports: budget"):
        smlt_optuna.run(trial, train, {"x": 0.5}, fleet=fleet, metric="accuracy")
    assert trial.user_attrs["smlt_stopped"] == "budget"


def test_the_budget_refuses_a_trial_that_has_not(tmp_path):
    fleet = FakeFleet(tmp_path / "fleet", budget_steps=0)
    trial = new_study().ask()
    with pytest.raises(BudgetExhausted, match="does not pay"):
        smlt_optuna.run(trial, train, {"x": 0.5}, fleet=fleet, metric="accuracy")
    assert trial.user_attrs["smlt_stopped"] == "budget"


def test_a_job_stopped_from_outside_prunes_its_trial(fleet):
    trial = new_study().ask()

    def endless(config, job):
        job.report(accuracy=0.3)
        job.wait(60)

    def stop(job, report):
        if report:
            job.stop("enough")

    with pytest.raises(optuna.TrialPruned, match="stopped after 1 reports: enough"):
        smlt_optuna.run(trial, endless, {}, fleet=fleet, metric="accuracy", watch=stop)


def test_an_error_of_the_watcher_stops_the_job(fleet):
    trial = new_study().ask()

    def broken(job, report):
        raise RuntimeError("my fault")

    with pytest.raises(RuntimeError, match="my fault"):
        smlt_optuna.run(
            trial, lambda c, job: job.wait(60), {}, fleet=fleet, metric="a", watch=broken
        )
    assert fleet.jobs()[0].result(5).reason == "abandoned"


@pytest.mark.parametrize(
    ("metrics", "metric", "message"),
    [
        (
            {"accuracy": 1.0, "loss": 2.0},
            "acuracy",
            "trial 0 reports no metric 'acuracy'; it reports: accuracy, loss; did you mean "
            "'accuracy'? (the first report has to carry the metric, later ones may leave it out)",
        ),
        (
            {"accuracy": 1.0},
            "acc",
            "trial 0 reports no metric 'acc'; it reports: accuracy; did you mean 'accuracy'? "
            "(the first report has to carry the metric, later ones may leave it out)",
        ),
        (
            {"loss": 1.0},
            "bleu",
            "trial 0 reports no metric 'bleu'; it reports: loss (the first report has to carry "
            "the metric, later ones may leave it out)",
        ),
        ({"bleu": "high"}, "bleu", "trial 0 reports bleu='high': expected a number"),
    ],
)
def test_a_wrong_metric_costs_one_report(fleet, metrics, metric, message):
    trial = new_study().ask()

    def endless(config, job):
        job.report(**metrics)
        job.wait(60)

    with pytest.raises(InvalidInput) as caught:
        smlt_optuna.run(trial, endless, {}, fleet=fleet, metric=metric)
    assert str(caught.value) == message
    assert fleet.jobs()[0].result(5).status == "stopped"


def test_a_training_without_reports_is_an_error(fleet):
    trial = new_study().ask()
    with pytest.raises(InvalidInput, match="trial 0 reports no metric 'x'; it reports: nothing"):
        smlt_optuna.run(trial, lambda config, job: 3, {}, fleet=fleet, metric="x")


def test_a_nan_is_passed_on(fleet):
    study = new_study()
    trial = study.ask()
    smlt_optuna.run(trial, lambda c, job: job.report(a=float("nan")), {}, fleet=fleet, metric="a")
    study.tell(trial, 0.0)
    assert math.isnan(study.trials[0].intermediate_values[0])


def test_all_mistakes_come_in_one_error():
    with pytest.raises(InvalidInput) as caught:
        smlt_optuna.run("trial", "train", {}, fleet=3, metric="")
    assert caught.value.mistakes == (
        "trial is a str: expected the optuna.Trial that the objective was given",
        "train is a str: expected the training function",
        "fleet is a int: expected a smlt_tune.Fleet",
        "metric is '': expected the name of a reported number, such as 'accuracy'",
    )


def test_a_closed_fleet_is_refused_before_anything_is_recorded(fleet):
    fleet.closed = True
    trial = new_study().ask()
    with pytest.raises(FleetClosed):
        smlt_optuna.run(trial, train, {"x": 1}, fleet=fleet, metric="accuracy")
    assert trial.user_attrs == {}
