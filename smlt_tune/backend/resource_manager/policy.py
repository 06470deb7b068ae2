"""How large a job's generations are: what a policy knows, what it says, and the simplest one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from smlt_tune.backend.goals import Cheapest, Goal, goal_mistakes
from smlt_tune.backend.platforms.base import MB_PER_VCPU, PlatformLimits, is_positive
from smlt_tune.backend.resource_manager.observations import (
    DEFAULT_STORE,
    Allocation,
    Decision,
    Option,
    Plan,
    Profile,
    Workload,
    not_counts,
)

_DEFAULT_WORKERS = 2


@dataclass(frozen=True)
class Bounds:
    """What the user fixed. May be impossible: :func:`check` says so.

    Attributes:
        workers: Pinned number of workers, or None to have it chosen.
        memory_mb: Pinned memory of a function, MB, or None to have it chosen.
        min_workers: Fewest workers to choose.
        max_workers: Most workers to choose; None for what the platform allows.
        min_memory_mb: Smallest memory to choose, MB; None for what the platform offers.
        max_memory_mb: Largest memory to choose, MB; None for what the platform offers.
        store: Pinned parameter store, by its name in the fleet, or None to have it chosen.
        profiles: How many allocations to try first, where that tells most.
        lease_s: Longest time for which money is reserved for a function at once, seconds, because
            the job is expected to be done by then; None for the platform's time limit.
    """

    workers: int | None = None
    memory_mb: int | None = None
    min_workers: int = 1
    max_workers: int | None = None
    min_memory_mb: int | None = None
    max_memory_mb: int | None = None
    store: str | None = None
    profiles: int = 0
    lease_s: float | None = None


@dataclass(frozen=True)
class JobFacts:
    """Everything that a policy may look at.

    Attributes:
        job_id: Of the job.
        limits: Of its platform.
        goal: What the user wants.
        bounds: What the user fixed.
        allocation: Of the current generation; None before the first.
        peak_mb: Highest resident memory of a worker that was seen, MB; 0 if none was.
        workload: What it computes now; None as long as nobody has said.
        iterations_left: Training iterations that are still to do; None if nobody knows.
        left_sd: Standard deviation of the logarithm of that, where it is a forecast.
        other_share: Time outside of training iterations over the time inside, so far; None before
            it was measured.
        elapsed_s: Time since it was submitted, seconds.
        spent_usd: What it has cost so far, running functions included, USD.
        functions: How many functions the fleet grants it at most, those that it has included.
        start_s: What a start of functions took lately on this platform, seconds; 0 if unknown.
        store_load: What the fleet's other jobs move through each store, bytes per second.
        stores: Names of the fleet's parameter stores.
    """

    job_id: str
    limits: PlatformLimits
    goal: Goal = field(default_factory=Cheapest)
    bounds: Bounds = Bounds()
    allocation: Allocation | None = None
    peak_mb: float = 0.0
    workload: Workload | None = None
    iterations_left: int | None = None
    left_sd: float = 0.0
    other_share: float | None = None
    elapsed_s: float = 0.0
    spent_usd: float = 0.0
    functions: int | None = None
    start_s: float = 0.0
    store_load: Mapping[str, float] = field(default_factory=dict)
    stores: tuple[str, ...] = (DEFAULT_STORE,)


class AllocationPolicy(Protocol):
    """Chooses allocations: a function of what it was told, without I/O and without a clock.

    The facts have passed :func:`check`. What is pinned stays as it is pinned.
    """

    def observe(self, profile: Profile) -> None:
        """Remembers a measurement, of any job of the project."""

    def first(self, facts: JobFacts) -> Decision:
        """For the first generation of a job."""

    def after_out_of_memory(self, facts: JobFacts, peak_mb: float) -> Decision | None:
        """For a job whose worker exceeded its memory.

        Args:
            facts: With the allocation that was too small.
            peak_mb: Memory that the worker had when it ended, MB; 0 if it is not known.

        Returns:
            One with more memory, or None to give up: it is pinned, or there is no more.
        """

    def review(self, facts: JobFacts) -> Decision | None:
        """For a job that runs; None, or what it has, to stay with that."""


@runtime_checkable
class Plans(Protocol):
    """A policy that can say what a job will take before it costs anything."""

    def plan(self, facts: JobFacts) -> Plan:
        """What it would choose, what else there is, and whether the goal can be kept.

        Args:
            facts: With a workload.
        """

    def options(self, facts: JobFacts) -> tuple[Option, ...]:
        """What the job would take with each allocation whose memory is enough.

        Which allocations there are depends on limits and bounds alone, and not on the workload.

        Args:
            facts: With a workload.
        """


class PinnedOrDefault:
    """Pins win. Otherwise two workers of one virtual CPU each; twice the memory once it runs out.

    Never changes a job that runs.
    """

    def observe(self, profile: Profile) -> None:  # noqa: D102 - the contract is the protocol's
        pass

    def first(self, facts: JobFacts) -> Decision:  # noqa: D102
        bounds = facts.bounds
        workers = bounds.workers
        if workers is None:
            workers = max(bounds.min_workers, min(_DEFAULT_WORKERS, most_workers(facts)))
        memory_mb = bounds.memory_mb
        if memory_mb is None:
            low, high = memory_range(facts)
            memory_mb = max(low, min(MB_PER_VCPU, high))
        store = bounds.store or DEFAULT_STORE
        return Decision(Allocation(workers, memory_mb, store), "pinned, or the default")

    def after_out_of_memory(  # noqa: D102
        self, facts: JobFacts, peak_mb: float
    ) -> Decision | None:
        current = facts.allocation or self.first(facts).allocation
        _, most = memory_range(facts)
        if facts.bounds.memory_mb is not None or current.memory_mb >= most:
            return None
        larger = replace(current, memory_mb=min(2 * current.memory_mb, most))
        return Decision(larger, f"{current.memory_mb} MB were not enough")

    def review(self, facts: JobFacts) -> Decision | None:  # noqa: D102
        return None


def is_pinned(facts: JobFacts) -> bool:
    """Whether nothing is left to choose."""
    bounds = facts.bounds
    only_store = bounds.store is not None or len(facts.stores) == 1
    return bounds.workers is not None and bounds.memory_mb is not None and only_store


def most_workers(facts: JobFacts) -> int:
    """The most workers that both the user and the platform allow."""
    platform = _most_on_platform(facts.limits)
    wanted = facts.bounds.max_workers
    return platform if wanted is None else min(wanted, platform)


def memory_range(facts: JobFacts) -> tuple[int, int]:
    """Smallest and largest memory that both the user and the platform allow, MB."""
    bounds, limits = facts.bounds, facts.limits
    low, high = bounds.min_memory_mb, bounds.max_memory_mb
    return (
        limits.min_memory_mb if low is None else max(low, limits.min_memory_mb),
        limits.max_memory_mb if high is None else min(high, limits.max_memory_mb),
    )


def check(facts: JobFacts) -> list[str]:
    """Every mistake in what the user fixed, one sentence each; empty if the job can be placed."""
    bounds = facts.bounds
    given = {
        "workers": bounds.workers,
        "memory_mb": bounds.memory_mb,
        "min_workers": bounds.min_workers,
        "max_workers": bounds.max_workers,
        "min_memory_mb": bounds.min_memory_mb,
        "max_memory_mb": bounds.max_memory_mb,
    }
    # What is no number cannot be compared.
    mistakes = not_counts({name: value for name, value in given.items() if value is not None})
    if bounds.profiles != 0:
        mistakes += not_counts({"profiles": bounds.profiles})
    mistakes = mistakes or (
        _check_workers(bounds, facts.limits) + _check_memory(bounds, facts.limits)
    )
    lease_s = bounds.lease_s
    if lease_s is not None and not (is_positive(lease_s) and math.isfinite(lease_s)):
        mistakes.append(f"lease_s must be a number of seconds above 0, or None, not {lease_s!r}")
    return goal_mistakes(facts.goal) + mistakes + _check_store(facts)


def _check_workers(bounds: Bounds, limits: PlatformLimits) -> list[str]:
    mistakes = []
    low, high, pinned = bounds.min_workers, bounds.max_workers, bounds.workers
    most = _most_on_platform(limits)
    if high is not None and low > high:
        mistakes.append(f"min_workers={low} is more than max_workers={high}")
    if low > most:
        mistakes.append(f"min_workers={low} is more than the platform can run at once ({most})")
    if pinned is None:
        return mistakes
    if pinned > most:
        mistakes.append(f"workers={pinned} is more than the platform can run at once ({most})")
    if high is not None and pinned > high:
        mistakes.append(f"workers={pinned} is more than max_workers={high}")
    if pinned < low:
        mistakes.append(f"workers={pinned} is less than min_workers={low}")
    return mistakes


def _check_memory(bounds: Bounds, limits: PlatformLimits) -> list[str]:
    least, most = limits.min_memory_mb, limits.max_memory_mb
    low, high, pinned = bounds.min_memory_mb, bounds.max_memory_mb, bounds.memory_mb
    given = {"memory_mb": pinned, "min_memory_mb": low, "max_memory_mb": high}
    mistakes = [
        f"{name}={value} is not among what the platform offers ({least} to {most} MB)"
        for name, value in given.items()
        if value is not None and not least <= value <= most
    ]
    if low is not None and high is not None and low > high:
        mistakes.append(f"min_memory_mb={low} is more than max_memory_mb={high}")
    if pinned is not None and high is not None and pinned > high:
        mistakes.append(f"memory_mb={pinned} is more than max_memory_mb={high}")
    if pinned is not None and low is not None and pinned < low:
        mistakes.append(f"memory_mb={pinned} is less than min_memory_mb={low}")
    return mistakes


def _check_store(facts: JobFacts) -> list[str]:
    store = facts.bounds.store
    if store is None or store in facts.stores:
        return []
    known = ", ".join(facts.stores)
    return [f"store={store!r} is none of the fleet's parameter stores: {known}"]


def _most_on_platform(limits: PlatformLimits) -> int:
    return min(limits.max_workers, limits.functions)
