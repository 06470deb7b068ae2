"""The configurations of a sweep that no result influences: its trials are known beforehand.

Trial number i gets configuration i, whatever runs beside it or ran before it, so that a sweep that
is continued after a crash, or given more trials, draws what it would have drawn.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from smlt_tune.backend.sweeps.search import Choice
from smlt_tune.backend.sweeps.space import Categorical, FloatParameter, IntParameter, Parameter


def draw(
    sampler: Choice, space: Sequence[Parameter], trials: int, seed: int
) -> list[dict[str, Any]]:
    """The configurations of so many trials, in their order.

    Args:
        sampler: One of :data:`~smlt_tune.backend.sweeps.search.DRAWN`; any other one draws at
            random until it knows something.
        space: What differs between trials.
        trials: How many; of a grid at most all.
        seed: Of everything random.
    """
    if sampler.name == "grid":
        return _grid(space, sampler.options.get("points"), trials, seed)
    shape = (trials, len(space))
    if sampler.name == "qmc":
        shares = _sobol(*shape, seed)
    else:
        shares = np.random.default_rng(seed).random(shape).tolist()
    return [at(space, row) for row in shares]


def at(space: Sequence[Parameter], shares: Sequence[float]) -> dict[str, Any]:
    """The configuration at a place of the unit cube."""
    return {one.name: quantile(one, u) for one, u in zip(space, shares, strict=True)}


def quantile(parameter: Parameter, u: float) -> Any:
    """The value below which a share ``u`` of random draws of a parameter lies."""
    if isinstance(parameter, Categorical):
        choices = parameter.choices
        if all(isinstance(one, int | float) for one in choices):
            choices = tuple(sorted(choices, key=lambda one: float(one or 0)))
        return choices[_index(u, len(choices))]
    low, high = parameter.low, parameter.high
    if isinstance(parameter, FloatParameter):
        if parameter.step is not None:
            return _stepped(parameter, _index(u, _steps(parameter)))
        value = low * (high / low) ** u if parameter.log else low + u * (high - low)
        return min(float(value), high)  # rounding must not lead out of the space
    if parameter.log:
        rounded = round((low - 0.5) * ((high + 0.5) / (low - 0.5)) ** u)
        return min(max(rounded, parameter.low), parameter.high)
    return _stepped(parameter, _index(u, _steps(parameter)))


def grid_size(space: Sequence[Parameter], points: int | None) -> int:
    """How many combinations a grid has."""
    return math.prod(_values(one, points) for one in space)


def without_points(space: Sequence[Parameter], points: int | None) -> list[str]:
    """Parameters of which a grid would have infinitely many values."""
    if points is not None:
        return []
    return [one.name for one in space if isinstance(one, FloatParameter) and one.step is None]


def _grid(
    space: Sequence[Parameter], points: int | None, trials: int, seed: int
) -> list[dict[str, Any]]:
    """In random order, so that the first trials, if not all can be paid, lie everywhere."""
    sizes = [_values(one, points) for one in space]
    order = np.random.default_rng(seed).permutation(math.prod(sizes))[:trials]
    places = np.stack(np.unravel_index(order, sizes), axis=1)
    return [
        {one.name: _grid_value(one, *cell) for one, *cell in zip(space, row, sizes, strict=True)}
        for row in places.tolist()
    ]


def _values(parameter: Parameter, points: int | None) -> int:
    """How many values of a parameter a grid has."""
    if isinstance(parameter, Categorical):
        return len(parameter.choices)
    if isinstance(parameter, FloatParameter) and parameter.step is None:
        return points or 1
    return _steps(parameter)


def _grid_value(parameter: Parameter, place: int, size: int) -> Any:
    if isinstance(parameter, Categorical):
        return parameter.choices[place]
    if isinstance(parameter, FloatParameter) and parameter.step is None:
        return quantile(parameter, place / max(1, size - 1))
    return _stepped(parameter, place)


def _steps(parameter: FloatParameter | IntParameter) -> int:
    """How many values it has."""
    if isinstance(parameter, IntParameter):
        return (parameter.high - parameter.low) // parameter.step + 1
    return math.floor((parameter.high - parameter.low) / (parameter.step or 1) * (1 + 1e-9)) + 1


def _stepped(parameter: FloatParameter | IntParameter, place: int) -> float:
    return parameter.low + place * (parameter.step or 1)


def _sobol(amount: int, dimensions: int, seed: int) -> Any:
    """Points of a scrambled Sobol sequence; a power of two of them is drawn, as it should be."""
    from scipy.stats.qmc import Sobol

    sequence = Sobol(dimensions, rng=np.random.default_rng(seed))
    return sequence.random_base2(max(0, amount - 1).bit_length())[:amount].tolist()


def _index(u: float, count: int) -> int:
    return min(int(u * count), count - 1)
