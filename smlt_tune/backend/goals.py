"""What a user wants of a job or a fleet (user-centric deployment, SMLT section 3.2)."""

import math
from dataclasses import dataclass

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
