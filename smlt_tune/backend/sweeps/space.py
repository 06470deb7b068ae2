"""The space of configurations that a sweep searches."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smlt_tune.backend.sweeps import convert
from smlt_tune.backend.sweeps.document import Mistake, Section

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class FloatParameter:
    """A number between two bounds, both included."""

    name: str
    low: float
    high: float
    log: bool = False
    step: float | None = None


@dataclass(frozen=True)
class IntParameter:
    """A whole number between two bounds, both included."""

    name: str
    low: int
    high: int
    log: bool = False
    step: int = 1


@dataclass(frozen=True)
class Categorical:
    """One of some values."""

    name: str
    choices: tuple[Scalar, ...]


Parameter = FloatParameter | IntParameter | Categorical


@dataclass(frozen=True)
class WorkersFrom:
    """The number of workers as a function of one parameter of the trial.

    Attributes:
        parameter: Its name.
        table: Its value -> number of workers; empty if the value is the number.
    """

    parameter: str
    table: Mapping[Any, int]

    def __call__(self, params: Mapping[str, Any]) -> int:
        """Number of workers for a trial with these parameters."""
        value = params[self.parameter]
        return self.table[value] if self.table else int(value)


def read_space(top: Section) -> tuple[Parameter, ...]:
    """The setting ``space``; empty if the file lists candidates instead."""
    if "space" not in top and "candidates" in top:
        return ()
    space = top.section("space")
    if space is None or not space.names():
        top.wrong("space", "expected at least one parameter, such as lr: {float: [0.001, 0.1]}")
        return ()
    found = [_parameter(space, name) for name in space.names()]
    return tuple(parameter for parameter in found if parameter is not None)


def read_candidates(top: Section) -> tuple[Mapping[str, Any], ...]:
    """The setting ``candidates``: a list of configurations; empty if there is none."""
    found: tuple[Mapping[str, Any], ...] = top.take("candidates", _candidates, default=())
    return found


def _candidates(value: Any) -> tuple[Mapping[str, Any], ...]:
    if not (isinstance(value, list) and value):
        raise Mistake(f"expected a list of configurations such as [{{depth: 2}}], not {value!r}")
    wrong = [str(place) for place, one in enumerate(value, 1) if not _is_configuration(one)]
    if wrong:
        raise Mistake(
            f"expected settings by name, such as {{depth: 2}}; not so: number {', '.join(wrong)}"
        )
    return tuple(value)


def _is_configuration(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(key, str) for key in value)


def _parameter(space: Section, name: str) -> Parameter | None:
    section = space.section(name)
    kinds = [kind for kind in ("float", "int", "categorical") if section and kind in section]
    if section is None or len(kinds) != 1:
        hint = "expected one of {float: [low, high]}, {int: [low, high]}, {categorical: [a, b]}"
        space.wrong(name, hint)
        return None
    parameter = {"float": _float, "int": _int, "categorical": _categorical}[kinds[0]](section, name)
    section.refuse_others()
    return parameter


def _float(section: Section, name: str) -> Parameter | None:
    bounds = section.take("float", lambda value: _bounds(value, convert.number))
    log = section.take("log", convert.truth, default=False)
    step = section.take("step", convert.positive, default=None)
    if bounds is None or not _range_is_right(section, "float", bounds, log, step):
        return None
    return FloatParameter(name, bounds[0], bounds[1], log, step)


def _int(section: Section, name: str) -> Parameter | None:
    bounds = section.take("int", lambda value: _bounds(value, convert.whole))
    log = section.take("log", convert.truth, default=False)
    step = section.take("step", convert.count, default=1)
    if bounds is None or not _range_is_right(
        section, "int", bounds, log, None if step == 1 else step
    ):
        return None
    return IntParameter(name, bounds[0], bounds[1], log, step)


def _categorical(section: Section, name: str) -> Parameter | None:
    choices = section.take("categorical", _choices)
    return Categorical(name, choices) if choices else None


def _bounds(value: Any, convert_one: Any) -> Any:
    if not (isinstance(value, list) and len(value) == 2):
        raise Mistake(f"expected [low, high], not {value!r}")
    low, high = convert_one(value[0]), convert_one(value[1])
    if low > high:
        raise Mistake(f"low {low} is above high {high}")
    return low, high


def _range_is_right(section: Section, kind: str, bounds: Any, log: bool, step: Any) -> bool:
    if log and bounds[0] <= 0:
        section.wrong(kind, f"low is {bounds[0]}: a log scale needs a low above 0")
        return False
    if log and step is not None:
        section.wrong("step", "a log scale has no step")
        return False
    return True


def _choices(value: Any) -> tuple[Scalar, ...]:
    if not (isinstance(value, list) and value):
        raise Mistake(f"expected a list of values, not {value!r}")
    for choice in value:
        if not isinstance(choice, str | int | float | bool | None):
            raise Mistake(f"{choice!r} is no plain value (text, number, true, false, null)")
    return tuple(value)


def read_workers(
    top: Section,
    space: tuple[Parameter, ...],
    candidates: Sequence[Mapping[str, Any]] = (),
) -> int | WorkersFrom | None:
    """The setting ``workers``: a number, or ``{from: parameter, map: {value: number}}``."""
    section = top.section("workers")
    if section is None:
        pinned: int | None = top.take("workers", convert.count, default=None)
        return pinned
    name = section.take("from", convert.text)
    table = section.take("map", _table, default={})
    section.refuse_others()
    if not name:
        return None
    parameter = next((one for one in space if one.name == name), None)
    values = _values(parameter)
    if candidates:
        values = [one[name] for one in candidates if name in one]
    if candidates and len(values) < len(candidates):
        section.wrong("from", f"{name!r} is not set in every candidate")
    elif not values:
        section.wrong("from", f"{name!r} is no categorical or int parameter of the space")
    elif table:
        _check_table(section, values, table)
    elif not all(_is_count(value) for value in values):
        section.wrong("from", f"{name!r} has values that are no numbers of workers; add a map")
    return WorkersFrom(name, table)


def _values(parameter: Parameter | None) -> list[Any]:
    if isinstance(parameter, Categorical):
        return list(parameter.choices)
    if isinstance(parameter, IntParameter):
        return list(range(parameter.low, parameter.high + 1, parameter.step))
    return []


def _check_table(section: Section, values: list[Any], table: Mapping[Any, int]) -> None:
    missing = [value for value in values if not (isinstance(value, Hashable) and value in table)]
    if missing:
        section.wrong("map", f"says nothing about {', '.join(map(repr, missing))}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _table(value: Any) -> dict[Any, int]:
    return {key: convert.count(workers) for key, workers in convert.mapping(value).items()}
