"""From a candidate to its job, and back: metrics, and how it ended."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from nni.nas.space import ModelStatus

from smlt_tune.errors import InvalidInput, JobError, TrainingFunctionError
from smlt_tune.integrations.nni.candidate import config_of, function_of
from smlt_tune.integrations.nni.candidates import Candidate
from smlt_tune.integrations.nni.config import SmltEngineConfig
from smlt_tune.integrations.nni.metrics import LOG, Metric, MetricReader

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet
    from smlt_tune.backend.job import Job

#: Takes a metric; and last, the status and why, if it did not train to its end.
Tell = Callable[[Metric | tuple[ModelStatus, str]], None]


def start(candidate: Candidate, fleet: "Fleet", config: SmltEngineConfig) -> "Job":
    """Submits a candidate's job.

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
        name=candidate.name,
        **config.bounds(),
    )


def follow(job: "Job", metric: str | None, who: str, tell: Tell) -> threading.Thread:
    """Has a thread wait for everything that a job reports, and for its end.

    Args:
        job: Which.
        metric: Name of the number that counts; None for NNI's trial API.
        who: The candidate, for messages.
        tell: Called by that thread.
    """
    arguments = (job, MetricReader(metric), who, tell)
    thread = threading.Thread(target=_follow, args=arguments, name=f"smlt-{job.job_id}")
    thread.daemon = True  # NNI stops experiments when the program ends, after threads are joined
    thread.start()
    return thread


def _follow(job: "Job", reader: MetricReader, who: str, tell: Tell) -> None:
    try:
        ended = _to_the_end(job, reader, who, tell)
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


def _to_the_end(job: "Job", reader: MetricReader, who: str, tell: Tell) -> tuple[ModelStatus, str]:
    for report in job.reports():
        metric = reader.read(report.metrics, who)
        if metric is not None:
            tell(metric)
    outcome = job.result()
    if outcome.status == "stopped":
        return ModelStatus.Interrupted, outcome.reason
    result = reader.result()
    if result is not None:
        tell(result)
    return ModelStatus.Trained, ""
