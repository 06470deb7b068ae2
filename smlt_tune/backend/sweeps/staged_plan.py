"""What a sweep in stages is to take, and how that is shown."""

from dataclasses import asdict
from typing import Any

from rich.table import Table

from smlt_tune.backend.goals import Cheapest, Fastest, Goal
from smlt_tune.backend.sweeps import words
from smlt_tune.backend.sweeps.halving_rules import Schedule, geometric
from smlt_tune.backend.sweeps.stage_planner import StagePlan
from smlt_tune.backend.sweeps.sweep import Sweep


def schedule_of(sweep: Sweep) -> Schedule:
    """When the stages of a sweep end."""
    assert sweep.stages is not None
    stages = sweep.stages
    rungs = geometric(stages.first, stages.factor, stages.count)
    return Schedule(sweep.metric, sweep.maximize, rungs, stages.factor)


def goal_of(sweep: Sweep) -> Goal | None:
    """As fast as the budget allows, or as cheap as the deadline does; None without either."""
    if sweep.budget_usd is not None:
        return Fastest(sweep.budget_usd)
    return None if sweep.deadline_s is None else Cheapest(sweep.deadline_s)


def lines(sweep: Sweep, plan: StagePlan) -> list[str]:
    """What was planned, and what all stages together take."""
    return [
        f"{sweep.name}: {sweep.trials} trials in {len(plan.stages)} stages",
        f"all stages take {words.seconds(plan.time_s)} and cost {words.usd(plan.cost_usd)}",
    ]


def table(sweep: Sweep, plan: StagePlan) -> Table:
    """One row for each stage."""
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("stage", "trials", "to report", "workers", "MB", "waves", "time", "cost"):
        shown.add_column(name, justify="right")
    rungs = schedule_of(sweep).rungs
    for number, (stage, rung) in enumerate(zip(plan.stages, rungs, strict=True), 1):
        place = stage.option.allocation
        numbers = (number, stage.trials, rung, place.workers, place.memory_mb, stage.waves)
        time, cost = words.seconds(stage.time_s), words.usd(stage.cost_usd)
        shown.add_row(*map(str, numbers), time, cost)
    return shown


def to_json(sweep: Sweep, plan: StagePlan) -> dict[str, Any]:
    """Everything, for programs."""
    asked = {"budget_usd": sweep.budget_usd, "deadline_s": sweep.deadline_s}
    return {"target": str(sweep.path), "trials": sweep.trials, **asked, **asdict(plan)}
