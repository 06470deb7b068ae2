"""What each allocation would do for the rest of a job, and which of them is best."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from smlt_tune.backend.goals import Cheapest, Fastest, Goal
from smlt_tune.backend.prices import Prices
from smlt_tune.backend.resource_manager.grid import Grid
from smlt_tune.backend.resource_manager.memory import Holdings, MemoryModel
from smlt_tune.backend.resource_manager.observations import (
    Z90,
    Allocation,
    Interval,
    Option,
    Prediction,
    Profile,
    Workload,
)
from smlt_tune.backend.resource_manager.physics import (
    IterationTime,
    JobTerms,
    Points,
    free_bandwidth,
    sample_flops,
)
from smlt_tune.backend.resource_manager.policy import JobFacts
from smlt_tune.backend.resource_manager.tables import PlatformTable, StoreTable

if TYPE_CHECKING:
    from smlt_tune.backend.resource_manager.gaussian_process import GaussianProcess

Array = NDArray[np.float64]

#: The goal's limit has a price: so many per cent of what the goal minimises for each per cent by
#: which the limit is expected to be exceeded, luck and ill luck weighed. At first little: that may
#: still be won back; more and more, the more of the limit is used once a move could take effect.
EXCESS_WEIGHTS = 2.5, 20.0
#: For how long a new pace is looked at before the job moves again, in seconds.
LOOK_S = 1.5
#: The limit is at risk where a job is expected to use more than this share of what is left of it.
RISK_SHARE = 0.99
#: The same at the beginning of a job is more by this, if there is an allocation that would keep the
#: limit by twice as much: paces vary, and moves cost.
PATIENCE = 0.05
#: A goal is refused if even that many standard deviations of luck would not do.
REFUSED_Z = 3.0
#: Least probability that the memory is enough.
FITS = 0.95
#: Least share of an iteration for computation and for synchronisation to be told apart.
LEAST_PART = 0.02
#: Weight of what the goal does not ask for: cheapest still prefers the faster of two equals.
TIE = 0.05
#: If the limit cannot be kept, what exceeds it hardly more than the least possible will do, too;
#: both by so many standard deviations more than expected: no hoping for what is hardly known.
NEARLY, SURE_Z = 1.03, 0.5
#: By how much the pace of a whole job may still change: other load on the machine, say; ln.
PACE_SD = 0.08
#: Least standard deviation of ln(time) of a whole job.
JOB_SD = 0.02
#: For how long a hand-over holds up training, as long as none was seen, in seconds.
HOLD_UP_S = 0.4
#: Weight of the assumption that what is done after the last epoch is done in parts.
END_RIDGE = 0.1
#: What a job of unknown length is assumed to have left, iterations: only ratios matter then.
UNKNOWN_ITERATIONS = 1000


@dataclass(frozen=True)
class Knowledge:
    """All that a decision about one job can be based on."""

    table: PlatformTable
    stores: Mapping[str, StoreTable]
    prices: Prices
    model: IterationTime
    near: list[Profile]
    facts: JobFacts

    @property
    def workload(self) -> Workload:
        """Of the job."""
        assert self.facts.workload is not None
        return self.facts.workload

    def trials(self) -> dict[str, int]:
        """Numbers of the jobs; that of this one is 0."""
        numbers = {self.facts.job_id: 0}
        for profile in self.near:
            numbers.setdefault(profile.job_id, len(numbers))
        return numbers

    def models(self, workloads: Iterable[Workload]) -> Array:
        """A number for each, the same for equal models of one function; 0 for that of this job."""
        numbers = {_model_of(self.workload): 0}
        every = [numbers.setdefault(_model_of(work), len(numbers)) for work in workloads]
        return np.array(every, dtype=np.float64)

    def process(self, *, residual: bool) -> "GaussianProcess":
        """The posterior of the time per iteration."""
        from smlt_tune.backend.resource_manager.gaussian_process import (
            GaussianProcess,
            Measurements,
        )

        numbers = self.trials()
        timed = [p for p in self.near if not p.out_of_memory and p.iteration_s > 0]
        # What its workers have computed by themselves: of this job only, to keep matrices small.
        apart = [p for p in timed if p.job_id == self.facts.job_id and _is_split(p)]
        every = [*timed, *apart]
        seconds = [p.iteration_s for p in timed] + [p.iteration_s - p.sync_s for p in apart]
        grid = Grid.of([p.allocation for p in every], list(self.stores))
        measured = Measurements(
            at=self.points(grid, [p.workload for p in every]),
            ln_s=np.log(seconds),
            iterations=np.array([float(p.iterations) for p in every]),
            trials=np.array([float(numbers[p.job_id]) for p in every]),
            models=self.models(p.workload for p in every),
            whole=np.arange(len(every)) < len(timed),
        )
        return GaussianProcess(self.model, measured, residual=residual)

    def of(self, grid: Grid, process: "GaussianProcess", memory: MemoryModel) -> Array:
        """What is expected of each allocation of a grid.

        Returns:
            Mean and standard deviation of ln(time per iteration), and the probability that the
            memory is enough; shape (3, p).
        """
        here = np.zeros(len(grid.workers))
        holdings = _holdings([self.workload] * len(here), grid.workers, here)
        mean, sd = process.predict(self.points(grid), trials=here, models=here)
        return np.stack([mean, sd, memory.fits(holdings, grid.memory_mb)])

    def memory(self) -> MemoryModel:
        """The posterior of the peak memory."""
        numbers = self.trials()
        seen = [p for p in self.near if p.peak_mb > 0]
        holdings = _holdings(
            [p.workload for p in seen],
            np.array([float(p.allocation.workers) for p in seen]),
            np.array([float(numbers[p.job_id]) for p in seen]),
        )
        return MemoryModel(holdings, [p.peak_mb for p in seen], [p.out_of_memory for p in seen])

    def points(self, grid: Grid, workloads: list[Workload] | None = None) -> Points:
        """Points of the grid; for this job's workload, or one for each."""
        size = len(grid.workers)
        work = [self.workload] if workloads is None else workloads
        load = self.facts.store_load

        def array(values: list[float]) -> Array:
            whole = np.array(values, dtype=np.float64)
            return np.full(size, whole[0]) if workloads is None else whole

        free = [
            free_bandwidth(t, load.get(name, 0.0) if workloads is None else 0.0)
            for name, t in self.stores.items()
        ]
        return Points(
            workers=grid.workers,
            memory_mb=grid.memory_mb,
            parameters=array([max(1, w.features.parameters) for w in work]),
            sync_bytes=array([max(1, w.features.gradient_bytes) for w in work]),
            flops=array([sample_flops(w.features) for w in work]),
            batch=array([max(1, w.batch) for w in work]),
            latency_s=np.array([t.latency_s for t in self.stores.values()])[grid.store],
            store_bandwidth=np.array(free)[grid.store],
        )

    def iterations_left(self) -> int | None:
        """Told, or as many samples as siblings of the same function have needed."""
        facts, work = self.facts, self.workload
        told = work.iterations if facts.iterations_left is None else facts.iterations_left
        if told is not None:
            return told
        samples = [
            p.workload.iterations * p.workload.batch
            for p in self._of_the_function()
            if p.workload.iterations
        ]
        return round(median(samples) / max(1, work.batch)) if samples else None

    def other_share(self) -> float:
        """Told, or that of the nearest siblings."""
        if self.facts.other_share is not None:
            return self.facts.other_share
        return _typical((p.other_share for p in self._of_the_function()), 8)

    def end_s(self, grid: Grid) -> Array:
        """After the last epoch, of every allocation of a grid: by what the nearest siblings took.

        Of a worker's speed and of a part for each worker, as loops over ``session.batches`` are,
        if they do not say otherwise: the exponent of the workers is fitted to them by ridge
        regression towards 1.
        """
        known = [(p, p.end_s) for p in self._of_the_function() if p.end_s is not None][:4]
        if not known:
            return np.zeros(len(grid.workers))
        at = [p.allocation for p, _ in known]
        ln_n = np.log([float(where.workers) for where in at])
        speed = self.table.speed_at(np.array([float(where.memory_mb) for where in at]))
        ln_work = np.log(np.maximum([end_s for _, end_s in known], 1e-6) * speed)
        x, y = ln_n - ln_n.mean(), ln_work - ln_work.mean()
        exponent = min(1.0, max(0.0, float((END_RIDGE - x @ y) / (END_RIDGE + x @ x))))
        one = np.exp(np.median(ln_work + exponent * ln_n))
        return np.asarray(one / grid.workers**exponent / self.table.speed_at(grid.memory_mb))

    def start_s(self) -> float:
        """From an invocation until its worker trains."""
        seen = [p.start_s for p in self.near if p.start_s > 0]
        return median(seen[:16]) if seen else self.facts.start_s or self.table.start_s

    def hold_up_s(self) -> float:
        """For how long a hand-over holds up training: the job itself, or the nearest siblings.

        It depends on the size of the model more than anything else.
        """
        seen = [p for p in self.near if p.hold_up_s > 0]
        own = [p for p in seen if p.job_id == self.facts.job_id]
        alike = [p.hold_up_s for p in own or seen[:4]]
        return median(alike) if alike else HOLD_UP_S

    def _of_the_function(self) -> list[Profile]:
        """Profiles of the same training function, the nearest first."""
        function = self.workload.function
        return [p for p in self.near if p.workload.function == function]


def _model_of(workload: Workload) -> tuple[str, int, int, str]:
    """What makes two models equal.

    Not their activations, in which something is counted that does not grow with the batch (of 4
    samples of a worker another share than of 32), nor the last digits of an average over samples.
    """
    of = workload.features
    return workload.function, of.parameters, of.gradient_bytes, f"{of.flops_per_sample:.3g}"


def _typical(values: Iterable[float | None], most: int) -> float:
    """The median of the first that are known, at most so many; 0 if none is."""
    known = [value for value in values if value is not None][:most]
    return median(known) if known else 0.0


def _is_split(profile: Profile) -> bool:
    """Whether it tells computation and synchronisation apart."""
    waiting = profile.sync_s / profile.iteration_s
    return profile.allocation.workers > 1 and LEAST_PART < waiting < 1.0 - LEAST_PART


def _holdings(workloads: list[Workload], workers: Array, trials: Array) -> Holdings:
    batch = np.array([float(w.batch) for w in workloads])
    kept = np.array([w.features.activation_bytes for w in workloads])
    return Holdings(
        parameters=np.array([float(w.features.parameters) for w in workloads]),
        activation_bytes=kept * np.ceil(batch / workers),
        trials=trials,
    )


class Outlook:
    """What each of some allocations would do for the rest of a job, and which is best."""

    def __init__(
        self, known: Knowledge, grid: Grid, expected: Array, current: Allocation | None
    ) -> None:
        self._known = known
        self._facts = known.facts
        self._names = list(known.stores)
        self._grid = grid
        self.workers, self.memory_mb = grid.workers, grid.memory_mb
        size = len(grid.workers)
        self._mean, sd, self._fits = expected
        self._sd = np.hypot(sd, JOB_SD)
        # Of the whole job: how much is left to do may be a forecast, too.
        self._job_sd = np.hypot(self._sd, known.facts.left_sd)
        self.own = sum(p.job_id == known.facts.job_id for p in known.near)
        self.siblings = len(known.near) - self.own
        self._current = current
        self._others = np.zeros(size, dtype=bool)  # those that the job would have to move to
        if current is not None:
            self._others = ~self._same(current)
        self._terms = self._job_terms(current)
        self.time_s = self._terms.time_s(np.exp(self._mean))
        self.cost_usd = self._terms.cost_usd(np.exp(self._mean))
        # What the goal limits and what it minimises, as they are expected.
        self._expected, self._sought = self.cost_usd, self.time_s
        if isinstance(self._goal, Cheapest):
            self._expected, self._sought = self.time_s, self.cost_usd
        self.allowed = np.ones(size, dtype=bool)

    def _job_terms(self, current: Allocation | None) -> JobTerms:
        known, grid, size = self._known, self._grid, len(self._grid.workers)
        start_s = known.start_s()
        told = known.iterations_left()
        stores = list(known.stores.values())
        whole = JobTerms(
            iterations=np.full(size, float(UNKNOWN_ITERATIONS if told is None else told)),
            other_share=known.other_share(),
            start_s=start_s,
            hold_up_s=known.hold_up_s(),
            end_s=known.end_s(grid),
            before_s=np.full(size, start_s),
            before_usd=np.zeros(size),
            starts=np.ones(size),
            time_limit_s=self._facts.limits.time_limit_s,
            workers=grid.workers,
            memory_mb=grid.memory_mb,
            gb_second_usd=float(known.prices.gb_second_usd),
            request_usd=float(known.prices.request_usd),
            store_usd_per_s=np.array([s.usd_per_hour / 3600.0 for s in stores])[grid.store],
            store_usd_per_request=np.array([s.usd_per_request for s in stores])[grid.store],
        )
        return whole if current is None else self._moving_terms(whole, self.index(current))

    def _moving_terms(self, whole: JobTerms, stay: int) -> JobTerms:
        """For a job that trains where it is until the functions of its next place are there."""
        iteration_s = float(np.exp(self._mean[stay])) * (1.0 + whole.other_share)
        left = whole.iterations[stay]
        meanwhile = min(whole.start_s / iteration_s, left)
        usd_per_s = self.workers * self.memory_mb / 1024.0 * whole.gb_second_usd
        together = meanwhile * iteration_s * usd_per_s[stay]
        together += whole.hold_up_s * (usd_per_s[stay] + usd_per_s)
        others = self._others
        return replace(
            whole,
            iterations=np.where(others, left - meanwhile, left),
            before_s=np.where(others, meanwhile * iteration_s + whole.hold_up_s, 0.0),
            before_usd=np.where(others, together, 0.0),
            starts=np.where(others, 1.0, 0.0),
        )

    @property
    def ends_first(self) -> bool:
        """Whether the job, where it is, will have ended before other functions could take over."""
        left = self._terms.iterations[self._others]
        return bool(len(left)) and not left.any() and self._measurable()

    def restrict(self, mask: NDArray[np.bool_]) -> None:
        """Leaves out what the mask leaves out."""
        self.allowed = self.allowed & mask

    def index(self, allocation: Allocation) -> int:
        """Where an allocation is in the grid; it is there."""
        return int(np.flatnonzero(self._same(allocation))[0])

    def _same(self, allocation: Allocation) -> NDArray[np.bool_]:
        grid, one = self._grid, Grid.of([allocation], self._names)
        same = (grid.workers == one.workers) & (grid.memory_mb == one.memory_mb)
        return np.asarray(same & (grid.store == one.store))

    def allocation(self, i: int) -> Allocation:
        """What stands at a place of the grid."""
        name = self._names[int(self._grid.store[i])]
        return Allocation(int(self.workers[i]), int(self.memory_mb[i]), name)

    # --- goals ----------------------------------------------------------------------------------

    @property
    def _goal(self) -> Goal:
        return self._facts.goal

    def _limit(self) -> float | None:
        """What is left of what the goal limits: seconds, or USD."""
        goal, facts = self._goal, self._facts
        if isinstance(goal, Cheapest):
            return None if goal.deadline_s is None else goal.deadline_s - facts.elapsed_s
        return None if goal.budget_usd is None else goal.budget_usd - facts.spent_usd

    def _limits(self) -> Array | None:
        """The same for each allocation, shape (p,), less a reserve: it may have to be left again.

        Where the job is already, everything that is left may be used.
        """
        limit, terms = self._limit(), self._terms
        if limit is None or not self._measurable():
            return None
        reserve = np.full(len(self.workers), terms.hold_up_s)
        if isinstance(self._goal, Fastest):
            usd_per_s = self.workers * self.memory_mb / 1024.0 * terms.gb_second_usd
            reserve = usd_per_s * (terms.start_s + terms.hold_up_s)
        if self._current is None:
            return limit - reserve
        return np.where(self._others, limit - reserve, limit)

    def _limited(self, z: float | Array) -> Array:
        """What the goal limits, z standard deviations from the middle."""
        iteration_s = np.exp(self._mean + z * self._job_sd)  # as good as that many more of them
        if isinstance(self._goal, Cheapest):
            return self._terms.time_s(iteration_s)
        return self._terms.cost_usd(iteration_s)

    def _objective(self, z: float = 0.0) -> Array:
        """Logarithm of what the goal minimises."""
        if z == 0.0:
            time, cost = self.time_s, self.cost_usd
        else:
            iteration_s = np.exp(self._mean + z * self._sd)
            time, cost = self._terms.time_s(iteration_s), self._terms.cost_usd(iteration_s)
        ln_time, ln_cost = np.log(np.maximum(time, 1e-12)), np.log(np.maximum(cost, 1e-18))
        if isinstance(self._goal, Cheapest):
            return ln_cost + TIE * ln_time
        return ln_time + TIE * ln_cost

    def _measurable(self) -> bool:
        """Whether time and cost of the rest are known at all."""
        return self._known.iterations_left() is not None

    def best(self) -> int:
        """What has the least price, of what is expected to keep the limit or comes nearest."""
        possible = self.allowed & (self._fits >= FITS)
        if not possible.any():  # then what is most likely to fit
            possible = self.allowed & (self._fits >= self._fits[self.allowed].max() - 1e-3)
        limits = self._limits()
        good = possible if limits is None else possible & (self._expected <= limits)
        if not good.any():
            sure = self._limited(SURE_Z)
            good = possible & (sure <= NEARLY * sure[possible].min())
        return int(np.argmin(np.where(good, self._price, np.inf)))

    @cached_property
    def _price(self) -> Array:
        """What the goal minimises, with what its limit and another move may cost; logarithm."""
        first, last = EXCESS_WEIGHTS
        weight = first + (last - first) * self._used_before_a_move()
        return self._objective() + self._another_move() + weight * self._excess()

    def _used_before_a_move(self) -> Array:
        """Share of the goal's limit that is used when a move takes effect; 0 without a limit."""
        left, terms = self._limit(), self._terms
        if left is None:
            return np.zeros(len(self.workers))
        meanwhile = np.full(len(self.workers), terms.start_s + LOOK_S + terms.hold_up_s)
        used = self._facts.elapsed_s
        if isinstance(self._goal, Fastest):
            meanwhile *= self.workers * self.memory_mb / 1024.0 * terms.gb_second_usd
            used = self._facts.spent_usd
        return np.asarray(np.minimum(1.0, (used + meanwhile) / max(used + left, 1e-18)))

    def _excess(self) -> Array:
        """By how much the limit is expected to be exceeded: E max(0, ln(use / limit)).

        The closed form of expected improvement, the other way round.
        """
        limits = self._limits()
        if limits is None:
            return np.zeros(len(self.workers))
        from scipy.special import ndtr

        middle = np.log(np.maximum(self._expected, 1e-18))
        spread = np.log(np.maximum(self._limited(1.0), 1e-18)) - middle
        spread = np.maximum(spread, 1e-6)  # nothing is left to train: the time is known
        over = middle - np.log(np.maximum(limits, 1e-3 * self._expected))
        z = over / spread
        density = np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
        return np.asarray(spread * (density + z * ndtr(z)))

    def _another_move(self) -> Array:
        """What having to leave again would cost, times its chance; logarithm of the objective."""
        limit = self._limit()
        if limit is None or limit <= 0.0 or not self._measurable():
            return np.zeros(len(self.workers))
        from scipy.special import ndtr

        over = np.log(np.maximum(self._expected, 1e-18) / limit)
        terms, move_s = self._terms, self._terms.hold_up_s
        if isinstance(self._goal, Cheapest):  # both generations are billed
            move_s = terms.start_s + 2.0 * terms.hold_up_s
        share = move_s / np.maximum(self.time_s, 1e-12)
        return np.asarray(ndtr(over / np.hypot(self._job_sd, PACE_SD)) * np.log1p(share))

    def gain(self, new: int, old: int) -> float:
        """Share of what is left that the new one saves of what the goal minimises."""
        return float(1.0 - self._sought[new] / self._sought[old])

    def saving(self, new: int, old: int) -> float:
        """What a move lowers the price by, as a share of the whole job: also of what was used."""
        facts, left = self._facts, self._sought[old]
        used = facts.spent_usd if isinstance(self._goal, Cheapest) else facts.elapsed_s
        lower = 1.0 - math.exp(min(self._price[new] - self._price[old], 1.0))
        return float(lower * left / (used + left))

    def limited(self, i: int) -> float:
        """What the goal limits, as it is expected."""
        return float(self._expected[i])

    def at_risk(self, i: int) -> bool:
        """Whether an allocation is expected to break the goal's limit, or nearly so.

        As long as much is left, a little too much may still be made up for: by luck or by a later
        move, if there is anywhere to move to.
        """
        limits, limit = self._limits(), self._limit()
        if limits is None or limit is None:
            return False
        expected, facts = self.limited(i), self._facts
        used = facts.elapsed_s if isinstance(self._goal, Cheapest) else facts.spent_usd
        left = expected / (used + expected)
        least = self._expected[self.allowed & (self._fits >= FITS)].min(initial=expected)
        patience = PATIENCE * left if least <= (1.0 - 2.0 * PATIENCE) * limits[i] else 0.0
        return bool(expected > (RISK_SHARE + patience) * limits[i])

    def most_promising(self) -> int:
        """Largest constrained expected improvement over the best that is expected now."""
        from scipy.special import log_ndtr

        mean = self._objective()
        sd = np.maximum(self._objective(1.0) - mean, 1e-6)
        best = mean[self.best()]
        score = np.log(sd) + _log_improvement((best - mean) / sd)
        score = score + np.log(np.maximum(self._fits, 1e-12))
        limit = self._limit()
        if limit is not None and self._measurable():
            middle = np.log(np.maximum(self._expected, 1e-18))
            spread = np.maximum(np.log(np.maximum(self._limited(1.0), 1e-18)) - middle, 1e-6)
            score = score + log_ndtr((math.log(max(limit, 1e-18)) - middle) / spread)
        return int(np.argmax(np.where(self.allowed, score, -np.inf)))

    def options(self) -> list[Option]:
        """Everything that is allowed and whose memory is enough; without intervals."""
        usable = np.flatnonzero(self.allowed & (self._fits >= FITS))
        return [
            Option(self.allocation(i), float(self.time_s[i]), float(self.cost_usd[i]))
            for i in usable.tolist()
        ]

    def front(self, most: int = 12) -> list[int]:
        """What nothing beats in both time and cost, the fastest first; evenly thinned out."""
        usable = np.flatnonzero(self.allowed & (self._fits >= FITS))
        if not len(usable):
            return [self.best()]
        order = usable[np.lexsort((self.cost_usd[usable], self.time_s[usable]))]
        cheapest = np.minimum.accumulate(np.concatenate([[np.inf], self.cost_usd[order]]))
        best = order[self.cost_usd[order] < cheapest[:-1] * (1 - 1e-3)]
        picked = np.unique(np.linspace(0, len(best) - 1, min(most, len(best))).round())
        return [int(best[int(i)]) for i in picked]

    # --- words ----------------------------------------------------------------------------------

    def goal_text(self) -> str:
        """The goal, for people."""
        goal = self._goal
        if isinstance(goal, Cheapest):
            return "cheapest" if goal.deadline_s is None else f"cheapest in {goal.deadline_s:g} s"
        return "fastest" if goal.budget_usd is None else f"fastest for {goal.budget_usd:g} USD"

    def sources(self) -> str:
        """What the predictions rest on, for people."""
        if not self.own and not self.siblings:
            return "the analytic model alone"
        return f"{self.own} own and {self.siblings} sibling profiles"

    def prediction(self, i: int) -> Prediction:
        """With its 90 % intervals."""

        def interval(of: Any, sd: Array) -> Interval:
            low, mid, high = (float(of(np.exp(self._mean + z * sd))[i]) for z in (-Z90, 0.0, Z90))
            return Interval(low, mid, high)

        return Prediction(
            allocation=self.allocation(i),
            iteration_s=interval(lambda t: t, self._sd),
            time_s=interval(self._terms.time_s, self._job_sd),
            cost_usd=interval(self._terms.cost_usd, self._job_sd),
            fits=float(self._fits[i]),
        )

    def row(self, i: int) -> dict[str, Any]:
        """In short, as JSON."""
        where = asdict(self.allocation(i))
        return {**where, "time_s": float(self.time_s[i]), "cost_usd": float(self.cost_usd[i])}

    def evidence(self, best: int) -> dict[str, Any]:
        """What a decision rests on, as JSON."""
        chosen = self.prediction(best)
        return {
            "goal": self.goal_text(),
            "workload": asdict(self._known.workload),
            "own": self.own,
            "siblings": self.siblings,
            "length_known": self._measurable(),
            "elapsed_s": self._facts.elapsed_s,
            "spent_usd": self._facts.spent_usd,
            "prediction": {
                "iteration_s": list(asdict(chosen.iteration_s).values()),
                "time_s": list(asdict(chosen.time_s).values()),
                "cost_usd": list(asdict(chosen.cost_usd).values()),
                "fits": chosen.fits,
            },
            "alternatives": [self.row(i) for i in self.front(5) if i != best],
        }

    def verdict(self, best: int) -> tuple[bool, tuple[str, ...]]:
        """Whether the goal can be reached, and what the user should know."""
        if not self._measurable():
            return True, (
                "nobody knows how many iterations this job has: its time and cost are given for "
                f"{UNKNOWN_ITERATIONS} of them, and no limit can be checked",
            )
        limit = self._limit()
        if limit is None or self._expected[best] <= limit:
            return True, ()
        return self._infeasible(best, limit)

    def _infeasible(self, best: int, limit: float) -> tuple[bool, tuple[str, ...]]:
        lucky = bool(
            (self._limited(-REFUSED_Z)[self.allowed & (self._fits >= FITS)] <= limit).any()
        )
        expected = self.prediction(best)
        at, name = expected.allocation, type(self._goal).__name__
        what = f"{at.workers} workers of {at.memory_mb} MB"
        how = "is unlikely to be reached" if lucky else "cannot be reached"
        if isinstance(self._goal, Fastest):
            cost = expected.cost_usd
            return lucky, (
                f"{name}(budget_usd={self._goal.budget_usd:g}) {how}: the cheapest allocation, "
                f"{what}, is expected to cost {cost.mid:.6f} USD; "
                f"Fastest(budget_usd={_up(cost.high)}) would do",
            )
        time = expected.time_s
        return lucky, (
            f"{name}(deadline_s={self._goal.deadline_s:g}) {how}: the fastest allocation, {what}, "
            f"is expected to take {time.mid:.1f} s; "
            f"Cheapest(deadline_s={_up(time.high + self._facts.elapsed_s)}) would do",
        )


def _up(value: float) -> str:
    """Rounded up to three digits."""
    step = 10.0 ** (math.floor(math.log10(max(value, 1e-12))) - 2)
    return f"{math.ceil(value / step) * step:.3g}"


def _log_improvement(z: Array) -> Array:
    """ln(pdf(z) + z cdf(z)) of the standard normal, exact where that underflows."""
    from scipy.special import erfcx, ndtr

    density = -0.5 * z**2 - 0.5 * math.log(2.0 * math.pi)
    near = np.log(np.maximum(np.exp(density) + z * ndtr(z), 1e-300))
    far = np.minimum(z, -1.0)
    ratio = np.sqrt(0.5 * np.pi) * -far * erfcx(-far / np.sqrt(2.0))
    small = density + np.log1p(-np.minimum(ratio, 1.0 - 1e-15))
    return np.asarray(np.where(z > -1.0, near, small))
