"""Pruners of Optuna, as a sweep file names them."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial

import optuna

from smlt_tune.backend.sweeps.search import Choice

#: Ours -> Optuna's.
_STEADY = {
    "startup": "n_startup_trials",
    "warmup": "n_warmup_steps",
    "interval": "interval_steps",
}
_PRUNERS: dict[str, tuple[Callable[..., optuna.pruners.BasePruner], Mapping[str, str]]] = {
    "none": (optuna.pruners.NopPruner, {}),
    "median": (optuna.pruners.MedianPruner, _STEADY),
    "percentile": (optuna.pruners.PercentilePruner, {"percentile": "percentile", **_STEADY}),
    "asha": (
        optuna.pruners.SuccessiveHalvingPruner,
        {
            "min_reports": "min_resource",
            "factor": "reduction_factor",
            "early_stopping_rate": "min_early_stopping_rate",
        },
    ),
    "hyperband": (
        optuna.pruners.HyperbandPruner,
        {
            "min_reports": "min_resource",
            "max_reports": "max_resource",
            "factor": "reduction_factor",
        },
    ),
    "patient": (
        partial(optuna.pruners.PatientPruner, None),
        {"patience": "patience", "min_delta": "min_delta"},
    ),
    "threshold": (
        optuna.pruners.ThresholdPruner,
        {
            "lower": "lower",
            "upper": "upper",
            "warmup": "n_warmup_steps",
            "interval": "interval_steps",
        },
    ),
}


def pruner(choice: Choice) -> optuna.pruners.BasePruner:
    """The pruner of a sweep, whose reports count from 1."""
    kind, names = _PRUNERS[choice.name]
    given = {names[one]: value for one, value in choice.options.items() if one in names}
    if "warmup" in names:  # Optuna lets a warm-up end with the step of that number
        given["n_warmup_steps"] = choice.options.get("warmup", 0) + 1
    if choice.name == "asha":
        given.setdefault("min_resource", 1)
    with warnings.catch_warnings():  # some are marked as experimental since years
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return kind(**given)
