"""A sweep in stages: successive halving of jobs, planned where budget or deadline are given."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from smlt_tune.backend.job import FAILED, FINISHED, STOPPED, Job
from smlt_tune.backend.planning import measure
from smlt_tune.backend.resource_manager.observations import Option, Workload
from smlt_tune.backend.sweeps import words
from smlt_tune.backend.sweeps.board import Board
from smlt_tune.backend.sweeps.halving import run_halving
from smlt_tune.backend.sweeps.stage_allocations import StageAllocations, options_of_workloads
from smlt_tune.backend.sweeps.staged_plan import goal_of, schedule_of
from smlt_tune.backend.sweeps.sweep import Sweep
from smlt_tune.errors import InvalidInput, JobError

if TYPE_CHECKING:
    from smlt_tune.backend.changes import Change
    from smlt_tune.backend.fleet import Fleet

#: Configurations whose workloads stand for all.
_LOOKED_AT = 4


def run_stages(
    sweep: Sweep, fleet: "Fleet", board: Board, *, say: Callable[[str], None]
) -> tuple[str, ...]:
    """Runs a sweep in stages, or goes on with one.

    Args:
        sweep: What to run.
        fleet: Where; the one that an earlier client has left, if it is continued.
        board: Is told what happens, and what has.
        say: Is told what is planned.

    Returns:
        What the user should know, one sentence each.

    Raises:
        InvalidInput: Budget or deadline are out of reach, and which are not; or the reports lack
            the metric.
    """
    params = sweep.configurations()
    follower = _Follower(board, params)
    for job in fleet.jobs():
        follower.take_up(job)
    planned = _allocations(sweep, fleet, say)
    pinned: dict[str, Any] = {"workers": sweep.workers, "memory_mb": sweep.memory_mb}
    result = run_halving(
        fleet,
        sweep.train,
        [sweep.config_of(one) for one in params],
        schedule=schedule_of(sweep),
        allocations=planned,
        on_change=follower.changed,
        seed=sweep.seed,
        max_workers=sweep.max_workers,
        **({} if planned else pinned),
    )
    return result.notes


def _allocations(
    sweep: Sweep, fleet: "Fleet", say: Callable[[str], None]
) -> StageAllocations | None:
    """None where the file pins allocations, or where there is no goal or nothing to plan with."""
    goal = goal_of(sweep)
    pinned = sweep.workers is not None or sweep.memory_mb is not None
    if pinned or goal is None or find_spec("gpytorch") is None:
        return None

    def predict(workload: Workload) -> list[Option]:
        most = sweep.max_workers
        found = fleet.options(workload)
        return [one for one in found if most is None or one.allocation.workers <= most]

    workloads = []
    for params in words.thinned(sweep.configurations(), _LOOKED_AT):
        say(f"looking at {words.settings(params)}")
        workloads.append(measure(sweep.train, sweep.config_of(params)))
    return StageAllocations(options_of_workloads(predict, workloads), goal)


class _Follower:
    """Puts on the board what happens to the trials."""

    def __init__(self, board: Board, params: Sequence[dict[str, Any]]) -> None:
        self._board, self._params = board, params
        self._begun: set[int] = set()

    def take_up(self, job: Job) -> None:
        """A job of an earlier client, with what it has reported."""
        trial = int(job.job_id.removeprefix("trial-"))
        if _over(job):
            self._begun.add(trial)
            self._board.restore(trial, self._params[trial], *_end(job), job.job_id)
            return
        self._begin(trial, job)
        for report in job.reported:
            self._board.watch(trial, job, report)

    def changed(self, trial: int, change: "Change") -> None:
        """A job has reported, or has another status."""
        self._begin(trial, change.job)
        metric, row = self._board.sweep.metric, self._board.rows[trial]
        if change.report is not None:
            for report in change.job.reported[len(row.points) : change.report.index + 1]:
                if not row.points and metric not in report.metrics:
                    names = ", ".join(sorted(report.metrics)) or "nothing"
                    raise InvalidInput(
                        f"trial {trial} reports no metric {metric!r}; it reports: {names}"
                    )
                self._board.watch(trial, change.job, report)
        elif _over(change.job) and not row.over:
            self._board.end(trial, *_end(change.job))

    def _begin(self, trial: int, job: Job) -> None:
        if trial not in self._begun:
            self._begun.add(trial)
            self._board.begin(trial, self._params[trial])
            self._board.watch(trial, job, None)


def _over(job: Job) -> bool:
    return job.status in (FINISHED, STOPPED, FAILED)


def _end(job: Job) -> tuple[str, str]:
    """State and reason of a trial that is over, for its row."""
    try:
        outcome = job.result(0.0)
    except JobError as error:
        return "failed", f"{type(error).__name__}: {error}"
    if outcome.status == FINISHED or outcome.reason == "the last stage is over":
        return "finished", ""
    lost = outcome.reason.startswith("not among the best")
    return ("pruned" if lost else "stopped"), outcome.reason
