"""What the user's training function talks to.

The same function runs alone in a debugger, on one worker, or on a hundred. A session knows where
the program is (:mod:`~smlt_tune.runtime.position`). When the program starts again, epochs and
iterations that are done are skipped and everything else runs as written.

A *boundary* is a point from which the rest of the program can be run again with the same result:
the beginning of an epoch, and the end of an iteration that trained. State is handed over at
boundaries.
"""

import json
import random
import resource
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from smlt_tune.errors import InvalidInput, UsageError
from smlt_tune.runtime import wire
from smlt_tune.runtime.checkpoint import Checkpoints
from smlt_tune.runtime.clock import SYSTEM_CLOCK, Clock
from smlt_tune.runtime.data import (
    DataIterator,
    Minibatch,
    UploadedDataset,
    dataset_size,
    minibatch_buffer,
)
from smlt_tune.runtime.frameworks.base import Framework, read_meta
from smlt_tune.runtime.handover import CannotGive, Leave, Membership
from smlt_tune.runtime.position import Position, entropy
from smlt_tune.runtime.stores.base import ObjectStore, ParameterStore

#: A worker whose time limit is nearer than this (plus a few iterations) asks for a hand-over, s.
TIME_LIMIT_MARGIN_S = 0.5

#: After so many boundaries without need, the whole state is no longer copied before every step.
SHADOW_BOUNDARIES = 10

_current: ContextVar["Session | None"] = ContextVar("smlt_session", default=None)


@dataclass(frozen=True)
class Home:
    """What connects a session to its fleet. A session without one runs alone.

    Attributes:
        spec: Who this worker is.
        parameter_store: Where workers meet.
        object_store: Where checkpoints and data lie.
    """

    spec: wire.WorkerSpec
    parameter_store: ParameterStore
    object_store: ObjectStore


def session() -> "Session":
    """The session of the training function that is running.

    Inside a job it belongs to the worker. Anywhere else (a debugger, a notebook, a test) each call
    makes a new one, which trains alone.
    """
    current = _current.get()
    return current if current is not None else Session()


class Session:
    """One worker's view of a job.

    Args:
        home: Connection to the fleet; None to run alone.
        seed: Of the job, if there is no home.
        clock: Time.
    """

    def __init__(
        self, home: Home | None = None, *, seed: int = 0, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._clock = clock
        self._home = home
        self._seed = home.spec.seed if home else seed
        self._rank = home.spec.rank if home else 0
        self._workers = home.spec.workers if home else 1
        self._objects: Framework | None = None
        self._prepared = 0
        self._entered = home is None
        self._begun = home is None
        self._start: tuple[str, bytes] | None = None
        self._leaving = False
        self._epoch_base = 0
        self._user_epoch = 0
        # Where the program is.
        self._place = Position()
        self._inside = False
        self._nth = 0
        self._resume = Position()
        self._boundary = Position()
        self._trained: list[int] = []
        self._resume_trained: list[int] = []
        self._boundary_trained: list[int] = []
        self._batch: Minibatch | None = None
        self._batch_size = 0
        # What has happened since the boundary.
        self._synced = False
        self._dirty = False
        self._shadowed = False
        self._calm = 0
        self._syncs = 0
        self._boundary_syncs = 0
        self._reports: dict[str, dict[str, Any]] = {}
        # Signs of life and checkpoints.
        self._started_s = clock.monotonic()
        self._last_progress_s = self._last_tick_s = self._last_checkpoint_s = self._started_s
        self._checkpoint_cost_s = 0.0
        self._slowest_s = self._sync_s = 0.0
        self._iterations = 0
        if home:
            self._checkpoints = Checkpoints(home.object_store, home.spec.job)
            self._membership = Membership(
                home.spec, home.parameter_store, clock, self._give, self._sign_of_life
            )
        self._seed_generators("start", shared=True)

    def __enter__(self) -> Self:
        self._token = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)

    @property
    def rank(self) -> int:
        """Which of the job's workers this is, from 0."""
        return self._rank

    @property
    def workers(self) -> int:
        """How many workers the job has at present."""
        return self._workers

    def prepare(self, *objects: Any) -> Any:
        """Puts models, optimizers, schedulers in the session's care.

        Restores them after a restart; from here on gradients are averaged over the workers after
        every backward pass, weighted by samples. Anything with ``state_dict`` and
        ``load_state_dict`` can be prepared; do so in the same order each time.

        Args:
            *objects: What to prepare.

        Returns:
            The same objects: one, or a tuple of them.

        Raises:
            InvalidInput: An object has no state to keep.
            UsageError: The checkpoint does not fit the objects.
        """
        if not objects:
            raise InvalidInput("prepare() needs at least one object, a model for example")
        if self._home and self._begun and self._prepared:
            raise UsageError(
                "prepare() was called after training began; prepare everything before the first "
                "epoch"
            )
        if self._objects is None:
            self._objects = _framework()
            self._begun = self._home is None
        self._objects.add(objects)
        if self._prepared == 0:
            self._objects.on_backward(self._on_backward, every_gradient=self._workers > 1)
        self._enter()
        if self._start:
            self._objects.load(self._start[1], self._prepared)
        self._prepared += len(objects)
        self._seed_generators("prepared", self._prepared, shared=True)
        return objects[0] if len(objects) == 1 else objects

    def epochs(self, count: int) -> Iterator[int]:
        """Numbers of the epochs that are still to do.

        Args:
            count: How many epochs the whole job has.

        Yields:
            The number of an epoch, from 0 on; after a restart from the one that was interrupted.
        """
        if not _whole(count) or count < 0:
            raise InvalidInput(f"epochs() needs a whole number of at least 0, got {count!r}")
        self._begin()
        base = self._epoch_base
        for epoch in range(max(0, self._resume.epoch - base), count):
            self._begin_epoch(base + epoch, epoch)
            self._tick()
            yield epoch
        self._begin_epoch(base + count, count)  # what comes after the last epoch
        self._epoch_base = base + count + 1

    def batches(
        self,
        dataset: Any,
        batch_size: int | Callable[[int], int],
        *,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> Iterator[Any]:
        """This worker's parts of the batches of a data set.

        A loop in which a backward pass happens is training: after a restart it continues where it
        was. Any other is evaluation: it runs as a whole.

        If a training batch has fewer samples than there are workers, those without a sample of
        their own work on a borrowed one, whose gradient counts nothing.

        Args:
            dataset: Anything with ``__len__`` and ``__getitem__``, an array, a tuple of arrays, or
                the name of a data set that was uploaded to the fleet.
            batch_size: Global batch size, or a function that gives it for an epoch.
            shuffle: Visit the samples in random order, another one each epoch, the same on every
                worker.
            drop_last: Leave out the last batch if it is smaller.

        Yields:
            What indexing the data set gives for this worker's samples: arrays, tuples of arrays, or
            collated samples; tensors if a PyTorch object was prepared.
        """
        if isinstance(dataset, str):
            dataset = self._uploaded(dataset)
        data = DataIterator(
            size=dataset_size(dataset),
            batch_size=_batch_size(batch_size, self._user_epoch),
            shuffle=shuffle,
            drop_last=drop_last,
            seed=self._seed,
            epoch=self._place.epoch,
            loop=self._place.loop + 1,
            rank=self._rank,
            workers=self._workers,
        )
        self._begin()
        if shuffle and self._workers > 1 and self._objects is None:
            raise UsageError(
                "batches() was called on several workers before prepare(): the workers would train "
                "different models; call session.prepare(model, optimizer) first (or use "
                "shuffle=False for a loop that only evaluates)"
            )
        native = self._objects.as_native if self._objects else lambda array: array
        fetch = minibatch_buffer(dataset, native)
        return self._nested(data, fetch) if self._inside else self._loop(data, fetch)

    def report(self, **metrics: Any) -> None:
        """Tells the tuner how the job is doing. Call it on every worker; rank 0's values count.

        Args:
            **metrics: Numbers (of any framework), strings, booleans.

        Raises:
            InvalidInput: A value is none of these.
        """
        if not metrics:
            raise InvalidInput("report() needs at least one metric: session.report(accuracy=0.9)")
        plain = _plain_metrics(metrics)
        self._begin()
        place = self._next_place()
        if place in self._reports:
            return
        self._reports[place] = plain
        if self._home and self._rank == 0:
            index = len(self._reports) - 1
            self._membership.tell(wire.Reported, index=index, metrics=plain)

    def mean(self, value: Any, count: Any = 1.0) -> Any:
        """Sum of the values over the sum of the counts, over all workers. Call it on every worker.

        Args:
            value: This worker's sum: a number, or an array of any shape.
            count: How many samples it is the sum of.

        Returns:
            A float for a number, else a float64 array of the value's shape; NaN if all counts
            are 0.
        """
        array = np.asarray(_number(value), dtype=np.float64)
        weight = float(_number(count))
        self._begin()
        place = self._next_place()
        if self._workers > 1:
            self._collective()
            content = np.append(array.reshape(-1), weight).tobytes()
            parts = self._waiting(lambda: self._membership.aggregator.gather(place, content))
            total = np.sum([np.frombuffer(p) for p in parts], axis=0)
            array, weight = total[:-1].reshape(array.shape), float(total[-1])
        mean = array / weight if weight else np.full_like(array, np.nan)
        return float(mean) if mean.ndim == 0 else mean

    def finish(self, value: Any) -> None:
        """Called by the worker when the training function has returned."""
        if self._home is None:
            return
        self._enter()
        checkpoint = None
        if self._objects:
            self._begin()
            self._set_boundary(max(self._boundary, self._place))
            if self._workers > 1:
                self._objects.keep_light()
            checkpoint = self._membership.last_word(self._save)
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            value = None
        self._membership.tell(
            wire.Finished,
            checkpoint=checkpoint,
            value=value,
            reports=list(self._reports.values()) if self._rank == 0 else [],
        )

    # --- where the program is -----------------------------------------------------------------

    def _loop(self, data: DataIterator, fetch: Callable[[Any], Any]) -> Iterator[Any]:
        number = self._place.loop + 1
        epoch = self._place.epoch
        first = 0
        if self._resume.epoch == epoch and number in self._resume_trained:
            first = self._resume.iteration if number == self._resume.loop else len(data)
            self._trained.append(number)
        self._move(Position(epoch, number, first), inside=True)
        finished = False
        try:
            for batch in data.minibatches(first):
                self._move(Position(epoch, number, batch.iteration), inside=True)
                yield from self._minibatch(batch, fetch)
                if self._synced:
                    self._note_training(number)
                    self._reach_boundary(Position(epoch, number, batch.iteration + 1))
                self._tick()
            finished = True
        finally:  # also when the user breaks out of the loop
            self._batch = None
            if self._synced and not finished:
                self._note_training(number)
                self._set_boundary(Position(epoch, number, len(data)))
            self._move(Position(epoch, number, len(data)), inside=False)
            self._seed_generators("after")

    def _nested(self, data: DataIterator, fetch: Callable[[Any], Any]) -> Iterator[Any]:
        """A loop inside an iteration of another: evaluation in mid-epoch."""
        outer, syncs = self._batch, (self._synced, self._syncs)
        try:
            for batch in data.minibatches():
                yield from self._minibatch(batch, fetch, "nested", self._nth, batch.iteration)
                if (self._synced, self._syncs) != syncs:
                    raise UsageError("a loop over batches inside another one must not train")
                self._tick()
        finally:
            self._batch = outer
            self._seed_generators("after", self._nth)

    def _minibatch(
        self, batch: Minibatch, fetch: Callable[[Any], Any], *where: int | str
    ) -> Iterator[Any]:
        self._batch = batch
        self._batch_size = batch.total
        self._seed_generators(*where)
        # Without a sample of its own a worker still takes part in training, not in evaluation.
        if batch.samples or batch.shuffled or self._place.loop in self._trained:
            yield fetch(batch.indices)
        self._batch = None

    def _note_training(self, loop: int) -> None:
        if loop not in self._trained:
            self._trained.append(loop)

    def _begin_epoch(self, number: int, user_epoch: int) -> None:
        self._user_epoch = user_epoch
        self._move(Position(number), inside=False)
        self._trained = []
        if self._resume.epoch != number:
            self._reach_boundary(self._place)
        self._seed_generators(shared=True)

    def _move(self, position: Position, *, inside: bool) -> None:
        self._place, self._inside, self._nth = position, inside, 0

    def _next_place(self) -> str:
        self._nth += 1
        where = self._place.iteration if self._inside else "after"
        return f"{self._place.epoch}.{self._place.loop}.{where}.{self._nth}"

    def _seed_generators(self, *where: int | str, shared: bool = False) -> None:
        """Random numbers from here on are a function of the position (and of rank and size)."""
        place = (self._place.epoch, self._place.loop, self._place.iteration, self._inside)
        who = () if shared else (self._rank, self._workers)
        bits = entropy("random", self._seed, *place, *where, *who)
        random.seed(bits)
        np.random.seed(bits & 0xFFFFFFFF)  # noqa: NPY002 - user code uses the global generator
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.default_generator.manual_seed(bits & 0x7FFFFFFFFFFFFFFF)

    def _set_boundary(self, position: Position) -> None:
        self._boundary = position
        self._boundary_syncs = self._syncs
        self._boundary_trained = list(self._trained)
        self._calm += self._dirty
        self._synced = self._dirty = self._shadowed = False

    def _reach_boundary(self, position: Position) -> None:
        self._set_boundary(position)
        if self._home is None or self._objects is None:
            return
        if self._leaving or self._should_leave():
            self._hand_over()
        if self._workers > 1:
            self._objects.keep_light()
        if self._rank == 0:
            self._maybe_checkpoint()

    # --- synchronisation ------------------------------------------------------------------------

    def _on_backward(self) -> None:
        """A backward pass has ended (with one worker: the optimizer has stepped)."""
        self._begin()
        self._synced = True
        if self._workers == 1 or self._objects is None:
            return
        self._collective()
        batch = self._batch
        weight = batch.samples / batch.total if batch else 1.0 / self._workers
        mine = self._objects.gradients()
        leave = self._leaving or self._time_is_up()
        total, self._leaving = self._waiting(
            lambda: self._membership.aggregator.reduce(
                self._syncs, mine.vector, weight=weight, check=mine.check, leave=leave
            )
        )
        self._objects.replace_gradients(total)
        self._syncs += 1
        if not self._dirty and self._calm < SHADOW_BOUNDARIES:
            self._objects.keep_all()
            self._shadowed = True
        self._dirty = True

    def _collective(self) -> None:
        """Notes that workers may have to wait for each other although the state has changed."""
        if self._dirty:
            self._calm = 0

    def _waiting(self, collective: Callable[[], Any]) -> Any:
        begun = self._clock.monotonic()
        result = collective()
        now = self._clock.monotonic()
        self._sync_s += now - begun
        self._last_tick_s += now - begun  # waiting for others says nothing about this worker's pace
        return result

    # --- hand-over ------------------------------------------------------------------------------

    def _enter(self) -> None:
        if self._entered:
            return
        self._entered = True
        gift = self._membership.enter()
        self._leaving = gift.leaving
        if gift.checkpoint:
            self._restore(gift.checkpoint)
        self._sign_of_life(waiting=False)

    def _restore(self, key: str) -> None:
        content = self._checkpoints.load(key)
        meta = read_meta(content)
        self._start = (key, content)
        self._resume = self._boundary = Position.decode(meta["position"])
        self._resume_trained = self._boundary_trained = json.loads(meta["trained"])
        self._syncs = self._boundary_syncs = int(meta["syncs"])
        self._reports = dict(json.loads(meta["reports"]))

    def _begin(self) -> None:
        """Before the first thing that depends on the state of the prepared objects."""
        self._enter()
        if self._begun:
            return
        if self._objects is None:
            self._begun = True
            return
        if self._start is None and self._workers > 1:
            key = self._membership.agree_on_init(self._save)
            if key is not None:
                self._objects.load(self._checkpoints.load(key), 0)
        self._start = None
        if self._workers > 1:
            self._objects.keep_light()
        self._begun = True
        if self._leaving:
            self._hand_over()

    def _give(self) -> tuple[str | None, bool]:
        """A replacement asks for the state at the boundary."""
        if self._objects is None or not self._begun:
            return None, False
        if self._dirty and not self._shadowed:
            raise CannotGive
        return self._save(kept=True), self._leaving

    def _should_leave(self) -> bool:
        """With one worker nobody has to agree."""
        if self._workers > 1:
            return False
        now = self._clock.monotonic()
        due = now - self._last_progress_s >= self._spec.progress_s
        return self._time_is_up() or (due and self._membership.asked_to_leave())

    def _time_is_up(self) -> bool:
        left = self._started_s + self._spec.timeout_s - self._clock.monotonic()
        reserve = TIME_LIMIT_MARGIN_S + 3 * (self._slowest_s + self._checkpoint_cost_s)
        return left < min(reserve, self._spec.timeout_s / 2)

    def _hand_over(self) -> None:
        key = self._membership.last_word(self._save)
        self._membership.tell(wire.HandedOver, checkpoint=key)
        raise Leave

    def _maybe_checkpoint(self) -> None:
        now = self._clock.monotonic()
        pause = max(self._spec.checkpoint_s, self._checkpoint_cost_s / self._spec.checkpoint_share)
        if now - self._last_checkpoint_s < pause:
            return
        key = self._save()
        self._last_checkpoint_s = self._clock.monotonic()
        self._membership.tell(wire.Saved, checkpoint=key)

    def _save(self, *, kept: bool = False) -> str:
        assert self._objects is not None
        begun = self._clock.monotonic()
        meta = {
            "position": self._boundary.encode(),
            "trained": json.dumps(self._boundary_trained),
            "syncs": str(self._boundary_syncs),
            "reports": json.dumps(list(self._reports.items())),
        }
        content = self._objects.save(meta, kept=kept)
        key = self._checkpoints.save(self._boundary, content)
        cost = self._clock.monotonic() - begun
        self._checkpoint_cost_s = cost
        self._last_tick_s += cost
        return key

    # --- signs of life --------------------------------------------------------------------------

    @property
    def _spec(self) -> wire.WorkerSpec:
        assert self._home is not None
        return self._home.spec

    def _tick(self) -> None:
        """After every iteration."""
        self._iterations += 1
        now = self._clock.monotonic()
        self._slowest_s = max(self._slowest_s, now - self._last_tick_s)
        self._last_tick_s = now
        # The first iterations are told at once: until then nobody knows what pace to expect.
        due = self._iterations <= 2 or now - self._last_progress_s >= self._spec.progress_s
        if self._home and due:
            if self._workers == 1 and self._objects is None:
                self._membership.asked_to_leave()  # notices a closed generation
            self._sign_of_life(waiting=False)

    def _sign_of_life(self, *, waiting: bool = True) -> None:
        now = self._clock.monotonic()
        self._last_progress_s = now
        self._membership.tell(
            wire.Progress,
            position=self._place.encode(),
            iterations=self._iterations,
            busy_s=now - self._started_s,
            sync_s=self._sync_s,
            slowest_s=self._slowest_s,
            batch=self._batch_size,
            peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            waiting=waiting,
        )

    def _uploaded(self, name: str) -> UploadedDataset:
        datasets = self._spec.datasets if self._home else {}
        if self._home is None or name not in datasets:
            known = ", ".join(sorted(datasets)) or "none"
            raise InvalidInput(
                f"no data set {name!r} was uploaded to the fleet (uploaded: {known}); call "
                f"fleet.upload({name!r}, arrays) before submitting"
            )
        return UploadedDataset(self._home.object_store, datasets[name])


def _framework() -> Framework:
    try:
        from smlt_tune.runtime.frameworks.torch import TorchObjects
    except ImportError as error:
        raise UsageError(
            "prepare() needs PyTorch, which is not installed: pip install 'smlt-tune[torch]'"
        ) from error
    return TorchObjects()


def _batch_size(batch_size: int | Callable[[int], int], epoch: int) -> int:
    size = batch_size(max(epoch, 0)) if callable(batch_size) else batch_size
    if not _whole(size) or size < 1:
        raise InvalidInput(f"batch_size must be a whole number of at least 1, got {size!r}")
    return int(size)


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _number(value: Any) -> Any:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value


def _plain_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    plain, mistakes = {}, []
    for name, value in metrics.items():
        item = value.item() if hasattr(value, "item") and getattr(value, "size", 1) != 0 else value
        if item is not None and not isinstance(item, bool | int | float | str):
            mistakes.append(
                f"report({name}=...): a {type(value).__name__} is no metric; give a number, a "
                "string or a boolean"
            )
        plain[name] = item
    if mistakes:
        raise InvalidInput(mistakes)
    return plain
