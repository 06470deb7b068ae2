r"""When a training will reach a target: its curve so far, continued (CE-scaling, section III-D).

| symbol | meaning |
|---|---|
| e, n | epoch, from 1; epochs so far |
| y_e | what was measured after epoch e, turned so that less is better |
| g(e) | shape of a curve: falls from about 1 towards 0 |
| a, c | its height, a >= 0; its asymptote, never better than the best possible value |
| s | scale of what is left, y - (a g + c) |

Every curve is ``a g(e) + c``. Three families of g have been found to cover most trainings (Domhan,
Springenberg, Hutter: Speeding up automatic hyperparameter optimization of deep neural networks by
extrapolation of learning curves, IJCAI 2015):

| family | g | contains |
|---|---|---|
| power | ``(1 + e / t)^-p`` | CE-scaling's ``1 / (a e + b) + c`` (p = 1), a pure power |
| stretched exponential | ``exp(-(e / t)^p)`` | exponential (p = 1), Weibull |
| Hill | ``1 / (1 + (e / t)^p)`` | MMF, log-power |

The form of g is taken from a grid of (t, p), and a, c are least squares: linear, so that all shapes
are fitted at once, by sums, without starting values and local optima. Spikes lose their weight
(iteratively reweighted least squares for Student's t). Trainings have phases, so every shape is
fitted with late epochs counting more than early ones to several degrees, and once more with the
best possible value as its asymptote. Nothing is selected: each fit counts by how well it foretells
the last third of the epochs from the others, and then uses all of them, with draws of its a and c.
Curves of siblings are shapes too, and give draws of their own (:mod:`sibling_curves`).
Noise reaches a target before the curve does, so each draw gives a distribution of the first epoch
whose value, noise included, is at the target. Their mixture is the prediction.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from statistics import NormalDist
from typing import cast

import numpy as np
from numpy.typing import NDArray

from smlt_tune.backend.resource_manager.observations import Interval
from smlt_tune.backend.sibling_curves import Siblings
from smlt_tune.errors import InvalidInput

Array = NDArray[np.float64]

#: Nothing is predicted from fewer epochs than this: two values and the bend between them.
FEWEST = 4
#: Beyond so many times the epochs so far, a target counts as never reached.
HORIZON = 30
#: How far a prediction moves before it is worth a decision (CE-scaling, section IV-G).
DELTA = 0.1

# Chosen on one half of the recorded curves, see benchmarks/bench_loss_curves.py.
#: Epochs that are used at most, evenly spread: bounds the time of a prediction.
_MOST = 120
#: Degrees of freedom of Student's t, and rounds of reweighting.
_FREEDOM, _ROUNDS = 4.0, 4
#: The weight of epoch e is (e / n) to one of these powers.
_RECENCIES = (1.0, 3.0, 8.0)
#: Share of the epochs that a fit has to foretell, at least so many.
_HELD_OUT, _HELD_OUT_LEAST = 1.0 / 3.0, 2
#: What is left is no white noise: shapes that are not the true one leave waves. So many epochs
#: count as one, ...
_EPOCHS_PER_FACT = 2.0
#: ... and however many are held out, they say no more about shapes than so many.
_FACTS = 4.0
#: How much likelier than not a curve ends at the best possible value, before it is seen.
_ODDS_OF_BEST = 4.5
#: How much likelier than not a sibling is the better shape, before anything is seen; share of the
#: draws that are blends of siblings.
_ODDS_OF_SIBLINGS, _BLENDED = 0.3, 0.4
#: Draws from all fits, and points of the distribution over epochs.
_DRAWS, _POINTS = 256, 160
#: Ends and middle of an interval.
_QUANTILES = (0.05, 0.5, 0.95)
#: What a number can be; larger ones are taken for infinite.
_LARGEST = 1e100
#: Of values scaled to a range of 1, what is nothing, and how far siblings can be.
_NOTHING, _FAR = 1e-6, 1e9
#: The grid: t, in units of the epochs so far, and p.
_SCALES = np.geomspace(0.03, 10.0, 16)
_POWERS = {
    "power": np.geomspace(0.25, 4.0, 6),
    "exponential": np.geomspace(0.3, 4.0, 8),
    "hill": np.geomspace(0.5, 4.0, 6),
}


@dataclass(frozen=True)
class Forecast:
    """When a target will be reached.

    Attributes:
        epochs: From the beginning of the training to the target; infinite where that lies beyond
            the horizon. The ends are those of the 90 % interval.
        chance: Probability that the target is reached within ``HORIZON`` times the epochs so far.
    """

    epochs: Interval
    chance: float

    @property
    def never(self) -> bool:
        """Whether the target will more probably be missed than reached."""
        return math.isinf(self.epochs.mid)


@dataclass(frozen=True)
class _Fits:
    """Every shape, fitted in one way. First axis: shapes.

    Attributes:
        height: a.
        asymptote: c.
        factor: Of the covariance of (a, c), lower triangular: its entries aa, ca, cc.
    """

    height: Array
    asymptote: Array
    factor: tuple[Array, Array, Array]

    def left(self, g: Array, y: Array) -> Array:
        """What curves leave of values; shape (shapes, n)."""
        return y - self.height[:, None] * g - self.asymptote[:, None]


@dataclass(frozen=True)
class _Way:
    """How shapes are fitted.

    Attributes:
        g: Shapes at the epochs so far; shape (shapes, n).
        ahead: The same at epochs ahead; shape (shapes, ends).
        floor: Least asymptote.
        ends_at_floor: The asymptote is the floor.
        log_prior: Of each shape; shape (shapes,).
    """

    g: Array
    ahead: Array
    floor: float
    ends_at_floor: bool
    log_prior: Array


def forecast(
    values: Sequence[float],
    target: float,
    *,
    falling: bool = True,
    best: float | None = None,
    siblings: Sequence[Sequence[float]] = (),
) -> Forecast | None:
    """Continues a curve to a target.

    Deterministic; some milliseconds, whatever the number of epochs and siblings.

    Args:
        values: Of the metric after each epoch, from the first. NaN and infinities are skipped.
        target: To be reached or passed by the metric itself, noise included.
        falling: Less is better, as of a loss; otherwise more, as of an accuracy.
        best: No curve passes this value: 0 for a loss that is not negative, 1 for an accuracy.
            Predictions are clearly better for knowing it.
        siblings: The same metric of other trainings of the same function, oldest first; whole
            curves, or as far as they are known. Of those that are longer than this one, the ones
            that began most alike count.

    Returns:
        None if fewer than ``FEWEST`` epochs have a finite value.

    Raises:
        InvalidInput: The target is no finite number, or is better than the best value.
    """
    sign = 1.0 if falling else -1.0
    _check(target, falling, best)
    measured = sign * np.asarray(values, dtype=np.float64)
    finite = np.abs(measured) < _LARGEST
    reached = np.flatnonzero(finite & (measured <= sign * target))
    if len(reached):
        epoch = float(reached[0] + 1)
        return Forecast(Interval(epoch, epoch, epoch), 1.0)
    known = np.flatnonzero(finite)
    if len(known) < FEWEST:
        return None
    if len(known) > _MOST:
        known = known[np.linspace(0, len(known) - 1, _MOST).round().astype(int)]
    y, now = measured[known], len(measured)
    least, spread = y.min(), float(np.ptp(y)) or max(1.0, abs(float(y[0])))
    goal = (sign * target - least) / spread
    floor = -math.inf if best is None else (sign * best - least) / spread
    far = _FAR * spread
    curves = [
        (np.clip(curve, least - far, least + far) - least) / spread
        for curve in _longer(siblings, sign, now)
    ]
    return _first_passage((known + 1) / now, (y - least) / spread, goal, floor, now, curves)


def moved(before: Forecast | None, now: Forecast | None, delta: float = DELTA) -> bool:
    """Whether a decision that rests on one forecast should be looked at again.

    Algorithm 2 of CE-scaling, line 11, as its text means it: in either direction.

    Args:
        before: At the last decision; None if there was none.
        now: The newest; None if there is none yet.
        delta: Relative change that is still no news.
    """
    if before is None or now is None:
        return before is not now
    if before.never or now.never:
        return before.never != now.never
    return abs(now.epochs.mid - before.epochs.mid) > delta * before.epochs.mid


def _check(target: float, falling: bool, best: float | None) -> None:
    mistakes = []
    if not math.isfinite(target):
        mistakes.append(f"target must be a finite number, not {target!r}")
    if best is not None and not math.isfinite(best):
        mistakes.append(f"best must be a finite number or None, not {best!r}")
    elif best is not None and (target < best if falling else target > best):
        mistakes.append(f"target {target!r} is better than the best possible value, {best!r}")
    if mistakes:
        raise InvalidInput(mistakes)


def _longer(siblings: Sequence[Sequence[float]], sign: float, now: int) -> list[Array]:
    """Curves that say something of what is ahead, newest first, NaN where there is no number."""
    found: list[Array] = []
    for values in reversed(siblings):
        curve = sign * np.asarray(values, dtype=np.float64)
        curve[~(np.abs(curve) < _LARGEST)] = math.nan
        known = np.flatnonzero(np.isfinite(curve))
        if len(known) >= FEWEST and known[-1] >= now:
            found.append(curve)
    return found


@cache
def _grid() -> tuple[Array, Array, Array]:
    """(family, t / n, p) of all shapes."""
    rows = [
        (family, t, p)
        for family, powers in enumerate(_POWERS.values())
        for t in _SCALES
        for p in powers
    ]
    return cast(tuple[Array, Array, Array], tuple(np.array(rows).T))


def _shapes(x: Array) -> Array:
    """All shapes g at epochs x, in units of the epochs so far; shape (shapes, len(x))."""
    family, t, p = _grid()
    ratio = x / t[:, None]
    raised = ratio ** p[:, None]
    g = np.empty_like(raised)
    power, exponential, hill = (family == i for i in range(len(_POWERS)))
    g[power] = (1.0 + ratio[power]) ** -p[power, None]
    g[exponential] = np.exp(-raised[exponential])
    g[hill] = 1.0 / (1.0 + raised[hill])
    return np.maximum(g, 1e-9)


def _noise(y: Array) -> float:
    """Standard deviation from one epoch to the next, of the later half; robust to spikes."""
    bends = np.diff(y, n=2)[-max(3, len(y) // 2) :]
    return float(1.4826 * np.median(np.abs(bends)) / math.sqrt(6.0)) + _NOTHING


def _fit(g: Array, y: Array, recency: Array, floor: float, *, ends_at_floor: bool) -> _Fits:
    """Every shape, by least squares that are robust to spikes.

    Args:
        g: Shapes; shape (shapes, n).
        y: Values; shape (n,).
        recency: Weights of the epochs; shape (n,).
        floor: Least asymptote.
        ends_at_floor: The asymptote is the floor.
    """
    solve = _height_alone if ends_at_floor else _height_and_asymptote
    weights = np.broadcast_to(recency, g.shape)
    for _ in range(_ROUNDS):
        a, c, aa, ca, cc = solve(weights, g, y, floor)
        left2 = (y - a[:, None] * g - c[:, None]) ** 2
        s2 = (weights * left2).sum(axis=1) / recency.sum() + _NOTHING**2
        weights = recency * (_FREEDOM + 1.0) / (_FREEDOM + left2 / s2[:, None])
    s = np.sqrt(s2 * _EPOCHS_PER_FACT)
    return _Fits(a, c, (s * aa, s * ca, s * cc))


def _height_and_asymptote(w: Array, g: Array, y: Array, floor: float) -> tuple[Array, ...]:
    """(a, c), and the factor of their covariance for s = 1; a >= 0, c >= floor."""
    wg = w * g
    one, with_g, gg = w.sum(axis=1), wg.sum(axis=1), (wg * g).sum(axis=1)
    with_y, gy = w @ y, wg @ y
    determinant = np.maximum(one * gg - with_g**2, 1e-12 * one * gg)
    a = (one * gy - with_g * with_y) / determinant
    c = (with_y - a * with_g) / one
    if math.isfinite(floor):
        a = np.where(c < floor, (gy - floor * with_g) / gg, a)
        c = np.maximum(c, floor)
    rises = a < 0.0
    a, c = np.where(rises, 0.0, a), np.where(rises, with_y / one, c)
    aa = np.sqrt(one / determinant)
    return a, c, aa, -with_g / one * aa, 1.0 / np.sqrt(one)


def _height_alone(w: Array, g: Array, y: Array, floor: float) -> tuple[Array, ...]:
    """The same with c at the floor."""
    wg = w * g
    gg = (wg * g).sum(axis=1)
    a = np.maximum(0.0, (wg @ y - floor * wg.sum(axis=1)) / gg)
    nothing = np.zeros_like(a)
    return a, nothing + floor, 1.0 / np.sqrt(gg), nothing, nothing


def _ways(x: Array, ahead: Array, floor: float, siblings: Siblings | None, now: int) -> list[_Way]:
    """All shapes, with all that is known of them beforehand."""
    family = _grid()[0].astype(int)
    prior = -np.log(np.bincount(family) * len(_POWERS))[family]
    g, g_ahead = _shapes(x), _shapes(ahead)
    ways = [_Way(g, g_ahead, floor, ends_at_floor=False, log_prior=prior)]
    if math.isfinite(floor):
        prior = prior + math.log(_ODDS_OF_BEST)
        ways.append(_Way(g, g_ahead, floor, ends_at_floor=True, log_prior=prior))
    if siblings is not None:
        odds = math.log(_ODDS_OF_SIBLINGS * sum(np.exp(way.log_prior).sum() for way in ways))
        g, g_ahead = siblings.stretched(x * now), siblings.stretched(ahead * now)
        prior = siblings.log_prior() + odds
        ways.append(_Way(g, g_ahead, siblings.floor, ends_at_floor=True, log_prior=prior))
    return ways


def _all_fits(x: Array, y: Array, ways: Sequence[_Way]) -> tuple[_Fits, Array]:
    """Every shape, fitted in every way, and the share of each fit.

    First axis: ways x recencies x shapes.
    """
    held_out = max(_HELD_OUT_LEAST, round(_HELD_OUT * len(y)))
    facts = min(_FACTS, held_out / _EPOCHS_PER_FACT)
    cut = len(y) - held_out
    noise2 = _noise(y) ** 2
    fits, evidence = [], []
    for way in ways:
        for recency in _RECENCIES:
            early = (x[:cut] / x[cut - 1]) ** recency
            fit = partial(_fit, floor=way.floor, ends_at_floor=way.ends_at_floor)
            before = fit(way.g[:, :cut], y[:cut], early)
            left2 = before.left(way.g[:, cut:], y[cut:]) ** 2
            spike = 9.0 * np.median(left2, axis=1, keepdims=True) + noise2
            left2 = np.minimum(left2, spike).mean(axis=1)
            evidence.append(-0.5 * facts * np.log(left2 + noise2) + way.log_prior)
            fits.append(fit(way.g, y, x**recency))
    joined = np.concatenate(evidence)
    share = np.exp(joined - joined.max())
    factors = zip(*(each.factor for each in fits), strict=True)
    return _Fits(
        np.concatenate([each.height for each in fits]),
        np.concatenate([each.asymptote for each in fits]),
        cast(tuple[Array, Array, Array], tuple(np.concatenate(each) for each in factors)),
    ), share / share.sum()


def _fitted(
    x: Array, y: Array, ahead: Array, floor: float, siblings: Siblings | None, now: int
) -> Array:
    """Draws of curves from all fits; shape (draws, ends)."""
    ways = _ways(x, ahead, floor, siblings, now)
    fits, share = _all_fits(x, y, ways)
    places = (np.arange(_DRAWS) + 0.5) / _DRAWS
    drawn = np.minimum(np.searchsorted(np.cumsum(share), places), len(share) - 1)
    first, second = np.random.default_rng(0).standard_normal((2, _DRAWS))
    aa, ca, cc = (entry[drawn] for entry in fits.factor)
    a = np.maximum(fits.height[drawn] + aa * first, 0.0)
    c = np.maximum(fits.asymptote[drawn] + ca * first + cc * second, floor)
    g = np.concatenate([way.ahead for way in ways for _ in _RECENCIES])[drawn]
    return np.asarray(a[:, None] * g + c[:, None])


def _first_passage(
    x: Array, y: Array, goal: float, floor: float, now: int, curves: Sequence[Array]
) -> Forecast:
    """Distribution of the first epoch at the goal, over draws of curves and noise.

    Args:
        x: Epochs, in units of those so far; shape (n,).
        y: Values, scaled to a range of 1; shape (n,).
        goal: The target, scaled.
        floor: Least asymptote, scaled.
        now: Epochs so far.
        curves: Of siblings, scaled.
    """
    ends = np.unique(np.geomspace(now + 1, HORIZON * now, _POINTS).round())
    epochs = np.rint(x * now)
    siblings = Siblings(curves, floor, epochs, y, goal) if curves else None
    drawn = _fitted(x, y, ends / now, floor, siblings, now)
    if siblings is not None:
        count = round(_DRAWS * _BLENDED / (1.0 - _BLENDED))
        numbers = np.random.default_rng(1).standard_normal((count, len(ends)))
        drawn = np.concatenate([drawn, siblings.blended(epochs, y, ends, numbers)])
    hazard = np.minimum(_below((goal - drawn) / _noise(y)), 1.0 - 1e-12)
    between = np.diff(ends, prepend=now)
    missed = np.exp(np.cumsum(between * np.log1p(-hazard), axis=1)).mean(axis=0)
    low, mid, high = (_quantile(1.0 - missed, ends, now, q) for q in _QUANTILES)
    return Forecast(Interval(low, mid, high), float(1.0 - missed[-1]))


def _quantile(reached: Array, ends: Array, now: int, q: float) -> float:
    if reached[-1] < q:
        return math.inf
    epoch = np.interp(q, np.append(0.0, reached), np.append(float(now), ends))
    return float(max(now + 1, math.ceil(epoch)))


@cache
def _normal_table() -> tuple[Array, Array]:
    z = np.linspace(-8.0, 8.0, 1601)
    return z, np.array([NormalDist().cdf(value) for value in z])


def _below(z: Array) -> Array:
    """The distribution function of the standard normal, to 1e-5."""
    return np.asarray(np.interp(z, *_normal_table()))
