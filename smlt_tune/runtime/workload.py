"""What a job computes, and how much of it is to do."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from smlt_tune.runtime.data import DataIterator
from smlt_tune.runtime.frameworks.base import Framework, Meter
from smlt_tune.runtime.position import Position

BatchSize = int | Callable[[int], int]

#: In so many iterations of loops that may train a backward pass is looked for, to measure it.
MEASURED_ITERATIONS = 10
#: With more epochs than this (a program that breaks out some time) nothing is known.
MOST_EPOCHS_AHEAD = 100_000


class WorkloadTeller:
    """Finds out what a job computes, and tells it as often as that is news.

    The first training iteration of a job is measured. That is kept with the state, so that the
    same is told by all invocations.

    Args:
        tell: Takes the fields of :class:`~smlt_tune.runtime.wire.Workload`; None on workers that
            need not tell.
        in_job: See :meth:`~smlt_tune.runtime.frameworks.base.Framework.measure`.

    Attributes:
        per_sample: Operations, and bytes of activations, of a sample; None before they are known.
    """

    def __init__(self, tell: Callable[..., None] | None, *, in_job: bool = True) -> None:
        self._tell = tell
        self._in_job = in_job
        self._tries = MEASURED_ITERATIONS if tell else 0
        self._told: dict[str, Any] = {}
        self.per_sample: tuple[float, float] | None = None

    def meter(self, objects: Framework | None, batch: Any) -> Meter | None:
        """For an iteration that may train; None if it need not or cannot be measured."""
        if not self._tries or self.per_sample or objects is None:
            return None
        self._tries -= 1
        return objects.measure(batch, in_job=self._in_job)

    def measured(self, meter: Meter, samples: int) -> None:
        """An iteration on so many samples has ended."""
        if meter.failed:
            self._tries = 0
        elif meter.backward:
            self.per_sample = meter.flops / samples, meter.activation_bytes / samples

    def tell(self, objects: Framework | None, batch: int, iterations: int | None) -> bool:
        """Tells what a loop that trains computes.

        Args:
            objects: What was prepared. Of a function that prepares nothing, nothing is known.
            batch: Global batch size.
            iterations: Of the whole job, None if that is not known.

        Returns:
            Whether it was told, because it is another than before.
        """
        if self._tell is None or objects is None:
            return False
        parameters, gradient_bytes = objects.trained()
        flops, activation_bytes = self.per_sample or (0.0, 0.0)
        workload = {
            "parameters": parameters,
            "gradient_bytes": gradient_bytes,
            "flops_per_sample": flops,
            "activation_bytes": activation_bytes,
            "batch": batch,
            "iterations": iterations,
        }
        if workload == self._told:
            return False
        self._told = workload
        self._tell(**workload)
        return True


class Course:
    """How many training iterations a job has, as far as that can be known, and has done.

    They lie in the loops over batches that train, repeated ``epochs`` times. A loop is known once
    it has trained; one out of which the program breaks is expected to be that short again. Of
    several ``session.epochs`` the present one and those before it are known.

    Attributes:
        position: Where it is.
    """

    def __init__(self) -> None:
        self.position = Position()
        self._base = self._epochs = 0
        #: By number of the loop in an epoch: training iterations before each epoch of the present
        #: ``session.epochs``, and at the end all; None if the batch size to come is not known.
        self._loops: dict[int, Sequence[int] | None] = {}
        self._most: dict[int, int] = {}
        self._before: int | None = 0

    @property
    def epochs(self) -> int:
        """How many the present ``session.epochs`` has; 0 if there was none."""
        return self._epochs

    def begin_epochs(self, base: int, count: int) -> None:
        """``session.epochs`` was called.

        Args:
            base: Number of its first epoch in the job.
            count: How many it has.
        """
        if self._epochs:
            before, here = self._before, self._total_here()
            self._before = None if before is None or here is None else before + here
        self._base, self._epochs = base, count
        self._loops, self._most = {}, {}

    def trains(self, data: DataIterator) -> bool:
        """Whether a loop at this place is known to train."""
        # Loops after the last epoch have numbers of loops within them.
        return self._epoch_here(data) is not None and data.loop in self._loops

    def note(self, data: DataIterator, batch_size: BatchSize) -> None:
        """A loop that trains.

        Args:
            data: Of the present epoch.
            batch_size: As the program has given it.
        """
        epoch = self._epoch_here(data)
        if epoch is None:
            return
        known, length = self._loops.get(data.loop), self._length(data)
        if known is None or known[epoch + 1] - known[epoch] != length:
            self._loops[data.loop] = self._lengths(data, batch_size)

    def ended(self, data: DataIterator, iterations: int) -> None:
        """A loop that trains has ended after so many iterations."""
        self._most.pop(data.loop, None)
        if iterations < len(data):
            self._most[data.loop] = max(1, iterations)

    def total(self) -> int | None:
        """Training iterations of the whole job; None if that is not known."""
        here = self._total_here()
        return None if self._before is None or here is None else self._before + here

    def left(self) -> int | None:
        """Training iterations that are still to do; None if that is not known."""
        total, epoch = self._total_here(), self.position.epoch - self._base
        if total is None or epoch < 0:
            return total
        if epoch >= self._epochs:
            return 0
        return total - sum(self._done(loop, epoch, k) for loop, k in self._loops.items() if k)

    def _done(self, loop: int, epoch: int, known: Sequence[int]) -> int:
        if loop > self.position.loop:
            return known[epoch]
        if loop < self.position.loop:
            return known[epoch + 1]
        return min(known[epoch] + self.position.iteration, known[epoch + 1])

    def _epoch_here(self, data: DataIterator) -> int | None:
        """Number in the present ``session.epochs``; None before and after its epochs."""
        epoch = data.epoch - self._base
        return epoch if 0 <= epoch < self._epochs else None

    def _total_here(self) -> int | None:
        if not self._loops or not all(self._loops.values()):
            return None
        return sum(known[-1] for known in self._loops.values() if known)

    def _length(self, data: DataIterator) -> int:
        return min(len(data), self._most.get(data.loop, len(data)))

    def _lengths(self, data: DataIterator, batch_size: BatchSize) -> Sequence[int] | None:
        if self._epochs > MOST_EPOCHS_AHEAD:
            return None
        if not callable(batch_size):
            length = self._length(data)
            return [epoch * length for epoch in range(self._epochs + 1)]
        try:
            sizes = [int(batch_size(epoch)) for epoch in range(self._epochs)]
            lengths = [self._length(replace(data, batch_size=size)) for size in sizes]
        except Exception:  # noqa: BLE001 - the user's function may refuse to look ahead
            return None
        return list(accumulate(lengths, initial=0))
