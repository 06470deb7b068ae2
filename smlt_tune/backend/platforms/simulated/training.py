"""What a simulated training function would do."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from smlt_tune.backend.platforms.base import is_positive
from smlt_tune.errors import InvalidInput
from smlt_tune.runtime.features import ModelFeatures
from smlt_tune.runtime.position import Position


def _nothing(epoch: int) -> Mapping[str, Any]:
    return {"epoch": epoch}


@dataclass(frozen=True)
class SimulatedTraining:
    """A run of some epochs, each of them training, an evaluation and a report.

    Attributes:
        epochs: How many.
        iterations: Of training, in each epoch; or a sequence, by epoch.
        iteration_s: Time of one, synchronisation included, seconds, for (workers, memory_mb, global
            batch size).
        metrics: What is reported at the end of an epoch, given its number from 0.
        batch: Global batch size, samples; or a sequence, by epoch. What is to come nobody says
            beforehand: each epoch is expected to be repeated.
        features: Of the model; None for a function that prepares nothing to be recognised by.
        memory_mb: Highest resident memory of a worker, MB.
        evaluation_s: Time of an evaluation, seconds.
        load_s: From the word to start until training begins, seconds: state is restored.
        save_s: Time that a checkpoint takes, seconds.

    Raises:
        InvalidInput: Lists every mistake.
    """

    epochs: int
    iterations: int | Sequence[int]
    iteration_s: Callable[[int, int, int], float]
    metrics: Callable[[int], Mapping[str, Any]] = _nothing
    batch: int | Sequence[int] = 1
    features: ModelFeatures | None = None
    memory_mb: float = 100.0
    evaluation_s: float = 0.0
    load_s: float = 0.1
    save_s: float = 0.05

    def __post_init__(self) -> None:
        mistakes = []
        if not _is_count(self.epochs):
            mistakes.append(f"epochs={self.epochs!r}: must be a whole number of at least 1")
        for name in ("iterations", "batch"):
            value = getattr(self, name)
            by_epoch = isinstance(value, Sequence) and len(value) == self.epochs
            if not _is_count(value) and not (by_epoch and all(map(_is_count, value))):
                must = "must be a whole number of at least 1, or one for each epoch"
                mistakes.append(f"{name}={value!r}: {must}")
        mistakes += [
            f"{name} must be callable, not {value!r}"
            for name in ("iteration_s", "metrics")
            if not callable(value := getattr(self, name))
        ]
        mistakes += [
            f"{name}={value!r}: must be a number of at least 0"
            for name in ("memory_mb", "evaluation_s", "load_s", "save_s")
            if (value := getattr(self, name)) != 0 and not is_positive(value)
        ]
        if mistakes:
            raise InvalidInput([f"SimulatedTraining: {mistake}" for mistake in mistakes])

    def batch_in(self, epoch: int) -> int:
        """Global batch size of an epoch, samples."""
        return self.batch if isinstance(self.batch, int) else self.batch[epoch]

    def iterations_in(self, epoch: int) -> int:
        """Of training."""
        return self.iterations if isinstance(self.iterations, int) else self.iterations[epoch]

    @cached_property
    def _begins(self) -> list[int]:
        """Iterations before each epoch, and in all."""
        return list(accumulate(map(self.iterations_in, range(self.epochs)), initial=0))

    @property
    def total(self) -> int:
        """Iterations of the whole run."""
        return self._begins[-1]

    def epoch_at(self, done: int) -> int:
        """How many epochs are complete after so many iterations."""
        return bisect_right(self._begins, done) - 1

    def end_of(self, epoch: int) -> int:
        """Iterations of the run at the end of an epoch."""
        return self._begins[epoch + 1]

    def expected(self, epoch: int) -> int:
        """Iterations of the whole run, as far as is known in an epoch."""
        return self._begins[epoch] + (self.epochs - epoch) * self.iterations_in(epoch)

    def position(self, done: int) -> Position:
        """Where it is after so many iterations."""
        epoch = self.epoch_at(done)
        iteration = done - self._begins[epoch]
        return Position(epoch, 1, iteration) if iteration else Position(epoch)

    def done_at(self, position: Position) -> int:
        """How many iterations lie before a position."""
        return self._begins[max(0, position.epoch)] + position.iteration


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1
