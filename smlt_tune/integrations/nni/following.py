"""From a candidate to its job, and back: metrics, and how it ended."""

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from nni.nas.space import ModelStatus

from smlt_tune.errors import InvalidInput, JobError, TrainingFunctionError
from smlt_tune.integrations.nni.candidate import config_of, function_of
from smlt_tune.integrations.nni.candidates import Candidate
from smlt_tune.integrations.nni.config import SmltEngineConfig
from smlt_tune.integrations.nni.metrics import LOG, Metric, MetricReader

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet
    from smlt_tune.backend.job import Job, Report

#: Takes a metric; and last, the status and why, if it did not train to its end.
Tell = Callable[[Metric | tuple[ModelStatus, str]], None]


def start(candidate: Candidate, fleet: "Fleet", config: SmltEngineConfig) -> "Job":
    """Submits a candidate's job, which goes on where an earlier one was stopped.

    Raises:
        InvalidInput: The fleet refuses it.
        FleetClosed: The fleet was closed.
    """
    return fleet.submit(
        function_of(candidate.model),
        config_of(candidate.model),
        goal=config.goal_of_trials(),
        workload=candidate.workload,
        seed=config.seed,
        start_from=candidate.start_from,
        name=candidate.job_name,
        **config.bounds(),
    )


def follow(candidate: Candidate, job: "Job", metric: str | None, tell: Tell) -> threading.Thread:
    """Has a thread wait for everything that a candidate's job reports, and for its end.

    Args:
        candidate: Whose job.
        job: It.
        metric: Name of the number that counts; None for NNI's trial API.
        tell: Called by that thread.
    """
    arguments = (candidate, job, MetricReader(metric), tell)
    thread = threading.Thread(target=_follow, args=arguments, name=f"smlt-{job.job_id}")
    thread.daemon = True  # NNI stops experiments when the program ends, after threads are joined
    thread.start()
    return thread


def _follow(candidate: Candidate, job: "Job", reader: MetricReader, tell: Tell) -> None:
    who = str(candidate)
    try:
        ended = _to_the_end(candidate, job, reader, tell)
    except JobError as error:
        if isinstance(error, TrainingFunctionError):
            LOG.warning("%s\n%s", who, error.worker_traceback)
        ended = ModelStatus.Failed, f"{type(error).__name__}: {error}"
    except InvalidInput as error:
        job.stop("its reports lack the metric")
        job.result()
        ended = ModelStatus.Failed, str(error)
    except Exception as error:  # noqa: BLE001 - it must end, or the search would wait for ever
        LOG.exception("%s could not be followed", who)
        ended = ModelStatus.Failed, f"{type(error).__name__}: {error}"
    tell(ended)


def _to_the_end(
    candidate: Candidate, job: "Job", reader: MetricReader, tell: Tell
) -> tuple[ModelStatus, str]:
    for report in _reports(candidate, job):
        metric = reader.read(report.metrics, str(candidate))
        if metric is not None:
            tell(metric)
    outcome = job.result()
    if outcome.status == "stopped":
        return ModelStatus.Interrupted, outcome.reason
    result = reader.result()
    if result is not None:
        tell(result)
    return ModelStatus.Trained, ""


def _reports(candidate: Candidate, job: "Job") -> "Iterator[Report]":
    """What earlier jobs have told until their last checkpoint, then what this one tells."""
    own = job.reports()
    first = next(own, None)
    for report in candidate.earlier_reports():
        if first is None or report.index < first.index:
            yield report
    if first is not None:
        yield first
    yield from own
