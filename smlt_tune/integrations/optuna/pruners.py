"""Pruners of Optuna, as a sweep file names them."""

import binascii
import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate, count, takewhile

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


#: One in so many goes on, if the file does not say.
FACTOR = {"asha": 4, "hyperband": 3}


def rungs(choice: Choice) -> list[tuple[int, ...]]:
    """At which reports ASHA or Hyperband judges the trials of each bracket; last, the end.

    Args:
        choice: One of these, with ``max_reports``.
    """
    options, end = choice.options, choice.options["max_reports"]
    factor, fewest = options.get("factor", FACTOR[choice.name]), options.get("min_reports", 1)
    rates = [options.get("early_stopping_rate", 0)]
    if choice.name == "hyperband":  # the number of brackets, as Optuna computes it
        rates = list(range(math.floor(math.log(end / fewest, factor)) + 1))
    return [
        (*takewhile(end.__gt__, (fewest * factor**k for k in count(rate))), end) for rate in rates
    ]


def bracket_of(study: str, brackets: int, factor: int, trial: int) -> int:
    """The bracket into which Optuna's Hyperband puts a trial: by chance, the bold ones more often.

    Args:
        study: Its name.
        brackets: How many there are.
        factor: One in so many goes on.
        trial: Its number.
    """
    shares = [math.ceil(brackets * factor**s / (s + 1)) for s in reversed(range(brackets))]
    number = binascii.crc32(f"{study}_{trial}".encode()) % sum(shares)
    return bisect_right(list(accumulate(shares)), number)


def pruner(choice: Choice) -> optuna.pruners.BasePruner:
    """The pruner of a sweep, whose reports count from 1."""
    kind, names = _PRUNERS[choice.name]
    given = {names[one]: value for one, value in choice.options.items() if one in names}
    if "warmup" in names:  # Optuna lets a warm-up end with the step of that number
        given["n_warmup_steps"] = choice.options.get("warmup", 0) + 1
    if choice.name in FACTOR:
        given.setdefault("reduction_factor", FACTOR[choice.name])
    if choice.name == "asha":
        given.setdefault("min_resource", 1)
    with warnings.catch_warnings():  # some are marked as experimental since years
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return kind(**given)
