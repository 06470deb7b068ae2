"""A sweep that was planned, run in virtual time: what its budget and its deadline make of it.

The scheduler, the ledger and, for a sweep in stages, :func:`~.halving.run_halving` are the real
ones. The configurations that were looked at for the plan stand for all trials, in turn; how long an
iteration takes is what the resource manager predicts, and varies from epoch to epoch. Who is better
than whom is drawn at random. A pruner ends nobody: what it would save is not known.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from smlt_tune.backend.goals import Cheapest, Fastest
from smlt_tune.backend.job import FAILED, FINISHED, OVER, Job
from smlt_tune.backend.platforms.base import PlatformLimits
from smlt_tune.backend.platforms.simulated import (
    SimulatedPlatform,
    SimulatedTraining,
    SimulationOptions,
)
from smlt_tune.backend.resource_manager.manager import ResourceManager
from smlt_tune.backend.resource_manager.observations import Allocation, Option, Workload
from smlt_tune.backend.resource_manager.policy import Bounds, JobFacts, PinnedOrDefault
from smlt_tune.backend.simulated_fleet import SimulatedFleet, without_collections
from smlt_tune.backend.sweeps.halving import run_halving
from smlt_tune.backend.sweeps.halving_rules import Schedule, geometric
from smlt_tune.backend.sweeps.plan import Sample, SweepPlan
from smlt_tune.backend.sweeps.stage_allocations import StageAllocations, options_of_workloads
from smlt_tune.backend.sweeps.sweep import Sweep
from smlt_tune.errors import InvalidInput

#: Standard deviation of the logarithm of an epoch's time per iteration.
PACE_SPREAD = 0.1
#: Reports of a training, where the sweep does not say.
_REPORTS = 10
#: Workers say where they are this often, in seconds: seldom, which makes simulations fast.
_PROGRESS_S, _HANG_S, _TICK_S = 30.0, 120.0, 1.0


@dataclass(frozen=True)
class SimulatedOutcome:
    """What came of a simulated sweep.

    Attributes:
        time_s: Until its last job was over, seconds.
        cost_usd: By the ledger, USD.
        finished: Trials that were trained to the end of the sweep's stages, or of their training.
        cut: Trials that were not, by the reason.
        notes: What the user should know, one sentence each.
    """

    time_s: float
    cost_usd: float
    finished: int
    cut: Mapping[str, int]
    notes: tuple[str, ...]


def simulate_sweep(
    sweep: Sweep,
    plan: SweepPlan,
    *,
    policy: ResourceManager,
    limits: PlatformLimits,
    start_s: float,
    seed: int = 0,
) -> SimulatedOutcome:
    """Runs a sweep in virtual time.

    Args:
        sweep: What to run.
        plan: Of it.
        policy: Predicts.
        limits: Of the platform.
        start_s: Time that a function takes to start there, seconds.
        seed: Of everything random.

    Raises:
        InvalidInput: Budget or deadline are out of reach, and which are not; or nobody knows how
            many iterations a training has.
    """
    drawn = [s for s in plan.samples if s.name not in ("lowest", "highest")]
    if any(sample.job.workload.iterations is None for sample in drawn):
        raise InvalidInput(
            "the sweep cannot be simulated, because nobody knows how many iterations a training "
            "has: let the training function say how many epochs there are, with session.epochs(n)"
        )
    options = SimulationOptions(
        seed=seed,
        min_memory_mb=limits.min_memory_mb,
        max_memory_mb=limits.max_memory_mb,
        time_limit_s=limits.time_limit_s,
        concurrency=limits.functions,
        cold_start_s=start_s,
        pace_spread=PACE_SPREAD,
        progress_s=_PROGRESS_S,
    )
    fleet = SimulatedFleet(
        SimulatedPlatform(options),
        budget_usd=sweep.budget_usd,
        deadline_s=sweep.deadline_s,
        policy=PinnedOrDefault(),
        hang_timeout_s=_HANG_S,
        tick_s=_TICK_S,
    )
    with without_collections(), fleet:
        run = _Simulation(sweep, drawn, policy, limits, seed)
        notes = run.in_stages(fleet) if sweep.stages else run.side_by_side(fleet)
        fleet.run_until_idle()
        jobs = fleet.jobs()
        cut = Counter(_why(job) for job in jobs if not _is_complete(job))
        cut["not started"] = sweep.trials - len(jobs)
        return SimulatedOutcome(
            time_s=fleet.now_s,
            cost_usd=fleet.ledger.settled_usd,
            finished=sum(_is_complete(job) for job in jobs),
            cut={why: count for why, count in sorted(cut.items()) if count},
            notes=notes,
        )


class _Simulation:
    """How the trials of one sweep run."""

    def __init__(
        self,
        sweep: Sweep,
        samples: list[Sample],
        policy: ResourceManager,
        limits: PlatformLimits,
        seed: int,
    ) -> None:
        self._sweep = sweep
        self._samples = samples
        self._policy = policy
        self._limits = limits
        chance = random.Random(seed)
        self._scores = [chance.random() for _ in range(sweep.trials)]
        self._iteration_s = cache(self._predicted)

    def in_stages(self, fleet: SimulatedFleet) -> tuple[str, ...]:
        """As ``run_halving`` does it, with as much of a plan as the sweep has a goal for."""
        sweep, stages = self._sweep, self._sweep.stages
        assert stages is not None
        rungs = geometric(stages.first, stages.factor, stages.count)
        allocations = None
        free = sweep.workers is None and sweep.memory_mb is None
        if free and (sweep.budget_usd is not None or sweep.deadline_s is not None):
            goal = Fastest(sweep.budget_usd) if sweep.budget_usd else Cheapest(sweep.deadline_s)
            workloads = [sample.job.workload for sample in self._samples]
            allocations = StageAllocations(
                options_of_workloads(self._options, workloads),
                goal,
            )
        place = self._samples[0].job.plan.chosen.allocation
        pins: dict[str, Any] = {"workers": place.workers, "memory_mb": place.memory_mb}
        schedule = Schedule("score", maximize=True, rungs=rungs, factor=stages.factor)
        result = run_halving(
            fleet,
            self._training(rungs[-1]),
            range(sweep.trials),
            schedule=schedule,
            allocations=allocations,
            **({} if allocations else pins),
        )
        return result.notes

    def side_by_side(self, fleet: SimulatedFleet) -> tuple[str, ...]:
        """All trials to their end, so many at once as the sweep says."""
        train, waiting, running = self._training(_REPORTS), list(range(self._sweep.trials)), 0
        with fleet.changes() as changes:
            while waiting or running:
                while waiting and running < self._sweep.parallel:
                    trial = waiting.pop(0)
                    place = self._sample(trial).job.plan.chosen.allocation
                    fleet.submit(train, trial, workers=place.workers, memory_mb=place.memory_mb)
                    running += 1
                change = changes.next()
                if change is not None and change.status in OVER:
                    running -= change.report is None
                    if change.job.reason in ("budget", "deadline"):
                        waiting = []
        return ()

    def _sample(self, trial: int) -> Sample:
        return self._samples[trial % len(self._samples)]

    def _training(self, reports: int) -> Callable[[int], SimulatedTraining]:
        def train(trial: int) -> SimulatedTraining:
            number, work = trial % len(self._samples), self._sample(trial).job.workload
            iterations = max(1, round((work.iterations or 1) / reports))
            return SimulatedTraining(
                epochs=reports,
                iterations=iterations,
                iteration_s=lambda n, memory_mb, batch: self._iteration_s(number, n, memory_mb),
                metrics=lambda epoch: {"score": self._scores[trial]},
                batch=work.batch,
            )

        return train

    def _options(self, work: Workload) -> tuple[Option, ...]:
        bounds = Bounds(max_workers=self._sweep.max_workers)
        return self._policy.options(
            JobFacts("simulated", self._limits, bounds=bounds, workload=work)
        )

    def _predicted(self, number: int, workers: int, memory_mb: int) -> float:
        work = self._samples[number].job.workload
        facts = JobFacts("simulated", self._limits, workload=work)
        return self._policy.predict(facts, Allocation(workers, memory_mb)).iteration_s.mid


def _is_complete(job: Job) -> bool:
    return job.status == FINISHED


def _why(job: Job) -> str:
    return "failed" if job.status == FAILED else job.reason
