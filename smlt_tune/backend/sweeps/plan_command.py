"""``smlt plan``: from what was asked for to what is shown."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from smlt_tune.backend.goals import Cheapest, Fastest, Goal
from smlt_tune.backend.planning import plan_job, resource_manager
from smlt_tune.backend.platforms import open_platform
from smlt_tune.backend.platforms.base import Platform
from smlt_tune.backend.resource_manager.manager import ResourceManager
from smlt_tune.backend.resource_manager.policy import Bounds, JobFacts, check
from smlt_tune.backend.sweeps import plan_plot, plan_text, plots, target
from smlt_tune.backend.sweeps.document import Mistake
from smlt_tune.backend.sweeps.plan import mistakes_of, plan_sweep
from smlt_tune.backend.sweeps.sweep import Sweep, load
from smlt_tune.errors import InvalidInput

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")

_PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Request:
    """The arguments of the command; None for what was not given.

    Attributes:
        target: A sweep file, or where a training function is.
        config: Of the function, JSON.
        data: ``NAME=FILE`` of the data sets that the function asks for by name.
        goal: ``cheapest`` or ``fastest``.
        deadline: Of the job or of the whole sweep, seconds.
        budget: Of the job or of the whole sweep, USD.
        workers: Pinned number of functions.
        memory_mb: Pinned memory of a function, MB.
        max_workers: Most functions to choose.
        platform: Name of the platform.
        project: Folder with the profiles of earlier jobs.
        out: Files to write.
        home: The user's folder, where calibrations are kept; None to look at none.
        dry_run_timeout: How long the function may take to the end of its first iteration, seconds.
    """

    target: str
    config: str | None
    data: Sequence[str]
    goal: str | None
    deadline: float | None
    budget: float | None
    workers: int | None
    memory_mb: int | None
    max_workers: int | None
    platform: str | None
    project: Path | None
    out: Sequence[Path]
    home: Path | None
    dry_run_timeout: float


@dataclass(frozen=True)
class Shown:
    """What the command shows.

    Attributes:
        lines: What was planned, and on what grounds.
        tables: Allocations with their predictions.
        notes: What the user should know.
        written: Files that were written.
        feasible: Whether the goal is expected to be reached.
    """

    lines: Sequence[str]
    tables: Sequence["Table"]
    notes: Sequence[str]
    written: Sequence[Path]
    feasible: bool


def plan(request: Request, *, progress: Callable[[str], None]) -> Shown:
    """Plans a training function or a sweep; nothing is run on the platform.

    Args:
        request: What was asked for.
        progress: Is told what is going on.

    Raises:
        InvalidInput: Lists everything that is wrong with the request.
        TrainingFunctionError: The function raised; carries the traceback.
        FunctionLost: It did not come to the end of an iteration.
    """
    if Path(request.target).suffix in (".yaml", ".yml"):
        return _sweep(request, progress)
    return _function(request)


def _function(request: Request) -> Shown:
    mistakes = _out_mistakes(request.out)
    train = _tried(mistakes, lambda: target.load(request.target, Path.cwd()))
    datasets = _datasets(request.data, mistakes)
    config = _tried(mistakes, lambda: _config(request.config))
    goal = _tried(mistakes, lambda: _goal(request)) or Cheapest()
    bounds = Bounds(request.workers, request.memory_mb, max_workers=request.max_workers)
    with closing(open_platform(request.platform or "local")) as platform:
        mistakes += check(JobFacts("plan", platform.limits, goal, bounds))
        policy = _tried(mistakes, lambda: _policy(platform, request))
        if mistakes or train is None or policy is None:
            raise InvalidInput(mistakes)
        job = plan_job(
            train,
            config,
            policy=policy,
            limits=platform.limits,
            goal=goal,
            bounds=bounds,
            datasets=datasets,
            timeout_s=request.dry_run_timeout,
        )
    limits = {"deadline_s": request.deadline, "budget_usd": request.budget}
    picture = plan_plot.of_job(job.plan, request.target, **limits)
    _write(request.out, picture, plan_text.job_json(request.target, job))
    lines, tables = plan_text.job_lines(request.target, job), [plan_text.job_table(job.plan)]
    return Shown(lines, tables, job.plan.notes, request.out, job.plan.feasible)


def _sweep(request: Request, progress: Callable[[str], None]) -> Shown:
    mistakes = _out_mistakes(request.out)
    if request.config is not None:
        mistakes.append("--config is for a training function; a sweep file has a setting for it")
    datasets = _datasets(request.data, mistakes)
    sweep = _tried(mistakes, lambda: _overridden(load(request.target), request))
    goal: Goal = Fastest() if request.goal == "fastest" else Cheapest()
    if sweep is None:
        raise InvalidInput(mistakes)
    with closing(sweep.open_platform()) as platform:
        mistakes += mistakes_of(sweep, platform.limits)
        policy = _tried(mistakes, lambda: _policy(platform, request))
        if mistakes or policy is None:
            raise InvalidInput(mistakes)
        found = plan_sweep(
            sweep,
            policy=policy,
            limits=platform.limits,
            goal=goal,
            datasets=datasets,
            timeout_s=request.dry_run_timeout,
            progress=progress,
        )
    limits = {"deadline_s": sweep.deadline_s, "budget_usd": sweep.budget_usd}
    title = f"{sweep.name}: {sweep.trials} trials"
    picture = plan_plot.of_sweep(found, title, **limits)
    _write(request.out, picture, plan_text.sweep_json(sweep, found))
    lines = plan_text.sweep_lines(sweep, found)
    tables = [plan_text.sample_table(found), plan_text.front_table(found)]
    return Shown(lines, tables, found.notes, request.out, found.feasible)


def _policy(platform: Platform, request: Request) -> ResourceManager:
    return resource_manager(platform, project=request.project, home=request.home)


def _tried(mistakes: list[str], make: Callable[[], T]) -> T | None:
    """What is made; None, and what is wrong in the list, if it cannot be."""
    try:
        return make()
    except InvalidInput as error:
        mistakes += error.mistakes
    except Mistake as error:
        mistakes.append(str(error))
    return None


def _config(text: str | None) -> Any:
    try:
        return json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise Mistake(f"--config must be JSON such as '{{\"lr\": 0.1}}': {error}") from error


def _datasets(given: Sequence[str], mistakes: list[str]) -> dict[str, Any]:
    """The arrays in some files, by the names that training functions use."""
    found: dict[str, Any] = {}
    for one in given:
        name, _, file = one.partition("=")
        if not (name and file):
            mistakes.append(f"--data {one}: expected NAME=FILE, such as digits=digits.npz")
            continue
        try:
            content = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            mistakes.append(f"--data {one}: {file} is no .npy or .npz file: {error}")
            continue
        found[name] = content if isinstance(content, np.ndarray) else tuple(content.values())
    return found


def _overridden(sweep: Sweep, request: Request) -> Sweep:
    given: dict[str, Any] = {
        "budget_usd": request.budget,
        "deadline_s": request.deadline,
        "workers": request.workers,
        "memory_mb": request.memory_mb,
        "max_workers": request.max_workers,
        "platform": request.platform,
        "platform_options": None if request.platform in (None, sweep.platform) else {},
    }
    return replace(sweep, **{name: value for name, value in given.items() if value is not None})


def _goal(request: Request) -> Goal:
    """A limit says which goal is meant; two that contradict each other are a mistake."""
    if request.deadline is not None and request.budget is not None:
        raise Mistake(
            "a training function has one limit: --deadline (the cheapest that keeps it) or "
            "--budget (the fastest that keeps it)"
        )
    if request.goal == "fastest" and request.deadline is not None:
        raise Mistake("--deadline is a limit for --goal cheapest; the fastest has a --budget")
    if request.goal == "cheapest" and request.budget is not None:
        raise Mistake("--budget is a limit for --goal fastest; the cheapest has a --deadline")
    if request.goal == "fastest" or request.budget is not None:
        return Fastest(request.budget)
    return Cheapest(request.deadline)


def _out_mistakes(files: Sequence[Path]) -> list[str]:
    mistakes = []
    for path in files:
        if path.suffix not in (".json", *_PICTURES):
            known = ", ".join((*_PICTURES, ".json"))
            mistakes.append(f"--out {path}: the name must end in one of {known}")
        elif path.suffix != ".json" and not plots.available():
            mistakes.append(f"--out {path}: {plots.MISSING}")
        if not path.parent.is_dir():
            mistakes.append(f"--out {path}: there is no folder {path.parent}")
    return mistakes


def _write(files: Sequence[Path], picture: plan_plot.Picture, content: Mapping[str, Any]) -> None:
    for path in files:
        try:
            if path.suffix == ".json":
                path.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
            else:
                plan_plot.write(picture, path)
        except OSError as error:
            raise InvalidInput(f"--out {path}: cannot be written: {error.strerror}") from error
