"""Runs successive halving on a fleet: every trial is one job that is paused between stages.

A trial trains in lockstep up to the report at which its stage ends, and not one iteration further.
There it is paused: it holds no function and no money. Once all trials of a stage have come that
far, the best go on from their checkpoints with the allocation that is planned for the next stage,
and the others end. The fleet admits as many trials at once as there are functions for (waves).

What is to be done next follows from the reports alone (:mod:`halving_rules`). A client that dies is
replaced by calling :func:`run_halving` again, with the same arguments, on ``Fleet.open``.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smlt_tune.backend.changes import Change, Changes
from smlt_tune.backend.job import FAILED, OVER, PAUSED, STOPPED, Job
from smlt_tune.backend.sweeps.halving_rules import Schedule, Situation, Trial, situation
from smlt_tune.backend.sweeps.stage_allocations import (
    StageAllocations,
    StageRun,
    lease_of,
    stage_run,
)
from smlt_tune.backend.sweeps.stage_planner import StagePlan
from smlt_tune.errors import InvalidInput

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet
    from smlt_tune.backend.simulated_fleet import SimulatedFleet

_LOG = logging.getLogger(__name__)

#: Why trials are stopped: the search is done, or, with the number of the stage, they have lost.
DONE, LOST = "the last stage is over", "not among the best of stage"
#: What a caller may not set of the jobs, because it follows from the method ...
_OWN = ("lockstep", "name", "start_from")
#: ... and from the plan.
_PLANNED = ("workers", "memory_mb", "store", "lease_s", "goal")


@dataclass(frozen=True)
class StageBegins:
    """A stage is about to begin, or is gone on with by another client.

    Attributes:
        stage: Its number, from 0.
        trials: Those that train in it, the best of the stage before first.
        plan: Of this stage and those after it; None if nothing is planned.
    """

    stage: int
    trials: tuple[int, ...]
    plan: StagePlan | None


@dataclass(frozen=True)
class HalvingResult:
    """How it ended.

    Attributes:
        best: Number of the trial that led at the last rung that any has come to; None if none has.
        complete: Whether a trial has come to the last rung.
        jobs: Of all trials.
        stages: What each stage took.
        notes: What the user should know, one sentence each: trials that were lost, and why.
    """

    best: int | None
    complete: bool
    jobs: tuple[Job, ...]
    stages: tuple[StageRun, ...]
    notes: tuple[str, ...]


def run_halving(
    fleet: "Fleet | SimulatedFleet",
    train: Callable[[Any], Any],
    configs: Sequence[Any],
    *,
    schedule: Schedule,
    allocations: StageAllocations | None = None,
    on_change: Callable[[int, Change], None] = lambda trial, change: None,
    on_stage: Callable[[StageBegins], None] = lambda stage: None,
    **options: Any,
) -> HalvingResult:
    """Trains many trials a little, the better ones longer, and the best to its end.

    Args:
        fleet: Where; its jobs are called ``trial-0``, ``trial-1``, ... Those that it knows already
            are gone on with.
        train: Training function; reports the metric.
        configs: One for each trial.
        schedule: When stages end, and who is best.
        allocations: Plans what each stage runs on; None leaves every job to ``options`` and to the
            fleet's policy.
        on_change: Told of every change of a trial, in the thread of the caller.
        on_stage: Told of every stage before it begins.
        **options: Further arguments of ``Fleet.submit``, the same for all trials.

    Returns:
        What there is when all is done, or when money or time has run out.

    Raises:
        InvalidInput: Lists everything that is wrong with the arguments; or the goal is out of
            reach, and which one is not. Nothing was started.
    """
    mistakes = [] if len(configs) else ["there are no configurations to try"]
    own = (*_OWN, *(_PLANNED if allocations else ()))
    mistakes += [
        f"{name}= follows from the method: leave it out" for name in own if name in options
    ]
    if mistakes:
        raise InvalidInput(mistakes)
    with fleet.changes() as changes:
        run = _Run(fleet, schedule, allocations, len(configs), on_change, on_stage)
        return run.to_its_end(
            changes, lambda i, pins: _submit(fleet, train, configs, i, {**options, **pins})
        )


def _submit(
    fleet: "Fleet | SimulatedFleet",
    train: Callable[[Any], Any],
    configs: Sequence[Any],
    trial: int,
    options: dict[str, Any],
) -> Job:
    return fleet.submit(train, configs[trial], lockstep=True, name=_name(trial), **options)


def _name(trial: int) -> str:
    return f"trial-{trial}"


class _Run:
    """One run of successive halving, by one client."""

    def __init__(
        self,
        fleet: "Fleet | SimulatedFleet",
        schedule: Schedule,
        allocations: StageAllocations | None,
        trials: int,
        on_change: Callable[[int, Change], None],
        on_stage: Callable[[StageBegins], None],
    ) -> None:
        self._fleet = fleet
        self._functions = fleet.platform.limits.functions
        self._schedule = schedule
        self._allocations = allocations
        self._on_change = on_change
        self._on_stage = on_stage
        self._numbers = {_name(i): i for i in range(trials)}
        known = {job.job_id: job for job in fleet.jobs()}
        self._jobs: list[Job | None] = [known.get(name) for name in self._numbers]
        self._notes: tuple[str, ...] = ()
        self._runs: list[StageRun] = []

    def to_its_end(
        self, changes: Changes, submit: Callable[[int, dict[str, Any]], Job]
    ) -> HalvingResult:
        """All stages, from wherever the jobs are."""
        now = self._situation()
        while True:
            self._end_those_that_lost(now)
            self._runs += [self._run_of(now, i) for i in range(len(self._runs), now.stage)]
            if now.over:
                break
            pins = self._begin(now)
            for i in now.entered[-1]:
                job = self._jobs[i]
                if job is None:
                    job = self._jobs[i] = submit(i, pins)
                elif i in now.to_come and pins:
                    job.resize(**pins)
                self._let_go_on(now, i, job)
            if not self._wait(changes, now):
                break  # the fleet was closed
            now = self._situation()
        return self._result(now)

    # --- a stage ----------------------------------------------------------------------------------

    def _begin(self, now: Situation) -> dict[str, Any]:
        """Plans a stage and says so; what is pinned of its trials."""
        plan = None
        if self._allocations is not None:
            begun = self._run_of(now, now.stage) if all(self._jobs) else None
            plan = self._allocations.plan(
                self._schedule, len(self._jobs), self._functions, self._runs, begun
            )
            if not plan.feasible and all(job is None for job in self._jobs):
                raise InvalidInput(plan.notes)
            self._notes = plan.notes
        self._on_stage(StageBegins(now.stage, now.entered[-1], plan))
        if plan is None:
            return {}
        lease_s = lease_of(plan.stages[0], self._functions, self._fleet.ledger.available_usd)
        return {**vars(plan.stages[0].option.allocation), "lease_s": lease_s}

    def _let_go_on(self, now: Situation, trial: int, job: Job) -> None:
        """As far as the end of the stage; who is there already rests."""
        rung = self._schedule.rungs[now.stage]
        if trial not in now.to_come:
            job.pause()
        elif self._is_last(now) and self._schedule.to_the_end:
            job.acknowledge(rung)
            job.resume()
        elif len(job.reported) >= rung:
            job.stop(DONE)
        else:
            job.acknowledge(rung - 1)
            job.resume()

    def _wait(self, changes: Changes, now: Situation) -> bool:
        """Until all trials of a stage rest at its end, or are over; False if that never comes."""
        rung = self._schedule.rungs[now.stage]
        moving = {i for i in now.entered[-1] if not self._rests(i, rung)}
        while moving:
            change = changes.next()
            if change is None:
                return False
            i = self._numbers.get(change.job.job_id)
            if i is None:
                continue
            self._on_change(i, change)
            if change.report is not None and i in moving:
                self._reported(now, change.job, change.report.index + 1)
            elif self._rests(i, rung):
                moving.discard(i)
        return True

    def _reported(self, now: Situation, job: Job, count: int) -> None:
        rung = self._schedule.rungs[now.stage]
        if not self._is_last(now):
            if count >= rung:
                job.pause()
        elif count > rung or (count == rung and not self._schedule.to_the_end):
            job.stop(DONE)

    def _rests(self, trial: int, rung: int) -> bool:
        job = self._jobs[trial]
        assert job is not None
        if job.status in OVER:
            return True
        return job.status == PAUSED and len(job.reported) >= rung

    def _is_last(self, now: Situation) -> bool:
        return now.stage == len(self._schedule.rungs) - 1

    def _end_those_that_lost(self, now: Situation) -> None:
        for stage, trials in enumerate(now.entered[:-1]):
            for i in set(trials).difference(now.entered[stage + 1]):
                job = self._jobs[i]
                if job is not None and job.status not in OVER:
                    job.stop(f"{LOST} {stage + 1}")

    # --- what is known ----------------------------------------------------------------------------

    def _situation(self) -> Situation:
        return situation(self._schedule, [self._trial(job) for job in self._jobs])

    def _trial(self, job: Job | None) -> Trial:
        if job is None:
            return Trial()
        name = self._schedule.metric
        values = tuple(_number(report.metrics.get(name)) for report in job.reported)
        return Trial(values, job.status)

    def _run_of(self, now: Situation, stage: int) -> StageRun:
        jobs = [job for job in self._jobs if job is not None]
        return stage_run(self._schedule, jobs, now.entered, stage, self._functions)

    def _result(self, now: Situation) -> HalvingResult:
        jobs = tuple(job for job in self._jobs if job is not None)
        runs = (*self._runs, self._run_of(now, now.stage))
        lost: Counter[str] = Counter()
        for job in jobs:
            if job.status == FAILED:
                lost["failed"] += 1
            elif job.status == STOPPED and job.reason in ("budget", "deadline"):
                lost[f"stopped: {job.reason}"] += 1
        notes = [f"{count} of {len(jobs)} trials {what}" for what, count in sorted(lost.items())]
        best = None if now.best is None else jobs[now.best]
        complete = best is not None and len(best.reported) >= self._schedule.rungs[-1]
        return HalvingResult(now.best, complete, jobs, runs, (*self._notes, *notes))


def _number(value: object) -> float:
    """A reported number; nan for anything else."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if good and math.isfinite(value) else math.nan  # type: ignore[arg-type]
