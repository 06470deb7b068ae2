"""Reports as metrics, and trial code as reports."""

import math

import nni
import pytest

import smlt_tune as smlt
from smlt_tune.errors import InvalidInput
from smlt_tune.integrations.nni.channel import trial_api
from smlt_tune.integrations.nni.metrics import Metric, MetricReader
from smlt_tune.integrations.nni.trial_function import TrialFunction


@pytest.mark.parametrize(
    ("reported", "metric"),
    [
        ({"nni": "intermediate", "default": 0.5}, Metric(False, 0.5)),
        ({"nni": "final", "default": 1}, Metric(True, 1)),
        ({"nni": "final", "default": 1.0, "loss": 2}, Metric(True, {"default": 1.0, "loss": 2})),
        ({"nni": "final", "default": math.nan}, None),
        ({"nni": "final", "default": math.inf}, None),
        ({"nni": "final", "default": None}, None),
        ({"nni": "final", "default": "high"}, None),
        ({"accuracy": 1.0}, None),
    ],
)
def test_reports_of_the_trial_api_are_metrics(reported, metric):
    assert MetricReader(None).read(reported, "trial") == metric


def test_reports_of_a_session_are_intermediate_and_the_last_number_is_final():
    reader = MetricReader("loss")
    told = [reader.read({"loss": loss}, "trial") for loss in (3.0, 2.0, math.nan)]
    assert told == [Metric(False, 3.0), Metric(False, 2.0), None]
    assert reader.read({"learning_rate": 0.1}, "trial") is None
    assert reader.result() == Metric(True, 2.0)
    assert MetricReader("loss").result() is None


def test_a_first_report_without_the_metric_is_an_error():
    with pytest.raises(InvalidInput, match="job 3 reports no metric 'loss'; it reports: a, b"):
        MetricReader("loss").read({"b": 1, "a": 2}, "job 3")


class Session:
    """Stands for the job's."""

    def __init__(self, workers=1, prepared=1):
        self.workers, self._prepared, self.reports = workers, prepared, []

    def report(self, **metrics):
        self.reports.append(metrics)


def test_what_nni_keeps_per_process_is_put_back_after_a_job(monkeypatch):
    session = Session()
    monkeypatch.setattr(smlt, "session", lambda: session)
    before = nni.trial._params

    def train(parameters):
        assert nni.get_current_parameter() is None  # not that of the job before
        assert nni.get_next_parameter() == parameters
        with trial_api({"inner": 1}):
            assert nni.get_next_parameter() == {"inner": 1}
        assert nni.get_current_parameter("x") == parameters["x"]
        nni.report_intermediate_result({"default": 1, "other": 2})
        nni.report_final_result(parameters["x"])
        return "done"

    for x in (1, 2):
        assert TrialFunction(train)({"x": x}) == "done"
    assert nni.trial._params is before
    assert session.reports == [
        {"nni": "intermediate", "default": 1, "other": 2}, {"nni": "final", "default": 1},
        {"nni": "intermediate", "default": 1, "other": 2}, {"nni": "final", "default": 2},
    ]  # fmt: skip
