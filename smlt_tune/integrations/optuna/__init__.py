"""Optuna trials as jobs of a fleet. Samplers, pruners and storages stay what they are.

    from smlt_tune.integrations import optuna as smlt_optuna

    def objective(trial):
        config = {"lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True)}
        outcome = smlt_optuna.run(trial, train, config, fleet=fleet, metric="accuracy")
        return outcome.metrics["accuracy"]        # or (accuracy, outcome.cost_usd)

    smlt_optuna.optimize(study, objective, n_trials=100, fleet=fleet, max_parallel=16)

``run`` works in a plain ``study.optimize(objective, n_jobs=16)`` too. What ``optimize`` adds: it
ends at once on Ctrl-C and at the timeout, ends cleanly when the budget or the deadline is reached,
and takes up the trials that a driver which died left behind.

A budget per trial is a constraint that Optuna's samplers know how to use; set it where the cost is
known: ``trial.set_constraint("cost", outcome.cost_usd - 0.01)``.

Storages: the journal file and in-memory storage take hundreds of parallel trials; SQLite takes a
lock for every write and is for up to some :data:`SQLITE_PARALLEL` (``optimize`` warns beyond).
"""

from smlt_tune.integrations.optuna.studies import SQLITE_PARALLEL, optimize
from smlt_tune.integrations.optuna.trials import run

__all__ = ["SQLITE_PARALLEL", "optimize", "run"]
