"""What the workers of one generation do: the life of a session, without the training.

Workers that synchronise after every iteration are in step, so a generation is simulated as a whole:
where it is, and who takes part. It says what sessions say, in the same messages, and obeys the same
keys (``runtime/handover.py``). What it leaves out: reports and hand-overs inside an epoch happen at
iterations' ends like real ones, checkpoints only when workers give a sign of life.
"""

from collections.abc import Callable
from typing import Any

from smlt_tune.backend.platforms.base import is_positive
from smlt_tune.backend.platforms.simulated.delivery import Delivery
from smlt_tune.backend.platforms.simulated.stores import (
    SimulatedObjectStore,
    SimulatedParameterStore,
)
from smlt_tune.backend.platforms.simulated.training import SimulatedTraining
from smlt_tune.backend.platforms.simulated.virtual_time import Timer, VirtualTime
from smlt_tune.errors import InvalidInput
from smlt_tune.runtime import keys, wire
from smlt_tune.runtime.checkpoint import Checkpoints
from smlt_tune.runtime.position import Position
from smlt_tune.runtime.session import TIME_LIMIT_MARGIN_S

#: A waiting worker looks around this often, in seconds; or, where it seldom says where it is, so
#: many times as often as that.
LOOK_AROUND_S, LOOKS = 1.0, 10
#: What stands in checkpoints: there is no state, and where it belongs says the name.
STATE = b"simulated"
_NOISE = 1e-9


class SimulatedGeneration:
    """One generation of one job, from when its first function enters until all have left.

    Args:
        spec: Of any of its workers.
        training: What they do.
        time: Of the simulation.
        store: Where they meet.
        objects: Where checkpoints lie.
        tell: Takes what workers say.
        progress_s: How often workers say where they are, seconds.
        pace: Gives the time per iteration over its median, of an epoch.
    """

    def __init__(
        self,
        spec: wire.WorkerSpec,
        training: SimulatedTraining,
        time: VirtualTime,
        store: SimulatedParameterStore,
        objects: SimulatedObjectStore,
        tell: Callable[[wire.WorkerEvent], None],
        progress_s: float,
        pace: Callable[[int], float],
    ) -> None:
        self._spec = spec
        self._training = training
        self._time = time
        self._store = store
        self._hear = tell
        self._progress_s = progress_s
        self._pace = pace
        self._keys = keys.FleetKeys(spec.fleet).generation(spec.job, spec.generation)
        self._checkpoints = Checkpoints(objects, spec.job)
        #: Those that have come in, by rank; a rank that was delivered twice has two.
        self._workers: dict[int, list[Delivery]] = {}
        #: Replacements that wait for the state.
        self._joining: list[Delivery] = []
        self._begun = self._leaving = self._over = False
        self._told_workload: tuple[Delivery, int] | None = None
        # Where it is: iterations done, at the beginning and now; epochs reported; present epoch.
        self._first = self._done = self._reported = self._epoch = 0
        self._checkpoint: str | None = None
        self._saved_s = time.monotonic()
        # What goes on: training since some time, at some pace, or something else until a timer.
        self._since_s: float | None = None
        self._iteration_s = 0.0
        self._told_done = 0
        self._doing = self._limit = Timer(None)
        self._beat = Timer(None)
        store.watch(self._keys.tokens(0), self._woken)

    # --- who takes part ---------------------------------------------------------------------------

    def enter(self, worker: Delivery) -> None:
        """A function's code runs and has loaded everything."""
        if not self._is_open():
            worker.end("returned")
            return
        self._tell(wire.Ready, worker)
        rank = worker.spec.rank
        if worker.spec.joining and self._begun:
            self._joining.append(worker)
            seconds = self._training.save_s + self._training.load_s  # a survivor saves, it loads
            worker.timers.append(self._time.after(seconds, lambda: self._join(worker)))
        elif self._begun and (rank in self._workers or self._has_trained()):
            worker.end("returned")  # delivered late: the others have gone on
            return
        else:
            self._workers.setdefault(rank, []).append(worker)
            if self._begun:
                self._tell_progress(worker, waiting=False)
            self._woken()
        if self._beat.call is None:
            self._look_later()

    def left(self, worker: Delivery) -> None:
        """A function has ended, whatever the reason."""
        if self._over:
            return
        if worker in self._joining:
            self._joining.remove(worker)
        others = self._workers.get(worker.spec.rank, [])
        if worker in others:
            others.remove(worker)
            if not others:
                del self._workers[worker.spec.rank]
        self._stall_if_incomplete()
        if not self._workers and not self._joining:
            self._finish()

    def silenced(self, worker: Delivery) -> None:
        """A function has fallen silent: the others wait for it."""
        self._stall_if_incomplete()

    @property
    def over(self) -> bool:
        """Whether nobody is left in it."""
        return self._over

    @property
    def _complete(self) -> bool:
        everybody = len(self._workers) == self._spec.workers
        return everybody and all(any(not w.hung for w in each) for each in self._workers.values())

    def _has_trained(self) -> bool:
        return self._since_s is not None or self._done > self._first

    def _join(self, worker: Delivery) -> None:
        """A replacement has got the state, if anybody is left who could have given it."""
        if not self._workers or worker.hung:
            return
        self._joining.remove(worker)
        if worker.spec.rank in self._workers:
            worker.end("returned")  # it was delivered twice
            return
        self._workers[worker.spec.rank] = [worker]
        self._tell_progress(worker, waiting=False)
        self._go()

    # --- what goes on -----------------------------------------------------------------------------

    def _woken(self) -> None:
        """The scheduler has written something."""
        if not self._is_open():
            self._dismiss()
        elif not self._begun:
            self._begin()
        elif self._doing.call is None and self._since_s is None:
            self._go()  # it waits: for the client, or for a replacement
        elif self._since_s is not None and self._is_asked_to_leave():
            self._leave_at_boundary()

    def _begin(self) -> None:
        """All are there, and the scheduler has said from where."""
        (content,) = self._store.get([self._keys.start])
        if content is None or not self._complete:
            return
        self._begun = True
        self._checkpoint = wire.Start.decode(content).checkpoint
        if self._checkpoint is not None:
            name = self._checkpoint.rpartition("/")[2]
            self._done = self._training.done_at(Position.decode(name))
        self._first = self._told_done = self._done
        self._reported = self._training.epoch_at(self._done)
        self._epoch = min(self._reported, self._training.epochs - 1)
        for worker in self._everybody():
            self._tell_progress(worker, waiting=False)
        self._do(self._training.load_s, self._go)

    def _go(self) -> None:
        """The next thing to do, at a boundary."""
        self._since_s = None
        self._doing.cancel()
        if not self._complete:
            return
        limit_mb = self._everybody()[0].invocation.memory_mb
        if not self._is_open():
            self._dismiss()
        elif self._training.memory_mb > limit_mb:
            for worker in self._everybody():
                worker.end("out_of_memory", f"its limit is {limit_mb} MB")
        elif self._training.epoch_at(self._done) > self._reported:
            seconds = self._training.evaluation_s
            seconds += self._training.save_s if self._spec.lockstep else 0.0
            self._do(seconds, self._report)
        elif self._leaving or self._is_asked_to_leave():
            self._leaving = True
            self._do(self._training.save_s, self._hand_over)
        elif self._is_held():
            self._watch_limit()
        elif self._done >= self._training.total:
            self._do(self._training.save_s, self._return)
        else:
            self._train()

    def _do(self, seconds: float, then: Callable[[], None]) -> None:
        self._doing.cancel()
        self._doing = self._time.after(seconds, then)

    def _train(self) -> None:
        training, any_worker = self._training, self._everybody()[0]
        self._epoch = training.epoch_at(self._done)
        self._tell_workload(any_worker)
        where = self._spec.workers, any_worker.invocation.memory_mb, training.batch_in(self._epoch)
        slowest = max(min(w.slowness for w in each) for each in self._workers.values())
        median_s = training.iteration_s(*where)
        if not is_positive(median_s):
            raise InvalidInput(
                f"SimulatedTraining: iteration_s{where} gave {median_s!r}: must be a number above 0"
            )
        self._iteration_s = median_s * self._pace(self._epoch) * slowest
        self._since_s = self._time.monotonic()
        self._train_on()
        self._watch_limit()

    def _train_on(self) -> None:
        """To the end of the epoch."""
        assert self._since_s is not None
        left = self._training.end_of(self._epoch) - self._done
        ends_s = self._since_s + left * self._iteration_s
        self._do(ends_s - self._time.monotonic(), self._trained)

    def _trained(self) -> None:
        self._advance()
        self._go()

    def _advance(self) -> None:
        """Counts the iterations that have ended."""
        if self._since_s is None:
            return
        passed_s = self._time.monotonic() - self._since_s
        ended = int(max(0.0, passed_s) / self._iteration_s * (1.0 + _NOISE) + _NOISE)
        self._done += ended
        self._since_s += ended * self._iteration_s

    def _stall_if_incomplete(self) -> None:
        """If somebody is missing, what goes on is lost: an iteration, an evaluation, a save."""
        if self._begun and not self._complete:
            self._advance()
            self._since_s = None
            self._doing.cancel()

    def _leave_at_boundary(self) -> None:
        self._leaving = True
        if self._since_s is None:
            if self._doing.call is None:
                self._go()
            return
        self._advance()
        until_s = self._since_s + self._iteration_s - self._time.monotonic()
        self._do(until_s, self._trained)

    def _watch_limit(self) -> None:
        """When the first worker's time is up, as ``Session`` judges it."""
        self._limit.cancel()
        ends_s = min((w.ends_s, w.invocation.timeout_s) for w in self._everybody())
        reserve_s = TIME_LIMIT_MARGIN_S + 3 * self._iteration_s + 3 * self._training.save_s
        at_s = ends_s[0] - min(reserve_s, ends_s[1] / 2)
        self._limit = self._time.after(at_s - self._time.monotonic(), self._leave_at_boundary)

    # --- reports, checkpoints, the end ------------------------------------------------------------

    def _report(self) -> None:
        key = self._save() if self._spec.lockstep else None
        metrics = dict(self._training.metrics(self._reported))
        rank0 = self._of_rank_0()
        self._tell(wire.Reported, rank0, index=self._reported, metrics=metrics, checkpoint=key)
        self._reported += 1
        self._go()

    def _is_held(self) -> bool:
        """In lockstep: whether the client has not consumed the last report."""
        if not self._spec.lockstep:
            return False
        (consumed,) = self._store.get([self._keys.consumed])
        return self._reported > (int(consumed) if consumed else 0)

    def _save(self) -> str:
        at = self._training.position(self._done)
        self._checkpoint = self._checkpoints.save(at, STATE)
        self._saved_s = self._time.monotonic()
        return self._checkpoint

    def _save_regularly(self) -> None:
        """A checkpoint now and then, which holds everybody up."""
        pause_s = max(self._spec.checkpoint_s, self._training.save_s / self._spec.checkpoint_share)
        if self._since_s is None or self._leaving:
            return
        if self._time.monotonic() - self._saved_s < pause_s:
            return
        self._advance()
        self._tell(wire.Saved, self._of_rank_0(), checkpoint=self._save())
        self._since_s += self._training.save_s
        self._train_on()

    def _hand_over(self) -> None:
        key = self._save()
        for worker in self._everybody():
            self._tell(wire.HandedOver, worker, checkpoint=key)
        self._dismiss()

    def _return(self) -> None:
        key = self._save()
        metrics = [dict(self._training.metrics(epoch)) for epoch in range(self._training.epochs)]
        for worker in self._everybody():
            first = worker.spec.rank == 0
            self._tell(
                wire.Finished,
                worker,
                checkpoint=key,
                value=None,
                reports=metrics if first else [],
                other_share=None,
                end_s=None,
            )
        self._dismiss()

    def _dismiss(self) -> None:
        """All return."""
        self._finish()
        for worker in [*self._everybody(silent=True), *self._joining]:
            if not worker.hung:
                worker.end("returned")

    def _finish(self) -> None:
        """It is over. Idempotent."""
        self._over = True
        for timer in (self._doing, self._limit, self._beat):
            timer.cancel()
        self._store.unwatch(self._keys.tokens(0))

    # --- signs of life ----------------------------------------------------------------------------

    def _look_later(self) -> None:
        trains = self._since_s is not None
        waiting_s = min(self._progress_s, max(LOOK_AROUND_S, self._progress_s / LOOKS))
        pause_s = self._progress_s if trains else waiting_s
        self._beat = self._time.after(pause_s, self._look_around)

    def _look_around(self) -> None:
        """What every worker does now and then."""
        if not self._is_open():
            self._dismiss()
            return
        self._save_regularly()
        self._advance()
        waiting = self._since_s is None
        for worker in self._everybody():
            self._tell_progress(worker, waiting=waiting)
        for worker in self._joining:
            self._tell_progress(worker, waiting=True)
        self._look_later()

    def _tell_progress(self, worker: Delivery, *, waiting: bool) -> None:
        first = worker.spec.rank == 0
        chunk = self._done - self._told_done if first else 0
        if first:
            self._told_done = self._done
        self._tell(
            wire.Progress,
            worker,
            position=self._training.position(self._done).encode(),
            iterations=self._done - self._first,
            chunk=chunk,
            iteration_s=self._iteration_s if chunk else 0.0,
            sync_s=0.0,
            left=self._training.expected(self._epoch) - self._done,
            other_share=None,
            slowest_s=self._iteration_s,
            batch=self._training.batch_in(self._epoch),
            peak_mb=self._training.memory_mb,
            waiting=waiting,
        )

    def _tell_workload(self, worker: Delivery) -> None:
        """Once of each generation, and when the batch size is another one."""
        features, batch = self._training.features, self._training.batch_in(self._epoch)
        if features is None or (worker, batch) == self._told_workload:
            return
        changed = self._told_workload is not None and self._told_workload[0] is worker
        self._told_workload = worker, batch
        self._tell(
            wire.Workload,
            worker,
            parameters=features.parameters,
            gradient_bytes=features.gradient_bytes,
            flops_per_sample=features.flops_per_sample,
            activation_bytes=features.activation_bytes,
            batch=batch,
            iterations=self._training.expected(self._epoch),
        )
        if changed:  # decisions wait for what is left of another batch size
            self._told_done = self._done
            self._tell_progress(worker, waiting=False)

    # --- small things -----------------------------------------------------------------------------

    def _everybody(self, *, silent: bool = False) -> list[Delivery]:
        """One of each rank (all, with ``silent``), by rank, who can still speak."""
        ranks = [self._workers[rank] for rank in sorted(self._workers)]
        if silent:
            return [worker for each in ranks for worker in each]
        return [w for each in ranks if (w := next((w for w in each if not w.hung), None))]

    def _of_rank_0(self) -> Delivery:
        return self._everybody()[0]

    def _is_open(self) -> bool:
        return self._store.get([self._keys.open]) != [None]

    def _is_asked_to_leave(self) -> bool:
        return self._store.get([self._keys.leave]) != [None]

    def _tell(self, kind: type[wire.WorkerEvent], worker: Delivery, **content: Any) -> None:
        spec = worker.spec
        self._hear(kind(spec.job, spec.generation, spec.rank, spec.incarnation, **content))
