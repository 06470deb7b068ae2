r"""Analytic model of the time per iteration, and of what a job takes and costs.

The form is that of CE-scaling's equations 2 to 5 with their errors corrected and SMLT's sharded
synchronisation (3.3) in place of a leader that merges whole models.

| symbol | meaning | unit |
|---|---|---|
| n, m | workers, memory of each | 1, MB |
| B, b | global batch, largest part of it that a worker gets: ceil(B / n) | samples |
| P, M, F | parameters, synchronised bytes, FLOPs per sample (forward and backward) | |
| s(m), R, w, h | speed, FLOP/s, link and handling of a function: ``tables.py`` | |
| W, l, L | bandwidth and latency of a store; what other jobs move through it | byte/s, s, byte/s |
| N, r | iterations; time outside of them over the time inside | 1 |
| p_fn, p_run | prices of memory-time and of a start | USD per GB-s, USD |

Time per iteration, with the unknowns in Greek::

    compute = (kappa F (b + beta) / R + pi P + tau) / s*(m) * (1 + varsigma sqrt(2 ln n))
    s*(m)   = s(m) up to 1,769 MB, above it 1 / (1 - phi + phi / s(m))              (Amdahl)
    V       = 3 M - 2 M / n                               bytes that a worker moves (n > 1)
    sync    = |V / (omega w), n V / (Omega (W - L))|_4
              + lambda l (4 + (3 n + 1) / 5) + eta h V / s*(m)
    t       = compute + sync                              (sync = 0 for n = 1)

``beta`` is the loss of efficiency of small parts, ``varsigma`` the price of waiting for the slowest
of n. ``|a, b|_4`` is a smooth maximum: a function's link or the store, whichever is narrower. All
unknowns are positive (phi is below 1) and lie in a vector theta of logarithms (phi: of the odds),
with a Gaussian prior.

A job, with k = ceil(N t (1 + r) / time limit) generations of functions, each of which takes t0 to
start; a hand-over from one to the next holds up training for th; what comes after the last epoch
takes te::

    T = t0 + N t (1 + r) + (k - 1) th + te
    C = n (k p_run + (T + (k - 1) t0) m / 1024 p_fn)
        + N t (1 + r) (store, by the second) + N n (3 n + 1) (store, by the request)

A job that moves trains on where it is until the new functions are there, t0 later; both are billed
until those have taken over, th after that.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smlt_tune.backend.platforms.base import MB_PER_VCPU
from smlt_tune.backend.resource_manager.tables import PlatformTable, StoreTable
from smlt_tune.runtime.features import ModelFeatures

Array = NDArray[np.float64]

#: Names of theta's entries, their prior medians, and the standard deviations of their logarithms.
PRIOR = {
    "kappa": (1.0, 0.8),
    "beta": (4.0, 1.5),
    "pi": (4e-9, 1.0),
    "tau": (2e-3, 1.5),
    "phi": (10.0, 1.2),
    "varsigma": (0.04, 0.8),
    "omega": (1.0, 0.4),
    "Omega": (1.0, 0.6),
    "lambda": (1.0, 0.8),
    "eta": (1.0, 0.6),
}
THETA_MEAN: Array = np.array([math.log(median) for median, _ in PRIOR.values()])
THETA_SD: Array = np.array([sd for _, sd in PRIOR.values()])

#: FLOPs per parameter and sample of a dense layer, forward and backward: for want of a count.
DENSE_FLOPS = 6.0
#: A store that other jobs keep busy still gives this share.
LEAST_SHARE = 0.1
_NORM = 4.0
#: Instead of 0 below a fraction.
_TINY = 1e-300


@dataclass(frozen=True)
class Points:
    """Places in the space of (workload, allocation); all arrays have the same shape (p,).

    Attributes:
        workers: n.
        memory_mb: m.
        parameters: P.
        sync_bytes: M.
        flops: F.
        batch: B.
        latency_s: l of the store of each.
        store_bandwidth: W - L of the store of each.
    """

    workers: Array
    memory_mb: Array
    parameters: Array
    sync_bytes: Array
    flops: Array
    batch: Array
    latency_s: Array
    store_bandwidth: Array

    @property
    def part(self) -> Array:
        """The largest part of a batch that a worker gets, samples."""
        return np.ceil(self.batch / self.workers)


def sample_flops(features: ModelFeatures) -> float:
    """F: counted, or that of dense layers."""
    return features.flops_per_sample or DENSE_FLOPS * max(1, features.parameters)


def free_bandwidth(store: StoreTable, load: float) -> float:
    """What a store has left for a job, bytes per second."""
    return max(store.bandwidth - load, LEAST_SHARE * store.bandwidth)


def worker_bytes(gradient_bytes: float, workers: int) -> float:
    """What one worker sends and receives per synchronisation (SMLT 3.3, m = n).

    It sends M and fetches 2 M (1 - 1 / n) bytes.
    """
    return gradient_bytes * (3.0 - 2.0 / workers) if workers > 1 else 0.0


@dataclass(frozen=True)
class Times:
    """What the model says of some points; arrays of shape (p,).

    Attributes:
        ln_s: ln t.
        compute_share: Part of t in computation.
        gradient: d ln t / d theta; shape (p, len(theta)).
    """

    ln_s: Array
    compute_share: Array
    gradient: Array


class IterationTime:
    """The model of the time per iteration on one platform.

    Args:
        table: Of the platform.
    """

    def __init__(self, table: PlatformTable) -> None:
        self._table = table

    def __call__(self, at: Points, theta: Array) -> Times:
        """Time per iteration, its parts and its derivatives.

        Args:
            at: Where; p points.
            theta: Of the unknowns, as in ``PRIOR``.
        """
        return self.at(at, np.ones_like(at.workers))(theta)

    def computation(self, at: Points, theta: Array) -> Times:
        """The same of what a worker computes by itself, without waiting for the others."""
        return self.at(at, np.zeros_like(at.workers))(theta)

    def at(self, points: Points, whole: Array) -> "IterationTimeAt":
        """The model at some points, for more than one theta.

        Args:
            points: Where; p points.
            whole: 1 for the whole time, 0 for what a worker computes by itself, shape (p,).
        """
        return IterationTimeAt(self._table, points, whole)


class IterationTimeAt:
    """The model at some points: what does not depend on theta is worked out once.

    Args:
        table: Of the platform.
        at: Where; p points.
        whole: 1 for the whole time, 0 for what a worker computes by itself, shape (p,).
    """

    def __init__(self, table: PlatformTable, at: Points, whole: Array) -> None:
        n, together = at.workers, whole * (at.workers > 1)
        self._per_sample, self._parameters = at.flops / table.flops, at.parameters
        self._part = at.part
        self._speed = table.speed_at(at.memory_mb)
        self._parallel = (at.memory_mb > MB_PER_VCPU) & (self._speed > 1.0)
        self._slowest = whole * np.sqrt(2.0 * np.log(n))
        moved = together * at.sync_bytes * (3.0 - 2.0 / n)
        self._link = (moved / table.bandwidth) ** _NORM
        self._store = (n * moved / at.store_bandwidth) ** _NORM
        self._requests = together * at.latency_s * (4.0 + (3.0 * n + 1.0) / 5.0)
        self._handling = table.handling_s * moved

    def __call__(self, theta: Array) -> Times:
        """Time per iteration, its parts and its derivatives.

        Args:
            theta: Of the unknowns, as in ``PRIOR``.
        """
        kappa, beta, pi, tau, odds, varsigma, omega, big_omega, lam, eta = np.exp(theta).tolist()
        speed, d_speed = self._speed_with(odds)
        straggling = 1.0 + varsigma * self._slowest
        slowness = straggling / speed  # of what is computed
        samples = kappa * self._per_sample * self._part * slowness
        lost = kappa * beta * self._per_sample * slowness
        per_parameter = pi * self._parameters * slowness
        fixed = tau * slowness
        compute = samples + lost + per_parameter + fixed

        link = self._link / omega**_NORM
        both = link + self._store / big_omega**_NORM
        narrowest = both ** (1.0 / _NORM)
        of_link = narrowest * (link / np.maximum(both, _TINY))
        requests = lam * self._requests
        handling = eta * self._handling / speed
        total = compute + narrowest + requests + handling

        gradient = np.array(
            [
                samples + lost,
                lost,
                per_parameter,
                fixed,
                -(compute + handling) * d_speed,
                compute - compute / straggling,
                -of_link,
                of_link - narrowest,
                requests,
                handling,
            ]
        )
        return Times(np.log(total), compute / total, (gradient / total).T)

    def _speed_with(self, odds: float) -> tuple[Array, Array]:
        """s*(m), and the derivative of its logarithm by the logarithm of the odds of phi."""
        speed, phi = self._speed, odds / (1.0 + odds)
        parallel = 1.0 / (1.0 - phi + phi / speed)
        slope = parallel * (1.0 - 1.0 / speed) * (phi * (1.0 - phi))
        return np.where(self._parallel, parallel, speed), self._parallel * slope


@dataclass(frozen=True)
class JobTerms:
    """What turns a time per iteration into a job's time and cost, for p allocations.

    Attributes:
        iterations: N, shape (p,).
        other_share: r.
        start_s: t0; billed for every function that starts.
        hold_up_s: th.
        end_s: te, shape (p,).
        before_s: What passes before these iterations, shape (p,).
        before_usd: What that costs besides the start of functions, shape (p,).
        starts: Whether functions have to start first, shape (p,): 1 or 0.
        time_limit_s: Of an invocation.
        workers: n, shape (p,).
        memory_mb: m, shape (p,).
        gb_second_usd: p_fn.
        request_usd: p_run.
        store_usd_per_s: Price of each allocation's store by the second, shape (p,).
        store_usd_per_request: The same by the request.
    """

    iterations: Array
    other_share: float
    start_s: float
    hold_up_s: float
    end_s: Array
    before_s: Array
    before_usd: Array
    starts: Array
    time_limit_s: float
    workers: Array
    memory_mb: Array
    gb_second_usd: float
    request_usd: float
    store_usd_per_s: Array
    store_usd_per_request: Array

    def time_s(self, iteration_s: Array) -> Array:
        """Time to the job's end, given t; shape (p,)."""
        training = self._training_s(iteration_s)
        return self.before_s + training + self._moves(training) * self.hold_up_s + self.end_s

    def cost_usd(self, iteration_s: Array) -> Array:
        """Cost to the job's end, given t; shape (p,)."""
        n, training = self.workers, self._training_s(iteration_s)
        moves = self._moves(training)
        runs = self.starts + moves
        seconds = training + moves * self.hold_up_s + runs * self.start_s + self.end_s
        functions = n * (
            runs * self.request_usd + seconds * self.memory_mb / 1024.0 * self.gb_second_usd
        )
        requests = np.where(n > 1, n * (3.0 * n + 1.0), 0.0) * self.iterations
        stores = training * self.store_usd_per_s + requests * self.store_usd_per_request
        return self.before_usd + functions + stores

    def _training_s(self, iteration_s: Array) -> Array:
        return self.iterations * iteration_s * (1.0 + self.other_share)

    def _moves(self, training_s: Array) -> Array:
        """How often functions reach their time limit before the end."""
        return np.maximum(0.0, np.ceil(training_s / self.time_limit_s) - 1.0)
