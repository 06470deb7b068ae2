"""One trial as one job."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import optuna

from smlt_tune.errors import BudgetExhausted
from smlt_tune.integrations.optuna import checks
from smlt_tune.integrations.optuna.adoption import claim, release
from smlt_tune.integrations.optuna.drive import current_drive
from smlt_tune.integrations.optuna.following import Calls, Follower

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet
    from smlt_tune.backend.job import Job, JobOutcome, Report


_CALLS: "WeakKeyDictionary[optuna.trial.BaseTrial, Calls]" = WeakKeyDictionary()


def run(
    trial: optuna.trial.BaseTrial,
    train: Callable[[Any], Any],
    config: Any = None,
    *,
    fleet: "Fleet",
    metric: str,
    goal: Any = None,
    workers: int | None = None,
    memory_mb: int | None = None,
    min_workers: int = 1,
    max_workers: int | None = None,
    seed: int = 0,
    step: str | None = None,
    first_step: int = 0,
    lockstep: bool = False,
    watch: "Callable[[Job, Report | None], None] | None" = None,
    judged: "Callable[[Job, Report, bool], None] | None" = None,
) -> "JobOutcome":
    """Trains one configuration for a trial, as one job of the fleet.

    With one objective every report goes to the trial, and a trial that its pruner gives up is
    stopped at once. (With several objectives Optuna has neither reports nor pruning.) Either way
    the trial gets the user attributes ``smlt_cost_usd``, ``smlt_seconds`` (sums, if called more
    than once for a trial), ``smlt_workers``, ``smlt_memory_mb``, ``smlt_job``, ``smlt_checkpoint``,
    ``smlt_fleet`` and, if the job did not run to its end, ``smlt_stopped`` with the reason.

    Args:
        trial: What the objective was given.
        train: The training function.
        config: Its argument.
        fleet: Where it runs.
        metric: Which reported number is the trial's intermediate value. The first report must
            carry it, so that a misspelt name costs one report and not a training; later reports
            without it are not passed on.
        goal: As in ``Fleet.submit``, like the next five.
        workers: Number of functions, if pinned.
        memory_mb: Memory of each function, if pinned.
        min_workers: Fewest functions.
        max_workers: Most functions.
        seed: Of everything random in the job.
        step: Which reported whole number is the step (such as ``"epoch"``); by default, the
            reports are counted from ``first_step``.
        first_step: The step of the first report.
        lockstep: The job goes on after a report only once the pruner has let it, so that a pruned
            trial has trained and cost nothing beyond it.
        watch: Called with the job as soon as it is submitted, then with each report.
        judged: Called once the pruner has judged a report, with whether it has ended the trial.

    Raises:
        TrialPruned: The pruner gave the trial up; or the job was stopped by the deadline, by the
            timeout of ``optimize``, by ``job.stop()`` or, after its first report, by the budget.
        BudgetExhausted: The budget does not pay for the job's first report.
        JobError: The job failed. ``catch=(JobError,)`` lets the study go on.
        InvalidInput: The arguments are wrong, or the reports lack the metric.
    """
    checks.refuse(checks.run_mistakes(trial, train, fleet, metric))
    checks.refuse_closed(fleet)
    drive, calls = current_drive(), _CALLS.setdefault(trial, Calls(next_step=first_step))
    if drive.ending:
        trial.set_user_attr("smlt_stopped", drive.ending)
    drive.admit()
    claimed, again = claim(trial, fleet)
    name = f"{claimed}-{len(calls.names)}" if calls.names else claimed
    calls.names.append(name)
    try:
        job = fleet.submit(
            train, config, goal=goal, workers=workers, memory_mb=memory_mb,
            min_workers=min_workers, max_workers=max_workers, seed=seed, lockstep=lockstep,
            name=name,
        )  # fmt: skip
        with drive.following(job):
            follower = Follower(
                trial,
                job,
                metric,
                step,
                calls,
                drive,
                again=again,
                lockstep=lockstep,
                judged=judged,
            )
            return follower.follow(watch)
    except BudgetExhausted:
        trial.set_user_attr("smlt_stopped", "budget")
        raise
    finally:
        release(claimed)
