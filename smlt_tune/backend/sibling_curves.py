r"""What the curves of earlier trainings of the same function say of the course of a later one.

A curve cannot tell what it has not seen yet, such as a rate that decays; those of its siblings can.

| symbol | meaning | shape |
|---|---|---|
| e, n | epoch, from 1; epochs of the training so far | |
| l(e) | log of the distance of a curve to the best possible value | |
| l_j | that of sibling j; k siblings | (k, epochs) |
| m | their mean | (epochs,) |

Only siblings that began alike are used: l(e) took the same course, late epochs counting more, and
was, less important, at the same level. They are used in two ways, which err differently.
**Stretched**: another rate or batch size makes a training faster or slower, so a sibling's curve
with another unit of time is one more shape of a curve; its height is fitted (Chandrashekaran, Lane:
Speeding up hyper-parameter optimization by extrapolation of learning curves using previous builds,
ECML PKDD 2017). **Blended**: a Gaussian process whose mean and covariance are those of the
siblings. Given the epochs so far, it is m plus that blend of the l_j - m that fits best, each with
as much confidence as k curves give. Besides, the training has a course of its own: a trend, a
smooth departure and a random walk, of several sizes, which count by their marginal likelihoods.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Siblings that are used, those that began most alike. Four or eight foretell as well.
MOST = 6

# Chosen on one half of the recorded searches, see benchmarks/bench_loss_curves.py.
#: How much less another level counts than another course, when beginnings are compared.
_OF_LEVEL = 0.1
#: Units of time of a stretched sibling, and the standard deviation of their logarithm.
_STRETCHES = np.geomspace(1.0 / 3.0, 3.0, 13)
_STRETCH = 0.3
#: Of a course of its own, in e-folds: standard deviation of the departure, of the trend over an
#: e-fold of epochs, and of the walk over n epochs.
_DEPARTURES = (0.02, 0.06, 0.2, 0.6)
#: Of its level, which is its own, about where it is now.
_LEVEL = 2.0
#: Values into which the epochs so far are summarised, by medians: their variance is larger than
#: that of means by the factor.
_BINS, _OF_MEDIANS = 12, 1.3
#: Of a logarithm, what is nothing.
_LITTLE = 1e-3


class Siblings:
    """Curves of siblings, continued.

    Args:
        curves: Values that fall, after each epoch from the first; NaN where there is none. At least
            four are numbers. The newest first.
        floor: The best possible value; -inf if nobody knows.
        epochs: Of the training itself, those so far that have a value; shape (known,).
        own: Of these; shape (known,).
        goal: What it heads for.

    Attributes:
        floor: From which distances are counted.
    """

    def __init__(
        self, curves: Sequence[Array], floor: float, epochs: Array, own: Array, goal: float
    ) -> None:
        known = [np.flatnonzero(np.isfinite(curve)) for curve in curves]
        finite = [curve[there] for curve, there in zip(curves, known, strict=True)]
        values = np.concatenate([own, *finite])
        if math.isinf(floor):
            floor = min(float(values.min()), goal) - 0.1 * float(np.ptp(values))
        self.floor = floor
        above = values[values > floor] - floor
        self._least = 0.5 * float(above.min()) if len(above) else 1.0
        self._courses = [
            _course(np.asarray(there + 1.0), self.distance(values))
            for there, values in zip(known, finite, strict=True)
        ]
        apart = self.at(epochs) - self.distance(own)
        weights = epochs / epochs.sum()
        level = apart @ weights
        unlike = apart**2 @ weights - (1.0 - _OF_LEVEL) * level**2
        alike = np.argsort(unlike, kind="stable")[:MOST]
        self._courses = [self._courses[each] for each in alike]

    def distance(self, values: Array) -> Array:
        """Logarithm of the distance to the best possible value."""
        return np.asarray(np.log(np.maximum(values - self.floor, self._least)))

    def at(self, epochs: Array) -> Array:
        """Every l_j at some epochs; shape (k, epochs)."""
        log = np.log(epochs)
        return np.array(
            [
                np.interp(log, known, values) + slope * np.maximum(0.0, log - known[-1])
                for known, values, slope in self._courses
            ]
        )

    def stretched(self, epochs: Array) -> Array:
        """Distances at other units of time; shape (k x stretches, epochs)."""
        return np.asarray(np.exp(np.concatenate([self.at(epochs * unit) for unit in _STRETCHES])))

    def log_prior(self) -> Array:
        """Of each row of :meth:`stretched`; shape (k x stretches,)."""
        prior = np.repeat(-0.5 * (np.log(_STRETCHES) / _STRETCH) ** 2, len(self._courses))
        return np.asarray(prior - np.log(np.exp(prior).sum()))

    def blended(self, epochs: Array, values: Array, ends: Array, draws: Array) -> Array:
        """Draws of the course of a training.

        Args:
            epochs: Those so far that have a value; shape (known,).
            values: Of these; shape (known,).
            ends: Epochs ahead; shape (ends,).
            draws: Standard normal numbers; shape (draws, ends).

        Returns:
            Values, of shape (draws, ends).
        """
        now, distance = epochs[-1], self.distance(values)
        seen, summary, variance = _summary(epochs, distance)
        first, x = len(seen), np.log(np.concatenate([seen, ends]) / now)
        curves = self.at(np.concatenate([seen, ends]))
        mean = curves.mean(axis=0)
        mean += summary[-1] - mean[first - 1]
        blend = (curves - curves.mean(axis=0)) / math.sqrt(max(1, len(curves) - 1))
        of_siblings = blend.T @ blend + _LEVEL**2
        smooth, walk = np.exp(-0.5 * (x[:, None] - x) ** 2), np.exp(np.minimum(x[:, None], x))
        own = np.outer(x, x) + smooth + walk
        found, evidence = [], []
        for size in _DEPARTURES:
            prior = of_siblings + size**2 * own
            factor = np.linalg.cholesky(prior[:first, :first] + np.diag(variance))
            gain = np.linalg.solve(factor, prior[:first])
            news = np.linalg.solve(factor, summary - mean[:first])
            evidence.append(-0.5 * news @ news - np.log(np.diag(factor)).sum())
            found.append(((mean + gain.T @ news)[first:], (prior - gain.T @ gain)[first:, first:]))
        share = np.exp(np.array(evidence) - max(evidence))
        until = np.round(len(draws) * np.cumsum(share) / share.sum()).astype(int)
        parts = np.split(draws, until[:-1])
        courses = [
            middle + part @ _factor(covariance).T
            for part, (middle, covariance) in zip(parts, found, strict=True)
            if len(part)
        ]
        return np.asarray(self.floor + np.exp(np.minimum(np.concatenate(courses), 50.0)))


def _course(epochs: Array, distance: Array) -> tuple[Array, Array, float]:
    """Log epochs, a curve there, and its slope over the later half: it is continued, never up."""
    log, late = np.log(epochs), len(epochs) // 2
    x = log[late:] - log[late:].mean()
    return log, distance, min(0.0, float(x @ distance[late:] / (x @ x)))


def _summary(epochs: Array, distance: Array) -> tuple[Array, Array, Array]:
    """Epochs, medians and their variances of bins that grow with the epoch."""
    ends = np.unique(np.round(np.linspace(0.0, math.sqrt(epochs[-1]), _BINS + 1) ** 2))
    place = np.digitize(epochs, ends, right=True)
    bins = [place == each for each in np.unique(place)]
    bends = np.diff(distance, n=2)[-max(3, len(distance) // 2) :]
    noise = max(_LITTLE, 1.4826 * float(np.median(np.abs(bends))) / math.sqrt(6.0))
    return (
        np.array([math.exp(np.log(epochs[each]).mean()) for each in bins]),
        np.array([np.median(distance[each]) for each in bins]),
        np.array([_OF_MEDIANS * noise**2 / each.sum() for each in bins]) + _LITTLE**2,
    )


def _factor(covariance: Array) -> Array:
    """Cholesky factor of a covariance that rounding may have made indefinite."""
    little = 1e-8 * max(1.0, float(np.trace(covariance)) / len(covariance))
    return np.asarray(np.linalg.cholesky(covariance + little * np.eye(len(covariance))))
