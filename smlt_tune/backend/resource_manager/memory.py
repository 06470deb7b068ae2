r"""How much memory a worker needs: a Gaussian regression of its peak, linear in what it holds.

::

    peak = w0 + w1 (4 P / MB) + w2 (A b / MB) + trial + noise

with P parameters, A activation bytes per sample, b the largest part of a batch that a worker gets.
w0 is the interpreter with its libraries; w1 counts copies of the parameters (gradients, optimizer
state, flat vectors); w2 is near 1. Each trial has an offset of its own, relative to its size. A
worker that ran out of memory says that the peak lies above what it had.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Prior of (w0 in MB, w1, w2): means and standard deviations.
MEAN: Array = np.array([280.0, 5.0, 1.3])
SD: Array = np.array([120.0, 2.0, 0.45])
#: Standard deviation of a trial's offset, as a share of its expected peak, ...
TRIAL_SD = 0.12
#: ... and where its activations are not known.
UNKNOWN_SD = 0.4
#: Of a measured peak: a share, and MB.
NOISE_SD, NOISE_MB = 0.02, 4.0
#: After an out-of-memory error the peak is taken to lie so far above the limit, as a share of it,
#: and to be so uncertain: little, because the limit is a fact and the rest only a model.
BEYOND, BEYOND_SD = 0.15, 0.02
#: Share of a function's memory that its worker may fill.
USABLE = 0.97
_MB = 2.0**20


@dataclass(frozen=True)
class Holdings:
    """What a worker has to hold; arrays of shape (p,).

    Attributes:
        parameters: P.
        activation_bytes: A b, bytes; 0 where A is not known.
        trials: Whose: equal numbers belong to one trial.
    """

    parameters: Array
    activation_bytes: Array
    trials: Array

    @cached_property
    def terms(self) -> Array:
        """What the weights stand before, shape (p, 3)."""
        ones = np.ones_like(self.parameters)
        return np.stack([ones, 4.0 * self.parameters / _MB, self.activation_bytes / _MB], axis=1)

    @cached_property
    def trial_sd(self) -> Array:
        """Standard deviation of the offset, MB, shape (p,)."""
        share = np.where(self.activation_bytes > 0, TRIAL_SD, UNKNOWN_SD)
        return np.asarray(share * (self.terms @ MEAN), dtype=np.float64)


class MemoryModel:
    """The posterior of the peak, given some that were seen.

    Args:
        seen: Of which workers.
        peak_mb: Their peaks, MB, shape (p,).
        exceeded: Where the peak was cut off by the limit, and lies above, shape (p,).
    """

    def __init__(self, seen: Holdings, peak_mb: Sequence[float], exceeded: Sequence[bool]) -> None:
        peaks, above = np.asarray(peak_mb, dtype=np.float64), np.asarray(exceeded, dtype=bool)
        self._seen = seen
        self._fit(peaks, NOISE_SD * peaks + NOISE_MB)
        if above.any():
            # What the others say may put it higher still; then the bound has nothing to add.
            expected = _expected(seen, peaks, ~above)
            assumed = np.where(above, np.maximum(peaks * (1.0 + BEYOND), expected), peaks)
            self._fit(assumed, np.where(above, BEYOND_SD * assumed, NOISE_SD * peaks + NOISE_MB))

    def _fit(self, peaks: Array, noise: Array) -> None:
        covariance = _covariance(self._seen, self._seen) + np.diag(noise**2)
        self._inverse = np.linalg.inv(covariance)
        self._weights = self._inverse @ (peaks - self._seen.terms @ MEAN)

    def peak_mb(self, of: Holdings) -> tuple[Array, Array]:
        """Mean and standard deviation of peaks, MB, each of shape (p,)."""
        across = _covariance(of, self._seen)
        mean = of.terms @ MEAN + across @ self._weights
        own = (of.terms**2) @ SD**2 + of.trial_sd**2
        explained = ((across @ self._inverse) * across).sum(axis=1)
        variance = np.maximum(own - explained, 1.0) + (NOISE_SD * mean + NOISE_MB) ** 2
        return mean, np.sqrt(variance)

    def fits(self, of: Holdings, memory_mb: Array) -> Array:
        """Probability that workers stay within a function's memory, shape (p,)."""
        mean, sd = self.peak_mb(of)
        from scipy.special import ndtr

        return np.asarray(ndtr((USABLE * memory_mb - mean) / sd))


def _expected(seen: Holdings, peaks: Array, known: Array) -> Array:
    """Of all, by what is known of some."""
    if not known.any():
        return np.asarray(seen.terms @ MEAN)
    kept = Holdings(seen.parameters[known], seen.activation_bytes[known], seen.trials[known])
    return MemoryModel(kept, list(peaks[known]), [False] * int(known.sum())).peak_mb(seen)[0]


def _covariance(a: Holdings, b: Holdings) -> Array:
    same = a.trials[:, None] == b.trials[None, :]
    offsets = np.where(same, a.trial_sd[:, None] * b.trial_sd[None, :], 0.0)
    return (a.terms * SD**2) @ b.terms.T + offsets
