"""Other ways to allocate functions to the stages of successive halving, on the same options.

* :func:`static`: one allocation for all stages, the best there is (LambdaML).
* :func:`printed`, :func:`repaired`: CE-scaling's Algorithm 1, which starts there.
* :func:`fixed_shares`: a fixed number of functions, of one size and with one store, divided among
  the trials of each stage, as Ray or a cluster do it. Number, size and store are the best there
  are, and only functions that run are billed.
* :func:`shrinking`: RubberBand's idea. From each such plan, and from those with as many workers for
  every trial, functions are taken away from the stage where that saves most money for the time it
  takes; a later stage never has more than an earlier one.
* :func:`integer_program`: the optimum, by scipy's MILP.
"""

from dataclasses import dataclass

import numpy as np

#: Algorithm 1 ends when a round gains less than this share of the objective.
DELTA = 1e-3


@dataclass(frozen=True)
class Sweep:
    """Stages and what each of them would take with each option.

    Attributes:
        trials: Of each stage, shape (d,).
        options: The same for all stages, p of them.
        functions: That may run at once.
        between_s: Between two stages, seconds.
    """

    trials: np.ndarray
    options: list
    functions: float
    between_s: float

    def __post_init__(self):
        workers = np.array([one.allocation.workers for one in self.options])
        once = np.array([one.time_s for one in self.options])
        usd = np.array([one.cost_usd for one in self.options])
        with np.errstate(divide="ignore"):
            waves = np.ceil(self.trials[:, None] / (self.functions // workers))
        object.__setattr__(self, "workers", workers)
        object.__setattr__(self, "time_s", waves * once + self.between_s)
        object.__setattr__(self, "cost_usd", self.trials[:, None] * usd)

    def totals(self, plan):
        """Seconds and USD of one option per stage."""
        return _of(self.time_s, plan), _of(self.cost_usd, plan)

    def tables(self, goal):
        """What is minimised and what is limited, (d, p) each."""
        pair = self.time_s, self.cost_usd
        return pair if goal == "budget" else pair[::-1]


def _of(table, plan):
    return float(table[np.arange(len(table)), plan].sum())


def static(sweep, goal, limit):
    """A plan, or None if none keeps the limit."""
    minimised, limited = (table.sum(axis=0) for table in sweep.tables(goal))
    if limited.min() > limit:
        return None
    return [int(np.argmin(np.where(limited <= limit, minimised, np.inf)))] * len(sweep.trials)


def integer_program(sweep, goal, limit):
    """The optimum to 1e-6, or None."""
    from scipy.optimize import LinearConstraint, milp
    from scipy.sparse import block_diag

    minimised, limited = sweep.tables(goal)
    kept = [_undominated(o, c) for o, c in zip(minimised, limited, strict=True)]
    o, c = (
        np.concatenate([row[k] for row, k in zip(table, kept, strict=True)])
        for table in (minimised, limited)
    )
    solved = milp(
        o / o.max(),
        integrality=1,
        bounds=(0, 1),
        constraints=[
            LinearConstraint(block_diag([np.ones((1, len(k))) for k in kept]), 1, 1),
            LinearConstraint(c[None] / limit, ub=1),
        ],
        options={"mip_rel_gap": 1e-6, "time_limit": 60},
    )
    return solved.fun * o.max() if solved.status == 0 else None


# --- CE-scaling -------------------------------------------------------------------------------


def printed(sweep, goal, limit):
    """Algorithm 1 as printed.

    Three things in it cannot be meant: eq. 10 ranks recycling moves backwards (first what loses
    most time per dollar), lines 21 to 24 accept a plan that exceeds the limit, and eq. 7 has all
    trials of a stage run at once.
    """
    seen = Sweep(sweep.trials, sweep.options, 1e12, sweep.between_s)
    return _algorithm_1(seen, goal, limit, literal=True)


def repaired(sweep, goal, limit):
    """Algorithm 1 with these errors corrected."""
    return _algorithm_1(sweep, goal, limit, literal=False)


def _algorithm_1(sweep, goal, limit, *, literal):
    start = static(sweep, goal, limit)
    if start is None:
        return None
    minimised, limited = sweep.tables(goal)
    kept = [_undominated(o, c) for o, c in zip(minimised, limited, strict=True)]
    most = max(map(len, kept))
    kept = np.array([[*row, *row[-1:] * (most - len(row))] for row in kept])
    stages = np.arange(len(kept))[:, None]
    minimised, limited = minimised[stages, kept], limited[stages, kept]
    # The last one that exceeds the static allocation in nothing.
    at = (limited <= sweep.tables(goal)[1][stages, np.array(start)[:, None]]).sum(axis=1) - 1
    plan = _climb(minimised, limited, limit, at, literal)
    return [int(j) for j in kept[stages[:, 0], plan]]


def _undominated(o, c):
    """Options that no other beats in both, by ascending c."""
    found = []
    for j in np.lexsort((o, c)):
        if np.isfinite(o[j]) and (not found or o[j] < o[found[-1]]):
            found.append(int(j))
    return found


def _climb(minimised, limited, limit, start, literal):
    """Algorithm 1 over options by ascending c; the numbers are its lines."""
    plan, least = start, _of(limited, start)
    while True:  # 2
        tried = _step(minimised, limited, plan, -1, literal)  # 3-5
        if tried is None:
            break
        while _of(limited, tried) <= least:  # 6
            step = _step(minimised, limited, tried, 1, literal)  # 7-8
            if step is None or (not literal and _of(limited, step) > least):
                break
            tried = step
        if _of(minimised, plan) - _of(minimised, tried) < DELTA * _of(minimised, plan):  # 10
            break
        plan = tried  # 13
    excluded = set()
    while True:  # 15
        step = _step(minimised, limited, plan, 1, literal, excluded)  # 16-17
        if step is None:
            break
        if _of(limited, step) > limit:  # 21
            excluded.add(tuple(step))
            if not literal:
                continue
        if _of(minimised, plan) - _of(minimised, step) < DELTA * _of(minimised, plan):  # 18
            break
        plan = step  # 24
    return plan


def _step(minimised, limited, plan, direction, literal, excluded=frozenset()):
    """The neighbour of a plan with the largest marginal benefit (eq. 10); None if there is none."""
    stages = np.arange(len(plan))
    at = np.clip(plan + direction, 0, minimised.shape[1] - 1)
    gained = minimised[stages, plan] - minimised[stages, at]
    paid = limited[stages, at] - limited[stages, plan]
    possible = paid != 0
    benefit = np.divide(gained, paid, out=np.zeros(len(plan)), where=possible)
    if direction < 0 and not literal:
        benefit = -benefit  # lost per unit saved: as little as possible
    for i in np.argsort(-benefit, kind="stable"):
        step = np.where(stages == i, at, plan)
        if possible[i] and tuple(step) not in excluded:
            return step
    return None


# --- clusters ---------------------------------------------------------------------------------


def fixed_shares(sweep):
    """Seconds and USD of all such plans, shape (2, ...)."""
    return np.array([shares.totals() for shares in _all_shares(sweep)]).T


def shrinking(sweep):
    """Seconds and USD of all plans on the way, shape (2, ...)."""
    starts = [*_all_shares(sweep), *_as_many_for_all(sweep)]
    return np.array([each for shares in starts for each in shares.shrunk()]).T


def _all_shares(sweep):
    """For each number of functions, size and store."""
    for size in _sizes(sweep):
        for functions in np.unique(np.geomspace(1, _most(sweep), 24).round()):
            if functions >= sweep.workers[size[0]]:
                yield _Shares(sweep, size, functions)


def _as_many_for_all(sweep):
    """As many workers for each trial of all stages: a cluster that shrinks with the trials."""
    for size in _sizes(sweep):
        for k, j in enumerate(size):
            if sweep.workers[j] <= sweep.functions:
                yield _Shares(sweep, size, _most(sweep), k)


def _most(sweep):
    return min(sweep.functions, sweep.trials.max() * sweep.workers.max())


def _sizes(sweep):
    """Indices of the options with each size and store, by ascending workers."""
    found = {}
    for j in np.argsort(sweep.workers, kind="stable"):
        place = sweep.options[j].allocation
        found.setdefault((place.memory_mb, place.store if place.workers > 1 else ""), []).append(j)
    return [
        [*found.get((memory_mb, ""), []), *several]
        for (memory_mb, store), several in found.items()
        if store
    ]


class _Shares:
    """A number of functions that the trials of each stage divide among themselves.

    Args:
        sweep: Of which.
        size: Indices of options that differ in their workers only, ascending.
        functions: How many.
        k: The option of all stages; None for as many workers as there are for each trial.
    """

    def __init__(self, sweep, size, functions, k=None):
        size = np.array(size)
        self.workers = sweep.workers[size]
        waves = np.ceil(sweep.trials[:, None] / (functions // self.workers).clip(min=1))
        once = np.array([sweep.options[j].time_s for j in size])
        self.time_s = waves * once + sweep.between_s
        self.cost_usd = sweep.cost_usd[:, size]
        self.used = np.minimum(functions, sweep.trials[:, None] * self.workers)
        share = np.maximum(functions // sweep.trials, self.workers[0])
        most = np.searchsorted(self.workers, share, side="right") - 1
        self.plan = most if k is None else np.full(len(share), k)

    def totals(self):
        return _of(self.time_s, self.plan), _of(self.cost_usd, self.plan)

    def shrunk(self):
        """Seconds and USD of the plans from the fixed one to the smallest."""
        yield self.totals()
        stages = np.arange(len(self.plan))
        while True:
            at = np.maximum(self.plan - 1, 0)
            lost = self.time_s[stages, at] - self.time_s[stages, self.plan]
            saved = self.cost_usd[stages, self.plan] - self.cost_usd[stages, at]
            # Those of the next stage must not be more than what is left here.
            later = np.append(self.used[stages, self.plan][1:], 0)
            possible = (self.plan > 0) & (self.used[stages, at] >= later) & (saved > 0)
            if not possible.any():
                return
            worth = np.where(possible, saved / np.maximum(lost, 1e-9), -np.inf)
            self.plan = np.where(stages == np.argmax(worth), at, self.plan)
            yield self.totals()
