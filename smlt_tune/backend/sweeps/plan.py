"""What a sweep will take, before it costs anything.

A few configurations of the space stand for all: drawn by a Latin hypercube, so that each setting is
seen over its whole range, and the two corners where every setting is at its lowest and at its
highest, which show how far trials may differ. The drawn ones are planned like single jobs that have
their fair share of the platform's functions; a sweep of T trials is taken to repeat them in turn,
first come, first served.

With T trials and n drawn configurations, the mean of the trials is known up to the relative error
``t v sqrt(1/n + 1/T)``, where v is the coefficient of variation of the drawn ones and t the 95 %
quantile of Student's distribution with n - 1 degrees of freedom. Of T listed candidates, n of which
were looked at, it is ``t v sqrt(1/n - 1/T)``: nothing is drawn if all were.

The resource manager errs for all trials in the same direction, so the low ends of its intervals are
added up as they are, and the high ends too. Drawing errs independently of that; both are combined
as independent errors of the logarithm. A trial that a pruner ends early takes less than is said.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import cycle, islice, pairwise
from typing import Any

import numpy as np

from smlt_tune.backend.goals import Goal
from smlt_tune.backend.planning import DRY_RUN_S, JobPlan, plan_job
from smlt_tune.backend.platforms.base import PlatformLimits
from smlt_tune.backend.resource_manager.observations import Allocation, Interval, Prediction
from smlt_tune.backend.resource_manager.policy import Bounds, JobFacts, Plans, check
from smlt_tune.backend.sweeps import words
from smlt_tune.backend.sweeps.drawing import at
from smlt_tune.backend.sweeps.sweep import Sweep
from smlt_tune.errors import InvalidInput

#: Configurations drawn from the space.
DRAWN = 4
_CORNERS = ("lowest", "highest")
#: Up to so many candidates are all looked at.
_ALL = DRAWN + 2
#: 95 % quantile of Student's distribution with DRAWN - 1 degrees of freedom.
_STUDENT = 2.353
#: Most points of the front, and most prices of time that are tried for it.
_FRONT, _PRICES = 12, 40


@dataclass(frozen=True)
class Sample:
    """One configuration of the space.

    Attributes:
        name: ``lowest``, ``highest`` or ``drawn 1``.
        params: Its settings.
        job: Its plan.
    """

    name: str
    params: Mapping[str, Any]
    job: JobPlan


@dataclass(frozen=True)
class Outcome:
    """What the whole sweep takes with certain allocations.

    Attributes:
        allocations: Of the drawn configurations, in turn.
        time_s: Until the last trial ends, seconds.
        cost_usd: Of all trials, USD.
    """

    allocations: tuple[Allocation, ...]
    time_s: Interval
    cost_usd: Interval


@dataclass(frozen=True)
class SweepPlan:
    """What is known of a sweep before it costs anything.

    Attributes:
        samples: The corners and the drawn configurations.
        chosen: With what the resource manager would take for each trial.
        front: What other allocations would take: nothing beats these in both time and cost.
        affordable: Trials that the budget pays for; None without a budget.
        in_time: Trials that end by the deadline; None without a deadline.
        feasible: Whether all trials are expected to fit into budget and deadline.
        notes: What the user should know, one sentence each.
    """

    samples: tuple[Sample, ...]
    chosen: Outcome
    front: tuple[Outcome, ...]
    affordable: Interval | None
    in_time: Interval | None
    feasible: bool
    notes: tuple[str, ...]

    @property
    def typical(self) -> list[Sample]:
        """The samples that stand for all trials: those that are not corners."""
        return _typical(self.samples)


def plan_sweep(
    sweep: Sweep,
    *,
    policy: Plans,
    limits: PlatformLimits,
    goal: Goal | None = None,
    datasets: Mapping[str, Any] | None = None,
    timeout_s: float = DRY_RUN_S,
    progress: Callable[[str], None] = lambda _: None,
) -> SweepPlan:
    """Plans a sweep without starting a trial.

    Args:
        sweep: The sweep.
        policy: Predicts.
        limits: Of its platform.
        goal: Of each trial; the cheapest by default.
        datasets: Arrays (or a tuple of them) of the data sets that the function asks for by name.
        timeout_s: How long a training function may take to the end of its first iteration, seconds.
        progress: Is told what is looked at.

    Raises:
        InvalidInput: What the file fixes is not possible on the platform; every mistake once.
        UsageError: The function does not train, or what it computes cannot be measured.
        TrainingFunctionError: The function raised; carries the traceback.
        FunctionLost: It did not come to the end of an iteration.
    """
    if mistakes := mistakes_of(sweep, limits):
        raise InvalidInput(mistakes)
    share = max(1, limits.functions // min(sweep.parallel, sweep.trials))
    known: list[tuple[Mapping[str, Any], JobPlan]] = []
    samples = []
    for name, params in configurations_of(sweep):
        job = next((one for seen, one in known if seen == params), None)
        if job is None:
            progress(f"{name}: {words.settings(dict(params))}")
            job = plan_job(
                sweep.train,
                sweep.config_of(params),
                policy=policy,
                limits=limits,
                goal=goal,
                bounds=bounds_of(sweep, params),
                functions=share,
                datasets=datasets,
                timeout_s=timeout_s,
            )
            known.append((params, job))
        samples.append(Sample(name, params, job))
    return _summary(sweep, tuple(samples), limits)


def configurations_of(sweep: Sweep) -> list[tuple[str, dict[str, Any]]]:
    """The corners of the space and what is drawn from it, by name; the same for the same seed.

    Of candidates, all if they are few, otherwise some.
    """
    space = sweep.space
    if sweep.candidates:
        listed = [(f"candidate {i}", one) for i, one in enumerate(sweep.configurations(), 1)]
        return words.thinned(listed, len(listed) if len(listed) <= _ALL else DRAWN)
    random = np.random.default_rng(sweep.seed)
    strata = np.stack([random.permutation(DRAWN) for _ in space], axis=1)
    drawn = (strata + random.random(strata.shape)) / DRAWN
    return [
        ("lowest", at(space, [0.0] * len(space))),
        ("highest", at(space, [1.0] * len(space))),
        *((f"drawn {number}", at(space, row)) for number, row in enumerate(drawn.tolist(), 1)),
    ]


def typical_of(sweep: Sweep) -> list[dict[str, Any]]:
    """Configurations that stand for all trials: those that are not corners."""
    return [params for name, params in configurations_of(sweep) if name not in _CORNERS]


def bounds_of(sweep: Sweep, params: Mapping[str, Any]) -> Bounds:
    """What the file fixes for a trial with these settings."""
    workers, memory_mb = sweep.workers_of(params), sweep.memory_mb
    return Bounds(workers=workers, memory_mb=memory_mb, max_workers=sweep.max_workers)


def mistakes_of(sweep: Sweep, limits: PlatformLimits) -> list[str]:
    """What the file fixes and the platform cannot do, one sentence each; empty if it can."""
    found = [
        f"{sweep.path}: {mistake}"
        for _, params in configurations_of(sweep)
        for mistake in check(JobFacts("plan", limits, bounds=bounds_of(sweep, params)))
    ]
    return list(dict.fromkeys(found))


def _summary(sweep: Sweep, samples: tuple[Sample, ...], limits: PlatformLimits) -> SweepPlan:
    drawn = [sample.job.plan for sample in _typical(samples)]
    chosen = outcome([plan.chosen for plan in drawn], sweep, limits)
    front = _front([(plan.chosen, *plan.front) for plan in drawn], sweep, limits)
    affordable = in_time = None
    if sweep.budget_usd is not None:
        affordable = _affordable(sweep.budget_usd, chosen, sweep.trials)
    if sweep.deadline_s is not None:
        in_time = _in_time(sweep.deadline_s, [plan.chosen for plan in drawn], chosen, sweep, limits)
    notes = _limit_notes(sweep, chosen, front, affordable, in_time)
    feasible = not notes
    if sweep.pruner.name != "none":
        notes.append("trials that the pruner ends early take less than this")
    notes += _notes_of(samples)
    return SweepPlan(samples, chosen, front, affordable, in_time, feasible, tuple(notes))


def _typical(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.name not in _CORNERS]


def _notes_of(samples: Sequence[Sample]) -> list[str]:
    """What is to be known of single configurations; of which, unless of all."""
    names: dict[str, list[str]] = {}
    for sample in samples:
        for note in sample.job.plan.notes:
            names.setdefault(note, []).append(sample.name)
    return [
        note if len(of) == len(samples) else f"{', '.join(of)}: {note}"
        for note, of in names.items()
    ]


def outcome(jobs: Sequence[Prediction], sweep: Sweep, limits: PlatformLimits) -> Outcome:
    """What a sweep takes whose trials repeat some jobs in turn.

    Args:
        jobs: One prediction for each drawn configuration.
        sweep: How many trials, and how many at once.
        limits: How many functions.
    """
    costs = [job.cost_usd for job in jobs]
    share = sweep.trials / len(jobs)
    cost = Interval(
        share * sum(c.low for c in costs),
        share * sum(c.mid for c in costs),
        share * sum(c.high for c in costs),
    )
    ends = [max(_ends(jobs, end, sweep, limits)) for end in ("low", "mid", "high")]
    return Outcome(
        tuple(job.allocation for job in jobs),
        _widened(Interval(*ends), [job.time_s.mid for job in jobs], sweep),
        _widened(cost, [c.mid for c in costs], sweep),
    )


def _ends(
    jobs: Sequence[Prediction], end: str, sweep: Sweep, limits: PlatformLimits
) -> list[float]:
    """When each trial ends, seconds: first come, first served, all workers of a trial or none."""
    running: list[tuple[float, int]] = []
    now, busy, ends = 0.0, 0, []
    for job in islice(cycle(jobs), sweep.trials):
        workers = job.allocation.workers
        while running and (len(running) >= sweep.parallel or busy + workers > limits.functions):
            now, freed = heappop(running)
            busy -= freed
        ends.append(now + float(getattr(job.time_s, end)))
        heappush(running, (ends[-1], workers))
        busy += workers
    return ends


def _widened(sum_: Interval, of_jobs: Sequence[float], sweep: Sweep) -> Interval:
    """Adds what is not known because only a few configurations were looked at."""
    mean = sum(of_jobs) / len(of_jobs)
    variance = sum((one - mean) ** 2 for one in of_jobs) / max(1, len(of_jobs) - 1)
    sign = -1 if sweep.candidates else 1
    share = 1 / len(of_jobs) + sign / sweep.trials
    drawing = _STUDENT * math.sqrt(variance * share) / mean
    below = math.hypot(math.log(sum_.mid / sum_.low), drawing)
    above = math.hypot(math.log(sum_.high / sum_.mid), drawing)
    return Interval(sum_.mid * math.exp(-below), sum_.mid, sum_.mid * math.exp(above))


def _front(
    options: Sequence[Sequence[Prediction]], sweep: Sweep, limits: PlatformLimits
) -> tuple[Outcome, ...]:
    """Outcomes that nothing beats, by time.

    Every trial takes the one of its options that minimises cost + price of time x time; the price
    runs over all at which some trial changes its mind.
    """
    prices = {0.0}
    for of_one in options:
        by_time = sorted((p.time_s.mid, p.cost_usd.mid) for p in of_one)
        prices |= {
            (c1 - c2) / (t2 - t1) * 1.001 for (t1, c1), (t2, c2) in pairwise(by_time) if t2 > t1
        }
    found: dict[tuple[Allocation, ...], Outcome] = {}
    for price in words.thinned(sorted(price for price in prices if price >= 0), _PRICES):
        taken = [min(one, key=lambda p: p.cost_usd.mid + price * p.time_s.mid) for one in options]
        one = outcome(taken, sweep, limits)
        found[one.allocations] = one
    best: list[Outcome] = []
    for one in sorted(found.values(), key=lambda o: (o.time_s.mid, o.cost_usd.mid)):
        if not best or one.cost_usd.mid < best[-1].cost_usd.mid:
            best.append(one)
    return tuple(words.thinned(best, _FRONT))


def _affordable(budget_usd: float, chosen: Outcome, trials: int) -> Interval:
    low, mid, high = (
        float(min(trials, math.floor(trials * budget_usd / cost * (1 + 1e-9))))
        for cost in (chosen.cost_usd.high, chosen.cost_usd.mid, chosen.cost_usd.low)
    )
    return Interval(low, mid, high)


def _in_time(
    deadline_s: float,
    jobs: Sequence[Prediction],
    chosen: Outcome,
    sweep: Sweep,
    limits: PlatformLimits,
) -> Interval:
    ends = _ends(jobs, "mid", sweep, limits)
    low, mid, high = (
        float(sum(end * total / chosen.time_s.mid <= deadline_s for end in ends))
        for total in (chosen.time_s.high, chosen.time_s.mid, chosen.time_s.low)
    )
    return Interval(low, mid, high)


def _limit_notes(
    sweep: Sweep,
    chosen: Outcome,
    front: Sequence[Outcome],
    affordable: Interval | None,
    in_time: Interval | None,
) -> list[str]:
    """One sentence for each limit that is not expected to hold, with the nearest that would."""
    notes = []
    budget, deadline = sweep.budget_usd, sweep.deadline_s
    if budget is not None and affordable is not None and chosen.cost_usd.mid > budget:
        notes.append(
            f"the budget of {words.usd(budget)} pays for about {affordable.mid:.0f} of "
            f"{sweep.trials} trials ({affordable.low:.0f} to {affordable.high:.0f}); all of them "
            f"are expected to cost {words.usd(chosen.cost_usd.mid)}"
        )
    if deadline is not None and in_time is not None and chosen.time_s.mid > deadline:
        soonest = min((chosen, *front), key=lambda one: one.time_s.mid)
        notes.append(
            f"about {in_time.mid:.0f} of {sweep.trials} trials end within "
            f"{words.seconds(deadline)} ({in_time.low:.0f} to {in_time.high:.0f}); all of them are "
            f"expected to take {words.seconds(chosen.time_s.mid)}, with other allocations at best "
            f"{words.seconds(soonest.time_s.mid)} for {words.usd(soonest.cost_usd.mid)}"
        )
    return notes
