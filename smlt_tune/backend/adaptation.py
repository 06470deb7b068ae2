"""What the policy of a fleet is told, and when it is asked again (paper 1b meets 1c).

The scheduler passes on what rank 0 of a job says. Here it becomes profiles for the policy, and
occasions to look at the job's allocation again:

| occasion | when |
|---|---|
| ``workload`` | the model or the batch size is another one, at once |
| ``measured`` | the first iterations of a generation have been measured |
| ``progress`` | at every tenth of the job, with pauses: what was spared so far may be used now |
| ``forecast`` | it is expected to reach its target at another epoch than at the last decision |
| ``drift`` | iterations take another time than the last decision was based on |
| ``share`` | the job may take more functions, or is asked to give some back; a few jobs at a time |
| ``time limit`` | the functions have to be started anew anyway |

A review costs the policy milliseconds, so there is one at a time, with pauses in between that bound
the share of a core that all of them take, however many jobs run.
"""

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, replace
from heapq import nsmallest
from typing import Any, TypeVar

from smlt_tune.backend.generations import Generation, Record, Seen
from smlt_tune.backend.goals import Cheapest, Fastest, is_number
from smlt_tune.backend.job import DecisionRecord
from smlt_tune.backend.late_policy import planner
from smlt_tune.backend.loss_curves import forecast, moved
from smlt_tune.backend.measurements import Measurement
from smlt_tune.backend.resource_manager.observations import (
    DEFAULT_STORE,
    Z90,
    Decision,
    Profile,
    Workload,
)
from smlt_tune.backend.resource_manager.policy import (
    AllocationPolicy,
    JobFacts,
    PinnedOrDefault,
)
from smlt_tune.errors import SmltError
from smlt_tune.runtime import wire
from smlt_tune.runtime.clock import Clock
from smlt_tune.runtime.features import ModelFeatures

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

#: Time between two reviews, in seconds: at 10 ms each, 4 % of a core.
REVIEW_PAUSE_S = 0.25
#: A generation is looked at after so many iterations, if they took so long, in seconds (the first
#: ones after a start are slower than the rest), ...
MEASURED_ITERATIONS, MEASURED_LEAST_S = 3, 1.0
#: ... or after fewer that took so long, in seconds.
MEASURED_S = 2.0
#: Features that are off by no more than this share are those of the same model.
ALIKE = 0.1
#: Shares of a job after which it is looked at again, so long after the last time, in seconds: of a
#: job that takes little there is little to save.
MILESTONES = tuple(tenth / 10 for tenth in range(1, 10))
PROGRESS_PAUSE_S = 2.0
#: Curves of a training function that are remembered, for the forecasts of its later jobs.
CURVES = 64
#: When functions have become free or are waited for, so many jobs are looked at, ...
SHARE_JOBS = 4
#: ... and not more often than this, in seconds.
SHARE_PAUSE_S = 5.0


class Adaptation:
    """Stands between the scheduler of one fleet and its policy.

    A policy that fails does not end jobs: the simplest one answers in its place.

    Args:
        policy: Chooses allocations.
        fleet: Name of the fleet; makes the names of its jobs unique in the project.
        clock: Time.
        record: Writes an event (kind, job, body) into the fleet's history.
        on_profile: Gets what a generation has measured, at its end.
        only_store: Whether there is no choice between parameter stores.
    """

    def __init__(
        self,
        policy: AllocationPolicy,
        fleet: str,
        clock: Clock,
        record: Callable[[str, str, dict[str, Any]], None],
        on_profile: Callable[[Profile], None] | None,
        *,
        only_store: bool,
    ) -> None:
        self._policy = policy
        self._fleet = fleet
        self._clock = clock
        self._record = record
        self._on_profile = on_profile
        self._only_store = only_store
        self._due: dict[str, str] = {}
        self._curves: dict[tuple[str, str], dict[str, list[float]]] = {}
        self._review_after_s = 0.0
        self._shares_changed = False
        self._shares_after_s = 0.0

    def name(self, job_id: str) -> str:
        """Of a job in the project."""
        return f"{self._fleet}/{job_id}"

    # --- what the policy decides ------------------------------------------------------------------

    def first(self, job: Record, facts: JobFacts, occasion: str) -> Decision:
        """For a job that has no functions."""
        decision = _on_usable_store(self._ask(lambda policy: policy.first(facts)), facts)
        self._decided(job, decision, occasion)
        return decision

    def after_out_of_memory(
        self, job: Record, generation: Generation, facts: JobFacts, peak_mb: float
    ) -> Decision | None:
        """For a job whose worker exceeded its memory; None to give up."""
        limit_mb = generation.allocation.memory_mb
        if job.workload is not None:
            profile = Profile(
                self.name(job.job_id),
                job.workload,
                generation.allocation,
                iterations=0,
                iteration_s=0.0,
                peak_mb=max(peak_mb, float(limit_mb)),
                out_of_memory=True,
            )
            job.measurements.pop(_key(job.workload, generation), None)  # this takes its place
            self._ask(lambda policy: policy.observe(profile))
            self._keep(job, profile)
        decision = self._ask(lambda policy: policy.after_out_of_memory(facts, peak_mb))
        if decision is None:
            return None
        decision = _on_usable_store(decision, facts)
        self._decided(job, decision, "out of memory")
        return decision

    def review(self, job: Record, facts: JobFacts, occasion: str) -> Decision | None:
        """For a job that runs; None to stay with what it has."""
        current = job.current
        assert current is not None
        self._due.pop(job.job_id, None)
        job.decided_forecast = job.forecast
        measurement = job.measurements.get(_key(job.workload, current))
        if measurement is not None and measurement.iterations:
            job.iteration_s = self._tell(measurement).iteration_s  # it decides on the newest
            measurement.decided()
        decision = self._ask(lambda policy: policy.review(facts))
        if decision is not None:
            decision = _on_usable_store(decision, facts)
        now = self._clock.monotonic()
        self._review_after_s = now + REVIEW_PAUSE_S
        if not job.reviewed_s:
            self._say_if_infeasible(facts)
        job.reviewed_s = now
        if decision is None or decision.allocation == current.allocation:
            if not current.reviewed:  # that it stays is told once
                stay = decision or Decision(current.allocation, "nothing is worth a move")
                self._decided(job, stay, occasion)
            current.reviewed = True
            return None
        self._decided(job, decision, occasion)
        return decision

    def next_review(
        self, jobs: Mapping[str, Record], shares: Callable[[], Callable[[Record], int]]
    ) -> tuple[Record, str] | None:
        """The job to look at now, and the occasion; None if there is none, or one was just now.

        Args:
            jobs: All that have functions.
            shares: Gives what gives the functions that a job may have.
        """
        now = self._clock.monotonic()
        if self._shares_changed and now >= self._shares_after_s:
            self._shares_changed, self._shares_after_s = False, now + SHARE_PAUSE_S
            share = shares()
            able = [j for j in jobs.values() if j.steady and _may_resize(j, share(j))]
            for job in nsmallest(SHARE_JOBS, able, key=lambda j: j.reviewed_s):
                self._due.setdefault(job.job_id, "share")
        if now < self._review_after_s:
            return None
        for job_id, occasion in list(self._due.items()):
            if job_id not in jobs:
                del self._due[job_id]
            elif jobs[job_id].steady and not jobs[job_id].workload_changed:
                del self._due[job_id]
                return jobs[job_id], occasion
        return None

    def may_review(self, job: Record) -> bool:
        """Whether there is something to choose, and the last review was long enough ago."""
        return not self.is_pinned(job) and self._clock.monotonic() >= self._review_after_s

    def is_pinned(self, job: Record) -> bool:
        """Whether its user has left nothing to choose."""
        bounds = job.state.spec.bounds
        store_is_open = bounds.store is None and not self._only_store
        return not (store_is_open or bounds.workers is None or bounds.memory_mb is None)

    def shares_changed(self) -> None:
        """A job has ended, or waits for functions."""
        self._shares_changed = True

    # --- what rank 0 says -------------------------------------------------------------------------

    def workload(self, job: Record, event: wire.Workload) -> None:
        """It knows what it computes, or that has changed."""
        features = ModelFeatures(
            event.parameters, event.gradient_bytes, event.flops_per_sample, event.activation_bytes
        )
        told = Workload(features, event.batch, event.iterations, job.state.spec.function)
        before, job.workload = job.workload, told
        if before is None or not _alike(before, told):
            job.workload_changed = True
            self._record("workload", job.job_id, asdict(told))

    def progress(self, job: Record, generation: Generation, event: wire.Progress) -> None:
        """It is at work."""
        self._note_hand_over(job, generation, event)
        if event.left is not None:
            job.left = event.left
        if event.other_share is not None:
            job.other_share = event.other_share
        occasion = self._measure(job, generation, event) if event.chunk else ""
        milestones = bisect_right(MILESTONES, _share_done(job))
        rested = self._clock.monotonic() >= job.reviewed_s + PROGRESS_PAUSE_S
        if milestones > job.milestones and rested:
            job.milestones = milestones
            if _enough(generation):  # else it is looked at soon
                occasion = occasion or "progress"
        if job.workload_changed:
            job.workload_changed = False
            occasion = "workload"
        if not occasion or self.is_pinned(job):
            return
        if occasion == "workload":  # whatever it has now was meant for something else
            self._due.pop(job.job_id, None)
            self._due = {job.job_id: occasion, **self._due}
        self._due.setdefault(job.job_id, occasion)

    def reported(self, job: Record) -> bool:
        """It has reported; returns whether it has reached its target."""
        target, reports = job.state.spec.target, job.state.reports
        if target is None:
            return False
        values = [_number(report.metrics.get(target.metric)) for report in reports]
        values = [math.nan] * job.state.spec.first_report + values
        siblings = self._siblings(job, target.metric, values)
        if any(target.reaches(value) for value in values):
            return True
        job.forecast = found = forecast(
            values,
            target.value,
            falling=target.mode == "min",
            best=target.best,
            siblings=siblings,
        )
        if job.left is None or job.workload is None or job.workload.iterations is None:
            return False
        job.beyond, job.left_sd = 0, 0.0
        if found is not None and not found.never:
            an_epoch = (job.workload.iterations - job.left) / len(values)
            ends = (found.epochs.mid - len(values), found.epochs.high - len(values))
            expected, most = (max(1, round(min(job.left, end * an_epoch))) for end in ends)
            job.beyond, job.left_sd = max(0, job.left - expected), math.log(most / expected) / Z90
        if moved(job.decided_forecast, found) and not self.is_pinned(job):
            self._due.setdefault(job.job_id, "forecast")
        return False

    def _siblings(self, job: Record, metric: str, values: list[float]) -> list[list[float]]:
        """Curves of the fleet's other jobs of its function and metric; remembers its own."""
        curves = self._curves.setdefault((job.state.spec.function, metric), {})
        curves[job.job_id] = values
        if len(curves) > CURVES:
            del curves[next(iter(curves))]
        return [curve for job_id, curve in curves.items() if job_id != job.job_id]

    def finished(self, job: Record, generation: Generation, event: wire.Finished) -> None:
        """It has trained to its end: only now is known what it did besides, and after that."""
        measurement = job.measurements.get(_key(job.workload, generation))
        if event.other_share is not None:
            job.other_share = event.other_share
        if measurement is not None:
            measurement.other_share, measurement.end_s = job.other_share, event.end_s
            measurement.kept = 0  # so that it is kept with that

    def generation_over(self, job: Record, generation: Generation) -> None:
        """Its functions are gone: what was measured is kept for the siblings."""
        for measurement in list(job.measurements.values()):
            if measurement.allocation == generation.allocation:
                measurement.peak_mb = max(measurement.peak_mb, generation.peak_mb)
                if measurement.iterations != measurement.kept:
                    measurement.kept = measurement.iterations
                    self._keep(job, self._tell(measurement))

    def _note_hand_over(self, job: Record, generation: Generation, event: wire.Progress) -> None:
        """What passes from the last iteration before a hand-over to the end of the first after it.

        Nobody sees both ends, so it is taken from signs of training before and after.
        """
        if event.left is None or not event.iterations:
            return
        now, before = self._clock.monotonic(), job.seen
        pace_s = event.iteration_s
        if before is not None and before.generation is generation:
            pace_s = pace_s or before.iteration_s
        elif before is not None and before.iteration_s and event.left < before.left:
            old = before.generation
            if old.left and generation.invoked_s < old.closed_s:  # it was there already
                between = before.left - event.left - 1
                generation.gap_s = now - before.at_s - between * before.iteration_s
        job.seen = Seen(generation, now, event.left, pace_s)

    def _measure(self, job: Record, generation: Generation, event: wire.Progress) -> str:
        """Adds a chunk of iterations; returns an occasion to look at the job, if it is one."""
        if job.workload is None or event.iteration_s <= 0.0:
            return ""
        key = _key(job.workload, generation)
        if key not in job.measurements:
            job.measurements[key] = Measurement(
                self.name(job.job_id), job.workload, generation.allocation
            )
        measurement = job.measurements[key]
        measurement.add(event.chunk, event.iteration_s, event.sync_s)
        measurement.other_share = job.other_share
        measurement.start_s = generation.start_s
        measurement.hold_up_s = max(0.0, generation.gap_s - event.iteration_s)
        measurement.peak_mb = max(measurement.peak_mb, generation.peak_mb)
        drifted = measurement.drifted
        if drifted:
            measurement.forget_the_past()
            measurement.decided()
        if drifted or measurement.worth_telling:
            job.iteration_s = self._tell(measurement).iteration_s
        before = _enough(generation)
        generation.measured += event.chunk
        generation.measured_s += event.chunk * event.iteration_s
        if _enough(generation) and not before:
            return "measured"
        return "drift" if drifted else ""

    # --- small things -----------------------------------------------------------------------------

    def _ask(self, question: Callable[[AllocationPolicy], _T]) -> _T:
        try:
            return question(self._policy)
        except Exception:  # noqa: BLE001 - a policy may be anybody's
            _LOG.exception("the allocation policy failed; the default one decides this time")
            return question(PinnedOrDefault())

    def _tell(self, measurement: Measurement) -> Profile:
        profile = measurement.profile()
        self._ask(lambda policy: policy.observe(profile))
        return profile

    def _keep(self, job: Record, profile: Profile) -> None:
        self._record("profile", job.job_id, asdict(profile))
        if self._on_profile is not None:
            try:
                self._on_profile(profile)
            except SmltError as error:
                _LOG.warning("a profile of job %s was not kept: %s", job.job_id, error)

    def _decided(self, job: Record, decision: Decision, occasion: str) -> None:
        now = self._clock.monotonic()
        entry = DecisionRecord(
            occasion,
            decision.allocation,
            decision.reason,
            dict(decision.evidence),
            0.0 if job.begun_s is None else now - job.begun_s,
        )
        self._record("decision", job.job_id, entry.to_json())
        job.state.update(decisions=[*job.state.decisions, entry])

    def _say_if_infeasible(self, facts: JobFacts) -> None:
        """Once per job, as soon as it is known what it computes."""
        if facts.workload is None or facts.goal in (Cheapest(), Fastest()):
            return
        try:
            able = planner(self._policy)
            plan = able.plan(facts) if able else None
        except Exception:  # noqa: BLE001 - a policy may be anybody's
            _LOG.exception("the allocation policy could not say whether the goal can be reached")
            return
        if plan is not None and not plan.feasible:
            _LOG.warning("job %s: %s", facts.job_id, " ".join(plan.notes))


def _on_usable_store(decision: Decision, facts: JobFacts) -> Decision:
    """A policy may not know that a store does not answer any more."""
    if decision.allocation.store in facts.stores:
        return decision
    return replace(decision, allocation=replace(decision.allocation, store=DEFAULT_STORE))


def _number(value: object) -> float:
    return float(value) if is_number(value) else math.nan


def _alike(a: Workload, b: Workload) -> bool:
    """Whether what was decided for the one holds for the other."""
    pairs = zip(astuple(a.features), astuple(b.features), strict=True)
    near = all(abs(x - y) <= ALIKE * max(x, y) for x, y in pairs)
    return near and a.batch == b.batch


def _key(workload: Workload | None, generation: Generation) -> Any:
    """What makes a measurement: how long the job is does not."""
    return (replace(workload, iterations=None) if workload else None, generation.allocation)


def _enough(generation: Generation) -> bool:
    enough = generation.measured >= MEASURED_ITERATIONS
    return generation.measured_s >= (MEASURED_LEAST_S if enough else MEASURED_S)


def _share_done(job: Record) -> float:
    total = job.workload.iterations if job.workload else None
    return 1.0 - job.left / total if total and job.left is not None else 0.0


def _may_resize(job: Record, share: int) -> bool:
    """Whether the number of its workers may change, and its share is another one."""
    bounds, current = job.state.spec.bounds, job.current
    if bounds.workers is not None or current is None:
        return False
    most = share if bounds.max_workers is None else min(share, bounds.max_workers)
    return most != current.allocation.workers
