"""What a simulated training function would do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from smlt_tune.backend.platforms.base import is_positive
from smlt_tune.errors import InvalidInput
from smlt_tune.runtime.features import ModelFeatures


def _nothing(epoch: int) -> Mapping[str, Any]:
    return {"epoch": epoch}


@dataclass(frozen=True)
class SimulatedTraining:
    """A run of some epochs, each of them training, an evaluation and a report.

    Attributes:
        epochs: How many.
        iterations: Of training, in each epoch.
        iteration_s: Time of one, synchronisation included, seconds, for (workers, memory_mb).
        metrics: What is reported at the end of an epoch, given its number from 0.
        batch: Global batch size, samples.
        features: Of the model; None for a function that prepares nothing to be recognised by.
        memory_mb: Highest resident memory of a worker, MB.
        evaluation_s: Time of an evaluation, seconds.
        load_s: From the word to start until training begins, seconds: state is restored.
        save_s: Time that a checkpoint takes, seconds.

    Raises:
        InvalidInput: Lists every mistake.
    """

    epochs: int
    iterations: int
    iteration_s: Callable[[int, int], float]
    metrics: Callable[[int], Mapping[str, Any]] = _nothing
    batch: int = 1
    features: ModelFeatures | None = None
    memory_mb: float = 100.0
    evaluation_s: float = 0.0
    load_s: float = 0.1
    save_s: float = 0.05

    def __post_init__(self) -> None:
        mistakes = [
            f"{name}={value!r}: must be a whole number of at least 1"
            for name in ("epochs", "iterations", "batch")
            if not isinstance(value := getattr(self, name), int) or value < 1
        ]
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

    @property
    def total(self) -> int:
        """Iterations of the whole run."""
        return self.epochs * self.iterations
