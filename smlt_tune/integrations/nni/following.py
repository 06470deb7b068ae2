"""From a job to its candidate: metrics, and how it ended."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from nni.nas.space import ModelStatus

from smlt_tune.errors import InvalidInput, JobError, TrainingFunctionError
from smlt_tune.integrations.nni.metrics import LOG, Metric, MetricReader

if TYPE_CHECKING:
    from smlt_tune.backend.job import Job

Tell = Callable[[Metric | tuple[ModelStatus, str]], None]


def follow(job: "Job", metric: str | None, who: str, tell: Tell) -> None:
    """Waits for everything that a job reports, and for its end.

    Args:
        job: Which.
        metric: Name of the number that counts; None for NNI's trial API.
        who: The candidate, for messages.
        tell: Takes every metric, and last the status and why, if it did not train to its end.
    """
    reader = MetricReader(metric)
    try:
        tell(_outcome(job, reader, who, tell))
    except JobError as error:
        if isinstance(error, TrainingFunctionError):
            LOG.warning("%s\n%s", who, error.worker_traceback)
        tell((ModelStatus.Failed, f"{type(error).__name__}: {error}"))
    except InvalidInput as error:
        job.stop("its reports lack the metric")
        job.result()
        tell((ModelStatus.Failed, str(error)))
    except Exception as error:  # noqa: BLE001 - the candidate must end, or the search would wait for ever
        LOG.exception("%s could not be followed", who)
        tell((ModelStatus.Failed, f"{type(error).__name__}: {error}"))


def _outcome(job: "Job", reader: MetricReader, who: str, tell: Tell) -> tuple[ModelStatus, str]:
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
