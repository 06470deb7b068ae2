"""A sweep in stages: successive halving of jobs, planned where budget or deadline are given."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from smlt_tune.backend.job import FINISHED, OVER, Job
from smlt_tune.backend.sweeps.board import Board
from smlt_tune.backend.sweeps.halving import DONE, LOST, run_halving
from smlt_tune.backend.sweeps.predicted import options_of
from smlt_tune.backend.sweeps.stage_allocations import StageAllocations
from smlt_tune.backend.sweeps.staged_plan import goal_of, schedule_of
from smlt_tune.backend.sweeps.sweep import Sweep
from smlt_tune.errors import InvalidInput, JobError

if TYPE_CHECKING:
    from smlt_tune.backend.changes import Change
    from smlt_tune.backend.fleet import Fleet


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
    goal = goal_of(sweep)
    options = None if goal is None else options_of(sweep, fleet, say)
    planned = StageAllocations(options, goal) if options and goal else None
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
    return job.status in OVER


def _end(job: Job) -> tuple[str, str]:
    """State and reason of a trial that is over, for its row."""
    try:
        outcome = job.result(0.0)
    except JobError as error:
        return "failed", f"{type(error).__name__}: {error}"
    if outcome.status == FINISHED or outcome.reason == DONE:
        return "finished", ""
    lost = outcome.reason.startswith(LOST)
    return ("pruned" if lost else "stopped"), outcome.reason
