"""What a user wants of a job or a fleet (user-centric deployment, SMLT section 3.2)."""

import math
from dataclasses import dataclass
from typing import TypeGuard

from smlt_tune.errors import InvalidInput


@dataclass(frozen=True)
class Cheapest:
    """Spend as little as possible.

    Attributes:
        deadline_s: Time in which the job shall end, seconds from its submission; None for no hurry.

    Raises:
        InvalidInput: The deadline is not a positive, finite number.
    """

    deadline_s: float | None = None

    def __post_init__(self) -> None:
        _require_positive("Cheapest", "deadline_s", self.deadline_s, "seconds")


@dataclass(frozen=True)
class Fastest:
    """End as early as possible.

    Attributes:
        budget_usd: What the job may cost, USD, within the budget of its fleet; None for no limit
            of its own.

    Raises:
        InvalidInput: The budget is not a positive, finite number.
    """

    budget_usd: float | None = None

    def __post_init__(self) -> None:
        _require_positive("Fastest", "budget_usd", self.budget_usd, "USD")


Goal = Cheapest | Fastest


@dataclass(frozen=True)
class Target:
    """When a job has trained long enough: once a reported metric is there.

    Meanwhile its reports, one an epoch, are continued to the target, and the job's allocation is
    chosen for the epochs that are left.

    Attributes:
        metric: A reported number.
        value: To be reached or passed.
        mode: ``"max"`` if larger is better, ``"min"`` if smaller is.
        best: No training passes this value: 1 for an accuracy, 0 for most losses. Predictions are
            clearly better for knowing it.

    Raises:
        InvalidInput: Lists everything that is wrong.
    """

    metric: str
    value: float
    mode: str = "max"
    best: float | None = None

    def __post_init__(self) -> None:
        mistakes = []
        metric: object = self.metric
        if not isinstance(metric, str) or not metric:
            mistakes.append(f"metric must be the name of a reported number, not {self.metric!r}")
        if not is_number(self.value):
            mistakes.append(f"value must be a finite number, not {self.value!r}")
        if self.mode not in ("max", "min"):
            mistakes.append(f"mode must be 'max' or 'min', not {self.mode!r}")
        if self.best is not None and not is_number(self.best):
            mistakes.append(f"best must be a finite number or None, not {self.best!r}")
        elif not mistakes and self.best is not None and not self.reaches(self.best):
            mistakes.append(f"value {self.value!r} is better than the best possible, {self.best!r}")
        if mistakes:
            raise InvalidInput([f"Target: {mistake}" for mistake in mistakes])

    def reaches(self, value: float) -> bool:
        """Whether a value of the metric is as good as the target."""
        return value >= self.value if self.mode == "max" else value <= self.value


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def goal_mistakes(goal: object) -> list[str]:
    """What is wrong with something that was given as a goal; empty if it is one."""
    if isinstance(goal, Cheapest | Fastest):
        return []
    if goal in (Cheapest, Fastest):
        return [f"goal must be made first: {getattr(goal, '__name__', goal)}()"]
    return [f"goal must be Cheapest(deadline_s=...) or Fastest(budget_usd=...), not {goal!r}"]


def _require_positive(goal: str, name: str, value: object, unit: str) -> None:
    if value is None:
        return
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not (number and isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise InvalidInput(
            f"{goal}: {name} must be a positive, finite number of {unit}, or None for no limit, "
            f"not {value!r}"
        )
