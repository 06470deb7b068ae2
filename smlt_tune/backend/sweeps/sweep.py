"""What a sweep file says.

```yaml
name: demo                      # names the report folder; default: the name of the file
train: fashion.py:train         # or package.module:function
metric: accuracy                # a reported number
direction: maximize             # or minimize
trials: 20
parallel: 4                     # trials at once
space:
  lr: {float: [0.001, 0.1], log: true}
  depth: {int: [1, 4]}
  kernel: {categorical: [3, 5]}
config: {epochs: 5}             # what is the same in every trial
sampler: {name: tpe, startup: 8}            # tpe or random
pruner: {name: median, startup: 4, warmup: 1}   # median, asha or none
seed: 1
workers: 2                      # or {from: kernel, map: {3: 1, 5: 2}}; or leave it to the fleet
max_workers: 8
memory_mb: 1769
budget_usd: 0.5
deadline: 8h
platform: local                 # or {name: local, concurrency: 8}, with options of the platform
show: [parameters]              # further reported values in the leaderboard
```
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from smlt_tune.backend.platforms import PLATFORMS
from smlt_tune.backend.platforms.base import Platform
from smlt_tune.backend.sweeps import convert, target
from smlt_tune.backend.sweeps.document import Mistake, Section, read
from smlt_tune.backend.sweeps.space import Parameter, WorkersFrom, read_space, read_workers

_SAMPLERS = {"tpe": {"startup": convert.natural}, "random": {}}
_PRUNERS = {
    "median": {"startup": convert.natural, "warmup": convert.natural},
    "asha": {"min_reports": convert.count, "factor": convert.count},
    "none": {},
}


@dataclass(frozen=True)
class Choice:
    """A sampler or a pruner by name, with what was set of it."""

    name: str
    options: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file.

    Attributes:
        path: The file.
        name: Of the sweep.
        train: The training function.
        train_name: As the file names it.
        metric: The reported number that is compared.
        direction: ``maximize`` or ``minimize``.
        trials: How many.
        parallel: How many at once.
        space: What differs between trials.
        config: What does not.
        sampler: Where configurations come from.
        pruner: Which trials end early.
        seed: Of the sampler and of every job.
        workers: Per job, or None if the fleet decides.
        max_workers: Per job, or None.
        memory_mb: Per function, or None if the fleet decides.
        budget_usd: For everything, or None.
        deadline_s: For everything, seconds, or None.
        platform: Where functions run.
        platform_options: What was set of it.
        show: Further reported values for the leaderboard.
    """

    path: Path
    name: str
    train: target.Train
    train_name: str
    metric: str
    direction: str
    trials: int
    parallel: int
    space: tuple[Parameter, ...]
    config: Mapping[str, Any]
    sampler: Choice
    pruner: Choice
    seed: int
    workers: int | WorkersFrom | None
    max_workers: int | None
    memory_mb: int | None
    budget_usd: float | None
    deadline_s: float | None
    platform: str
    platform_options: Mapping[str, Any]
    show: tuple[str, ...]

    @property
    def maximize(self) -> bool:
        """Whether more is better."""
        return self.direction == "maximize"

    def open_platform(self) -> Platform:
        """The platform, for whoever asks to close.

        Raises:
            InvalidInput: It refuses its options.
        """
        return platform_class(self.platform)(**self.platform_options)

    def config_of(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What the training function of a trial with these parameters is given."""
        config = {**self.config, **params}
        if isinstance(self.workers, WorkersFrom) and not self.workers.table:
            del config[self.workers.parameter]
        return config

    def workers_of(self, params: Mapping[str, Any]) -> int | None:
        """Number of workers of a trial with these parameters, if pinned."""
        return self.workers(params) if isinstance(self.workers, WorkersFrom) else self.workers


def load(path: str | Path) -> Sweep:
    """Reads and checks a sweep file; imports the training function.

    Raises:
        InvalidInput: With every mistake, each as ``file:line: what is wrong``.
    """
    path = Path(path)
    top = read(path)
    space = read_space(top)
    config = top.take("config", convert.mapping, default={})
    for name in sorted({one.name for one in space} & set(config)):
        top.wrong("config", f"{name!r} is in the space too")
    platform, platform_options = _platform(top)
    sweep = Sweep(
        path=path,
        name=top.take("name", _name, default=path.stem),
        train=top.take("train", lambda value: target.load(value, path.parent)),
        train_name=top.take("train", str, default=""),
        metric=top.take("metric", convert.text),
        direction=top.take("direction", convert.one_of(["maximize", "minimize"]), "maximize"),
        trials=top.take("trials", convert.count),
        parallel=top.take("parallel", convert.count, default=4),
        space=space,
        config=config,
        sampler=_choice(top, "sampler", _SAMPLERS, "tpe"),
        pruner=_choice(top, "pruner", _PRUNERS, "none"),
        seed=top.take("seed", convert.natural, default=0),
        workers=read_workers(top, space),
        max_workers=top.take("max_workers", convert.count, default=None),
        memory_mb=top.take("memory_mb", convert.count, default=None),
        budget_usd=top.take("budget_usd", convert.positive, default=None),
        deadline_s=top.take("deadline", convert.duration, default=None),
        platform=platform,
        platform_options=platform_options,
        show=top.take("show", convert.words, default=()),
    )
    top.refuse_others()
    top.mistakes.refuse()
    return sweep


def _name(value: Any) -> str:
    name = convert.text(value)
    if not name.replace("-", "").replace("_", "").isalnum():
        raise Mistake(f"expected letters, digits, - and _, not {name!r}")
    return name


def _platform(top: Section) -> tuple[str, dict[str, Any]]:
    """A name, or a mapping of a name and arguments of the platform's class."""
    known = convert.one_of(sorted(PLATFORMS))
    section = top.section("platform")
    if section is None:
        return top.take("platform", known, default="local"), {}
    name = section.take("name", known)
    if name is None:
        return "local", {}
    arguments = signature(platform_class(name)).parameters
    options = {
        option: section.take(option, lambda value: value, default=None)
        for option in arguments
        if option != "clock"
    }
    section.refuse_others()
    return name, {option: options[option] for option in options if option in section}


def platform_class(name: str) -> Callable[..., Platform]:
    """The class of a platform."""
    module, _, attribute = PLATFORMS[name].partition(":")
    found: Callable[..., Platform] = getattr(import_module(module), attribute)
    return found


def _choice(top: Section, key: str, known: Mapping[str, Any], default: str) -> Choice:
    """A name, or a mapping of a name and its options."""
    section = top.section(key)
    if section is None:
        return Choice(top.take(key, convert.one_of(known), default=default))
    name = section.take("name", convert.one_of(known))
    given = {
        option: section.take(option, check, default=None)
        for option, check in known.get(name, {}).items()
    }
    options = {option: value for option, value in given.items() if value is not None}
    if name is not None:
        section.refuse_others()
    return Choice(name or default, options)
