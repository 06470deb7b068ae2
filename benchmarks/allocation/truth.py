"""A synthetic ground truth for the choice of workers and memory. Nothing here was measured on AWS.

One :class:`Family` is one search: siblings of one kind of network, on one platform. What the
platform *is* stays in the family; what a user would know of it (a table that is some 8 % off) is in
``Family.table`` and ``Family.stores``. A :class:`Candidate` is one network with its job.

| symbol | meaning | unit |
|---|---|---|
| n, m | workers, memory of each | 1, MB |
| v, c | share of CPU time m / 1,769; visible virtual CPUs (2 to 6, AWS) | 1 |
| P, F, A, B | parameters, FLOPs and activations per sample, global batch | 1, FLOP, byte, 1 |
| b | samples of the slowest worker, ceil(B / n) | 1 |
| M | gradient, 4 P bytes and buffers | byte |
| H(n) | expected maximum of n standard exponentials, less that of one: 1/2 + ... + 1/n | 1 |

Time per iteration, mean::

    t       = (compute * e_c + sync * e_s) * exp(field)
    compute = [F b (1 + (b_h / b)^0.7) / (R S(m)) + a P / S_o(m) + c_0 / min(1, v)]
              * (1 + s H(n)) * pressure
    S(m)    = tier(c) / [((1 - p) / min(1, v) + p / v) (1 + theta ln(c / v))], 1 at 1,769 MB:
              Amdahl's law over the CPU share, threads that wait for their quota, hosts that
              differ by tier
    S_o(m)  = min(1, v) max(1, v)^0.6: the optimizer is bound by memory bandwidth
    pressure= 1 + 0.3 ((peak / m - 0.8) / 0.2)^2 above 80 % of the memory
    sync    = [max(link, store) + 0.3 min(link, store) + requests] (1 + s H(n)) + h V / min(1, v);
              0 if n = 1
    V       = 3 M - 2 M / n (scatter, reduce and gather of a hierarchical aggregation)
    link    = V / (w min(1, m / 1,024)^0.35);   store = n V (1 + kappa ln n) / W
    requests= r l (1 + n / 150) / d + n r / Q;   r = (3 n - 2) ceil(M / n / 4 MiB), d in flight

e_c and e_s are hidden from everybody, log-normal with sigma 20 %, drawn for every candidate. The
field is smooth (random Fourier features over ln n, ln m, ln P, ln B; sigma 5 %): nobody's model
has it. A job of N iterations takes ``start + N t (1 + other)`` and 1.5 s plus the transfer of its
state for each relaunch (every 900 s); functions bill for all of it, and twice while they start
again; a store with a price bills by time. Peak memory, against which an out-of-memory failure is
decided: ``(w_0 + k_1 P + k_2 A b) * trial``, the last log-normal with sigma 5-15 % by family.

Networks whose job would have fewer than 100 iterations are drawn again, so that large networks with
large batches are rarer than small ones.

A measurement is the median of a few iterations, each with a Lomax-distributed delay (tail index
2.5, scale 1-3 %), times the luck of where the functions were placed (1 %, and 10-60 % slower in
3 % of the cases).

What truth and ``smlt_tune.backend.resource_manager.physics`` share: a time is compute plus
synchronisation, Amdahl's law above one virtual CPU, the bytes of SMLT's section 3.3, the price
list, the tiers of visible CPUs, the 900 s. What they do not share: one speed for everything there,
three here, with tiers; the law of small batches (b + beta there); the law of stragglers
(sqrt(2 ln n) there); how two bandwidths combine; contention, limited request rates and requests in
flight; links and start-up that depend on memory and workers; memory pressure; the field; skewed
noise; every constant.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from smlt_tune.backend.goals import Cheapest, Fastest
from smlt_tune.backend.platforms.base import PlatformLimits
from smlt_tune.backend.prices import load_prices
from smlt_tune.backend.resource_manager.observations import (
    DEFAULT_STORE,
    Allocation,
    Profile,
    Workload,
)
from smlt_tune.backend.resource_manager.tables import PlatformTable, StoreTable
from smlt_tune.runtime.features import ModelFeatures

MAX_WORKERS = 200
MIN_MB, MAX_MB = 128, 10_240
TIERS_MB = np.array([3009, 5308, 7077, 8846])  # from here on 3, 4, 5, 6 virtual CPUs are visible
LIMITS = PlatformLimits(
    MIN_MB, MAX_MB, time_limit_s=900.0, concurrency=1000, max_workers=MAX_WORKERS
)
PRICES = load_prices()
LIMITED_GOALS = ("cheapest in time", "fastest in budget")
GOALS = (*LIMITED_GOALS, "fastest", "cheapest")

_KNOTS = (128, 256, 512, 1024, 1769, 3008, 3009, 5307, 5308, 7076, 7077, 8845, 8846, 10_240)
_CHUNK = 4 * 2**20

#: By kind of network: FLOPs per parameter and sample at 5 M parameters, activations per sample at
#: 5 M parameters (bytes), FLOP/s of 1,769 MB, part that runs in parallel, batch of half efficiency.
_KINDS = {
    "convolutions": (800.0, 4e6, 2.2e10, 0.97, 2.0),
    "separable convolutions": (500.0, 3e6, 1.1e10, 0.93, 3.0),
    "attention": (700.0, 3e6, 2.6e10, 0.95, 1.5),
    "recurrent": (200.0, 1e6, 1.5e10, 0.88, 6.0),
}


@dataclass(frozen=True)
class _Store:
    """What a store really is; the symbols are those of the module."""

    latency_s: float
    bandwidth: float
    requests_s: float
    usd_per_hour: float


class Family:
    """One search on one platform.

    Args:
        seed: Of everything in it.
        two_stores: A small store of one's own and a large one that costs by the hour, instead of
            one between them.
    """

    def __init__(self, seed, *, two_stores=False):
        self.seed = seed
        rng = np.random.default_rng([seed, 1])
        kind = list(_KINDS)[rng.integers(len(_KINDS))]
        flops, activations, rate, parallel, half = _KINDS[kind]
        self.kind = kind
        self.flops_per_parameter = flops * _spread(rng, 0.3)
        self.activations = activations * _spread(rng, 0.3)
        self.rate = rate * _spread(rng, 0.3)
        self.parallel = 1 - (1 - parallel) * _spread(rng, 0.3)
        self.half = half * _spread(rng, 0.5)
        self.optimizer_s = 3e-9 * _spread(rng, 0.3)
        self.fixed_s = 0.012 * _spread(rng, 0.4)
        self.straggling = rng.uniform(0.01, 0.03)
        self.theta = rng.uniform(0.04, 0.10)
        self.tier = np.exp(rng.normal(0, 0.04, len(TIERS_MB) + 1))
        self.link = 75e6 * _spread(rng, 0.12)
        self.handling_s = 2.5e-9 * _spread(rng, 0.25)
        self.contention = rng.uniform(0.02, 0.08)
        self.in_flight = rng.uniform(3, 8)
        self.start_s = rng.uniform(3, 9)
        self.other_share = rng.uniform(0.02, 0.09)
        self.memory = (rng.uniform(220, 380), rng.uniform(18, 28), rng.uniform(1.1, 1.6))
        self.trial_memory = rng.uniform(0.05, 0.15)
        self.field = _Field(rng)
        kinds = ("small", "large") if two_stores else (DEFAULT_STORE,)
        self.real_stores = {name: _store(name, rng) for name in kinds}
        self.stores = {
            name: StoreTable(
                latency_s=store.latency_s * _spread(rng, 0.15),
                bandwidth=store.bandwidth * _spread(rng, 0.10),
                usd_per_hour=store.usd_per_hour,
            )
            for name, store in self.real_stores.items()
        }
        self.table = self._table(rng)

    def _table(self, rng):
        """What a calibration with another network says: at least 6 % off at every size."""
        nominal = _amdahl(np.array(_KNOTS), 0.93, 0.07) * self.tier[_tier(np.array(_KNOTS))]
        # Both sides of a tier were measured together, so that the jump itself is about right.
        errors = {m - m % 10: np.exp(rng.normal(0, 0.06)) for m in _KNOTS}
        speed = nominal * [errors[m - m % 10] for m in _KNOTS]
        return PlatformTable(
            fingerprint="synthetic",
            memory_mb=_KNOTS,
            speed=tuple((speed / speed[_KNOTS.index(1769)]).tolist()),
            flops=1.8e10,
            bandwidth=80e6,
            handling_s=2e-9,
            start_s=self.start_s * _spread(rng, 0.15),
            warm_start_s=0.5,
        )

    def speed(self, memory_mb):
        """S(m) of the module's table."""
        relative = _amdahl(memory_mb, self.parallel, self.theta) * self.tier[_tier(memory_mb)]
        here = np.array(1769)
        return relative / (_amdahl(here, self.parallel, self.theta) * self.tier[_tier(here)])

    def candidate(self, index):
        """The sibling of that number, always the same."""
        return Candidate(self, index)


class Candidate:
    """One network, and the job that trains it.

    Attributes:
        workload: What is told of it: parameters, batch and FLOPs exactly, activations 5 % off.
        iterations: Of its job, such that the geometric mean of the shortest time and that of the
            cheapest allocation is 4 to 60 minutes.
    """

    def __init__(self, family, index):
        self.family = family
        self.job_id = f"job-{family.seed}-{index}"
        rng = np.random.default_rng([family.seed, 2, index])
        self.iterations = 0
        while self.iterations < 100:  # else an iteration is too long to speak of training
            self._draw(rng)
        self.workload = Workload(
            ModelFeatures(
                parameters=round(self.parameters),
                gradient_bytes=round(self.gradient_bytes),
                flops_per_sample=self.flops,
                activation_bytes=self.activations * _spread(rng, 0.05),
            ),
            batch=self.batch,
            iterations=self.iterations,
            function="train",
        )

    def _draw(self, rng):
        family = self.family
        self.__dict__.pop("grid", None)
        self.parameters = np.exp(rng.uniform(np.log(0.5e6), np.log(110e6)))
        self.batch = round(np.exp(rng.uniform(np.log(64), np.log(4096))))
        size = self.parameters / 5e6
        per_parameter = family.flops_per_parameter * size**-0.3 * _spread(rng, 0.4)
        self.flops = per_parameter * self.parameters
        self.activations = family.activations * size**0.4 * _spread(rng, 0.4)
        self.gradient_bytes = 4 * self.parameters * rng.uniform(1.0, 1.02)
        self.compute_error, self.sync_error = np.exp(rng.normal(0, 0.2, 2))
        self.memory_error = np.exp(rng.normal(0, family.trial_memory))
        job_s = np.exp(rng.uniform(np.log(240), np.log(3600)))
        grid = self.grid
        iteration_s = np.where(grid.fits, grid.iteration_s, np.inf)
        cheapest = np.argmin(grid.workers * grid.memory_mb * iteration_s)
        middle = np.sqrt(iteration_s.min() * iteration_s.flat[cheapest])
        self.iterations = int(job_s / (middle * (1 + family.other_share)))

    @cached_property
    def grid(self):
        """Every number of workers, 110 sizes of memory and every store."""
        return Grid(self)

    def peak_mb(self, workers):
        """Highest resident memory of a worker, MB."""
        fixed, per_parameter, per_activation = self.family.memory
        samples = np.ceil(self.batch / np.asarray(workers))
        numbers = per_parameter * self.parameters + per_activation * self.activations * samples
        return (fixed + numbers / 2**20) * self.memory_error

    def fits(self, workers, memory_mb):
        """Whether the memory is enough."""
        return self.peak_mb(workers) <= memory_mb

    def compute_s(self, workers, memory_mb):
        """Computing of the slowest worker in an iteration, seconds."""
        family = self.family
        samples = np.ceil(self.batch / workers)
        share = memory_mb / 1769
        small = 1 + (family.half / samples) ** 0.7
        passes = self.flops * samples * small / (family.rate * family.speed(memory_mb))
        optimizer_speed = np.minimum(1, share) * np.maximum(1, share) ** 0.6
        optimizer = family.optimizer_s * self.parameters / optimizer_speed
        fixed = family.fixed_s / np.minimum(1, share)
        pressed = np.clip((self.peak_mb(workers) / memory_mb - 0.8) / 0.2, 0, 1)
        slowest = 1 + family.straggling * _harmonic(workers)
        seconds = (passes + optimizer + fixed) * slowest * (1 + 0.3 * pressed**2)
        return seconds * self.compute_error

    def sync_s(self, workers, memory_mb, store=DEFAULT_STORE):
        """Synchronisation in an iteration, seconds."""
        family, real = self.family, self.family.real_stores[store]
        share = memory_mb / 1769
        volume = self.gradient_bytes * (3 - 2 / workers)
        link = volume / (family.link * np.minimum(1, memory_mb / 1024) ** 0.35)
        contended = workers * volume * (1 + family.contention * np.log(workers)) / real.bandwidth
        requests = (3 * workers - 2) * np.ceil(self.gradient_bytes / workers / _CHUNK)
        waiting = requests * real.latency_s * (1 + workers / 150) / family.in_flight
        waiting = waiting + workers * requests / real.requests_s
        moving = np.maximum(link, contended) + 0.3 * np.minimum(link, contended)
        handling = family.handling_s * volume / np.minimum(1, share)
        seconds = (moving + waiting) * (1 + family.straggling * _harmonic(workers)) + handling
        return np.where(workers > 1, seconds * self.sync_error, 0.0)

    def iteration_s(self, workers, memory_mb, store=DEFAULT_STORE):
        """Mean time per iteration, seconds."""
        workers, memory_mb = np.asarray(workers, float), np.asarray(memory_mb, float)
        field = self.family.field(workers, memory_mb, self.parameters, self.batch)
        parts = self.compute_s(workers, memory_mb) + self.sync_s(workers, memory_mb, store)
        return parts * np.exp(field)

    def start_s(self, workers, memory_mb):
        """From a cold invocation until the last worker is ready, seconds."""
        share = np.minimum(1, np.asarray(memory_mb) / 1769)
        return self.family.start_s * (0.5 + 0.5 / share**0.7) * (1 + 0.1 * np.log(workers))

    def usd(self, workers, memory_mb, seconds, starts=1, store=DEFAULT_STORE):
        """What functions that ran for some time cost, and the store meanwhile, USD."""
        gb_s = workers * np.asarray(memory_mb) / 1024 * seconds
        hourly = self.family.real_stores[store].usd_per_hour
        invoked = workers * starts * float(PRICES.request_usd)
        return gb_s * float(PRICES.gb_second_usd) + invoked + hourly * seconds / 3600

    def training(
        self, workers, memory_mb, iterations, store=DEFAULT_STORE, *, iteration_s=None, since_s=0.0
    ):
        """Some iterations on functions that are ready, with what comes between and relaunches.

        Args:
            workers: How many.
            memory_mb: Of each.
            iterations: How many.
            store: That they synchronise over.
            iteration_s: Time per iteration, if it is known already.
            since_s: For how long they have trained already.

        Returns:
            Seconds, and USD.
        """
        if iteration_s is None:
            iteration_s = self.iteration_s(workers, memory_mb, store)
        seconds = iterations * iteration_s * (1 + self.family.other_share)
        limit = LIMITS.time_limit_s
        relaunches = np.floor((since_s + seconds) / limit) - np.floor(since_s / limit)
        seconds = seconds + relaunches * self.pause_s
        # The next functions start while the old ones still train.
        billed = seconds + relaunches * self.start_s(workers, memory_mb)
        usd = self.usd(workers, memory_mb, billed, relaunches, store)
        return seconds, usd

    @property
    def pause_s(self):
        """How long training stands still when it moves to other functions, seconds."""
        return 1.5 + 12 * self.parameters / self.family.link

    def whole(self, workers, memory_mb, store=DEFAULT_STORE, iteration_s=None):
        """The whole job on one allocation: seconds and USD, whether or not it fits."""
        start = self.start_s(workers, memory_mb)
        seconds, usd = self.training(
            workers, memory_mb, self.iterations, store, iteration_s=iteration_s
        )
        return start + seconds, usd + self.usd(workers, memory_mb, start, 1, store)

    def measure(self, allocation, rng, iterations=5):
        """What a few iterations on an allocation say of it."""
        n, m, store = allocation.workers, allocation.memory_mb, allocation.store
        peak = float(self.peak_mb(n))
        if peak > m:
            return Profile(
                self.job_id, self.workload, allocation, 0, 0.0, peak_mb=float(m), out_of_memory=True
            )
        scale = self.family.straggling
        delays = np.median(scale * rng.pareto(2.5, min(iterations, 101)))
        # The mean of a Lomax distribution: true times are means.
        noise = (1 + delays) / (1 + scale / 1.5) * np.exp(rng.normal(0, 0.01))
        if rng.random() < 0.03:
            noise *= rng.uniform(1.1, 1.6)
        total = float(self.iteration_s(n, m, store)) * noise
        compute, sync = float(self.compute_s(n, m)), float(self.sync_s(n, m, store))
        share = sync / (compute + sync) * np.exp(rng.normal(0, 0.03))
        return Profile(
            self.job_id,
            self.workload,
            allocation,
            iterations=iterations,
            iteration_s=total,
            sync_s=total * min(share, 0.99),
            other_share=self.family.other_share * _spread(rng, 0.1),
            start_s=float(self.start_s(n, m)) * _spread(rng, 0.1),
            peak_mb=peak * _spread(rng, 0.01),
        )


class Grid:
    """All allocations that an optimum is looked for on, as arrays of one shape."""

    def __init__(self, candidate):
        sizes = np.unique([*np.geomspace(MIN_MB, MAX_MB, 96).round(), *_KNOTS]).astype(int)
        names = list(candidate.family.real_stores)
        shape = (len(names), MAX_WORKERS, len(sizes))
        self.workers = np.broadcast_to(np.arange(1, MAX_WORKERS + 1)[:, None], shape)
        self.memory_mb = np.broadcast_to(sizes, shape)
        self.stores = names
        self.iteration_s = np.stack(
            [candidate.iteration_s(self.workers[0], self.memory_mb[0], name) for name in names]
        )
        self.fits = candidate.fits(self.workers, self.memory_mb)

    def whole(self, candidate):
        """Seconds and USD of the job on each; infinite where it does not fit."""
        both = [
            candidate.whole(self.workers[i], self.memory_mb[i], name, self.iteration_s[i])
            for i, name in enumerate(self.stores)
        ]
        seconds, usd = (np.stack(part) for part in zip(*both, strict=True))
        return np.where(self.fits, seconds, np.inf), np.where(self.fits, usd, np.inf)


class Case:
    """A candidate with a goal, the best that can be done, and the score of anything else.

    Attributes:
        goal: With a limit of 1.1 to 3 times the least that is possible, where it has one.
        best: The objective at the optimum: seconds or USD.
        oracle: The allocation there.
        scores: Of every allocation of the grid, in percent; infinite where it does not fit.
    """

    def __init__(self, candidate, goal, rng):
        self.candidate = candidate
        self.kind = goal
        grid = candidate.grid
        seconds, usd = grid.whole(candidate)
        slack = np.exp(rng.uniform(np.log(1.1), np.log(3.0)))
        self.goal = {
            "cheapest in time": Cheapest(deadline_s=float(slack * seconds.min())),
            "fastest in budget": Fastest(budget_usd=float(slack * usd.min())),
            "fastest": Fastest(),
            "cheapest": Cheapest(),
        }[goal]
        objective = self._objective(seconds, usd)
        allowed = np.where(self._used(seconds, usd) <= 1, objective, np.inf)
        at = np.unravel_index(np.argmin(allowed), allowed.shape)
        self.best = float(allowed[at])
        self.oracle = Allocation(int(grid.workers[at]), int(grid.memory_mb[at]), grid.stores[at[0]])
        with np.errstate(invalid="ignore"):
            over = np.maximum(0, self._used(seconds, usd) - 1)
            self.scores = 100 * (objective / self.best - 1 + 2 * over)

    def _objective(self, seconds, usd):
        return seconds if isinstance(self.goal, Fastest) else usd

    def _used(self, seconds, usd):
        """Part of the limit that is used; 0 without one."""
        if isinstance(self.goal, Cheapest):
            used, limit = seconds, self.goal.deadline_s
        else:
            used, limit = usd, self.goal.budget_usd
        return np.zeros_like(used) if limit is None else used / limit

    def score(self, seconds, usd):
        """Of a job that took and cost so much.

        Returns:
            Regret plus twice what the limit was exceeded by, percent; the latter alone, percent.
        """
        over = max(0.0, float(self._used(seconds, usd)) - 1)
        regret = float(self._objective(seconds, usd)) / self.best - 1
        return 100 * (regret + 2 * over), 100 * over

    def run(self, allocation, paid_s=0.0, paid_usd=0.0):
        """The job on a recommended allocation.

        Where the memory is not enough, another start is paid and memory doubles, then workers.

        Args:
            allocation: To begin with.
            paid_s: Time that has passed before, seconds.
            paid_usd: What was spent before, USD.

        Returns:
            Score and overshoot, percent, and whether memory was not enough at first.
        """
        candidate, failed = self.candidate, False
        n, m, store = allocation.workers, allocation.memory_mb, allocation.store
        while not candidate.fits(n, m):
            failed = True
            start = float(candidate.start_s(n, m))
            paid_s, paid_usd = paid_s + start, paid_usd + candidate.usd(n, m, start, 1, store)
            n, m = (n, min(2 * m, MAX_MB)) if m < MAX_MB else (min(2 * n, MAX_WORKERS), m)
        seconds, usd = candidate.whole(n, m, store)
        return *self.score(seconds + paid_s, usd + paid_usd), failed


class _Field:
    """A smooth random function with a standard deviation of about 5 %."""

    def __init__(self, rng, features=48, sigma=0.05):
        scales = np.array([1.5, 1.2, 1.5, 1.2])  # of ln n, ln m, ln P, ln B
        self.waves = rng.normal(0, 1, (4, features)) / scales[:, None]
        self.phases = rng.uniform(0, 2 * np.pi, features)
        self.weights = rng.normal(0, 1, features) * sigma * np.sqrt(2 / features)

    def __call__(self, workers, memory_mb, parameters, batch):
        # cos(x + y) over a whole grid would be slow; workers and memory repeat in it.
        n, back_n = np.unique(np.log(workers), return_inverse=True)
        m, back_m = np.unique(np.log(memory_mb), return_inverse=True)
        model = np.log(parameters) * self.waves[2] + np.log(batch) * self.waves[3] + self.phases
        by_n = np.exp(1j * (n[:, None] * self.waves[0] + model)) * self.weights
        by_m = np.exp(1j * m[:, None] * self.waves[1])
        whole = (by_n @ by_m.T).real
        return whole[back_n.reshape(np.shape(workers)), back_m.reshape(np.shape(memory_mb))]


def _store(name, rng):
    """Latency, bandwidth and request rate of a store, some 25 % around the usual."""
    latency_s, bandwidth, requests_s, usd = {
        DEFAULT_STORE: (0.8e-3, 600e6, 9e4, 0.0),
        "small": (0.8e-3, 250e6, 7e4, 0.0),
        "large": (1.0e-3, 1.2e9, 3e5, float(PRICES.parameter_stores["cache.r5.4xlarge"].hour_usd)),
    }[name]
    return _Store(latency_s * _spread(rng, 0.25), bandwidth * _spread(rng, 0.25), requests_s, usd)


def _tier(memory_mb):
    return np.searchsorted(TIERS_MB, memory_mb, side="right")


def _amdahl(memory_mb, parallel, theta):
    share = np.asarray(memory_mb) / 1769
    visible = 2 + _tier(memory_mb)
    seconds = (1 - parallel) / np.minimum(1, share) + parallel / share
    return 1 / (seconds * (1 + theta * np.log(visible / share)))


_HARMONIC = np.concatenate([[0, 0], np.cumsum(1 / np.arange(2, 4097))])


def _harmonic(workers):
    return _HARMONIC[np.asarray(workers).astype(int)]


def _spread(rng, sigma):
    """A factor that is log-normal around 1."""
    return float(np.exp(rng.normal(0, sigma)))
