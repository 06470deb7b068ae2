"""``smlt plan``: from what was asked for to what is shown."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from smlt_tune.backend.goals import Cheapest, Fastest, Goal
from smlt_tune.backend.planning import plan_job, resource_manager
from smlt_tune.backend.platform_tables import platform_table
from smlt_tune.backend.platforms import open_platform
from smlt_tune.backend.platforms.base import Platform, PlatformLimits
from smlt_tune.backend.resource_manager.manager import ResourceManager
from smlt_tune.backend.resource_manager.observations import Option, Workload
from smlt_tune.backend.resource_manager.policy import Bounds, JobFacts, check
from smlt_tune.backend.sweeps import plan_plot, plan_text, plots, staged_plan, target, words
from smlt_tune.backend.sweeps.document import Mistake
from smlt_tune.backend.sweeps.plan import SweepPlan, bounds_of, mistakes_of, plan_sweep
from smlt_tune.backend.sweeps.simulate import simulate_sweep
from smlt_tune.backend.sweeps.stage_allocations import StageAllocations, options_of_workloads
from smlt_tune.backend.sweeps.staged_plan import goal_of, schedule_of
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
        simulate: Whether to run a sweep in virtual time too.
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
    simulate: bool


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
    if request.simulate:
        mistakes.append("--simulate is for a sweep file")
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
        if sweep.stages is not None:
            mistakes += [
                f"--out {path}: there are pictures of all sweeps but those in stages"
                for path in request.out
                if path.suffix in _PICTURES
            ]
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
        simulated = _simulated(sweep, found, policy, platform, request) if request.simulate else []
        limits = platform.limits
    if sweep.stages is not None:
        shown = _stages(request, sweep, found, policy, limits, goal)
    else:
        shown = _side_by_side(request, sweep, found)
    return replace(shown, lines=[*shown.lines, *simulated])


def _side_by_side(request: Request, sweep: Sweep, found: SweepPlan) -> Shown:
    limits = {"deadline_s": sweep.deadline_s, "budget_usd": sweep.budget_usd}
    title = f"{sweep.name}: {sweep.trials} trials"
    picture = plan_plot.of_sweep(found, title, **limits)
    _write(request.out, picture, plan_text.sweep_json(sweep, found))
    lines = plan_text.sweep_lines(sweep, found)
    tables = [plan_text.sample_table(found), plan_text.front_table(found)]
    return Shown(lines, tables, found.notes, request.out, found.feasible)


def _simulated(
    sweep: Sweep,
    found: SweepPlan,
    policy: ResourceManager,
    platform: Platform,
    request: Request,
) -> list[str]:
    """What came of it in virtual time, in words."""
    start_s = platform_table(platform, home=request.home).start_s
    try:
        came = simulate_sweep(
            sweep, found, policy=policy, limits=platform.limits, start_s=start_s, seed=sweep.seed
        )
    except InvalidInput as error:
        return [f"not simulated: {mistake}" for mistake in error.mistakes]
    cut = "".join(f", {count} {why}" for why, count in came.cut.items())
    took = f"{words.seconds(came.time_s)} and {words.usd(came.cost_usd)}"
    done = f"{came.finished} of {sweep.trials} trials finished{cut}"
    return [f"simulated: {took}; {done}", *(f"simulated: {note}" for note in came.notes)]


def _stages(
    request: Request,
    sweep: Sweep,
    found: SweepPlan,
    policy: ResourceManager,
    limits: PlatformLimits,
    goal: Goal,
) -> Shown:
    """As a sweep in stages plans itself when it starts."""
    bounds = bounds_of(sweep, {})

    def predict(workload: Workload) -> Sequence[Option]:
        return policy.options(JobFacts("plan", limits, goal, bounds, workload=workload))

    options = options_of_workloads(predict, [one.job.workload for one in found.typical])
    planner = StageAllocations(options, goal_of(sweep) or goal)
    plan = planner.plan(schedule_of(sweep), sweep.trials, limits.functions)
    for path in request.out:
        _write_json(path, staged_plan.to_json(sweep, plan))
    tables = [plan_text.sample_table(found), staged_plan.table(sweep, plan)]
    return Shown(staged_plan.lines(sweep, plan), tables, plan.notes, request.out, plan.feasible)


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
        if path.suffix == ".json":
            _write_json(path, content)
            continue
        with _told(path):
            plan_plot.write(picture, path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with _told(path):
        path.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidInput(f"--out {path}: cannot be written: {error.strerror}") from error
