"""The resource manager behind the protocol of the peers, and whole jobs that it steers live."""

import math
from dataclasses import dataclass, replace

import numpy as np
from allocation.truth import LIMITS, MAX_MB, MAX_WORKERS, PRICES, Case

from smlt_tune.backend.adaptation import (
    MEASURED_ITERATIONS,
    MEASURED_LEAST_S,
    MEASURED_S,
    MILESTONES,
)
from smlt_tune.backend.resource_manager.manager import ResourceManager
from smlt_tune.backend.resource_manager.observations import Allocation, Profile
from smlt_tune.backend.resource_manager.policy import Bounds, JobFacts

#: Iterations of a profiling run: those that are measured, and one before them to warm up.
PROFILED = 5


def facts_of(case, *, store=None):
    """What is told of a job before it begins."""
    work = case.candidate.workload
    return JobFacts(
        case.candidate.job_id,
        LIMITS,
        goal=case.goal,
        bounds=Bounds(store=store),
        workload=work,
        iterations_left=work.iterations,
    )


def new_manager(family, siblings=(), *, residual=True):
    """A resource manager that knows the family's tables and some profiles."""
    return ResourceManager(family.table, family.stores, PRICES, siblings, residual=residual)


class Ours:
    """The resource manager, asked like a peer.

    Args:
        family: Whose tables it is given.
        facts: Of the job.
        siblings: Profiles of other jobs.
        residual: False for the analytic model alone.
    """

    def __init__(self, family, facts, siblings=(), *, residual=True):
        self._manager = new_manager(family, siblings, residual=residual)
        self._facts = facts

    def observe(self, profile):
        """A profiling run has ended."""
        self._manager.observe(profile)
        if not profile.out_of_memory:
            self._facts = replace(self._facts, other_share=profile.other_share)

    def suggest(self):
        """Where to profile next."""
        return self._manager.suggest(self._facts)

    def recommend(self):
        """On what to run the job."""
        return self._manager.first(self._facts).allocation

    def interval(self, workers, memory_mb):
        """Mean and standard deviation of ln(time per iteration), from the 90 % intervals."""
        sizes = zip(workers, memory_mb, strict=True)
        at = [self._manager.predict(self._facts, Allocation(int(n), int(m))) for n, m in sizes]
        low, high = (np.log([getattr(p.iteration_s, end) for p in at]) for end in ("low", "high"))
        return (low + high) / 2, (high - low) / (2 * 1.645)


@dataclass
class Ride:
    """How a whole job went.

    Attributes:
        seconds: From its submission to its end.
        usd: All that was billed.
        moves: To other allocations, while it trained.
        failures: For want of memory.
        profiles: All that was observed.
    """

    seconds: float = 0.0
    usd: float = 0.0
    moves: int = 0
    failures: int = 0
    profiles: tuple[Profile, ...] = ()

    def paid(self, seconds, usd):
        """Time passes, money is spent."""
        self.seconds += float(seconds)
        self.usd += float(usd)


class LiveJob:
    """A job that a resource manager steers, every overhead paid, on the synthetic truth.

    Args:
        manager: Learns from it.
        case: The job.
        rng: Of the measurements.
        store: Pinned store, or None.
    """

    def __init__(self, manager, case, rng, *, store=None):
        self.manager, self.case, self.rng = manager, case, rng
        self.candidate = case.candidate
        self.facts = facts_of(case, store=store)
        self.ride = Ride()
        self._generation_s = 0.0

    def profile_first(self, runs):
        """Separate profiling runs, one after the other, before the job starts."""
        for _ in range(runs):
            profile_run(self.case, self.manager.suggest(self._now()), self.rng, self._observe)

    def run(self):
        """From the first allocation to the last iteration."""
        allocation = self._placed(self.manager.first(self._now()).allocation)
        done, here, total = 0, 0, self.candidate.iterations
        while done < total:
            stop = self._next_look(allocation, done, here)
            self._train(allocation, stop - done)
            here += stop - done
            done = stop
            if done < total:
                self._observe(self.candidate.measure(allocation, self.rng, here))
                before, allocation = allocation, self._reviewed(allocation, total - done)
                here = here if allocation == before else 0
        return self.ride

    def _next_look(self, allocation, done, here):
        """At how many iterations the job is looked at again, ``here`` of them where it is."""
        total = self.candidate.iterations
        looks = [look for part in MILESTONES if (look := math.ceil(part * total)) > done]
        if not here:
            iteration_s = float(self.candidate.iteration_s(**_where(allocation)))
            enough = max(MEASURED_ITERATIONS, math.ceil(MEASURED_LEAST_S / iteration_s))
            looks.append(done + min(enough, math.ceil(MEASURED_S / iteration_s)))
        return min([total, *looks])

    def _train(self, allocation, iterations):
        seconds, usd = self.candidate.training(
            iterations=iterations, since_s=self._generation_s, **_where(allocation)
        )
        self._generation_s += float(seconds)
        self.ride.paid(seconds, usd)

    def _reviewed(self, allocation, left):
        """The allocation after a look at the job, moved to."""
        facts = self._now(allocation=allocation, iterations_left=left)
        decision = self.manager.review(facts)
        if decision is None or decision.allocation == allocation:
            return allocation
        self.ride.moves += 1
        self._generation_s = 0.0
        new, candidate = decision.allocation, self.candidate
        # The new functions start while the old ones train; both are billed.
        start = candidate.start_s(new.workers, new.memory_mb)
        self.ride.paid(0.0, candidate.usd(new.workers, new.memory_mb, start, 1, new.store))
        pause = candidate.pause_s
        self.ride.paid(pause, candidate.usd(new.workers, new.memory_mb, pause, 0, new.store))
        if candidate.fits(new.workers, new.memory_mb):
            return new
        self._failed(new)
        return self._placed(self._larger(new, left), left)

    def _placed(self, allocation, left=None):
        """Starts functions, more of them or larger ones as long as memory is not enough."""
        candidate = self.candidate
        while True:
            n, m = allocation.workers, allocation.memory_mb
            start = candidate.start_s(n, m)
            self.ride.paid(start, candidate.usd(n, m, start, 1, allocation.store))
            if candidate.fits(n, m):
                return allocation
            self._failed(allocation)
            allocation = self._larger(allocation, left)

    def _failed(self, allocation):
        self.ride.failures += 1
        self._observe(self.candidate.measure(allocation, self.rng))

    def _larger(self, allocation, left):
        facts = self._now(allocation=allocation, peak_mb=float(allocation.memory_mb))
        if left is not None:
            facts = replace(facts, iterations_left=left)
        decision = self.manager.after_out_of_memory(facts, float(allocation.memory_mb))
        if decision is not None:
            return decision.allocation
        return replace(
            allocation, workers=min(2 * allocation.workers, MAX_WORKERS), memory_mb=MAX_MB
        )

    def _observe(self, profile, seconds=0.0, usd=0.0):
        self.ride.paid(seconds, usd)
        self.ride.profiles += (profile,)
        self.manager.observe(profile)
        if not profile.out_of_memory:
            peak = max(self.facts.peak_mb, profile.peak_mb)
            self.facts = replace(self.facts, other_share=profile.other_share, peak_mb=peak)

    def _now(self, **changes):
        return replace(self.facts, elapsed_s=self.ride.seconds, spent_usd=self.ride.usd, **changes)


def profile_run(case, allocation, rng, observe):
    """Starts functions for a few iterations; ``observe(profile, seconds, usd)`` is told."""
    candidate, n, m = case.candidate, allocation.workers, allocation.memory_mb
    profile = candidate.measure(allocation, rng, PROFILED)
    seconds = float(candidate.start_s(n, m))
    if not profile.out_of_memory:
        seconds += (PROFILED + 1) * float(candidate.iteration_s(n, m, allocation.store))
    observe(profile, seconds, float(candidate.usd(n, m, seconds, 1, allocation.store)))


def history(family, jobs, goals, *, residual=True):
    """Runs some siblings one after the other, each steered by what was learnt from those before.

    Args:
        family: Whose candidates 0, 1, ... they are.
        jobs: How many.
        goals: Of the jobs, in turn.
        residual: False for the analytic model alone.

    Returns:
        The profiles of each, in order.
    """
    manager = new_manager(family, residual=residual)
    profiles = []
    for index in range(jobs):
        rng = np.random.default_rng([family.seed, 3, index])
        case = Case(family.candidate(index), goals[index % len(goals)], rng)
        profiles.append(LiveJob(manager, case, rng).run().profiles)
    return profiles


def _where(allocation):
    return {
        "workers": allocation.workers,
        "memory_mb": allocation.memory_mb,
        "store": allocation.store,
    }
