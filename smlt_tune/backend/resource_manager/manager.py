"""Resource Manager (paper 1b): chooses workers, memory and store of every job, again and again.

It predicts the time per iteration of every allocation (:mod:`gaussian_process`, with the analytic
model of :mod:`physics` inside), from that time and cost of the rest of the job, and recommends the
optimum of the posterior among the allocations that are expected to keep the goal's limit, which has
a price, and whose memory is enough with a probability of 95 %. It costs no profiling runs: a job
starts at the recommendation and is looked at again while it trains.

A function of what it was told: no I/O, no clock, no random numbers.
"""

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from smlt_tune.backend.prices import Prices
from smlt_tune.backend.resource_manager.grid import Grid, around, grid_of
from smlt_tune.backend.resource_manager.observations import (
    Allocation,
    Decision,
    Option,
    Plan,
    Prediction,
    Profile,
)
from smlt_tune.backend.resource_manager.outlook import Knowledge, Outlook
from smlt_tune.backend.resource_manager.physics import IterationTime
from smlt_tune.backend.resource_manager.policy import JobFacts, PinnedOrDefault
from smlt_tune.backend.resource_manager.siblings import ProfileBook
from smlt_tune.backend.resource_manager.tables import PlatformTable, StoreTable
from smlt_tune.errors import InvalidInput

#: A job moves if that saves more than this share of all that it needs, the move paid for.
LEAST_GAIN = 0.03
#: If the limit is at risk, a job moves to where it would use less than this share of what it would
#: use where it is.
EASED = 0.98


class ResourceManager:
    """The allocation policy of a fleet. May be used from several threads.

    Args:
        table: Of the platform.
        stores: The fleet's parameter stores, by name.
        prices: What functions cost.
        profiles: What is known from earlier fleets on the same platform.
        residual: False leaves the analytic model alone, without Gaussian process: a baseline.

    Raises:
        InvalidInput: There is no store.
    """

    def __init__(
        self,
        table: PlatformTable,
        stores: Mapping[str, StoreTable],
        prices: Prices,
        profiles: Iterable[Profile] = (),
        *,
        residual: bool = True,
    ) -> None:
        if not stores:
            raise InvalidInput("a resource manager needs at least one parameter store")
        self._table = table
        self._stores = dict(stores)
        self._prices = prices
        self._residual = residual
        self._model = IterationTime(table)
        self._book = ProfileBook()
        self._lock = threading.Lock()
        for profile in profiles:
            self._book.add(profile)

    # --- the policy -----------------------------------------------------------------------------

    def observe(self, profile: Profile) -> None:  # noqa: D102 - the contract is the protocol's
        with self._lock:
            self._book.add(profile)

    def first(self, facts: JobFacts) -> Decision:  # noqa: D102
        with self._lock:
            workload = facts.workload or self._book.typical()
            if workload is None:
                decision = PinnedOrDefault().first(facts)
                return replace(decision, reason="nothing is known yet: pinned, or the default")
            outlook = self._outlook(replace(facts, workload=workload))
            best = outlook.best()
        known = "" if facts.workload else ", taken for an average trial"
        return Decision(
            outlook.allocation(best),
            f"{outlook.goal_text()}, by {outlook.sources()}{known}",
            outlook.evidence(best),
        )

    def after_out_of_memory(  # noqa: D102
        self, facts: JobFacts, peak_mb: float
    ) -> Decision | None:
        doubled = PinnedOrDefault().after_out_of_memory(facts, peak_mb)
        current = facts.allocation
        if facts.workload is None or current is None:
            return doubled
        part = math.ceil(facts.workload.batch / current.workers)
        with self._lock:
            outlook = self._outlook(facts)
            smaller = np.ceil(facts.workload.batch / outlook.workers) < part
            larger = outlook.memory_mb >= min(1.2 * current.memory_mb, facts.limits.max_memory_mb)
            more = outlook.memory_mb > current.memory_mb
            outlook.restrict((larger & more) | ((outlook.memory_mb >= current.memory_mb) & smaller))
            if not outlook.allowed.any():
                return doubled
            best = outlook.best()
        reason = f"{current.memory_mb} MB were not enough"
        return Decision(outlook.allocation(best), reason, outlook.evidence(best))

    def review(self, facts: JobFacts) -> Decision | None:  # noqa: D102
        current = facts.allocation
        if facts.workload is None or current is None or facts.iterations_left == 0:
            return None
        with self._lock:
            outlook = self._outlook(facts, current)
            stay = outlook.index(current)
            if outlook.ends_first:
                why_not = "it will have ended before other functions have started"
                return Decision(current, why_not, outlook.evidence(stay))
            if facts.functions is not None and facts.bounds.workers is None:
                outlook.restrict(outlook.workers <= max(facts.functions, facts.bounds.min_workers))
            best = outlook.best()
            why = None if best == stay else _why_move(outlook, best, stay)
            tried = self._book.tried(facts.job_id, facts.workload) | {current}
            if len(tried) < facts.bounds.profiles:
                there = outlook.most_promising()
                if outlook.allocation(there) not in tried:
                    best, why = there, f"profile {len(tried) + 1} of {facts.bounds.profiles}"
            if why is None:
                return Decision(current, "nothing is worth a move", outlook.evidence(stay))
            gain, row = outlook.gain(best, stay), outlook.row(stay)
            evidence = {**outlook.evidence(best), "gain": gain, "stay": row}
        return Decision(outlook.allocation(best), f"{outlook.goal_text()}: {why}", evidence)

    # --- beyond the policy ----------------------------------------------------------------------

    def plan(self, facts: JobFacts) -> Plan:
        """What can be expected of a job that has not begun.

        Args:
            facts: With a workload.

        Raises:
            InvalidInput: The facts have no workload.
        """
        if facts.workload is None:
            raise InvalidInput("a plan needs a workload: run the training function dry first")
        with self._lock:
            outlook = self._outlook(facts)
            best = outlook.best()
        feasible, notes = outlook.verdict(best)
        front = tuple(outlook.prediction(i) for i in outlook.front())
        return Plan(outlook.prediction(best), front, feasible, notes, outlook.own, outlook.siblings)

    def options(self, facts: JobFacts) -> tuple[Option, ...]:
        """What the job would take with each allocation whose memory is enough.

        Not only the front of one job: where many of them share the functions, fewer workers for
        each can end all of them sooner than an allocation that is faster and cheaper.

        Args:
            facts: With a workload.

        Raises:
            InvalidInput: The facts have no workload.
        """
        if facts.workload is None:
            raise InvalidInput("options need a workload: run the training function dry first")
        with self._lock:
            outlook = self._outlook(facts, closer=False)
        return tuple(outlook.options())

    def predict(self, facts: JobFacts, allocation: Allocation) -> Prediction:
        """What can be expected of one allocation.

        Args:
            facts: With a workload.
            allocation: Within the bounds or not.
        """
        with self._lock:
            outlook = self._outlook(facts, allocation)
            return outlook.prediction(outlook.index(allocation))

    def suggest(self, facts: JobFacts) -> Allocation:
        """Where a profiling run would help most: constrained expected improvement.

        Closed-form EI (SMLT 3.2, minimised) of the logarithm of what the goal minimises, times the
        probabilities that limit and memory are kept; compared as a logarithm, because EI itself
        underflows on most of the grid.

        Args:
            facts: With a workload.
        """
        with self._lock:
            outlook = self._outlook(facts)
            return outlook.allocation(outlook.most_promising())

    # --- how ------------------------------------------------------------------------------------

    def _outlook(
        self, facts: JobFacts, current: Allocation | None = None, *, closer: bool = True
    ) -> Outlook:
        """Predictions for a grid of allocations; ``closer``, also for a finer one around the best.

        The grid alone is the same for all workloads.
        """
        # Imports scipy, which takes half a second the first time.
        from smlt_tune.backend.resource_manager.gaussian_process import one_thread

        assert facts.workload is not None
        names = list(self._stores)
        near = self._book.nearest(facts.workload, facts.job_id)
        known = Knowledge(self._table, self._stores, self._prices, self._model, near, facts)
        grid = grid_of(facts, self._table, names)
        with one_thread():
            process, memory = known.process(residual=self._residual), known.memory()
            if current is not None:
                grid = grid.joined(Grid.of([current], names))
            expected = known.of(grid, process, memory)
            coarse = Outlook(known, grid, expected, current)
            if not closer:
                return coarse
            finer = around(grid, coarse.best(), facts)
            expected = np.concatenate([expected, known.of(finer, process, memory)], axis=1)
            return Outlook(known, grid.joined(finer), expected, current)


def _why_move(outlook: Outlook, best: int, stay: int) -> str | None:
    """A reason to move from one place to another; None if there is none."""
    if not outlook.allowed[stay]:
        return "the fleet needs functions for other jobs"
    if outlook.at_risk(stay) and outlook.limited(best) < EASED * outlook.limited(stay):
        return "the limit is at risk"
    if outlook.saving(best, stay) <= LEAST_GAIN:
        return None
    if outlook.gain(best, stay) <= 0.0:
        return "the limit may well be broken otherwise"
    return f"saves {outlook.gain(best, stay):.0%} of what is left"
