"""A whole study on a fleet."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import optuna

from smlt_tune.errors import BudgetExhausted
from smlt_tune.integrations.optuna import checks
from smlt_tune.integrations.optuna.adoption import AdoptingStudy, orphans, stop_strays
from smlt_tune.integrations.optuna.drive import Drive

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet

#: Up to how many parallel trials SQLite does not slow a study down.
SQLITE_PARALLEL = 16

Objective = Callable[[optuna.Trial], float | Sequence[float]]
Callback = Callable[[optuna.Study, optuna.trial.FrozenTrial], None]


def optimize(
    study: optuna.Study,
    objective: Objective,
    *,
    n_trials: int | None = None,
    fleet: "Fleet",
    max_parallel: int = 8,
    timeout: float | None = None,
    catch: Iterable[type[Exception]] | type[Exception] = (),
    callbacks: Iterable[Callback] | None = None,
    show_progress_bar: bool = False,
    gc_after_trial: bool = False,
) -> None:
    """``study.optimize`` with trials that are jobs of a fleet (the objective calls :func:`run`).

    Three things differ from Optuna's own. Ctrl-C stops the running jobs at once, frees what they
    had reserved and marks their trials FAIL; so does any exception of a signal handler. At the
    timeout running jobs stop too, their trials are PRUNED. When the budget or the deadline of the
    fleet is reached, no more trials start and the call returns with what there is.

    Trials that an earlier driver of the same fleet left RUNNING when it died are completed first,
    each by running the objective on that very trial: its job is taken up where it is, or by now.
    They count as trials of this call. That takes a study in a storage that survived and the fleet
    of that driver, continued with ``Fleet.open``; a trial that had not reached :func:`run` yet
    stays RUNNING, as in Optuna.

    Args:
        study: Any study with any sampler, pruner and storage.
        objective: Called in a thread of its own for every trial.
        n_trials: How many trials this call sees through; None for no limit.
        fleet: Where the jobs run.
        max_parallel: Trials at once. The fleet decides how many of their jobs run and how many
            wait, so this may be larger than what fits.
        timeout: Seconds until everything stops; None for no limit.
        catch: Exceptions that fail one trial only, as in Optuna; ``smlt_tune.errors.JobError`` for
            all ways in which a job fails.
        callbacks: As in Optuna.
        show_progress_bar: As in Optuna.
        gc_after_trial: As in Optuna.

    Raises:
        InvalidInput: Arguments are wrong; the message lists every mistake.
        FleetClosed: The fleet is closed.
        BudgetExhausted: The budget did not pay for a single report of a single trial.
    """
    checks.refuse(
        checks.optimize_mistakes(study, objective, fleet, n_trials, max_parallel, timeout, catch)
    )
    checks.refuse_closed(fleet)
    _warn_of_sqlite(study, max_parallel)
    stop_strays(study, fleet)
    drive, left_behind = Drive(), orphans(study, fleet)
    driven = AdoptingStudy(study, left_behind) if left_behind else study
    options: dict[str, Any] = {
        "n_trials": None if n_trials is None else max(n_trials, len(left_behind)),
        "n_jobs": max_parallel,
        "timeout": timeout,
        "catch": (*(catch if isinstance(catch, Iterable) else (catch,)), BudgetExhausted),
        "callbacks": callbacks,
        "show_progress_bar": show_progress_bar,
        "gc_after_trial": gc_after_trial,
    }
    _drive(driven, _on(drive, objective), drive, options)
    if drive.refusal and not drive.trained:
        raise drive.refusal


def _on(drive: Drive, objective: Objective) -> Objective:
    """The objective, whose thread ends the study's loop when the drive is over."""

    def on_drive(trial: optuna.Trial) -> float | Sequence[float]:
        try:
            with drive.current():
                return objective(trial)
        finally:
            if drive.ending:
                trial.study.stop()

    return on_drive


def _drive(
    study: optuna.Study, objective: Objective, drive: Drive, options: dict[str, Any]
) -> None:
    """Runs Optuna's loop in a thread, so that this one is free to hear of signals."""
    with ThreadPoolExecutor(1, thread_name_prefix="smlt-optuna") as pool:
        loop = pool.submit(study.optimize, objective, **options)
        try:
            if not wait([loop], timeout=options["timeout"]).done:
                drive.stop("timeout")
            wait([loop])
        except BaseException:
            drive.stop("interrupted")
            raise
        loop.result()


def _warn_of_sqlite(study: optuna.Study, max_parallel: int) -> None:
    storage: Any = study._storage
    url = str(getattr(getattr(storage, "_backend", storage), "url", ""))
    if url.startswith("sqlite") and max_parallel > SQLITE_PARALLEL:
        warnings.warn(
            f"SQLite with {max_parallel} parallel trials is slow: it takes a lock for every write. "
            "optuna.storages.JournalStorage takes hundreds.",
            stacklevel=3,
        )
