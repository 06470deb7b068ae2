"""A sweep file as an Optuna study."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from smlt_tune.backend.sweeps.board import Board
from smlt_tune.backend.sweeps.sweep import Sweep
from smlt_tune.errors import BudgetExhausted, JobError
from smlt_tune.integrations.optuna.adoption import JOB
from smlt_tune.integrations.optuna.journal import study_of
from smlt_tune.integrations.optuna.promoting import Promoting, promoting
from smlt_tune.integrations.optuna.samplers import suggest
from smlt_tune.integrations.optuna.studies import optimize
from smlt_tune.integrations.optuna.trials import run

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet

#: Reports are counted from 1, so that ``min_reports: 1`` means the first one.
_FIRST_STEP = 1


def run_sweep(
    sweep: Sweep,
    fleet: "Fleet",
    board: Board,
    journal: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Runs the trials of a sweep that are not over yet.

    What a sampler that learns suggests depends on the order in which trials report, which no seed
    fixes; everything else is the same for the same seed, however often the sweep was continued.

    Args:
        sweep: What to run.
        fleet: Where; the one that an earlier client has left, if it is continued.
        board: Is told what happens, and what has.
        journal: Where the study is kept, to be continued by another process; None for nowhere.
        say: Is told what is looked at before the first trial.

    Raises:
        BudgetExhausted: The budget did not pay for a single report.
        InvalidInput: The reports lack the metric, or the fleet refuses what the file asks for.
    """
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        study = study_of(sweep, fleet, journal)
        left = sweep.trials - _restore(board, study)
        if left < 1:
            return
        places = promoting(sweep, fleet, say)
        if places is not None:
            for row in board.snapshot():
                places.restore(row)
        optimize(
            study,
            partial(_objective, sweep, fleet, board, places),
            n_trials=left,
            fleet=fleet,
            max_parallel=sweep.parallel,
            catch=(JobError,),
            callbacks=[partial(_tell, board, places)],
        )
    except BudgetExhausted:
        if not any(row.points for row in board.snapshot()):  # of an earlier client neither
            raise
    finally:
        optuna.logging.set_verbosity(verbosity)


def _restore(board: Board, study: optuna.Study) -> int:
    """Puts the trials that are over on the board. Returns how many."""
    over = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    for trial in over:
        params = _params(board.sweep, trial)
        board.restore(trial.number, params, *_end(study, trial), trial.user_attrs.get(JOB, ""))
    return len(over)


def _objective(
    sweep: Sweep, fleet: "Fleet", board: Board, places: Promoting | None, trial: optuna.Trial
) -> float:
    suggest(trial, sweep.space)
    params = _params(sweep, trial)
    board.begin(trial.number, params)
    workers, memory_mb = sweep.workers_of(params), sweep.memory_mb
    if places is not None:
        place = places.begins(trial.number)
        workers, memory_mb = place.workers, place.memory_mb
    try:
        outcome = run(
            trial, sweep.train, sweep.config_of(params), fleet=fleet, metric=sweep.metric,
            workers=workers, memory_mb=memory_mb, max_workers=sweep.max_workers,
            seed=sweep.seed, lockstep=True, first_step=_FIRST_STEP,
            watch=partial(board.watch, trial.number),
            judged=None if places is None else partial(places.judged, trial.number),
        )  # fmt: skip
    except JobError as error:
        why = f"{type(error).__name__}: {error}"
        trial.set_user_attr("smlt_error", why)
        board.end(trial.number, "failed", why)
        raise
    except KeyboardInterrupt:
        board.end(trial.number, "stopped", "interrupted", trial.user_attrs.get("smlt_seconds"))
        raise
    board.end(trial.number, "finished", seconds=outcome.duration_s)
    value = board.rows[trial.number].value
    return float("nan") if value is None else value


def _params(sweep: Sweep, trial: optuna.trial.BaseTrial | FrozenTrial) -> dict[str, Any]:
    """What a trial differs in from others."""
    return dict(sweep.candidates[trial.number] if sweep.candidates else trial.params)


def _tell(board: Board, places: Promoting | None, study: optuna.Study, trial: FrozenTrial) -> None:
    """The end of a trial that Optuna knows more about than its job does."""
    row = board.rows.get(trial.number)
    if row is None:
        return
    if not row.over:
        board.end(trial.number, *_end(study, trial), trial.user_attrs.get("smlt_seconds"))
    if places is not None:
        places.leaves(trial.number, row.cost_usd)


def _end(study: optuna.Study, trial: FrozenTrial) -> tuple[str, str]:
    """State and reason of a trial that is over, for its row."""
    stopped = trial.user_attrs.get("smlt_stopped", "")
    if trial.state == TrialState.COMPLETE:
        return "finished", ""
    if stopped == "pruned":
        name = study.pruner.__class__.__name__.removesuffix("Pruner").lower()
        return "pruned", f"{name}, after {len(trial.intermediate_values)} reports"
    if "smlt_error" in trial.user_attrs:
        return "failed", trial.user_attrs["smlt_error"]
    return "stopped", stopped
