"""Successive halving (Jamieson and Talwalkar, 2016): who goes on, from what was reported.

All N trials begin. A stage ends at a certain report, its *rung*; the best N / factor**(i + 1) of
stage i go on to stage i + 1. A trial that has failed or was stopped before the rung loses its place
to the next best.

Functions of the trials' reports alone, without memory: who asks again, after a crash too, gets the
same answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from smlt_tune.backend.job import FINISHED, OVER
from smlt_tune.backend.resource_manager.observations import not_counts
from smlt_tune.errors import InvalidInput


@dataclass(frozen=True)
class Schedule:
    """When stages end, and who is best.

    Attributes:
        metric: Reported number that trials are compared by.
        maximize: Whether larger is better.
        rungs: Number of the report, from 1, at which each stage ends; ascending.
        factor: One in so many goes on.
        reports: How many reports a whole training makes; None if the last rung is the last one.
            The trials of the last stage then run to their end, otherwise they are stopped there.

    Raises:
        InvalidInput: Lists every mistake.
    """

    metric: str
    maximize: bool
    rungs: tuple[int, ...]
    factor: int
    reports: int | None = None

    def __post_init__(self) -> None:
        numbers = {f"rungs[{i}]": rung for i, rung in enumerate(self.rungs)}
        mistakes = not_counts(numbers)
        if not self.rungs:
            mistakes.append("there are no rungs: give the report at which each stage ends")
        elif not mistakes and list(self.rungs) != sorted(set(self.rungs)):
            mistakes.append(f"rungs must ascend, not {self.rungs}")
        if not_counts({"factor": self.factor}) or self.factor < 2:
            mistakes.append(f"factor must be a whole number of at least 2, not {self.factor!r}")
        if not self.metric:
            mistakes.append(f"metric must be the name of a reported number, not {self.metric!r}")
        if not mistakes and self.reports is not None and not self.reports >= self.rungs[-1]:
            mistakes.append(f"reports={self.reports!r} are fewer than the last rung needs")
        if mistakes:
            raise InvalidInput(mistakes)

    @property
    def to_the_end(self) -> bool:
        """Whether a whole training is over with the last rung."""
        return self.reports in (None, self.rungs[-1])

    def share(self, stage: int) -> float:
        """Part of a whole training that lies in a stage."""
        before = self.rungs[stage - 1] if stage else 0
        return (self.rungs[stage] - before) / (self.reports or self.rungs[-1])

    def trials(self, stage: int, of: int) -> int:
        """How many trials a stage has room for, of all that began; at least one."""
        return max(1, of // int(self.factor**stage))


def geometric(first: int, factor: int, count: int) -> tuple[int, ...]:
    """Rungs after ``first`` reports, then ``factor`` times as many as before; ``count`` of them."""
    return tuple(first * factor**i for i in range(count))


@dataclass(frozen=True)
class Trial:
    """What is known of a trial.

    Attributes:
        values: The metric in each of its reports; nan if it was not there.
        status: Of its job; empty if it was not submitted yet.
    """

    values: tuple[float, ...] = ()
    status: str = ""

    @property
    def over(self) -> bool:
        """Whether its job has ended."""
        return self.status in OVER

    def value_at(self, rung: int) -> float:
        """What it is compared by at a rung; nan if it has not got there.

        A training that has finished before is judged by its last report.
        """
        if len(self.values) >= rung:
            return self.values[rung - 1]
        return self.values[-1] if self.values and self.status == FINISHED else math.nan


@dataclass(frozen=True)
class Situation:
    """Where successive halving stands.

    Attributes:
        entered: Trials of each stage that has begun, the best of the stage before first.
        to_come: Of the last of these, those that have not come to its end.
        best: The trial that leads; None if nobody has come to the end of a stage.
        over: Whether all is done.
    """

    entered: tuple[tuple[int, ...], ...]
    to_come: frozenset[int]
    best: int | None
    over: bool

    @property
    def stage(self) -> int:
        """The stage under way, or the last one."""
        return len(self.entered) - 1


def situation(schedule: Schedule, trials: Sequence[Trial]) -> Situation:
    """Where trials stand that have reported so much.

    Args:
        schedule: Of the stages.
        trials: All of them, by number.
    """
    entered: list[tuple[int, ...]] = [tuple(range(len(trials)))]
    best = None
    last = len(schedule.rungs) - 1
    for stage, rung in enumerate(schedule.rungs):
        # A trial of the last stage is there when it is over, the others at the rung.
        to_come = frozenset(
            i
            for i in entered[-1]
            if not trials[i].over and (stage == last or len(trials[i].values) < rung)
        )
        ranked = _ranked(schedule, trials, entered[-1], rung)
        best = ranked[0] if ranked else best
        if to_come or stage == last or not ranked:
            break
        entered.append(tuple(ranked[: schedule.trials(stage + 1, len(trials))]))
    return Situation(tuple(entered), to_come, best, over=not to_come)


def _ranked(
    schedule: Schedule, trials: Sequence[Trial], among: Sequence[int], rung: int
) -> list[int]:
    """Those that have got to a rung with a number to compare, the best first."""
    sign = -1.0 if schedule.maximize else 1.0
    values = {i: sign * trials[i].value_at(rung) for i in among}
    return sorted((i for i in among if not math.isnan(values[i])), key=values.__getitem__)
