"""What the user's training function talks to.

The same function runs alone in a debugger, on one worker, or on a hundred. A session knows where
the program is (:mod:`~smlt_tune.runtime.position`). When the program starts again, epochs and
iterations that are done are skipped and everything else runs as written.

A *boundary* is a point from which the rest of the program can be run again with the same result:
the beginning of an epoch, and the end of an iteration in which an optimizer has stepped (in which a
backward pass has happened, if no optimizer was prepared). State is handed over at boundaries. So a
program that accumulates gradients over some iterations always continues after a step.

On its way back to the boundary where it was, a program may do things again that change the state (a
scheduler that steps before the loop, initial weights that are set after ``prepare``). So the state
is restored twice: when objects are prepared, and when the program *arrives* at that boundary.
Before it arrives, nothing is synchronised and no state is saved.

In *lockstep* a report waits until the client has consumed it. The state of its boundary is saved
before it is told, so that others can begin there whatever happens next; hence a report that comes
between a step and the boundary after it is told, and waits, at that boundary.
"""

import json
import random
import resource
import sys
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np

from smlt_tune.errors import InvalidInput, UsageError
from smlt_tune.runtime import wire
from smlt_tune.runtime.checkpoint import KEEP_OF_REPORTS, Checkpoints
from smlt_tune.runtime.clock import SYSTEM_CLOCK, Clock
from smlt_tune.runtime.data import (
    DataIterator,
    Minibatch,
    UploadedDataset,
    dataset_size,
    minibatch_buffer,
)
from smlt_tune.runtime.frameworks.base import Framework, read_meta
from smlt_tune.runtime.frameworks.files import FILES, pack, unpack
from smlt_tune.runtime.handover import CannotGive, Leave, Membership
from smlt_tune.runtime.pace import Pace
from smlt_tune.runtime.position import NO_EPOCH, Position, entropy, part
from smlt_tune.runtime.reports import Reports
from smlt_tune.runtime.stores.base import ObjectStore, ParameterStore
from smlt_tune.runtime.workload import BatchSize, Course, WorkloadTeller

#: A worker whose time limit is nearer than this (plus a few iterations) asks for a hand-over, s.
TIME_LIMIT_MARGIN_S = 0.5

#: A worker that is alone asks this often whether it is to leave, in seconds: whoever is to follow
#: waits, and is billed.
ASK_S = 0.1

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
        started_s: When the invocation began, on the clock's ``monotonic``; None for just now.
        gradient_store: Where gradients are added up; None for the parameter store.
    """

    spec: wire.WorkerSpec
    parameter_store: ParameterStore
    object_store: ObjectStore
    started_s: float | None = None
    gradient_store: ParameterStore | None = None


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
        self._arrived = True
        self._leaving = self._departing = self._left = False
        self._epoch_base = self._user_epoch = 0
        self._datasets: dict[str, UploadedDataset] = {}
        # Where the program is.
        self._place = Position()
        self._inside = self._keeps_files = False
        self._within = ""
        self._counts: dict[str, int] = {}
        self._resume = Position()
        self._boundary = Position()
        # Loops that have trained, by epoch and number: of the present epoch and outside of epochs.
        self._trained: list[tuple[int, int]] = []
        self._resume_trained: list[tuple[int, int]] = []
        self._boundary_trained: list[tuple[int, int]] = []
        self._sections = {NO_EPOCH}
        self._batch: Minibatch | None = None
        self._batch_size = 0
        self._everyone = True
        # What has happened since the boundary.
        self._synced = self._stepped = self._dirty = self._shadowed = False
        self._calm = self._syncs = self._boundary_syncs = 0
        # The checkpoint to hand over to from within a report.
        self._safe: str | None = None
        # How fast it goes, how far it has to go, and what it computes.
        self._pace, self._course = Pace(clock.monotonic()), Course()
        self._workload = WorkloadTeller(self._tell_workload if home and not self._rank else None)
        if home:
            self._checkpoints = Checkpoints(home.object_store, home.spec.job)
            self._of_reports = Checkpoints(home.object_store, home.spec.job, keep=KEEP_OF_REPORTS)
            self._membership = Membership(
                home.spec,
                home.parameter_store,
                clock,
                self._give,
                self._sign_of_life,
                home.gradient_store,
            )
        lockstep = home is not None and home.spec.lockstep
        self._keeps = self._workers > 1 or lockstep
        self._reports = Reports(
            self._membership if home else None, self._rank, self._workers, lockstep=lockstep
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

    @property
    def prepared(self) -> bool:
        """Whether the program has put anything into the session's care."""
        return self._prepared > 0

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
        if self._keeps_files:
            raise UsageError(
                "the job keeps its state in files (report_files, restored_files): it cannot give "
                "it to prepare() too"
            )
        if self._objects is None:
            self._objects = _framework()
            self._begun = self._home is None
        self._objects.add(objects)
        if self._prepared == 0:
            self._objects.on_backward(self._on_backward, every_gradient=self._workers > 1)
            self._objects.on_step(self._on_step)
        self._enter()
        if self._start:
            self._objects.load(self._start[1], self._prepared, whole=False, fork=self._forks)
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
        base, after = self._epoch_base, self._epoch_base + count
        self._course.begin_epochs(base, count)
        finished = False
        try:
            for epoch in range(max(0, self._resume.epoch - base), count):
                self._begin_epoch(base + epoch, epoch)
                self._tick()
                yield epoch
            finished = True
        finally:
            # What comes after the last epoch, or after the one in which the user breaks out.
            self._epoch_base = after + 1
            self._sections.add(after)
            if not finished and self._arrived and base <= self._place.epoch < after:
                self._move_to_epoch(after, count)
                self._set_boundary(self._place)
                self._seed_generators(shared=True)
        self._begin_epoch(after, count)

    def batches(
        self,
        dataset: Any,
        batch_size: BatchSize,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> Iterator[Any]:
        """This worker's parts of the batches of a data set.

        A loop in which a backward pass happens is training: after a restart it continues where it
        was (so ``enumerate`` counts from there). Any other is evaluation: it runs as a whole.

        If a training batch has fewer samples than there are workers, those without a sample of
        their own work on a borrowed one, whose gradient counts nothing.

        Args:
            dataset: Anything with ``__len__`` and ``__getitem__``, an array, a tuple of arrays, or
                the name of a data set that was uploaded to the fleet.
            batch_size: Global batch size, or a function that gives it for an epoch. That is also
                asked about epochs to come, so that the job's length is known.
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
        return self._nested(data, fetch) if self._inside else self._loop(data, fetch, batch_size)

    def report(self, **metrics: Any) -> None:
        """Tells the tuner how the job is doing. Call it on every worker; rank 0's values count.

        In a job that was submitted with ``lockstep=True`` it returns once the client has consumed
        the report. Called between an optimizer's step and the end of that iteration (or epoch, for
        steps outside of loops), it returns at once, and the job waits there.

        Args:
            **metrics: Numbers (of any framework), strings, booleans.

        Raises:
            InvalidInput: A value is none of these.
        """
        if not metrics:
            raise InvalidInput("report() needs at least one metric: session.report(accuracy=0.9)")
        plain = _plain_metrics(metrics)
        self._begin()
        if self._keeps_files:
            self.report_files(plain, None)
            return
        self._reports.add(self._next_place("report"), plain)
        self._settle()

    def report_files(self, metrics: dict[str, Any], folder: str | Path | None) -> None:
        """Reports, and hands over files as the state; for programs that do not use ``prepare``.

        A report with a folder is a boundary: whoever follows finds these files, runs the training
        function from the top, and goes on counting reports from there. Reports without one are made
        again after a restart, with their old numbers. In lockstep both wait as ``report`` does.
        With one worker only.

        Args:
            metrics: As for :meth:`report`, by name.
            folder: All files below it are kept, as they are now; None keeps nothing.

        Raises:
            InvalidInput: A value is no metric, or the folder cannot be kept.
            UsageError: The job has several workers, or has prepared objects.
        """
        if not metrics:
            raise InvalidInput("report_files() needs at least one metric")
        plain = _plain_metrics(metrics)
        self._keep_files()
        self._reports.add_next(plain)
        if self._home is None:
            return
        if folder is not None:
            self._save_files(folder)
        self._reports.tell(self._safe if folder is not None else None)
        self._sign_of_life(waiting=False)
        if self._reports.unconsumed:
            self._wait_for_client()
        elif folder is not None and self._should_leave():
            self._go()

    def restored_files(self, into: str | Path) -> bool:
        """Writes the files of the last report that had some below a folder.

        A program that keeps its state in files calls it first. Nobody can tell then whether it
        hangs, so it may work on in silence up to its time limit.

        Args:
            into: The folder; made if it does not exist.

        Returns:
            Whether there are any; False at the beginning of a job.

        Raises:
            UsageError: As for :meth:`report_files`.
        """
        self._keep_files()
        if self._start is None:
            return False
        unpack(self._start[1], Path(into))
        return True

    def mean(self, value: Any, count: Any = 1.0) -> Any:
        """Sum of the values over the sum of the counts, over all workers. Call it on every worker.

        Args:
            value: This worker's sum: a number, or an array of any shape.
            count: How many samples it is the sum of.

        Returns:
            A float for a number, else a float64 array of the value's shape; NaN if all counts
            are 0.

        Raises:
            InvalidInput: The value or the count is no number.
        """
        try:
            array = np.asarray(_number(value), dtype=np.float64)
            weight = float(_number(count))
        except (TypeError, ValueError) as error:
            raise InvalidInput(
                f"mean() needs a number or an array of numbers, and a number of samples: {error}"
            ) from error
        self._begin()
        place = self._next_place("mean")
        if self._workers > 1:
            self._collective()
            content = np.append(array.reshape(-1), weight).tobytes()
            ranks = self._ranks_present()
            gather = self._membership.aggregator.gather
            parts = self._waiting(lambda: gather(place, content, ranks))
            total = np.sum([np.frombuffer(p) for p in parts], axis=0)
            array, weight = total[:-1].reshape(array.shape), float(total[-1])
        mean = array / weight if weight else np.full_like(array, np.nan)
        return float(mean) if mean.ndim == 0 else mean

    def finish(self, value: Any) -> None:
        """Called by the worker when the training function has returned."""
        if self._home is None:
            return
        self._begin()
        checkpoint = self._safe
        if self._objects:
            if not self._arrived:
                raise UsageError(
                    f"the training function was interrupted at {self._resume}, and has not come "
                    "there again: its loops and epochs must be the same each time it runs"
                )
            self._set_boundary(max(self._boundary, self._place))
            self._settle()
            checkpoint = self._membership.last_word(self._save)
        try:
            value = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            value = None
        self._membership.tell(
            wire.Finished,
            checkpoint=checkpoint,
            value=value,
            reports=list(self._reports.made.values()) if self._rank == 0 else [],
            other_share=self._pace.other_share(),
            end_s=self._pace.end_s(self._clock.monotonic()),
        )

    # --- where the program is -----------------------------------------------------------------

    def _loop(
        self, data: DataIterator, fetch: Callable[[Any], Any], batch_size: BatchSize
    ) -> Iterator[Any]:
        if self._inside:
            raise UsageError(
                "two loops over batches() go on at the same time; to draw from two data sets in "
                "one iteration, make one data set of both"
            )
        epoch, number = self._place.epoch, self._place.loop + 1
        data = replace(data, epoch=epoch, loop=number)
        first = done = self._first_iteration(data)
        self._move(Position(epoch, number, first), inside=True)
        if (epoch, number) in self._trained or self._course.trains(data):
            self._note_workload(data, batch_size)
        self._pace.loop_begins(self._clock.monotonic())
        finished = False
        try:
            for batch in data.minibatches(first):
                self._move(Position(epoch, number, batch.iteration), inside=True)
                self._synced = False
                if self._objects and self._workers > 1:
                    self._objects.watch()
                yield from self._minibatch(batch, fetch)
                done = batch.iteration + 1
                self._iterated(data, batch, batch_size)
            finished = True
        finally:  # also when the user breaks out of the loop
            self._batch = None
            if self._synced and not finished:
                self._note_training(epoch, number)
            if (epoch, number) in self._trained:
                self._course.ended(data, done + self._synced)
                if not finished and self._arrived:
                    self._set_boundary(Position(epoch, number, len(data)))
            self._move(Position(epoch, number, len(data)), inside=False)
            self._seed_generators("after")

    def _iterated(self, data: DataIterator, batch: Minibatch, batch_size: BatchSize) -> None:
        """An iteration of a loop that is not nested has ended."""
        here = (data.epoch, data.loop)
        self._course.position = Position(*here, batch.iteration + 1)
        if self._synced:
            self._note_training(*here)
        if here in self._trained:
            whole = batch.total == min(data.batch_size, data.size)
            self._pace.trained(self._clock.monotonic(), whole=whole)
            if not self._course.trains(data):
                self._note_workload(data, batch_size)
        if self._synced and self._has_stepped():
            self._pace.reached_boundary(self._clock.monotonic())
            self._reach_boundary(self._course.position)
        self._tick()

    def _note_workload(self, data: DataIterator, batch_size: BatchSize) -> None:
        """Of a loop that trains: at its beginning, or as soon as it is known to train."""
        self._course.note(data, batch_size)
        batch = min(data.batch_size, data.size)
        if self._workload.tell(self._objects, batch, self._course.total()):
            self._pace.forget_chunk()
            if self._pace.iterations:  # decisions wait for what is left of another batch size
                self._sign_of_life(waiting=False)

    def _first_iteration(self, data: DataIterator) -> int:
        """Where a loop begins: what has trained before the program was interrupted is skipped."""
        here = (data.epoch, data.loop)
        resumed = here == (self._resume.epoch, self._resume.loop)
        if resumed:
            self._arrive()
        if here not in self._resume_trained:
            return 0
        self._note_training(*here)
        return self._resume.iteration if resumed else len(data)

    def _nested(self, data: DataIterator, fetch: Callable[[Any], Any]) -> Iterator[Any]:
        """A loop inside an iteration of another: evaluation in mid-epoch."""
        outer, syncs = (self._batch, self._everyone, self._within), self._syncs
        nest = f"{self._within}n{self._count('nested')}"
        begun_s = self._clock.monotonic()
        try:
            for batch in data.minibatches():
                # Places of their own: not every worker has a sample in every batch.
                self._within = f"{nest}.{batch.iteration}."
                yield from self._minibatch(batch, fetch, self._within, nested=True)
                if self._syncs != syncs:
                    raise UsageError("a loop over batches inside another one must not train")
                self._tick()
        finally:
            self._batch, self._everyone, self._within = outer
            self._pace.put_aside(self._clock.monotonic() - begun_s)
            self._seed_generators("after", nest)

    def _minibatch(
        self,
        batch: Minibatch,
        fetch: Callable[[Any], Any],
        *where: int | str,
        nested: bool = False,
    ) -> Iterator[Any]:
        self._batch = batch
        self._batch_size = batch.total
        self._seed_generators(*where)
        # Without a sample of its own a worker still takes part in training, not in evaluation.
        self._everyone = not nested and self._may_train(batch)
        if batch.samples or self._everyone:
            content = fetch(batch.indices)
            meter = self._workload.meter(self._objects, content) if self._everyone else None
            if meter is None:
                yield content
            else:
                try:
                    with meter:
                        yield content
                finally:  # also when the user breaks out of the loop
                    self._workload.measured(meter, len(batch.indices))
        self._batch = None

    def _may_train(self, batch: Minibatch) -> bool:
        if (self._place.epoch, self._place.loop) in self._trained:
            return True
        if self._objects is None:
            return False
        return self._objects.training(assume=batch.shuffled)

    def _ranks_present(self) -> list[int]:
        """The workers that run the present piece of the program."""
        ranks, batch = range(self._workers), self._batch
        if batch is None or self._everyone:
            return list(ranks)
        parts = [part(0, batch.total, rank=r, workers=self._workers) for r in ranks]
        return [r for r in ranks if parts[r][1] > parts[r][0]]

    def _note_training(self, epoch: int, loop: int) -> None:
        if (epoch, loop) not in self._trained:
            self._trained.append((epoch, loop))

    def _begin_epoch(self, number: int, user_epoch: int) -> None:
        self._pace.epoch_begins(self._clock.monotonic(), whole=self._resume <= Position(number))
        self._move_to_epoch(number, user_epoch)
        if self._resume == self._place:
            self._arrive()
        elif self._arrived and self._resume.epoch != number:
            self._reach_boundary(self._place)
        self._seed_generators(shared=True)

    def _move_to_epoch(self, number: int, user_epoch: int) -> None:
        self._user_epoch = user_epoch
        self._trained = [t for t in self._trained if t[0] in self._sections]
        self._move(Position(number), inside=False)

    def _move(self, position: Position, *, inside: bool) -> None:
        self._place, self._inside, self._within = position, inside, ""
        self._course.position = position
        self._counts = {}

    def _next_place(self, what: str) -> str:
        """Names the next report or mean. Each is counted by itself: some may be rank 0's alone."""
        nth = self._count(what)
        where = self._place.iteration if self._inside else "after"
        return f"{self._place.epoch}.{self._place.loop}.{where}.{self._within}{nth}"

    def _count(self, what: str) -> int:
        key = self._within + what
        self._counts[key] = self._counts.get(key, 0) + 1
        return self._counts[key]

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
        self._reports.reach_boundary()
        self._calm += self._dirty
        self._synced = self._stepped = self._dirty = self._shadowed = False
        if self._keeps and self._objects is not None:
            self._objects.keep_light()  # what is given away must be of this very boundary

    def _reach_boundary(self, position: Position) -> None:
        self._set_boundary(position)
        if self._home is None or self._objects is None:
            return
        if self._leaving or self._should_leave():
            self._hand_over()
        self._settle()
        if self._rank == 0:
            self._maybe_checkpoint()

    # --- synchronisation ------------------------------------------------------------------------

    def _on_backward(self) -> None:
        """A backward pass has ended (with one worker: the optimizer has stepped)."""
        self._begin_late()
        if not self._arrived or self._objects is None:
            return
        if self._workers > 1:
            self._synchronise(self._objects)
        self._synced = True
        self._syncs += 1

    def _begin_late(self) -> None:
        """The first thing that the program does is a step outside of loops and epochs."""
        if self._begun or self._objects is None:
            self._begin()
            return
        gradients = self._objects.take_gradients()  # of this step, not of the state before it
        self._begin()
        self._objects.put_gradients(gradients)

    def _synchronise(self, objects: Framework) -> None:
        batch = self._batch
        if batch and not self._everyone and batch.total < self._workers:
            raise UsageError(
                f"a loop with shuffle=False trains on batches of {batch.total} samples with "
                f"{self._workers} workers, while the model is in evaluation mode: call "
                "model.train() before it"
            )
        self._collective()
        weight = batch.samples / batch.total if batch else 1.0 / self._workers
        mine = objects.gradients()
        check = zlib.crc32(self._place.encode().encode(), mine.check)
        leave = self._leaving or self._time_is_up()
        total, self._leaving = self._waiting(
            lambda: self._membership.aggregator.reduce(
                self._syncs,
                mine.vector,
                weight=weight,
                check=check,
                leave=leave,
                replay=self._boundary_syncs,
            )
        )
        objects.replace_gradients(total)
        self._about_to_change(objects)

    def _on_step(self) -> None:
        """A prepared optimizer is about to step."""
        self._begin_late()
        if self._begun and self._arrived and self._objects is not None:
            self._stepped = True
            if self._workers > 1:
                self._about_to_change(self._objects)

    def _has_stepped(self) -> bool:
        return self._stepped or not (self._objects and self._objects.has_optimizer())

    def _about_to_change(self, objects: Framework) -> None:
        # What has already changed since the boundary, weights set by hand say, is not worth a copy.
        if not self._dirty and self._calm < SHADOW_BOUNDARIES and objects.unchanged():
            objects.keep_all()
            self._shadowed = True
        self._dirty = True

    def _collective(self) -> None:
        """Notes that workers may have to wait for each other although the state has changed."""
        if self._dirty:
            self._calm = 0

    def _waiting(self, collective: Callable[[], Any]) -> Any:
        begun = self._clock.monotonic()
        result = collective()
        self._pace.waited(self._clock.monotonic() - begun)
        return result

    # --- hand-over ------------------------------------------------------------------------------

    def _enter(self) -> None:
        if self._left:  # the training function has caught Leave and goes on
            raise Leave
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
        self._resume_trained = [(epoch, loop) for epoch, loop in json.loads(meta["trained"])]
        self._boundary_trained = self._resume_trained
        self._arrived = False
        self._syncs = self._boundary_syncs = int(meta["syncs"])
        if per_sample := json.loads(meta["per_sample"]):
            self._workload.per_sample = tuple(per_sample)
        self._safe = key
        self._keeps_files = FILES in meta
        if self._keeps_files:  # the program runs from the top, and nothing of it is skipped
            self._resume, self._resume_trained, self._arrived = Position(), [], True
        reports, untold = dict(json.loads(meta["reports"])), int(meta["untold"])
        self._reports.restore(reports, untold, fork=self._forks, key=key)

    def _arrive(self) -> None:
        """The program is back where it was interrupted: the state is again what it was there."""
        if self._arrived or self._objects is None or self._start is None:
            return
        self._objects.load(self._start[1], 0, whole=True, fork=self._forks)
        self._arrived, self._start = True, None
        if self._keeps:
            self._objects.keep_light()

    def _begin(self) -> None:
        """Before the first thing that depends on the state of the prepared objects."""
        self._enter()
        self._settle()
        if self._begun:
            return
        if self._objects is None:
            self._begun = True
            return
        if self._start and self._resume == Position():
            self._arrive()  # what was saved here holds also what was set after prepare()
        elif self._start is None and self._workers > 1:
            key = self._membership.agree_on_init(self._save)
            if key is not None:
                self._objects.load(self._checkpoints.load(key), 0, whole=True)
        if self._keeps:
            self._objects.keep_light()
        self._begun = True
        if self._leaving:
            self._hand_over()

    def _give(self) -> tuple[str | None, bool]:
        """A replacement asks for the state at the boundary."""
        if self._start and not (self._begun and self._arrived):
            return self._start[0], False
        if self._objects is None or not self._begun:
            return None, False
        if not self._shadowed and (self._dirty or not self._objects.unchanged()):
            raise CannotGive
        return self._save(kept=True), self._departing

    def _should_leave(self) -> bool:
        """With one worker nobody has to agree."""
        if self._workers > 1:
            return False
        if self._time_is_up():
            return True
        now = self._clock.monotonic()
        if now - self._pace.last_asked_s < min(ASK_S, self._spec.progress_s):
            return False
        self._pace.last_asked_s = now
        return self._membership.asked_to_leave()

    def _time_is_up(self) -> bool:
        assert self._home is not None
        begun_s = self._home.started_s
        invoked_s = self._pace.started_s if begun_s is None else begun_s
        left = invoked_s + self._spec.timeout_s - self._clock.monotonic()
        step_s = max(3 * self._pace.slowest_s, 1.5 * self._pace.between_boundaries_s)
        reserve = TIME_LIMIT_MARGIN_S + step_s + 3 * self._pace.checkpoint_cost_s
        return left < min(reserve, self._spec.timeout_s / 2)

    def _hand_over(self) -> None:
        self._departing = True
        key = self._membership.last_word(self._save)
        self._membership.tell(wire.HandedOver, checkpoint=key)
        self._left = True
        raise Leave

    # --- lockstep -------------------------------------------------------------------------------

    def _settle(self) -> None:
        """In lockstep: tells what was reported up to here, and waits until it was consumed."""
        reports = self._reports
        if not reports.waits or not self._at_boundary():
            return
        if reports.untold:
            reports.reach_boundary()
            if self._objects is not None and self._begun:
                self._safe = self._save(kept=True, of_report=True)
                self._pace.last_checkpoint_s = self._clock.monotonic()
            reports.tell(self._safe)
        if reports.unconsumed:
            self._wait_for_client()

    def _at_boundary(self) -> bool:
        """Whether the state of the boundary can be had."""
        if self._objects is None or not (self._begun and self._arrived):
            return True
        return not (self._stepped or self._dirty) and self._objects.unchanged()

    def _wait_for_client(self) -> None:
        begun_s, count = self._clock.monotonic(), len(self._reports)
        may_leave = self._rank == 0 and (self._workers == 1 or self._safe is not None)
        consumed = self._membership.wait_until_consumed(count, may_leave, self._time_is_up)
        self._pace.held_up(self._clock.monotonic() - begun_s)
        self._reports.consumed = consumed
        if consumed < count:
            self._go()

    def _go(self) -> NoReturn:
        """Hands over to the checkpoint that lies there already."""
        if self._workers > 1 and self._safe is not None:
            self._membership.go_first(self._safe)
        self._membership.tell(wire.HandedOver, checkpoint=self._safe)
        self._left = True
        raise Leave

    # --- files of the program's own --------------------------------------------------------------

    def _keep_files(self) -> None:
        """From here on the state is what the program hands over in files."""
        self._enter()
        if self._home is None or (self._keeps_files and self._begun):
            return
        if self._objects is not None or (self._start is not None and not self._keeps_files):
            raise UsageError(
                "report_files() and restored_files() are for programs that keep their state in "
                "files; the state of this job was given to prepare()"
            )
        if self._workers > 1:
            raise UsageError(
                f"report_files() and restored_files() work with one worker, and the job has "
                f"{self._workers}: submit(..., workers=1)"
            )
        self._keeps_files = True
        self._begin()
        self._sign_of_life(waiting=False)

    def _save_files(self, folder: str | Path) -> None:
        begun_s = self._clock.monotonic()
        self._pace.reached_boundary(begun_s)
        self._boundary = Position(len(self._reports))
        self._reports.reach_boundary()
        self._safe = self._of_reports.save(self._boundary, pack(folder, self._meta()))
        self._start = None
        self._pace.saved(self._clock.monotonic() - begun_s)

    def _maybe_checkpoint(self) -> None:
        now = self._clock.monotonic()
        pause = max(
            self._spec.checkpoint_s, self._pace.checkpoint_cost_s / self._spec.checkpoint_share
        )
        if now - self._pace.last_checkpoint_s < pause:
            return
        key = self._save()
        self._pace.last_checkpoint_s = self._clock.monotonic()
        self._membership.tell(wire.Saved, checkpoint=key)

    def _save(self, *, kept: bool = False, of_report: bool = False) -> str:
        assert self._objects is not None
        if self._start and not self._arrived:
            return self._start[0]
        begun = self._clock.monotonic()
        content = self._objects.save(self._meta(), kept=kept)
        checkpoints = self._of_reports if of_report else self._checkpoints
        key = checkpoints.save(self._boundary, content)
        self._pace.saved(self._clock.monotonic() - begun)
        return key

    def _meta(self) -> dict[str, str]:
        """What a checkpoint says of the boundary."""
        reports, untold = self._reports.to_save()
        return {
            "position": self._boundary.encode(),
            "trained": json.dumps(self._boundary_trained),
            "syncs": str(self._boundary_syncs),
            "reports": json.dumps(list(reports.items())),
            "untold": str(untold),
            "per_sample": json.dumps(self._workload.per_sample),
        }

    # --- signs of life --------------------------------------------------------------------------

    @property
    def _spec(self) -> wire.WorkerSpec:
        assert self._home is not None
        return self._home.spec

    @property
    def _forks(self) -> bool:
        """Whether the job begins here with the checkpoint of another one."""
        return self._start is not None and self._start[0] == self._spec.fork

    def _tell_workload(self, **workload: Any) -> None:
        self._membership.tell(wire.Workload, **workload)

    def _tick(self) -> None:
        """After every iteration."""
        now = self._clock.monotonic()
        self._pace.tick(now)
        if self._home is None:
            return
        silent_s = now - self._pace.last_progress_s
        # The first iterations are told at once: until then nobody knows what pace to expect.
        if self._pace.iterations <= 2 or silent_s >= self._spec.progress_s:
            if self._workers == 1 and self._objects is None:
                self._membership.asked_to_leave()  # notices a closed generation
            self._sign_of_life(waiting=False)

    def _sign_of_life(self, *, waiting: bool = True) -> None:
        self._pace.last_progress_s = self._clock.monotonic()
        chunk, iteration_s, sync_s = self._pace.take_chunk()
        self._membership.tell(
            wire.Progress,
            position=(self._boundary if self._keeps_files else self._place).encode(),
            iterations=self._pace.iterations,
            chunk=chunk,
            iteration_s=iteration_s,
            sync_s=sync_s,
            left=self._course.left(),
            other_share=self._pace.other_share(),
            slowest_s=self._spec.timeout_s if self._keeps_files else self._pace.slowest_s,
            batch=self._batch_size,
            peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            waiting=waiting,
        )

    def _uploaded(self, name: str) -> Any:
        datasets = self._spec.datasets if self._home else {}
        if self._home is None or name not in datasets:
            known = ", ".join(sorted(datasets)) or "none"
            raise InvalidInput(
                f"no data set {name!r} was uploaded to the fleet (uploaded: {known}); call "
                f"fleet.upload({name!r}, arrays) before submitting"
            )
        if name not in self._datasets:  # kept with the shards that it has fetched
            self._datasets[name] = UploadedDataset(self._home.object_store, datasets[name])
        return self._datasets[name]


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
    return value.detach().double().cpu().numpy() if hasattr(value, "detach") else value


def _item(value: Any) -> Any:
    """The one number in an array or tensor; anything else as it is."""
    try:
        return value.item()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return value


def _plain_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    plain, mistakes = {}, []
    for name, value in metrics.items():
        item = _item(value)
        if item is not None and not isinstance(item, bool | int | float | str):
            mistakes.append(
                f"report({name}=...): a {type(value).__name__} is no metric; give a number, a "
                "string or a boolean"
            )
        plain[name] = item
    if mistakes:
        raise InvalidInput(mistakes)
    return plain
