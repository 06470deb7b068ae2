"""Reports of a job as NNI's metrics."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smlt_tune.errors import InvalidInput

# Below "nni": NNI prints what is said there, and keeps it in the experiment's log.
LOG = logging.getLogger("nni.smlt_tune")

#: Under these names and values a report tells which call of NNI's trial API it stands for.
KIND, INTERMEDIATE, FINAL = "nni", "intermediate", "final"
#: What NNI calls the number that counts.
DEFAULT = "default"

Value = float | dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """One metric of a trial.

    Attributes:
        final: Whether it is the trial's result.
        value: A finite number, or a dictionary with one under ``default``.
    """

    final: bool
    value: Value


class MetricReader:
    """Translates the reports of one job, in their order.

    Args:
        name: Of the number in the reports of ``session.report``; None for a job that uses NNI's
            trial API.
    """

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._last: Value | None = None
        self._begun = False

    def read(self, metrics: Mapping[str, Any], who: str) -> Metric | None:
        """The metric in a report; None if there is none that NNI could use.

        Args:
            metrics: Of the report.
            who: Whose, for messages.

        Raises:
            InvalidInput: The first report lacks the metric.
        """
        if self._name is None:
            return self._read_nni(metrics, who)
        if self._name not in metrics:
            if self._begun:
                return None
            raise InvalidInput(
                f"{who} reports no metric {self._name!r}; it reports: "
                f"{', '.join(sorted(metrics))} (the first report has to carry the metric)"
            )
        self._begun = True
        value = _number(metrics[self._name], self._name, who)
        self._last = value if value is not None else self._last
        return None if value is None else Metric(final=False, value=value)

    def result(self) -> Metric | None:
        """The final metric of a job that has finished and never said which one that is."""
        return None if self._last is None else Metric(final=True, value=self._last)

    def _read_nni(self, metrics: Mapping[str, Any], who: str) -> Metric | None:
        if KIND not in metrics:
            return None  # something else that the function reports
        number = _number(metrics.get(DEFAULT), DEFAULT, who)
        if number is None:
            return None
        others = {name: each for name, each in metrics.items() if name not in (KIND, DEFAULT)}
        value: Value = {DEFAULT: number, **others} if others else number
        return Metric(metrics[KIND] == FINAL, value)


def _number(value: Any, name: str, who: str) -> float | None:
    """NNI's strategies and tuners compare metrics: NaN would be neither better nor worse."""
    if isinstance(value, int | float) and math.isfinite(value):
        return value
    LOG.warning("%s reports %s=%r, which is no finite number: it is dropped", who, name, value)
    return None
