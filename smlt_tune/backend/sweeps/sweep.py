"""What a sweep file says.

```yaml
name: demo                      # names the report folder; default: the name of the file
train: fashion.py:train         # or package.module:function
metric: accuracy                # a reported number
direction: maximize             # or minimize
trials: 20                      # a grid and a list of candidates know by themselves
parallel: 4                     # trials at once
space:
  lr: {float: [0.001, 0.1], log: true}
  depth: {int: [1, 4]}
  kernel: {categorical: [3, 5]}
# candidates: [{layers: [64, 32]}, {layers: [128]}]    # instead of the space: an explicit list
config: {epochs: 5}             # what is the same in every trial
sampler: {name: tpe, startup: 8}            # see search.py for all, with their settings
pruner: {name: median, startup: 4, warmup: 1}
# stages: {first: 1, factor: 2, count: 4}   # instead of the pruner: the best half goes on after
                                            # 1, 2 and 4 reports; the 8th report is the last
seed: 1
workers: 2                      # or {from: kernel, map: {3: 1, 5: 2}}; or leave it to the fleet
max_workers: 8
memory_mb: 1769
budget_usd: 0.5
deadline: 8h
project: measurements           # folder in which measurements are kept for later sweeps and plans
project_budget_usd: 5           # for all sweeps of the project together
platform: local                 # or {name: local, concurrency: 8}, with options of the platform
show: [parameters]              # further reported values in the leaderboard
```
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from smlt_tune.backend.platforms import PLATFORMS
from smlt_tune.backend.platforms.base import Platform
from smlt_tune.backend.sweeps import convert, target
from smlt_tune.backend.sweeps.document import Mistake, Section, read
from smlt_tune.backend.sweeps.drawing import draw, grid_size, without_points
from smlt_tune.backend.sweeps.search import (
    DRAWN,
    PRUNERS,
    SAMPLERS,
    Choice,
    Stages,
    read_choice,
    read_stages,
)
from smlt_tune.backend.sweeps.space import (
    Parameter,
    WorkersFrom,
    read_candidates,
    read_space,
    read_workers,
)

#: Stands for a number of trials that could not be read: it contradicts nothing.
_MANY = 2**31


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
        space: What differs between trials; empty if there are candidates.
        candidates: An explicit list of configurations; empty if there is a space.
        config: What does not.
        sampler: Where configurations come from.
        pruner: Which trials end early.
        stages: Successive halving in stages, or None.
        seed: Of the sampler and of every job.
        workers: Per job, or None if the fleet decides.
        max_workers: Per job, or None.
        memory_mb: Per function, or None if the fleet decides.
        budget_usd: For everything, or None.
        deadline_s: For everything, seconds, or None.
        project: Folder of what is shared with other sweeps, or None.
        project_budget_usd: For all of them together, or None.
        platform: Where functions run.
        platform_options: What was set of it.
        show: Further reported values for the leaderboard.
        document: The file, what was given beside it put in: plain values.
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
    candidates: tuple[Mapping[str, Any], ...]
    config: Mapping[str, Any]
    sampler: Choice
    pruner: Choice
    stages: Stages | None
    seed: int
    workers: int | WorkersFrom | None
    max_workers: int | None
    memory_mb: int | None
    budget_usd: float | None
    deadline_s: float | None
    project: Path | None
    project_budget_usd: float | None
    platform: str
    platform_options: Mapping[str, Any]
    show: tuple[str, ...]
    document: Mapping[str, Any]

    @property
    def maximize(self) -> bool:
        """Whether more is better."""
        return self.direction == "maximize"

    @property
    def search(self) -> str:
        """How it searches, in two words."""
        return f"{self.sampler.name}, {'stages' if self.stages else self.pruner.name}"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what differs between trials."""
        if self.candidates:
            return tuple(dict.fromkeys(name for one in self.candidates for name in one))
        return tuple(one.name for one in self.space)

    def configurations(self) -> list[dict[str, Any]]:
        """What the trials differ in, in their order, as far as no result influences it.

        A sampler that learns from results has drawn none of them yet, but for those at random with
        which it begins.
        """
        if self.candidates:
            return [dict(one) for one in self.candidates[: self.trials]]
        known = self.trials
        if self.sampler.name not in DRAWN:
            known = min(known, self.sampler.startup)
        return draw(self.sampler, self.space, known, self.seed)

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


def load(path: str | Path, **given: Any) -> Sweep:
    """Reads and checks a sweep file; imports the training function.

    Args:
        path: The file.
        **given: Settings that replace those of the file, unless they are None.

    Raises:
        InvalidInput: With every mistake, each as ``file:line: what is wrong``.
    """
    path = Path(path)
    top = read(path, {name: value for name, value in given.items() if value is not None})
    space, candidates = read_space(top), read_candidates(top)
    sampler = read_choice(top, "sampler", SAMPLERS, "random" if "stages" in top else "tpe")
    if candidates and "sampler" not in top:
        sampler = Choice("candidates")
    platform, platform_options = _platform(top)
    sweep = Sweep(
        path=path,
        name=top.take("name", _name, default=path.stem),
        train=top.take("train", lambda value: target.load(value, path.parent)),
        train_name=top.take("train", str, default=""),
        metric=top.take("metric", convert.text),
        direction=top.take("direction", convert.one_of(["maximize", "minimize"]), "maximize"),
        trials=_trials(top, space, candidates, sampler),
        parallel=top.take("parallel", convert.count, default=4),
        space=space,
        candidates=candidates,
        config=top.take("config", convert.mapping, default={}),
        sampler=sampler,
        pruner=read_choice(top, "pruner", PRUNERS, "none"),
        stages=read_stages(top),
        seed=top.take("seed", convert.natural, default=0),
        workers=read_workers(top, space, candidates),
        max_workers=top.take("max_workers", convert.count, default=None),
        memory_mb=top.take("memory_mb", convert.count, default=None),
        budget_usd=top.take("budget_usd", convert.positive, default=None),
        deadline_s=top.take("deadline", convert.duration, default=None),
        project=top.take("project", lambda value: path.parent / convert.text(value), default=None),
        project_budget_usd=top.take("project_budget_usd", convert.positive, default=None),
        platform=platform,
        platform_options=platform_options,
        show=top.take("show", convert.words, default=()),
        document=top.plain(),
    )
    for key, message in _contradictions(sweep):
        top.wrong(key, message)
    top.refuse_others()
    top.mistakes.refuse()
    return sweep


def _trials(
    top: Section,
    space: tuple[Parameter, ...],
    candidates: tuple[Mapping[str, Any], ...],
    sampler: Choice,
) -> int:
    """How many: as the file says; without that all candidates, or all of the grid."""
    known = len(candidates) or None
    if sampler.name == "grid" and not without_points(space, sampler.options.get("points")):
        known = grid_size(space, sampler.options.get("points"))
    found: int
    if known is None:
        found = top.take("trials", convert.count) or _MANY
    else:
        found = top.take("trials", convert.count, default=known)
        if found > known:
            what = "candidates" if candidates else "configurations in the grid"
            top.wrong("trials", f"there are {known} {what}, not {found}")
    return found


def _contradictions(sweep: Sweep) -> Iterator[tuple[str, str]]:
    """Settings that exclude each other: key and message."""
    for name in sorted(set(sweep.parameters) & set(sweep.config)):
        yield "config", f"{name!r} is in the {'candidates' if sweep.candidates else 'space'} too"
    if sweep.candidates and sweep.space:
        yield "candidates", "there is a space too: give one of them"
    if sweep.candidates and sweep.sampler.name != "candidates":
        yield "sampler", "candidates are trained as they are listed: there is nothing to sample"
    if sweep.project_budget_usd is not None and sweep.project is None:
        yield "project_budget_usd", "there is no project: the folder that keeps it"
    loose = without_points(sweep.space, sweep.sampler.options.get("points"))
    if sweep.sampler.name == "grid" and loose:
        names = ", ".join(loose)
        yield "sampler", f"a grid needs points: N, or a step of every float; without: {names}"
    fewest, most = (sweep.pruner.options.get(f"{end}_reports") for end in ("min", "max"))
    if most is not None and most < (fewest or 1):
        yield "pruner", f"max_reports {most} is below min_reports {fewest}"
    if sweep.stages is not None:
        yield from _stage_contradictions(sweep, sweep.stages)


def _stage_contradictions(sweep: Sweep, stages: Stages) -> Iterator[tuple[str, str]]:
    if sweep.pruner.name != "none":
        yield "pruner", "stages end trials themselves: leave the pruner out"
    if sweep.sampler.name not in (*DRAWN, "candidates"):
        known = ", ".join(DRAWN)
        yield "sampler", f"stages start all trials before anything is known: choose one of {known}"
    if isinstance(sweep.workers, WorkersFrom):
        yield "workers", "in stages all trials have the same number: leave it out, or name one"
    if sweep.trials < stages.fewest:
        what = f"{stages.count} stages that keep one in {stages.factor}"
        yield "stages", f"{what} need at least {stages.fewest} trials, not {sweep.trials}"


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
