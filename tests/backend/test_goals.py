import math
import re

import pytest

import smlt_tune as smlt
from smlt_tune.backend.goals import Cheapest, Fastest, goal_mistakes
from smlt_tune.errors import InvalidInput

BAD = [0, -1, math.inf, math.nan, "8h", True, [1]]


@pytest.mark.parametrize("value", BAD)
def test_a_deadline_is_a_positive_number_of_seconds(value):
    message = (
        "Cheapest: deadline_s must be a positive, finite number of seconds, or None for no limit, "
        f"not {value!r}"
    )
    with pytest.raises(InvalidInput, match=f"^{re.escape(message)}$"):
        Cheapest(deadline_s=value)


@pytest.mark.parametrize("value", BAD)
def test_a_budget_is_a_positive_number_of_dollars(value):
    message = (
        "Fastest: budget_usd must be a positive, finite number of USD, or None for no limit, "
        f"not {value!r}"
    )
    with pytest.raises(InvalidInput, match=f"^{re.escape(message)}$"):
        Fastest(budget_usd=value)


def test_goals_are_values():
    assert Cheapest() == Cheapest(None)
    assert Cheapest(60) == Cheapest(60.0)
    assert Fastest(0.01) != Fastest()
    assert len({Cheapest(), Cheapest(), Fastest()}) == 2
    assert (smlt.Cheapest, smlt.Fastest) == (Cheapest, Fastest)


@pytest.mark.parametrize(
    ("goal", "mistakes"),
    [
        (Cheapest(), []),
        (Fastest(3), []),
        (Cheapest, ["goal must be made first: Cheapest()"]),
        ("fast", ["goal must be Cheapest(deadline_s=...) or Fastest(budget_usd=...), not 'fast'"]),
        (None, ["goal must be Cheapest(deadline_s=...) or Fastest(budget_usd=...), not None"]),
    ],
)
def test_what_is_no_goal_is_told(goal, mistakes):
    assert goal_mistakes(goal) == mistakes
