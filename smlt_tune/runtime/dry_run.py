"""What a model and a training function compute, found out before they run.

A model is played through without values; a training function trains once, on a few samples.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from smlt_tune.errors import InvalidInput, UsageError
from smlt_tune.runtime.data import DataIterator
from smlt_tune.runtime.features import ModelFeatures
from smlt_tune.runtime.handover import Leave
from smlt_tune.runtime.position import Position
from smlt_tune.runtime.session import Session
from smlt_tune.runtime.workload import BatchSize, WorkloadTeller

#: A batch is cut to so many samples. More than one, because batch norm refuses to train on one;
#: several, because what a batch costs as such is divided among them.
SAMPLES = 4
#: In so many iterations of each loop a backward pass is waited for: gradients may be accumulated.
ITERATIONS = 4


@dataclass(frozen=True)
class DryRun:
    """Of a training function with one configuration.

    Attributes:
        features: Of its model.
        batch: Global batch size of its first loop that trains, samples.
        samples: Size of the data set of that loop.
        epochs: How many there are; None if it does not say.
        iterations: Training iterations of all epochs, if that loop is the only one that trains;
            None if it does not say how many epochs there are, or how large later batches are.
    """

    features: ModelFeatures
    batch: int
    samples: int
    epochs: int | None
    iterations: int | None


def model_features(model: Any, *inputs: Any) -> ModelFeatures:
    """What a PyTorch module asks of a machine, without running it.

    The forward and the backward pass of the sum of all floating-point outputs are played through
    with tensors that have no content, so that neither memory nor time for the real size is needed:
    module and inputs may also be on the ``meta`` device. The module is not changed, no random
    number is drawn, no gradient appears. It runs in the mode (training, evaluation) it is in.

    A module whose control flow depends on values (``if x.sum() > 0``) cannot be played through.
    It is run on its real parameters, which are shared and not copied, with two samples of the
    inputs.

    Operations are counted as PyTorch's ``FlopCounterMode`` counts them: matrix products,
    convolutions and attention, a multiplication and an addition being two. Activations are the
    inputs and what the forward pass has made and is alive when the backward pass begins, each
    storage once; parameters do not count, nor does the workspace of an LSTM on a CPU, whose size
    is known only when it runs.

    Args:
        model: A ``torch.nn.Module``.
        *inputs: Of its ``forward``: tensors, or structures of them. The first tensor's first
            dimension is the batch.

    Returns:
        The features; per sample, those of the whole divided by the size of the batch.

    Raises:
        InvalidInput: The model is no module, has uninitialised parameters or cannot be copied, or
            the inputs hold no batch.
        UsageError: PyTorch is not installed, or the module is on ``meta`` and depends on values.
    """
    try:
        from smlt_tune.runtime.frameworks.torch_features import features_of
    except ImportError as error:
        raise UsageError(
            "model_features() needs PyTorch, which is not installed: pip install 'smlt-tune[torch]'"
        ) from error
    return features_of(model, inputs)


def dry_run(
    train: Callable[[Any], Any], config: Any, *, datasets: Mapping[str, Any] | None = None
) -> DryRun:
    """Runs a training function up to the end of its first training iteration.

    Everything before that runs as written (data is loaded, the model made), in this process and on
    this thread; loops over batches are cut to a few iterations of a few samples. Then the function
    is ended as at a hand-over, by an exception that is no ``Exception``.

    Args:
        train: Training function.
        config: Its configuration.
        datasets: Arrays (or a tuple of them) of the data sets that it asks for by name.

    Raises:
        InvalidInput: It asks for a data set that is not among those.
        UsageError: It has ended without training; or what it computes cannot be measured.
        Exception: Whatever the function raises.
    """
    with _DrySession(datasets or {}) as session, suppress(Leave):
        train(config)
    return session.result()


class _DrySession(Session):
    """Ends the training function after its first training iteration."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        self._workload = WorkloadTeller(lambda **_: None, in_job=False)
        self._given = given
        self._features: ModelFeatures | None = None
        self._data: DataIterator | None = None

    def result(self) -> DryRun:
        """What was found out."""
        if self._data is None:
            raise UsageError(
                "the training function has ended without training: no backward pass reached what "
                "was given to session.prepare() inside a loop over session.batches()"
                if self._objects
                else "the training function has ended without training: it never called "
                "session.prepare(model, optimizer)"
            )
        if self._features is None:
            raise UsageError(
                "the training function uses operators that cannot be measured (sparse tensors, "
                "say), or measures something itself"
            )
        batch = min(self._data.batch_size, self._data.size)
        epochs, iterations = self._course.epochs or None, self._course.total()
        return DryRun(self._features, batch, self._data.size, epochs, iterations)

    def _loop(
        self, data: DataIterator, fetch: Callable[[Any], Any], batch_size: BatchSize
    ) -> Iterator[Any]:
        data = replace(data, epoch=self._place.epoch, loop=self._place.loop + 1)
        samples = min(SAMPLES, data.batch_size)
        few = replace(data, size=min(data.size, ITERATIONS * samples), batch_size=samples)
        for batch in few.minibatches():
            if batch.iteration >= min(ITERATIONS, len(data)):
                break
            self._move(Position(data.epoch, data.loop, batch.iteration), inside=True)
            self._synced = False
            try:
                yield from self._minibatch(batch, fetch)
            finally:  # also when the user breaks out of the loop
                if self._synced or self._workload.per_sample:
                    self._note(data, batch_size)
            if self._left:
                raise Leave
        self._move(Position(data.epoch, data.loop, len(data)), inside=False)

    def _note(self, data: DataIterator, batch_size: BatchSize) -> None:
        """It has trained once: whatever it asks of the session next ends it."""
        self._data, self._left = data, True
        self._course.note(data, batch_size)
        if self._objects and self._workload.per_sample:
            self._features = ModelFeatures(*self._objects.trained(), *self._workload.per_sample)

    def _uploaded(self, name: str) -> Any:
        if name not in self._given:
            known = ", ".join(sorted(self._given)) or "none"
            raise InvalidInput(
                f"the training function asks for the data set {name!r}, which was not given "
                f"(given: {known}): datasets={{{name!r}: arrays}}"
            )
        return self._given[name]
