r"""The multiple-choice knapsack: one option in every stage, least sum, another sum limited.

| symbol | meaning |
|---|---|
| d | stages |
| o_ij, l_ij | objective and limited quantity of option j in stage i, not negative |
| s, b | width of a bin of the objective; number of a bin |
| OPT | least sum of o over all choices whose sum of l keeps the limit |

NP-hard, but not at this size. With every o rounded down to whole bins, b = floor(o / s), a dynamic
programme over sums of b keeps the least sum of l of each::

    f_i(b) = min_j f_{i-1}(b - b_ij) + l_ij

The first b with f_d(b) within the limit brackets the optimum: b s <= OPT, and the choice found
there is below (b + d) s. With s a small part of the best choice known so far, the bracket closes by
a constant factor in every pass, until it is as narrow as asked. The limit itself is never rounded.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: How far from the optimum a choice may be, relative to it.
EXACT = 0.005
#: By how much the bracket of the optimum closes in one pass, at least.
_CLOSES = 10


@dataclass(frozen=True)
class Choice:
    """One option of every stage.

    Attributes:
        options: Their indices.
        objective: Sum of o.
        least: No choice within the limit has a smaller sum of o.
    """

    options: tuple[int, ...]
    objective: float
    least: float

    @property
    def gap(self) -> float:
        """By how much the objective may be above the optimum, relative to that."""
        return self.objective / self.least - 1.0 if self.least else 0.0


def choose(
    objective: Sequence[Array],
    limited: Sequence[Array],
    limit: float = math.inf,
    known: Iterable[tuple[int, ...]] = (),
) -> Choice | None:
    """The choice with the least objective that keeps the limit.

    Args:
        objective: o of the options of each stage; d arrays of shapes (p_i,).
        limited: l, likewise.
        limit: Of the sum of l, as :func:`total` adds it.
        known: Choices than which the result shall not be worse, as far as they keep the limit.

    Returns:
        At most ``EXACT`` above the optimum; None if no choice keeps the limit.
    """
    frugal = _by_stage(limited, objective)
    if _sum_of(limited, frugal) > limit:
        return None
    free = _by_stage(objective, limited)
    least = _sum_of(objective, free)
    candidates = [each for each in (free, frugal, *known) if _sum_of(limited, each) <= limit]
    first = min(candidates, key=lambda each: _sum_of(objective, each))
    best = Choice(first, _sum_of(objective, first), least)
    while best.objective > (1.0 + EXACT) * best.least:
        best = _closer(best, objective, limited, limit)
    return best


def _by_stage(objective: Sequence[Array], other: Sequence[Array]) -> tuple[int, ...]:
    """The least objective of each stage by itself; among equals, the least of the other."""
    return tuple(int(np.lexsort((b, a))[0]) for a, b in zip(objective, other, strict=True))


def total(values: Sequence[float]) -> float:
    """Their sum, rounded as the dynamic programme rounds it: one after the other."""
    *_, last = accumulate(values, initial=0.0)
    return last


def _sum_of(arrays: Sequence[Array], options: Sequence[int]) -> float:
    return total([float(a[j]) for a, j in zip(arrays, options, strict=True)])


def _closer(
    best: Choice, objective: Sequence[Array], limited: Sequence[Array], limit: float
) -> Choice:
    """One pass of the dynamic programme over bins up to the best choice known so far."""
    bins = int(np.ceil(_CLOSES * len(objective) / EXACT))
    width = best.objective / bins
    steps = [np.floor(o / width) for o in objective]
    tables = [np.full(bins + 1, np.inf)]
    tables[0][0] = 0.0
    for step, cost in zip(steps, limited, strict=True):
        table, before = np.full(bins + 1, np.inf), tables[-1]
        for j in _undominated(step, cost, bins):
            at = int(step[j])
            np.minimum(table[at:], before[: bins + 1 - at] + cost[j], out=table[at:])
        tables.append(table)
    found = int(np.argmax(tables[-1] <= limit))  # the known choice is in some bin
    options, b = [], found
    for step, cost, before in zip(steps[::-1], limited[::-1], tables[-2::-1], strict=True):
        back = b - step
        sums = np.where(back >= 0, before[np.maximum(back, 0).astype(int)] + cost, np.inf)
        options.append(int(np.argmin(sums)))
        b -= int(step[options[-1]])
    options.reverse()
    least = max(best.least, found * width)
    reached = _sum_of(objective, options)
    if reached >= best.objective:
        return Choice(best.options, best.objective, least)
    return Choice(tuple(options), reached, least)


def _undominated(step: Array, cost: Array, bins: int) -> list[int]:
    """Options that no other one beats in bins and cost."""
    kept: list[int] = []
    for j in np.lexsort((cost, step)):
        if step[j] <= bins and (not kept or cost[j] < cost[kept[-1]]):
            kept.append(int(j))
    return kept
