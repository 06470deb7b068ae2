"""Plans as people and programs read them."""

from dataclasses import asdict
from typing import Any

from rich.table import Table

from smlt_tune.backend.goals import Fastest, Goal
from smlt_tune.backend.planning import JobPlan
from smlt_tune.backend.resource_manager.observations import Interval, Plan, Prediction, Workload
from smlt_tune.backend.sweeps import words
from smlt_tune.backend.sweeps.plan import Outcome, SweepPlan
from smlt_tune.backend.sweeps.sweep import Sweep

#: Most points of a front that are shown.
_FRONT = 12
_TIME, _COST = "time (90 %)", "cost (90 %)"
_NUMBERS = {"workers", "MB", _TIME, _COST, "per iteration", "memory fits"}


def job_lines(name: str, job: JobPlan) -> list[str]:
    """What was planned, and on what grounds."""
    return [f"{name}: {goal_text(job.goal)}", workload_text(job.workload), known_text(job.plan)]


def sweep_lines(sweep: Sweep, plan: SweepPlan) -> list[str]:
    """What was planned, and what all trials together take."""
    chosen = plan.chosen
    lines = [
        f"{sweep.name}: {sweep.trials} trials, {sweep.parallel} at once",
        known_text(plan.samples[0].job.plan),
        f"all trials take {words.within(chosen.time_s, words.seconds)}"
        f" and cost {words.within(chosen.cost_usd, words.usd)}",
    ]
    if sweep.budget_usd is not None and plan.affordable is not None:
        lines.append(f"the budget of {words.usd(sweep.budget_usd)} pays for {_of(plan.affordable)}")
    if sweep.deadline_s is not None and plan.in_time is not None:
        lines.append(f"within {words.seconds(sweep.deadline_s)} there end {_of(plan.in_time)}")
    return lines


def goal_text(goal: Goal) -> str:
    """A goal in words."""
    if isinstance(goal, Fastest):
        limit = f" for at most {words.usd(goal.budget_usd)}" if goal.budget_usd else ""
        return f"fastest{limit}"
    return f"cheapest{f' within {words.seconds(goal.deadline_s)}' if goal.deadline_s else ''}"


def workload_text(workload: Workload) -> str:
    """What a job computes, in words."""
    features = workload.features
    length = "an unknown number of" if workload.iterations is None else f"{workload.iterations:,}"
    flops = f", {features.flops_per_sample:.3g} FLOP a sample" if features.flops_per_sample else ""
    return (
        f"{features.parameters:,} parameters{flops}; {length} iterations of {workload.batch:,} "
        "samples"
    )


def known_text(plan: Plan) -> str:
    """What a prediction rests on."""
    if plan.own or plan.siblings:
        return f"predicted from {plan.siblings} measurements of earlier jobs and the platform's"
    return "predicted from measurements of the platform alone: no earlier job is known"


def job_table(plan: Plan) -> Table:
    """The recommended allocation, then the front, by time."""
    rows = {one.allocation: one for one in words.thinned(plan.front, _FRONT)}
    rows.setdefault(plan.chosen.allocation, plan.chosen)
    table = _table("", "workers", "MB", "store", _TIME, _COST, "per iteration", "memory fits")
    for one in sorted(rows.values(), key=lambda row: row.time_s.mid):
        mark = ">" if one.allocation == plan.chosen.allocation else ""
        table.add_row(mark, *_cells(one), style="bold" if mark else "")
    return table


def sample_table(plan: SweepPlan) -> Table:
    """The configurations that were looked at, each with its recommended allocation."""
    heads = ("", "parameters", "iterations", "workers", "MB", _TIME, _COST, "memory fits")
    table = _table(*heads, "settings")
    for sample in plan.samples:
        workload, chosen = sample.job.workload, sample.job.plan.chosen
        length = "?" if workload.iterations is None else f"{workload.iterations:,}"
        workers, memory_mb, _, time, cost, _, fits = _cells(chosen)
        table.add_row(
            sample.name, f"{workload.features.parameters:,}", length, workers, memory_mb, time,
            cost, fits, words.settings(dict(sample.params)),
        )  # fmt: skip
    return table


def front_table(plan: SweepPlan) -> Table:
    """What the whole sweep takes: the recommended way, and the front, by time."""
    table = _table("", "workers", "MB", _TIME, _COST)
    rows = {one.allocations: one for one in plan.front}
    rows.setdefault(plan.chosen.allocations, plan.chosen)
    for one in sorted(rows.values(), key=lambda row: row.time_s.mid):
        mark = ">" if one.allocations == plan.chosen.allocations else ""
        workers = words.span(taken.workers for taken in one.allocations)
        memory_mb = words.span(taken.memory_mb for taken in one.allocations)
        time, cost = _time_and_cost(one)
        table.add_row(mark, workers, memory_mb, time, cost, style="bold" if mark else "")
    return table


def job_json(name: str, job: JobPlan) -> dict[str, Any]:
    """Everything that is known of a job, for programs."""
    return {"target": name, "goal": goal_text(job.goal), **asdict(job.workload), **_plan(job.plan)}


def sweep_json(sweep: Sweep, plan: SweepPlan) -> dict[str, Any]:
    """Everything that is known of a sweep, for programs."""
    return {
        "target": str(sweep.path),
        "trials": sweep.trials,
        "budget_usd": sweep.budget_usd,
        "deadline_s": sweep.deadline_s,
        "feasible": plan.feasible,
        "notes": list(plan.notes),
        "chosen": asdict(plan.chosen),
        "front": [asdict(one) for one in plan.front],
        "affordable_trials": plan.affordable and asdict(plan.affordable),
        "trials_in_time": plan.in_time and asdict(plan.in_time),
        "samples": [
            {"params": dict(one.params), **job_json(one.name, one.job)} for one in plan.samples
        ],
    }


def _plan(plan: Plan) -> dict[str, Any]:
    return {
        "feasible": plan.feasible,
        "notes": list(plan.notes),
        "own": plan.own,
        "siblings": plan.siblings,
        "chosen": asdict(plan.chosen),
        "front": [asdict(one) for one in plan.front],
    }


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in names:
        right = name in _NUMBERS or name in ("parameters", "iterations")
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "settings")
    return table


def _cells(one: Prediction) -> list[str]:
    taken = one.allocation
    time, cost = _time_and_cost(one)
    per_iteration = words.within(one.iteration_s, words.brief)
    fits = f"{one.fits:.0%}"
    return [str(taken.workers), str(taken.memory_mb), taken.store, time, cost, per_iteration, fits]


def _time_and_cost(one: Prediction | Outcome) -> tuple[str, str]:
    return words.within(one.time_s, words.seconds), words.within(one.cost_usd, words.usd)


def _of(trials: Interval) -> str:
    return f"{trials.mid:.0f} trials ({trials.low:.0f} to {trials.high:.0f})"
