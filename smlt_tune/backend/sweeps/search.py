"""How a sweep searches: samplers, pruners and stages, as a sweep file names them.

- ``random``: drawn at random.
- ``grid``: every combination once, in random order. ``points``: values of a float without a step.
- ``qmc``: a scrambled Sobol sequence; random, but evenly spread.
- ``tpe``: Optuna's tree-structured Parzen estimator. ``startup``, ``ei_candidates``,
  ``multivariate``.
- ``gp``: Optuna's Gaussian process. ``startup``.
- ``nsgaii``: Optuna's genetic algorithm. ``population``, all of the first generation at random.

The first three know all configurations before anything was trained; the others draw ``startup``
configurations at random first.

Pruners are those of Optuna:

- ``median``: ends what is worse than the median of the others. ``startup``, ``warmup``,
  ``interval``.
- ``percentile``: ends what is not among the best ``percentile`` percent; else as ``median``.
- ``asha``: asynchronous successive halving. ``min_reports``, ``factor``, ``early_stopping_rate``,
  ``max_reports``.
- ``hyperband``: several of these, from bold to cautious. ``min_reports``, ``max_reports``,
  ``factor``. Of both with a budget and ``max_reports``, the reports of a whole training, trials
  that will probably be promoted get what is fast and the others what is cheap.
- ``patient``: ends what was worse for ``patience`` reports than before. ``min_delta``.
- ``threshold``: ends what leaves ``lower`` to ``upper``. ``warmup``, ``interval``.
- ``none``.

``startup`` counts trials that are seen through first, ``warmup`` reports before the first decision.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smlt_tune.backend.sweeps import convert
from smlt_tune.backend.sweeps.document import Section

Converter = Callable[[Any], Any]

#: How many configurations a sampler draws at random before it models anything.
STARTUP = 10
#: Samplers that know all configurations beforehand.
DRAWN = ("random", "grid", "qmc")

_STEADY = {"startup": convert.natural, "warmup": convert.natural, "interval": convert.count}
SAMPLERS: Mapping[str, Mapping[str, Converter]] = {
    "random": {},
    "grid": {"points": convert.several},
    "qmc": {},
    "tpe": {
        "startup": convert.natural,
        "ei_candidates": convert.count,
        "multivariate": convert.truth,
    },
    "gp": {"startup": convert.count},
    "nsgaii": {"population": convert.several},
}
PRUNERS: Mapping[str, Mapping[str, Converter]] = {
    "median": _STEADY,
    "percentile": {"percentile": convert.percent, **_STEADY},
    "asha": {
        "min_reports": convert.count,
        "max_reports": convert.count,
        "factor": convert.several,
        "early_stopping_rate": convert.natural,
    },
    "hyperband": {
        "min_reports": convert.count,
        "max_reports": convert.count,
        "factor": convert.several,
    },
    "patient": {"patience": convert.count, "min_delta": convert.non_negative},
    "threshold": {
        "lower": convert.number,
        "upper": convert.number,
        "warmup": convert.natural,
        "interval": convert.count,
    },
    "none": {},
}
#: Settings without which a sampler or a pruner makes no sense; of several in a group, one will do.
_NEEDED: Mapping[str, Sequence[Sequence[str]]] = {
    "percentile": [("percentile",)],
    "hyperband": [("max_reports",)],
    "patient": [("patience",)],
    "threshold": [("lower", "upper")],
}


@dataclass(frozen=True)
class Choice:
    """A sampler or a pruner by name, with what was set of it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def startup(self) -> int:
        """Of a sampler that learns: how many configurations it draws at random first."""
        if self.name == "nsgaii":  # its first generation is its own
            return 0
        return int(self.options.get("startup", STARTUP))


@dataclass(frozen=True)
class Stages:
    """Successive halving in stages: all trials that are left train up to the same report.

    Attributes:
        first: At how many reports stage 0 ends.
        factor: Between two stages, one in ``factor`` trials goes on.
        count: How many stages.
    """

    first: int
    factor: int
    count: int

    def reports(self, stage: int) -> int:
        """At how many reports of a trial a stage ends; stages count from 0."""
        return self.first * int(self.factor**stage)

    def trials(self, stage: int, trials: int) -> int:
        """How many of ``trials`` trials take part in a stage."""
        return max(1, trials // int(self.factor**stage))

    @property
    def fewest(self) -> int:
        """With fewer trials, stages at the end would halve nothing."""
        return int(self.factor ** (self.count - 1))


def read_choice(
    top: Section, key: str, known: Mapping[str, Mapping[str, Converter]], default: str
) -> Choice:
    """The setting ``sampler`` or ``pruner``: a name, or a mapping of a name and its options."""
    section = top.section(key)
    if section is None:
        name = top.take(key, convert.one_of(known), default=default)
        _refuse_bare(top, key, name)
        return Choice(name)
    name = section.take("name", convert.one_of(known))
    given = {
        option: section.take(option, check, default=None)
        for option, check in known.get(name, {}).items()
    }
    if name is not None:
        section.refuse_others()
        for group in _NEEDED.get(name, ()):
            if not any(option in section for option in group):
                section.wrong("name", f"{name} needs {' or '.join(group)}")
    return Choice(
        name or default, {option: value for option, value in given.items() if value is not None}
    )


def _refuse_bare(top: Section, key: str, name: str) -> None:
    for group in _NEEDED.get(name, ()):
        top.wrong(key, f"{name} needs {' or '.join(group)}: {{name: {name}, {group[0]}: ...}}")


def read_stages(top: Section) -> Stages | None:
    """The setting ``stages``."""
    section = top.section("stages")
    if section is None:
        if "stages" in top:
            top.wrong("stages", "expected {first: 1, factor: 2, count: 4}")
        return None
    first = section.take("first", convert.count, default=1)
    factor = section.take("factor", convert.several, default=2)
    count = section.take("count", convert.several)
    section.refuse_others()
    return Stages(first, factor, count) if count is not None else None
