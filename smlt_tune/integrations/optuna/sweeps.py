"""A sweep file as an Optuna study."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial

from smlt_tune.backend.sweeps.board import Board
from smlt_tune.backend.sweeps.space import Categorical, FloatParameter
from smlt_tune.backend.sweeps.sweep import Sweep
from smlt_tune.errors import JobError
from smlt_tune.integrations.optuna.studies import optimize
from smlt_tune.integrations.optuna.trials import run

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet

#: How many configurations TPE draws at random before it models anything, unless the file says.
TPE_STARTUP = 10


def run_sweep(sweep: Sweep, fleet: "Fleet", board: Board) -> None:
    """Runs the trials of a sweep.

    Configurations that are drawn at random are the same for the same seed. What TPE suggests after
    them depends on the order in which trials end, which no seed fixes.

    Args:
        sweep: What to run.
        fleet: Where.
        board: Is told what happens.

    Raises:
        BudgetExhausted: The budget did not pay for a single report.
        InvalidInput: The reports lack the metric, or the fleet refuses what the file asks for.
    """
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        optimize(
            _study(sweep),
            partial(_objective, sweep, fleet, board),
            n_trials=sweep.trials,
            fleet=fleet,
            max_parallel=sweep.parallel,
            catch=(JobError,),
            callbacks=[partial(_tell, board)],
        )
    finally:
        optuna.logging.set_verbosity(verbosity)


def _study(sweep: Sweep) -> optuna.Study:
    study = optuna.create_study(
        study_name=sweep.name,
        direction="maximize" if sweep.maximize else "minimize",
        sampler=_sampler(sweep),
        pruner=_pruner(sweep),
    )
    for params in _drawn_at_random(sweep):
        study.enqueue_trial(params)
    return study


def _objective(sweep: Sweep, fleet: "Fleet", board: Board, trial: optuna.Trial) -> float:
    params = _suggest(sweep, trial)
    board.begin(trial.number, params)
    try:
        outcome = run(
            trial, sweep.train, sweep.config_of(params), fleet=fleet, metric=sweep.metric,
            workers=sweep.workers_of(params), max_workers=sweep.max_workers,
            memory_mb=sweep.memory_mb, seed=sweep.seed, watch=partial(board.watch, trial.number),
        )  # fmt: skip
    except JobError as error:
        board.end(trial.number, "failed", f"{type(error).__name__}: {error}")
        raise
    except KeyboardInterrupt:
        board.end(trial.number, "stopped", "interrupted", trial.user_attrs.get("smlt_seconds"))
        raise
    board.end(trial.number, "finished", seconds=outcome.duration_s)
    value = board.rows[trial.number].value
    return float("nan") if value is None else value


def _tell(board: Board, study: optuna.Study, trial: FrozenTrial) -> None:
    """The end of a trial that Optuna knows more about than its job does."""
    row = board.rows.get(trial.number)
    if row is None or row.over:
        return
    why = trial.user_attrs.get("smlt_stopped", "")
    state = "pruned" if why == "pruned" else "stopped"
    if state == "pruned":
        why = f"{study.pruner.__class__.__name__.removesuffix('Pruner').lower()}"
        why = f"{why}, after {len(trial.intermediate_values)} reports"
    board.end(trial.number, state, why, trial.user_attrs.get("smlt_seconds"))


def _suggest(sweep: Sweep, trial: optuna.Trial) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in sweep.space:
        if isinstance(one, Categorical):
            found[one.name] = trial.suggest_categorical(one.name, one.choices)
        elif isinstance(one, FloatParameter):
            found[one.name] = trial.suggest_float(
                one.name, one.low, one.high, log=one.log, step=one.step
            )
        else:
            found[one.name] = trial.suggest_int(
                one.name, one.low, one.high, log=one.log, step=one.step
            )
    return found


def _distributions(sweep: Sweep) -> dict[str, optuna.distributions.BaseDistribution]:
    found: dict[str, optuna.distributions.BaseDistribution] = {}
    for one in sweep.space:
        if isinstance(one, Categorical):
            found[one.name] = optuna.distributions.CategoricalDistribution(one.choices)
        elif isinstance(one, FloatParameter):
            found[one.name] = optuna.distributions.FloatDistribution(
                one.low, one.high, log=one.log, step=one.step
            )
        else:
            found[one.name] = optuna.distributions.IntDistribution(
                one.low, one.high, log=one.log, step=one.step
            )
    return found


def _drawn_at_random(sweep: Sweep) -> list[dict[str, Any]]:
    """The configurations that no earlier trial influences."""
    startup = sweep.sampler.options.get("startup", TPE_STARTUP)
    amount = sweep.trials if sweep.sampler.name == "random" else min(sweep.trials, startup)
    dice = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=sweep.seed))
    space = _distributions(sweep)
    return [dice.ask(space).params for _ in range(amount)]


def _sampler(sweep: Sweep) -> optuna.samplers.BaseSampler:
    if sweep.sampler.name == "random":
        return optuna.samplers.RandomSampler(seed=sweep.seed)
    startup = sweep.sampler.options.get("startup", TPE_STARTUP)
    return optuna.samplers.TPESampler(n_startup_trials=startup, seed=sweep.seed)


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    options = sweep.pruner.options
    makers: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
        "none": optuna.pruners.NopPruner,
        "median": lambda: optuna.pruners.MedianPruner(
            n_startup_trials=options.get("startup", 5), n_warmup_steps=options.get("warmup", 0)
        ),
        "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(
            min_resource=options.get("min_reports", 1), reduction_factor=options.get("factor", 4)
        ),
    }
    return makers[sweep.pruner.name]()
