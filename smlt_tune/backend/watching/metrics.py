"""Which metric a fleet is judged by, and its best job."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from smlt_tune.backend.job import FAILED, FINISHED
from smlt_tune.backend.watching.snapshot import JobView
from smlt_tune.errors import InvalidInput

#: Parts of the names of metrics that say which way is better.
_SMALLER = ("loss", "err", "perplexity", "mse", "mae", "nll", "wer")
_LARGER = ("acc", "auc", "f1", "score", "reward", "precision", "recall", "bleu", "iou", "r2")


@dataclass(frozen=True)
class Metric:
    """What jobs are compared by.

    Attributes:
        name: As it is reported.
        maximize: Whether larger is better; None if nobody said so.
    """

    name: str
    maximize: bool | None

    @property
    def title(self) -> str:
        """Its name and which way is better."""
        which = {True: " (larger is better)", False: " (smaller is better)", None: ""}
        return self.name + which[self.maximize]


def choose(jobs: Sequence[JobView], name: str | None = None, mode: str | None = None) -> Metric:
    """The metric to compare jobs by.

    Args:
        jobs: Of the fleet.
        name: Of the metric; None for the one that most jobs report and whose name says which way is
            better, such as ``val_accuracy`` or ``loss``; larger goes first.
        mode: ``max`` or ``min``; None to tell it from the name.

    Returns:
        The metric; its name is empty if no job has reported a number.

    Raises:
        InvalidInput: The jobs have reported others; or the name does not say which way is better.
    """
    counts: Counter[str] = Counter()
    for job in jobs:
        reported = {metric for report in job.reports for metric in report.metrics}
        counts.update(metric for metric in reported if job.last(metric) is not None)
    known = sorted(counts, key=lambda metric: (-counts[metric], metric))
    if name is None:
        told = [metric for metric in known if _direction(metric) is not None]
        told.sort(key=lambda metric: (-counts[metric], not _direction(metric), metric))
        name = next(iter([*told, *known]), "")
        return Metric(name, _direction(name) if mode is None else mode == "max")
    if known and name not in counts:
        raise InvalidInput(f"no job has reported a number {name!r}; they report {', '.join(known)}")
    maximize = _direction(name) if mode is None else mode == "max"
    if maximize is None:
        raise InvalidInput(f"say with --mode min or --mode max whether a smaller {name} is better")
    return Metric(name, maximize)


def ranked(jobs: Sequence[JobView], metric: Metric) -> list[JobView]:
    """What is under way first, then what finished, best first, then the rest, failures last."""

    def place(job: JobView) -> tuple[int, float]:
        group = 0 if not job.over else 1 if job.status == FINISHED else 2
        value = job.last(metric.name)
        sign = -1.0 if metric.maximize else 1.0
        worth = math.inf if value is None or metric.maximize is None else sign * value
        return (3 if job.status == FAILED else group, worth if group else 0.0)

    return sorted(jobs, key=place)


def best(jobs: Sequence[JobView], metric: Metric) -> JobView | None:
    """The best job that ran to its end; None if nobody said which way is better."""
    finished = [j for j in jobs if j.status == FINISHED and j.last(metric.name) is not None]
    if not finished or metric.maximize is None:
        return None
    return ranked(finished, metric)[0]


def _direction(name: str) -> bool | None:
    low = name.lower()
    if any(part in low for part in _SMALLER):
        return False
    return True if any(part in low for part in _LARGER) else None
