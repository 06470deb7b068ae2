"""The choices of a model space as a sequence of decisions, each between a few options.

| choice of the space | its decisions |
|---|---|
| one of k values | one between k options |
| any of k values | k, each yes or no |
| n of k values | n between k options, in increasing order, so that a set has one sequence only |
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nni.mutable import Categorical, CategoricalMultiple
from nni.mutable.annotation import MutableAnnotation

from smlt_tune.errors import InvalidInput


class Choice:
    """One of k values; the base of the other two.

    Attributes:
        label: What the space calls it.
        options: How many options each of its decisions has.
    """

    def __init__(self, label: str, values: Sequence[Any]) -> None:
        self.label = label
        self._values = list(values)
        self.options = [len(self._values)]

    def prior(self, decided: Sequence[int]) -> list[float]:
        """Logits of the next decision, given the earlier ones, that make all values equally likely.

        Minus infinity forbids an option.
        """
        return [0.0] * self.options[len(decided)]

    def value(self, decided: Sequence[int]) -> Any:
        """What the decisions choose, as a sample of the space holds it."""
        return self._values[decided[0]]

    def decisions(self, value: Any) -> list[int]:
        """The decisions that choose a value: the inverse of :meth:`value`."""
        return [self._values.index(value)]


class AnyOf(Choice):
    """Any of k values."""

    def __init__(self, label: str, values: Sequence[Any]) -> None:
        super().__init__(label, values)
        self.options = [2] * len(self._values)

    def value(self, decided: Sequence[int]) -> list[Any]:  # noqa: D102 - stands on the base
        return [value for value, taken in zip(self._values, decided, strict=True) if taken]

    def decisions(self, value: Any) -> list[int]:  # noqa: D102
        return [int(each in value) for each in self._values]


class SomeOf(Choice):
    """n of k values."""

    def __init__(self, label: str, values: Sequence[Any], number: int) -> None:
        super().__init__(label, values)
        self.options = [len(self._values)] * number

    def prior(self, decided: Sequence[int]) -> list[float]:  # noqa: D102
        size, first = len(self._values), decided[-1] + 1 if decided else 0
        after = len(self.options) - len(decided) - 1
        # The logarithm of how many ways there are to go on after an option.
        ways = [math.comb(size - 1 - i, after) if i >= first else 0 for i in range(size)]
        return [math.log(number) if number else -math.inf for number in ways]

    def value(self, decided: Sequence[int]) -> list[Any]:  # noqa: D102
        return [self._values[i] for i in decided]

    def decisions(self, value: Any) -> list[int]:  # noqa: D102
        return sorted(self._values.index(each) for each in value)


def choices_of(mutables: Mapping[str, Any]) -> list[Choice]:
    """The choices of a simplified model space, in its order.

    Constraints between choices are left out: who samples has to try again.

    Args:
        mutables: What ``model_space.simplify()`` gives.

    Raises:
        InvalidInput: Lists the choices that have no finite number of options; or there is none.
    """
    found: list[Choice] = []
    mistakes = []
    for label, mutable in mutables.items():
        if isinstance(mutable, Categorical):
            found.append(Choice(label, mutable.values))
        elif isinstance(mutable, CategoricalMultiple):
            values, number = mutable.values, mutable.n_chosen
            found.append(SomeOf(label, values, number) if number else AnyOf(label, values))
        elif not isinstance(mutable, MutableAnnotation):
            mistakes.append(
                f"SmltEnas cannot choose {label!r}, a {type(mutable).__name__}: give a list of "
                "values with nni.choice()"
            )
    if not found and not mistakes:
        mistakes.append("the model space has no choices: there is nothing to search")
    if mistakes:
        raise InvalidInput(mistakes)
    return found
