"""What callers may get wrong, one sentence each."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import optuna

from smlt_tune.errors import FleetClosed, InvalidInput


def kind(value: object) -> str:
    """What a value is, for a message: ``a str`` or ``None``."""
    return "None" if value is None else f"a {type(value).__name__}"


def is_count(value: object) -> bool:
    """Whether it is a whole number of at least one."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_fleet(value: object) -> bool:
    """Whether jobs can be submitted to it (a Fleet, or something that wraps one)."""
    return not isinstance(value, type) and callable(getattr(value, "submit", None))


def refuse(mistakes: Iterable[str | None]) -> None:
    """Raises one error for all of them.

    Raises:
        InvalidInput: There is at least one.
    """
    found = [mistake for mistake in mistakes if mistake]
    if found:
        raise InvalidInput(found)


def refuse_closed(fleet: Any) -> None:
    """Raises early what every submission would raise.

    Raises:
        FleetClosed: The fleet says that it is closed.
    """
    if getattr(fleet, "closed", False) is True:
        raise FleetClosed("the fleet is closed; open its folder again with Fleet.open")


def fleet_mistake(fleet: object) -> str | None:
    """Whether trials can run on it."""
    return None if is_fleet(fleet) else f"fleet is {kind(fleet)}: expected a smlt_tune.Fleet"


def run_mistakes(trial: object, train: object, fleet: object, metric: object) -> Iterable[str]:
    """Mistakes in the arguments of ``run`` that the fleet would not find."""
    if not isinstance(trial, optuna.trial.BaseTrial):
        yield f"trial is {kind(trial)}: expected the optuna.Trial that the objective was given"
    if not callable(train):
        yield f"train is {kind(train)}: expected the training function"
    if mistake := fleet_mistake(fleet):
        yield mistake
    if not (isinstance(metric, str) and metric):
        yield f"metric is {metric!r}: expected the name of a reported number, such as 'accuracy'"


def catch_mistake(catch: object) -> str | None:
    """Whether Optuna can catch it."""
    kinds = tuple(catch) if isinstance(catch, Iterable) else (catch,)
    if all(isinstance(one, type) and issubclass(one, Exception) for one in kinds):
        return None
    return f"catch is {catch!r}: expected classes of exceptions"


def optimize_mistakes(
    study: object,
    objective: object,
    fleet: object,
    n_trials: object,
    max_parallel: object,
    timeout: Any,
    catch: object,
) -> Iterable[str | None]:
    """Mistakes in the arguments of ``optimize``."""
    if not isinstance(study, optuna.Study):
        yield f"study is {kind(study)}: expected an optuna.Study"
    if not callable(objective):
        yield f"objective is {kind(objective)}: expected a function of the trial"
    yield fleet_mistake(fleet)
    if n_trials is not None and not is_count(n_trials):
        yield f"n_trials is {n_trials!r}: expected at least 1, or None for no limit"
    if not is_count(max_parallel):
        yield f"max_parallel is {max_parallel!r}: expected at least 1"
    if timeout is not None and not (isinstance(timeout, int | float) and timeout > 0):
        yield f"timeout is {timeout!r}: expected seconds above 0, or None for no limit"
    yield catch_mistake(catch)


def unknown_metric(metric: str, trial: int, reported: Iterable[str]) -> InvalidInput:
    """The error for a report that lacks the metric."""
    names = sorted(reported)
    close = get_close_matches(metric, names, n=1) or [
        name for name in names if name in metric or metric in name
    ]
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return InvalidInput(
        f"trial {trial} reports no metric {metric!r}; it reports: {', '.join(names) or 'nothing'}"
        f"{hint} (the first report has to carry the metric, later ones may leave it out)"
    )
