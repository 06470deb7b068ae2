r"""A Gaussian process on ln(time per iteration) with the analytic model inside.

With the analytic model g linearised at the most probable theta, J its gradient there,

    ln t ~ N(g(theta*) + J (theta0 - theta*),  J S0 J' + trial + kind + field + context) + noise

- ``J S0 J'``: what the data say about theta, with the prior N(theta0, S0). The prior covariance
  with a mean that belongs to theta0, not the posterior, or the data would count twice.
- ``trial``: each trial computes and synchronises a little faster or slower than its features say;
  one effect for each share of its time. Most of it belongs to the model: trials of one training
  function with equal features, as those of a search for a learning rate, share that part.
- ``kind``: how efficiently operations are computed depends on the kind of layers, which shows in
  their number per parameter: Matern 5/2 over (ln P, ln F / P, ln B), on the share of computation.
  What was learnt of convolutions says little of dense layers.
- ``field``: Matern 5/2 over (ln n, ln m): what the model gets wrong about allocations.
- ``context``: Matern 5/2 over (ln n, ln m, ln P, ln F, ln B): the same, about models.

A measurement may also be of the time that a worker has computed by itself: the same with g of the
computation alone and without the fields. So the first measurement of a job tells what more workers
would bring.

Intervals widen where a machine is less regular than all this assumes: with n measurements y of
mean m and covariance K, variances are multiplied by (nu + (y - m)' K^-1 (y - m)) / (nu + n) if that
is above 1 (the posterior scale of a Student-t process; Shah et al., 2014).

The hyper-parameters are fixed: with the dozens of observations that a search has, fitting them
costs more than it brings (and a fit in the middle of a job would make decisions jump).

The posterior is written out, in numpy: with the dozens of points that there are, calls of a library
for Gaussian processes would take longer than what they compute. Tests hold it against gpytorch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import inf, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular
from threadpoolctl import ThreadpoolController

from smlt_tune.backend.resource_manager.physics import (
    PRIOR,
    THETA_MEAN,
    THETA_SD,
    IterationTime,
    Points,
    Times,
)

Array = NDArray[np.float64]

#: Standard deviations of a trial's effects on its computation and on its synchronisation.
TRIAL_COMPUTE_SD, TRIAL_SYNC_SD = 0.2, 0.2
#: Share of their variances that belongs to the model, and not to the trial itself: how busy the
#: machine is, or another optimizer.
OF_MODEL = 0.75
#: Standard deviation and length scales (ln P, ln F / P, ln B) of the effect of the kind of layers.
KIND_SD, KIND_SCALES = 0.4, (3.0, 1.5, 3.0)
#: Standard deviation and length scales (ln n, ln m) of the field over allocations.
FIELD_SD, FIELD_SCALES = 0.09, (1.5, 1.2)
#: Standard deviation and length scales (ln n, ln m, ln P, ln F, ln B) of the field over models.
CONTEXT_SD, CONTEXT_SCALES = 0.07, (1.5, 1.2, 1.5, 1.5, 1.5)
#: Noise of one iteration and of any mean, as standard deviations of ln t.
ITERATION_NOISE, NOISE_FLOOR = 0.05, 0.03
#: Noise of a time of computation: where it ends and waiting begins differs from the model.
COMPUTATION_NOISE = 0.1
#: A measurement that lies so many standard deviations above what the others say is a straggler;
#: one of the job itself more of them (a job that is unlike its siblings shows in each of its own),
#: unless it is of so many iterations or all that is known of its pace.
STRAGGLER_Z, OWN_STRAGGLER_Z, OWN_PACE = 2.5, 4.0, 20
_STEPS = 4
_JITTER = 1e-8
#: Degrees of freedom of the prior of the scale of all covariances, nu.
SCALE_DOF = 8.0
#: Columns of the kernel's inputs: J S0^(1/2), shares of the time (of computation first), the
#: numbers of trial and model, whether it is the whole time, the place (ln of n, m, P, F, B, F / P).
_SHARES = len(PRIOR)
_TRIAL = _SHARES + 2
_MODEL = _TRIAL + 1
_WHOLE = _MODEL + 1
_PLACE = _WHOLE + 1
#: The shares carry the trial's standard deviation already.
_KIND = KIND_SD / TRIAL_COMPUTE_SD
#: Length scales of kind, field and context over the place: infinite where it does not matter.
_SCALES: Array = np.array(
    [
        [(inf, inf, KIND_SCALES[0], inf, KIND_SCALES[2], KIND_SCALES[1])],
        [(*FIELD_SCALES, inf, inf, inf, inf)],
        [(*CONTEXT_SCALES, inf)],
    ]
)


@dataclass(frozen=True)
class Measurements:
    """Times that were measured.

    Attributes:
        at: Where; p points.
        ln_s: ln t, shape (p,).
        iterations: Of how many iterations each is the mean, shape (p,).
        trials: Whose: equal numbers belong to one trial, 0 to the one that is asked about; shape
            (p,).
        models: Of what model: equal numbers mean the same features and training function, shape
            (p,).
        whole: Whether it is the whole time, or what a worker has computed by itself, shape (p,).
    """

    at: Points
    ln_s: Array
    iterations: Array
    trials: Array
    models: Array
    whole: NDArray[np.bool_]


@dataclass(frozen=True)
class Apart:
    """What of the covariances of some places with others does not depend on theta.

    Attributes:
        same: How much of the effects of a trial they share: all of one trial and model, a part of
            trials of one model; shape (p, q).
        kinds: How much of the effect of the kind of layers they share, and the same of the trial's
            own effect on computation, shape (p, q).
        fields: What the analytic model gets wrong, shape (p, q).
    """

    same: Array
    kinds: Array
    fields: Array


class AnalyticKernel:
    """``J S0 J'`` alone; its inputs are what :func:`features` gives, shape (p, 21)."""

    #: What the analytic model gets wrong is noise then, as a standard deviation of ln t.
    noise_sd = 0.08

    def variance(self, x: Array) -> Array:
        """Of each, shape (p,)."""
        return np.asarray((x[:, :_SHARES] ** 2).sum(axis=1))

    def apart(self, x1: Array, x2: Array) -> Apart | None:
        """What :meth:`covariance` needs again for every theta: nothing."""
        return None

    def covariance(self, x1: Array, x2: Array, apart: Apart | None) -> Array:
        """Of all places with all others, shape (p, q)."""
        return np.asarray(x1[:, :_SHARES] @ x2[:, :_SHARES].T)


class TimeKernel(AnalyticKernel):
    """The covariance."""

    noise_sd = 0.0

    def variance(self, x: Array) -> Array:  # noqa: D102
        kind = (x[:, _SHARES] * _KIND) ** 2
        fields = x[:, _WHOLE] * (FIELD_SD**2 + CONTEXT_SD**2)
        return np.asarray((x[:, :_TRIAL] ** 2).sum(axis=1) + kind + fields)

    def apart(self, x1: Array, x2: Array) -> Apart:  # noqa: D102
        trial, model = (x1[:, k, None] == x2[:, k] for k in (_TRIAL, _MODEL))
        same = (1.0 - OF_MODEL) * trial + OF_MODEL * model
        kind, field, context = _matern(x1[:, _PLACE:], x2[:, _PLACE:])
        fields = FIELD_SD**2 * field + CONTEXT_SD**2 * context
        fields = fields * np.outer(x1[:, _WHOLE], x2[:, _WHOLE])
        return Apart(same, same + _KIND**2 * kind, fields)

    def covariance(  # noqa: D102
        self, x1: Array, x2: Array, apart: Apart | None
    ) -> Array:
        assert apart is not None
        compute, synchronise = (
            x1[:, share, None] * x2[:, share] for share in (_SHARES, _SHARES + 1)
        )
        theta = super().covariance(x1, x2, apart)
        effects = apart.kinds * compute + apart.same * synchronise
        return np.asarray(theta + effects + apart.fields)


def _matern(x1: Array, x2: Array) -> Array:
    """Matern 5/2 of kind, field and context, shape (3, p, q).

    ``(1 + d + d**2 / 3) exp(-d)`` with d the square root of 5 times the scaled distance.
    """
    middle = x1.mean(axis=0)  # squares of small numbers lose fewer digits
    a, b = (x1 - middle) / _SCALES, (x2 - middle) / _SCALES
    lengths = (a**2).sum(axis=2)[:, :, None] + (b**2).sum(axis=2)[:, None, :]
    square = np.maximum(5.0 * (lengths - 2.0 * a @ b.transpose(0, 2, 1)), 0.0)
    away = np.sqrt(square)
    return np.asarray((1.0 + away + square / 3.0) * np.exp(-away))


@contextmanager
def one_thread() -> Iterator[None]:
    """For matrices this small, more threads only wait for each other, at the cost of CPU time."""
    with _pools().limit(limits=1):
        yield


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()


@cache
def time_kernel(*, residual: bool = True) -> AnalyticKernel:
    """The one that all processes share: it never changes."""
    return TimeKernel() if residual else AnalyticKernel()


def features(at: Points, times: Times, trials: Array, models: Array, whole: Array) -> Array:
    """Inputs of the kernel, shape (p, 21).

    Args:
        at: The points.
        times: What the analytic model says of them, at the theta it is linearised at.
        trials: Numbers of their trials, shape (p,).
        models: Numbers of their models, shape (p,).
        whole: 1 for the whole time, 0 for what a worker computes by itself, shape (p,).
    """
    size, work = at.parameters, at.flops
    logs = [at.workers, at.memory_mb, size, work, at.batch, work / size]
    columns = [
        *(times.gradient * THETA_SD).T,
        TRIAL_COMPUTE_SD * times.compute_share,
        TRIAL_SYNC_SD * (1.0 - times.compute_share),
        trials,
        models,
        whole,
        *np.log(logs),
    ]
    return np.array(columns).T


class GaussianProcess:
    """The posterior of ln t, given measurements.

    Args:
        model: The analytic model.
        measured: What was measured; may be empty.
        residual: Whether there is anything but the analytic model.
    """

    def __init__(
        self, model: IterationTime, measured: Measurements, *, residual: bool = True
    ) -> None:
        self._model = model
        self._measured = measured
        self._kernel = time_kernel(residual=residual)
        self._theta, self._scale = THETA_MEAN, 1.0
        self._whole = measured.whole.astype(np.float64)
        self._times = model.at(measured.at, self._whole)
        self._apart: Apart | None = None
        self._noise = noise_sd(measured.iterations) ** 2 + self._kernel.noise_sd**2
        self._noise = self._noise + np.where(measured.whole, 0.0, COMPUTATION_NOISE**2)
        if len(measured.ln_s):
            self._fit()
            if self._discount_stragglers():
                self._fit()

    @property
    def scale(self) -> float:
        """Factor of all standard deviations."""
        return self._scale

    @property
    def theta(self) -> Array:
        """Most probable unknowns of the analytic model, as in ``physics.PRIOR``."""
        return self._theta

    def predict(self, at: Points, trials: Array, models: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of ln t without noise, each of shape (p,).

        Args:
            at: Where; p points.
            trials: Whose, shape (p,).
            models: Of what model, shape (p,).
        """
        times = self._model(at, self._theta)
        mean = times.ln_s + times.gradient @ (THETA_MEAN - self._theta)
        x = features(at, times, trials, models, np.ones_like(trials))
        variance = self._kernel.variance(x)
        if len(self._measured.ln_s):
            across = self._kernel.covariance(self._x, x, self._kernel.apart(self._x, x))
            half = solve_triangular(self._factor, across, lower=True, check_finite=False)
            mean = mean + self._weights @ across
            variance = variance - (half**2).sum(axis=0)
        return mean, self._scale * np.sqrt(np.maximum(variance, 1e-6))

    def _fit(self) -> None:
        """Finds the most probable theta, and the posterior there (Gauss-Newton)."""
        measured = self._measured
        for last in (*[False] * (_STEPS - 1), True):
            times = self._times(self._theta)
            trials, models = measured.trials, measured.models
            self._x = x = features(measured.at, times, trials, models, self._whole)
            surprise = measured.ln_s - times.ln_s - times.gradient @ (THETA_MEAN - self._theta)
            if self._apart is None:
                self._apart = self._kernel.apart(x, x)
            covariance = self._kernel.covariance(x, x, self._apart)
            covariance.flat[:: len(x) + 1] += self._noise + _JITTER
            self._factor = np.linalg.cholesky(covariance)
            self._weights = cho_solve((self._factor, True), surprise, check_finite=False)
            if not last:
                step = THETA_SD**2 * (times.gradient.T @ self._weights)
                self._theta = THETA_MEAN + step
        count, surprises = len(surprise), float(surprise @ self._weights)
        # Not narrower: what siblings have in common says less of the next one than it seems.
        self._scale = max(1.0, sqrt((SCALE_DOF + surprises) / (SCALE_DOF + count)))

    def _discount_stragglers(self) -> bool:
        """Adds noise to what is far slower than the other measurements say (leave one out)."""
        half = solve_triangular(self._factor, np.eye(len(self._factor)), lower=True)
        inverse = (half**2).sum(axis=0)
        z = self._weights / np.sqrt(inverse)
        own = self._measured.trials == 0
        alone = (own & self._measured.whole).sum() == 1
        believed = own & (alone | (self._measured.iterations >= OWN_PACE))
        slow = (z > np.where(own, OWN_STRAGGLER_Z, STRAGGLER_Z)) & ~believed
        self._noise = self._noise + np.where(slow, (z / np.sqrt(inverse)) ** 2, 0.0)
        return bool(slow.any())


def noise_sd(iterations: Array) -> Array:
    """Standard deviation of ln(mean of some iterations), shape of the argument."""
    return np.asarray(np.sqrt(NOISE_FLOOR**2 + ITERATION_NOISE**2 / np.maximum(iterations, 1.0)))
