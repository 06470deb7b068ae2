r"""What the trials of an asynchronous search (ASHA, Hyperband) run on, under one budget.

Trials come to a rung one by one, and the best go on at once: there are no stages to plan. What
money buys here is time on the way of the trial that wins in the end, and nobody knows yet which one
that is. So a trial's time counts as much as its chance of being that one.

| symbol | meaning |
|---|---|
| f, K | one in f goes on at each of K rungs; segment k ends at rung k = 0, ..., K - 1 |
| t_k(j), c_k(j) | time and cost of segment k with option j, s and USD |
| p | chance of a trial to go on at its next rung |
| w | chance of a trial to win over that of a new one: p f^(k + 1) in segment k < K - 1, then f^k |
| n_k | trials that have still to begin segment k: N f^-k less those that have begun it |
| mu | price of time, USD per second |

Every segment has the option that minimises c + mu w t; mu is the largest for which what is to come
is expected to cost no more than is left: the Lagrangian of "least expected time of the winner
within the budget". Trials that are likely to end at the next rung get what is cheap, survivors what
is fast. What is expected is corrected by what the segments so far have cost.

All trials share the platform's functions, and one that takes more than its share makes others wait:
so no option has more workers than there are functions for each of the trials that run at once. When
fewer run in the end, the survivors may have more.

Hyperband has several *brackets* of trials with rungs of their own, from bold to cautious ones. New
trials are equally likely to win in all of them, and all segments of all brackets have one mu.

A trial that is new has p = 1 / f. One that was at the quantile u (0 is the best) of a rung of which
f^-1 have gone on has

    p = P(rho z + sqrt(1 - rho^2) e > c),    z = Phi^-1(1 - u),

with e standard normal, rho the correlation of results at two rungs in a row, and c so that on
average one in f of those that went on goes on again.
"""

import math
import threading
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

from smlt_tune.backend.resource_manager.observations import Allocation, Option
from smlt_tune.backend.sweeps.halving_rules import Schedule
from smlt_tune.backend.sweeps.stage_allocations import OptionsOf

#: Correlation of the normal scores of trials at two rungs in a row.
RHO = 0.8
#: Quantiles that stand for all trials that went on.
_QUANTILES = 64
_NORMAL = NormalDist()
#: How often the price of time is halved in between.
_HALVINGS = 60


def chance(u: float, factor: int, rho: float = RHO) -> float:
    """p: that a trial which has gone on goes on at the next rung, too.

    Args:
        u: Its quantile at the last rung, 0 for the best; trials up to 1 / factor went on.
        factor: One in so many goes on.
        rho: Correlation of results at two rungs in a row, from 0 to below 1.
    """
    return _passes(u, _threshold(factor, rho), rho)


def _passes(u: float, threshold: float, rho: float) -> float:
    z = _NORMAL.inv_cdf(1.0 - min(max(u, 1e-6), 1.0 - 1e-6))
    return _NORMAL.cdf((rho * z - threshold) / math.sqrt(1.0 - rho * rho))


@cache
def _threshold(factor: int, rho: float) -> float:
    """c, by bisection."""
    quantiles = [(i + 0.5) / _QUANTILES / factor for i in range(_QUANTILES)]
    low, high = -9.0, 9.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        go_on = sum(_passes(u, middle, rho) for u in quantiles) / _QUANTILES
        low, high = (middle, high) if go_on > 1.0 / factor else (low, middle)
    return low


def lower_hull(options: Iterable[Option]) -> list[Option]:
    """Those that are the best at some price of time, the fastest first."""
    found: list[Option] = []
    for one in sorted(options, key=lambda o: (o.time_s, o.cost_usd)):
        if found and one.cost_usd >= found[-1].cost_usd:
            continue
        while len(found) > 1 and _usd_per_s(*found[-2:]) <= _usd_per_s(found[-1], one):
            found.pop()
        found.append(one)
    return found


def _usd_per_s(faster: Option, slower: Option) -> float:
    """What a second costs between two options."""
    return (faster.cost_usd - slower.cost_usd) / (slower.time_s - faster.time_s)


def best_option(options: Sequence[Option], price: float) -> Option:
    """The option with the least cost if time has a price, USD per second."""
    return min(options, key=lambda one: (one.cost_usd + price * one.time_s, one.time_s))


def price_of_time(
    segments: Sequence[tuple[float, float, Sequence[Option]]], budget_usd: float
) -> float:
    """mu: the largest price at which what is to come costs no more than there is.

    Args:
        segments: Number of trials to come, w and options of each.
        budget_usd: What is left for all of them, USD.

    Returns:
        USD per second; 0 if even the cheapest options cost more.
    """

    def cost_usd(price: float) -> float:
        return sum(n * best_option(options, price * w).cost_usd for n, w, options in segments)

    if cost_usd(0.0) > budget_usd:
        return 0.0
    low, high = 0.0, 1e6
    if cost_usd(high) <= budget_usd:
        return high
    for _ in range(_HALVINGS):
        middle = math.sqrt(max(low, 1e-12) * high)
        low, high = (middle, high) if cost_usd(middle) <= budget_usd else (low, middle)
    return low


@dataclass
class _Segment:
    """What a trial is training now."""

    expected_usd: float
    before_usd: float


class _Bracket:
    """Trials that are judged at the same rungs.

    Attributes:
        schedule: The rungs.
        last: Number of the last segment.
        to_come: How many trials have still to begin each segment.
    """

    def __init__(self, schedule: Schedule, trials: int, options: OptionsOf) -> None:
        self.schedule, self.last = schedule, len(schedule.rungs) - 1
        self.to_come = [trials / float(schedule.factor) ** k for k in range(self.last + 1)]
        self._options = [list(options(schedule.share(k))) for k in range(self.last + 1)]
        self._hulls: dict[int | None, list[list[Option]]] = {}
        self._results: list[list[float]] = [[] for _ in schedule.rungs]

    def quantile(self, rung: int, value: float) -> float:
        """The u of a trial that has come to a rung, among all that have so far."""
        results, value = self._results[rung], -value if self.schedule.maximize else value
        insort(results, value)
        return (bisect_left(results, value) + 0.5) / len(results)

    def weight(self, k: int, p: float) -> float:
        """The w of a trial in segment k that goes on at its end with the chance p."""
        factor = float(self.schedule.factor)
        return p * factor ** (k + 1) if k < self.last else factor**k

    def hulls(self, most: int | None) -> list[list[Option]]:
        """The options of each segment that have at most so many workers."""
        if most not in self._hulls:
            self._hulls[most] = [
                lower_hull(
                    [one for one in every if most is None or one.allocation.workers <= most]
                    or every
                )
                for every in self._options
            ]
        return self._hulls[most]

    def segments(self, most: int | None) -> list[tuple[float, float, list[Option]]]:
        """Of each: trials to come, their w, their options."""
        usual = 1.0 / self.schedule.factor
        return [
            (number, self.weight(k, usual), options)
            for k, (number, options) in enumerate(zip(self.to_come, self.hulls(most), strict=True))
        ]


class Promotions:
    """Chooses allocations in one asynchronous search. May be used from several threads.

    Args:
        brackets: Rungs at which the trials of each bracket are judged; ASHA has one.
        trials: How many will begin.
        options: What a trial takes for a share of its training.
        budget_usd: For all of them, USD.
        bracket_of: To which bracket a trial belongs, by number.
        functions: How many there are for all of them; None for any number.
        parallel: How many run at once.
    """

    def __init__(
        self,
        brackets: Sequence[Schedule],
        trials: int,
        options: OptionsOf,
        budget_usd: float,
        *,
        bracket_of: Callable[[int], int] = lambda trial: 0,
        functions: int | None = None,
        parallel: int = 1,
    ) -> None:
        numbers = Counter(bracket_of(trial) for trial in range(trials))
        self._brackets = [_Bracket(one, numbers[i], options) for i, one in enumerate(brackets)]
        self._bracket_of = bracket_of
        self._functions, self._parallel = functions, parallel
        self._budget_usd = budget_usd
        self._running: dict[int, _Segment] = {}
        # Of the segments that are over: what they were expected to cost, and did.
        self._expected_usd = self._measured_usd = 0.0
        self._lock = threading.Lock()

    def schedule_of(self, trial: int) -> Schedule:
        """Where a trial is judged."""
        return self._of(trial).schedule

    def begins(self, trial: int) -> Allocation:
        """What a new trial runs on.

        Args:
            trial: Its number.
        """
        with self._lock:
            return self._choose(trial, 0, 1.0 / self.schedule_of(trial).factor, 0.0)

    def goes_on(self, trial: int, rung: int, value: float, cost_usd: float) -> Allocation | None:
        """What a trial runs on after a rung; None if it was the last one.

        Args:
            trial: Its number.
            rung: Number of the rung, from 0.
            value: What it has reported there.
            cost_usd: What it has cost so far, USD.
        """
        with self._lock:
            u = self._came_to(trial, rung, value, cost_usd)
            if rung == self._of(trial).last:
                return None
            p = chance(u, self.schedule_of(trial).factor)
            return self._choose(trial, rung + 1, p, cost_usd)

    def ends(self, trial: int, rung: int, value: float, cost_usd: float) -> None:
        """A trial does not go on after a rung; the arguments are those of :meth:`goes_on`."""
        with self._lock:
            self._came_to(trial, rung, value, cost_usd)

    def leaves(self, trial: int, cost_usd: float) -> None:
        """A trial is over wherever it was: it failed, say. Nothing is kept for it any more.

        Args:
            trial: Its number; of one that has come to its last rung nothing is kept anyway.
            cost_usd: What it has cost in all, USD.
        """
        with self._lock:
            segment = self._running.pop(trial, None)
            if segment is not None:  # how much of it was trained is not known: only money is gone
                self._budget_usd -= cost_usd - segment.before_usd

    def _came_to(self, trial: int, rung: int, value: float, cost_usd: float) -> float:
        """Books a segment; the trial's quantile among all that have come to the rung."""
        segment = self._running.pop(trial)
        self._expected_usd += segment.expected_usd
        self._measured_usd += cost_usd - segment.before_usd
        return self._of(trial).quantile(rung, value)

    def _of(self, trial: int) -> _Bracket:
        return self._brackets[self._bracket_of(trial)]

    def _choose(self, trial: int, k: int, p: float, cost_usd: float) -> Allocation:
        """An allocation for segment k of a trial that goes on at its end with the chance p."""
        bracket = self._of(trial)
        dearer = self._measured_usd / self._expected_usd if self._expected_usd else 1.0
        running = sum(segment.expected_usd for segment in self._running.values())
        most = self._share_of_functions(k)
        left_usd = (self._budget_usd - self._measured_usd) / dearer - running
        price = price_of_time([s for b in self._brackets for s in b.segments(most)], left_usd)
        chosen = best_option(bracket.hulls(most)[k], price * bracket.weight(k, p))
        bracket.to_come[k] = max(0.0, bracket.to_come[k] - 1.0)
        self._running[trial] = _Segment(chosen.cost_usd, cost_usd)
        return chosen.allocation

    def _share_of_functions(self, k: int) -> int | None:
        """How many workers leave the other trials their functions; None for any number.

        Args:
            k: The segment that a trial is about to begin.
        """
        if self._functions is None:
            return None
        beginning = math.ceil(sum(b.to_come[0] for b in self._brackets))
        beginning += k > 0  # else this one is among them
        at_once = min(self._parallel, len(self._running) + beginning)
        return max(1, self._functions // max(1, at_once))
