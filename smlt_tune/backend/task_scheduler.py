"""Task Scheduler (paper 1c): keeps every job's workers running until the job is done.

A state machine without threads: the fleet hands it what happens (a submission, a worker's event, an
invocation's end, the passing of time), one at a time, and it invokes, fences, reserves, settles.
It never waits.

One mechanism for every change. A job trains in generations. Whatever has to change (size, memory,
time limit, lost store), the next generation begins at a checkpoint; where possible its functions
start while the old ones still train, and the old hand over at an iteration that they agree on. Only
the loss of some of a generation's workers is mended inside it: the replacement gets the state from
a survivor, and nobody else restarts.
"""

import logging
import math
from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from smlt_tune.backend.adaptation import Adaptation
from smlt_tune.backend.generations import Call, Generation, Planned, Record, Worker
from smlt_tune.backend.job import (
    FAILED,
    FINISHED,
    PAUSED,
    QUEUED,
    RUNNING,
    STOPPED,
    AllocationRecord,
    JobOutcome,
    JobState,
    Report,
)
from smlt_tune.backend.leases import PAID_CHECKPOINT_S, Leases
from smlt_tune.backend.ledger import Ledger
from smlt_tune.backend.platforms.base import Cancels, Invocation, InvocationResult, Platform
from smlt_tune.backend.prices import Prices
from smlt_tune.backend.rationing import BUDGET, DEADLINE, TARGET, Rationing
from smlt_tune.backend.resource_manager.observations import (
    DEFAULT_STORE,
    Decision,
    Profile,
)
from smlt_tune.backend.resource_manager.physics import worker_bytes
from smlt_tune.backend.resource_manager.policy import AllocationPolicy, Bounds, JobFacts
from smlt_tune.errors import (
    BudgetExhausted,
    FunctionLost,
    InvalidInput,
    JobError,
    OutOfMemory,
    PlatformError,
    StoreError,
    StoreUnavailable,
    Throttled,
    TrainingFunctionError,
)
from smlt_tune.runtime import keys, wire
from smlt_tune.runtime.aggregator import TTL_S
from smlt_tune.runtime.checkpoint import KEEP_OF_REPORTS, Checkpoints
from smlt_tune.runtime.clock import Clock
from smlt_tune.runtime.session import TIME_LIMIT_MARGIN_S
from smlt_tune.runtime.stores.base import ObjectStore, ParameterStore

_LOG = logging.getLogger(__name__)

#: A worker without a sign of life is given up after this while no pace of its job is known, s.
START_TIMEOUT_S = 120.0
#: A worker is taken for hung after this many times its slowest iteration.
HANG_FACTOR = 10.0
#: Workers give signs of life at least this often, in seconds, busy or waiting.
SIGNS_S = 1.0
#: Losses in a row without any progress after which a job fails.
MOST_STRIKES = 5
#: Workers that were told to go are killed after this, in seconds.
GRACE_S = 10.0
#: A worker saves a checkpoint at most this often, in seconds.
CHECKPOINT_S = 0.25
#: Whether money and time will do for all jobs is looked at this often, in seconds.
RATION_PAUSE_S = 1.0
#: After being throttled, wait this long before the next attempt, in seconds.
THROTTLE_PAUSE_S = 0.2


@dataclass(frozen=True)
class Settings:
    """What is the same for all jobs of a fleet.

    Attributes:
        fleet: Its name.
        parameter_store: URL; holds a password.
        gradient_stores: URLs of further parameter stores by name, for gradients only; hold
            passwords.
        object_store: URL.
        store_options: Further arguments of the object store.
        hang_timeout_s: Shortest silence that is taken for a hang, seconds.
        deadline_s: When everything has to be over, on the clock's ``monotonic``; None for never.
        logs: Folder for the workers' output; None where they print nothing.
        bill: Where the platform writes down what it charges, if it does.
        paid_requests: Whether the object store charges for requests.
        metric: What jobs are compared by when money or time will not do for all of them; None to
            let them all go on for as long as it lasts.
        maximize: Whether larger values of it are better.
    """

    fleet: str
    parameter_store: str = field(repr=False)
    object_store: str
    store_options: dict[str, str] = field(repr=False)
    hang_timeout_s: float
    deadline_s: float | None
    logs: Path | None
    bill: Path | None = None
    paid_requests: bool = False
    gradient_stores: Mapping[str, str] = field(default_factory=dict, repr=False)
    metric: str | None = None
    maximize: bool = True


class TaskScheduler:
    """The scheduler of one fleet. Not thread-safe: one thread calls it.

    Args:
        settings: Of the fleet.
        platform: Where functions run.
        policy: Chooses allocations.
        ledger: Grants and books money.
        prices: What things cost.
        parameter_store: Where workers meet.
        object_store: Where checkpoints lie.
        clock: Time.
        record: Writes an event (kind, job, body) into the fleet's history.
        on_done: Called with the result of an invocation, from the platform's threads.
        datasets: SHA-256 of the uploaded data sets, by name, as they are now.
        gradient_stores: Connections to the further parameter stores, by name.
        rent: Called before a generation uses a parameter store; raises BudgetExhausted.
        on_profile: Gets what a generation has measured, at its end.
    """

    def __init__(
        self,
        settings: Settings,
        platform: Platform,
        policy: AllocationPolicy,
        ledger: Ledger,
        prices: Prices,
        parameter_store: ParameterStore,
        object_store: ObjectStore,
        clock: Clock,
        record: Callable[[str, str, dict[str, Any]], None],
        on_done: Callable[[InvocationResult], None],
        datasets: Callable[[], dict[str, str]],
        gradient_stores: Mapping[str, ParameterStore] | None = None,
        rent: Callable[[str], None] = lambda store: None,
        on_profile: Callable[[Profile], None] | None = None,
    ) -> None:
        self._settings = settings
        self._platform = platform
        self._adaptation = Adaptation(
            policy, settings.fleet, clock, record, on_profile, only_store=not gradient_stores
        )
        self._leases = Leases(platform, prices, ledger, paid_requests=settings.paid_requests)
        self._ledger = ledger
        self._prices = prices
        self._store = parameter_store
        self._objects = object_store
        self._clock = clock
        self._record = record
        self._on_done = on_done
        self._datasets = datasets
        self._gradient_stores = dict(gradient_stores or {})
        self._silent_stores: set[str] = set()
        self._rent = rent
        self._keys = keys.FleetKeys(settings.fleet)
        self._jobs: dict[str, Record] = {}
        self._active: dict[str, Record] = {}
        #: Those of them that have generations: time passes for no others.
        self._placed: dict[str, Record] = {}
        self._calls: dict[str, str] = {}
        #: Plans that wait, in their turn, with their jobs; some of them may be out of date.
        self._queue: list[tuple[Planned, Record]] = []
        #: Functions that generations have still to invoke, all together.
        self._to_invoke = 0
        self._start_s = 1.0
        self._ready_s = 0.0
        self._retry_s = 0.0
        self._ration_s = 0.0
        self._rationing = Rationing(settings.metric or "", settings.maximize, prices, self.cost_usd)
        self._store_is_gone = False

    # --- what the fleet asks for ----------------------------------------------------------------

    def submit(self, state: JobState, *, next_number: int = 0, elapsed_s: float = 0.0) -> None:
        """Takes a job in; it starts as soon as there are functions and money for it.

        Args:
            state: Of the job.
            next_number: Number of its next generation, for a job of an earlier client.
            elapsed_s: Time since it was submitted, seconds.
        """
        submitted_s = self._clock.monotonic() - elapsed_s
        job = Record(state, submitted_s, len(self._jobs), next_number=next_number)
        job.workload = state.workload or state.spec.workload
        job.acknowledged, job.paused = state.spec.first_report, state.paused
        job.held_back = state.held_back
        self._jobs[job.job_id] = self._active[job.job_id] = job
        occasion = "resumed" if next_number else "first"
        decision = self._adaptation.first(job, self._facts(job), occasion)
        names = [self._keys.generation(job.job_id, n).open for n in range(next_number)]
        if names:  # functions that have outlived an earlier client
            self._forget(partial(self._store.delete, names))
            self._plan_from_checkpoint(job, decision, "resumed")
            if self._adaptation.reported(job):
                self._end(job, STOPPED, reason=TARGET)
        else:
            self._plan(job, decision, "first", wire.Start(state.spec.start_from or None))
            if self._rationing.short:
                self._hold_back(job, BUDGET)
        self._rest(job)
        self._admit()

    def stop(self, job_id: str, reason: str) -> None:
        """Kills a job's functions; it is over when they are gone."""
        job = self._active.get(job_id)
        if job is not None and not job.ending:
            self._end(job, STOPPED, reason=reason)

    def resize(self, job_id: str, bounds: Bounds) -> None:
        """Moves a job to another allocation: as soon as it trains, or when it begins to.

        Args:
            job_id: Its name.
            bounds: What is given of them replaces what the job had.
        """
        job = self._active.get(job_id)
        if job is None or job.ending:
            return
        base = job.heading_for
        assert base is not None  # it has a plan at least
        names = ("workers", "memory_mb", "store", "lease_s")
        asked = {name: value for name in names if (value := getattr(bounds, name)) is not None}
        self._record("resize", job_id, asked)
        job.state.pin(asked)
        asked.pop("lease_s", None)  # holds from the next function on
        wanted = replace(base, **asked)
        if wanted == base:
            return
        if job.plan and job.current is None:
            self._wait(job, replace(job.plan, allocation=wanted))
            self._admit()
        else:
            job.resize_to = Decision(wanted, "asked for")
            self._plan_hand_over(job, self._clock.monotonic())

    def pause(self, job_id: str) -> None:
        """Takes a job off its functions at the next boundary, or holds it back."""
        job = self._active.get(job_id)
        if job is None or job.ending or (job.paused and not job.held_back):
            return
        self._record("paused", job_id, {})
        job.state.held_back = job.held_back = ""
        if not job.paused:
            self._take_off(job)

    def _take_off(self, job: Record) -> None:
        job.state.paused = job.paused = True
        job.paused_s = self._clock.monotonic()
        job.resize_to = None
        if job.plan is not None and job.plan.start is None:
            job.plan = None
        if job.following is not None:
            self._close(job, job.following)
        current = job.current
        if current is not None and current.started:
            self._ask_to_leave(job, current)
        elif current is not None:
            self._close(job, current)
            self._plan(job, Decision(current.allocation, ""), "paused", current.start)
        self._sweep(job)
        self._admit()

    def resume(self, job_id: str) -> None:
        """Lets a paused job go on; one that has not come to its boundary yet just goes on there."""
        job = self._active.get(job_id)
        if job is not None and not job.ending and job.paused and not job.held_back:
            self._go_on(job)

    def _go_on(self, job: Record) -> None:
        self._record("resumed", job.job_id, {})
        job.state.paused = job.paused = False
        job.state.held_back = job.held_back = ""
        if job.plan is not None:
            decision = self._adaptation.first(job, self._facts(job), "resumed")
            self._plan(job, decision, "resumed", job.plan.start)
        self._admit()

    def acknowledge(self, job_id: str, count: int) -> None:
        """The client has consumed the first ``count`` reports of a job in lockstep."""
        job = self._active.get(job_id)
        if job is None or count <= job.acknowledged:
            return
        job.acknowledged = count
        for generation in job.generations:
            if not generation.closed and not generation.left:
                names = self._keys.generation(job_id, generation.number)
                self._store.put({names.consumed: str(count).encode()}, ttl_s=24 * TTL_S)
                wake = [names.tokens(w.rank) for w in generation.workers]
                self._store.put_once({}, ttl_s=TTL_S, announce=wake)

    def cost_usd(self, job_id: str) -> float:
        """What a job has cost up to now, running functions included, USD."""
        running = 0.0
        job = self._active.get(job_id)
        if job is not None:
            now = self._clock.monotonic()
            for _, call in list(job.calls()):
                if call.alive_s is not None:  # then its start is billed, too
                    elapsed = min(now - call.started_s, call.timeout_s)
                    running += self._prices.invocation_usd(call.memory_mb, elapsed)
        return self._ledger.job_usd(job_id) + running

    def users(self, store: str) -> list[str]:
        """Jobs whose gradients go through a parameter store, or are about to."""
        return [
            job.job_id
            for job in self._active.values()
            if (job.plan and not job.paused and job.plan.allocation.store == store)
            or any(g.allocation.store == store for g in job.generations)
        ]

    @property
    def idle(self) -> bool:
        """Whether every job is over."""
        return not self._active

    # --- what happens ---------------------------------------------------------------------------

    def event(self, event: wire.WorkerEvent) -> None:
        """A worker has said something. Repeats and words of the past are harmless."""
        job = self._active.get(event.job)
        if job is None:
            return
        if isinstance(event, wire.Reported):
            self._reported(job, event)
        if isinstance(event, wire.Saved):
            job.checkpoint = event.checkpoint
        if isinstance(event, wire.Requests):
            for of, call in job.calls():
                who = (of.number, call.rank, call.incarnation)
                if who == (event.generation, event.rank, event.incarnation):
                    call.requests.append(event)
        generation = next((g for g in job.generations if g.number == event.generation), None)
        if generation is None or generation.closed or job.ending:
            return
        worker = generation.workers[event.rank]
        worker.sign_s = self._clock.monotonic()
        for call in generation.calls.values():
            if call.rank == event.rank and call.alive_s is None:
                call.alive_s = worker.sign_s
        self._heard(job, generation, worker, event)

    def _heard(
        self, job: Record, generation: Generation, worker: Worker, event: wire.WorkerEvent
    ) -> None:
        late = event.incarnation != worker.incarnation
        match event:
            case wire.Ready() | wire.Progress() | wire.Workload() if late:
                pass  # says nothing about the replacement
            case wire.Stuck() | wire.Failed() if generation.left:
                pass  # whatever went wrong, the state is safe and others go on with it
            case wire.Ready():
                self._ready(job, generation, worker)
            case wire.Progress():
                self._progress(job, generation, worker, event)
            case wire.Workload():
                self._adaptation.workload(job, event)
            case wire.HandedOver():
                worker.gone = True
                self._handed_over(job, generation, event.checkpoint)
            case wire.Finished():
                worker.gone = True
                self._finished(job, generation, event)
            case wire.Stuck():
                self._roll_back(job, "no survivor has the state of the iteration's beginning")
            case wire.Failed():
                self._failed(job, worker, event)

    def ended(self, result: InvocationResult) -> None:
        """The platform says that an invocation is over. Comes after the worker's last event."""
        job_id = self._calls.pop(result.invocation_id, None)
        if job_id is None:
            return
        job = self._jobs[job_id]
        generation, call = next(
            (g, c) for g, c in job.calls() if c.invocation_id == result.invocation_id
        )
        del generation.calls[result.invocation_id]
        usd = self._leases.billed_usd(call.memory_mb, call.timeout_s, result, call.requests)
        self._ledger.settle(result.invocation_id, usd)
        job.peak_mb = max(job.peak_mb, result.peak_mb)
        generation.peak_mb = max(generation.peak_mb, result.peak_mb)
        if result.start_s:
            self._start_s = 0.8 * self._start_s + 0.2 * result.start_s
        self._record(
            "invocation",
            job_id,
            {
                "id": result.invocation_id,
                "ending": result.ending,
                "billed_s": result.billed_s,
                "cold": result.cold,
                "peak_mb": result.peak_mb,
                "detail": result.detail,
            },
        )
        worker = generation.workers[call.rank]
        others = [c for c in generation.calls.values() if c.rank == call.rank]
        if not (job.ending or generation.closed or generation.left or worker.gone or others):
            self._lost(job, generation, worker, call, result)
        self._sweep(job)
        self._admit()

    def store_lost(self, name: str = DEFAULT_STORE) -> None:
        """A parameter store was restarted: everything in it is gone."""
        everybody = name == DEFAULT_STORE
        if everybody:
            self._store_is_gone = False
        self._silent_stores.discard(name)
        for job in list(self._active.values()):
            hit = any(everybody or g.allocation.store == name for g in job.generations)
            if hit and not job.ending:
                self._roll_back(job, "the parameter store was restarted", strike=False)
        self._admit()

    def store_gone(self, name: str) -> None:
        """A store for gradients does not answer: whoever is free to goes on without it."""
        self._silent_stores.add(name)
        for job_id in self.users(name):
            job = self._active[job_id]
            wanted = job.heading_for
            if job.ending or wanted is None or job.state.spec.bounds.store == name:
                continue
            moved = Decision(replace(wanted, store=DEFAULT_STORE), "")
            if job.generations:
                self._roll_back(job, f"{name} does not answer", decision=moved, strike=False)
            elif job.plan:
                job.plan.allocation = moved.allocation
        self._admit()

    def store_back(self, name: str) -> None:
        """It answers again, and has lost nothing."""
        self._silent_stores.discard(name)

    def abandon(self, error: Exception) -> None:
        """Something that all jobs need has failed for good: they cannot go on."""
        self._store_is_gone = self._store_is_gone or isinstance(error, StoreUnavailable)
        for job in list(self._active.values()):
            if not job.ending:
                message = f"job {job.job_id} cannot go on: {error}"
                self._end(job, FAILED, error=FunctionLost(message, job_id=job.job_id))

    def tick(self) -> None:
        """Time has passed."""
        now = self._clock.monotonic()
        deadline = self._settings.deadline_s
        if deadline is not None and now >= deadline:
            for job in [job for job in self._active.values() if not job.ending]:
                self._end(job, STOPPED, reason=DEADLINE)
        for job in list(self._placed.values()):
            if not job.ending:
                self._force_pause(job, now)
                self._invoke_rest(job, now)
                self._check_hangs(job, now)
                self._plan_hand_over(job, now)
            self._kill_stragglers(job, now)
            if job.ending:
                self._sweep(job)
        self._ration(now)
        self._review()
        if now >= self._retry_s:
            self._admit()

    # --- events in detail -----------------------------------------------------------------------

    def _reported(self, job: Record, event: wire.Reported) -> None:
        if not _is_news(job, event):
            return
        of = next((a for a in job.state.allocations if a.generation == event.generation), None)
        if of is None:
            return
        report = Report(
            index=event.index,
            metrics=event.metrics,
            cost_usd=self.cost_usd(job.job_id),
            time_s=self._elapsed_s(job),
            workers=of.workers,
            memory_mb=of.memory_mb,
            generation=event.generation,
            checkpoint=f"{self._objects.url}/{event.checkpoint}" if event.checkpoint else None,
        )
        job.checkpoint = event.checkpoint or job.checkpoint
        self._record("report", job.job_id, vars(report))
        job.state.add_report(report)
        if self._adaptation.reported(job) and not (job.ending or job.held_back == TARGET):
            job.held_back = TARGET  # it ends at a checkpoint
            if not job.paused:
                self._take_off(job)

    def _ready(self, job: Record, generation: Generation, worker: Worker) -> None:
        worker.ready = True
        for call in generation.calls.values():
            if call.rank == worker.rank:
                job.boot_s = max(job.boot_s, worker.sign_s - call.started_s)
        if generation.started or not all(w.ready for w in generation.workers):
            return
        if generation.start is not None:
            self._start(job, generation)
        else:  # everything is there: the old ones may go
            before = job.current
            if before is not None and before is not generation:
                self._ask_to_leave(job, before)

    def _start(self, job: Record, generation: Generation) -> None:
        assert generation.start is not None
        generation.started, generation.began_s = True, self._clock.monotonic()
        invoked_s = min((c.started_s for c in generation.calls.values()), default=0.0)
        generation.start_s = generation.began_s - (invoked_s or generation.began_s)
        self._ready_s = 0.8 * (self._ready_s or generation.start_s) + 0.2 * generation.start_s
        names = self._keys.generation(job.job_id, generation.number)
        wake = [names.tokens(w.rank) for w in generation.workers]
        content = generation.start.encode()
        self._store.put_once({names.start: content}, ttl_s=TTL_S, announce=wake)
        job.state.update(status=RUNNING, allocation=generation.allocation)

    def _progress(
        self, job: Record, generation: Generation, worker: Worker, event: wire.Progress
    ) -> None:
        worker.begun = worker.begun or not event.waiting
        worker.slowest_s = max(worker.slowest_s, event.slowest_s)
        job.slowest_s = max(job.slowest_s, event.slowest_s)
        if event.slowest_s < generation.lease_s:  # whoever cannot tell it says the whole lease
            job.step_s = max(job.step_s, event.slowest_s)
        generation.peak_mb = max(generation.peak_mb, event.peak_mb)
        job.position = max(job.position, event.position)
        took_s = worker.sign_s - generation.invoked_s + job.step_s + TIME_LIMIT_MARGIN_S
        if job.position > job.strike_position and took_s <= job.fruitless_s:
            job.fruitless_s = 0.0  # that lease was long enough: something else has spoilt it
        job.peak_mb = max(job.peak_mb, event.peak_mb)
        if event.rank == 0:
            self._adaptation.progress(job, generation, event)

    def _handed_over(self, job: Record, generation: Generation, checkpoint: str | None) -> None:
        if generation.left:
            return
        following = job.following
        generation.left = True
        generation.closed_s = self._clock.monotonic()
        self._invoke_no_more(generation)
        job.checkpoint = checkpoint
        start = wire.Start(checkpoint)
        if following is not None:
            following.start = start
            if all(w.ready for w in following.workers):
                self._start(job, following)
        elif job.plan is not None:
            job.plan.start = start
        else:
            reason = "paused" if job.paused_s > generation.began_s else "time limit"
            reason = "resize" if job.resize_to else reason
            decision = job.resize_to or Decision(generation.allocation, "")
            job.resize_to = None
            self._plan(job, decision, reason, start, held=generation.allocation.workers)

    def _finished(self, job: Record, generation: Generation, event: wire.Finished) -> None:
        if event.rank == 0:
            self._complete(job, generation, event)
        elif generation.stranded:
            self._roll_back(job, "its last survivor has finished", strike=False)

    def _complete(self, job: Record, generation: Generation, last: wire.Finished) -> None:
        for index, metrics in enumerate(last.reports):
            said = wire.Reported(
                job=job.job_id,
                generation=generation.number,
                rank=0,
                incarnation=0,
                index=index,
                metrics=metrics,
            )
            self._reported(job, said)
        job.checkpoint = last.checkpoint or job.checkpoint
        job.value = last.value
        self._adaptation.finished(job, generation, last)
        self._end(job, FINISHED, kill=False)

    def _failed(self, job: Record, worker: Worker, event: wire.Failed) -> None:
        if event.retry:
            worker.told = event
            return
        if event.by_user:
            error: JobError = TrainingFunctionError(
                f"job {job.job_id}: the training function raised {event.error} "
                f"(worker {event.rank})\n{event.traceback}",
                job_id=job.job_id,
                worker_traceback=event.traceback,
            )
        else:
            error = JobError(
                f"job {job.job_id}: worker {event.rank} could not go on: {event.error}",
                job_id=job.job_id,
            )
        self._end(job, FAILED, error=error)

    # --- losses ---------------------------------------------------------------------------------

    def _lost(
        self,
        job: Record,
        generation: Generation,
        worker: Worker,
        call: Call,
        result: InvocationResult,
    ) -> None:
        """A worker ended without having said that it may."""
        what = f"worker {worker.rank} of generation {generation.number}: {_describe(call, result)}"
        if worker.told is not None:
            what += f" ({worker.told.error})"
        _LOG.info("job %s: %s", job.job_id, what)
        if result.ending == "out_of_memory":
            self._out_of_memory(job, generation, result)
            return
        if generation.to_invoke and worker.rank in generation.to_invoke:
            return
        idle = job.held and worker.begun  # in its report, with a checkpoint: nothing is lost
        if not idle:
            if result.ending == "timed_out" and job.position <= job.strike_position:
                job.fruitless_s = max(job.fruitless_s, call.timeout_s)
            if call.invocation_id not in job.struck and self._strike(job, what):
                return
        begun = any(w.begun and not w.gone and w is not worker for w in generation.workers)
        if generation.started and not begun:
            self._roll_back(job, what, strike=False)
            return
        worker.ready = worker.begun = False
        worker.told = None
        generation.to_invoke.append(worker.rank)
        self._to_invoke += 1
        self._invoke_rest(job, self._clock.monotonic())

    def _strike(self, job: Record, what: str) -> bool:
        """Counts losses without progress; ends the job after too many.

        Whoever was running at a loss may have been hit by the same: it does not count once more.
        """
        job.struck = frozenset(c.invocation_id for _, c in job.calls())
        fresh = job.position > job.strike_position
        job.strikes = 1 if fresh else job.strikes + 1
        job.strike_position = max(job.position, job.strike_position)
        if job.strikes <= MOST_STRIKES:
            return False
        error = FunctionLost(
            f"job {job.job_id}: {job.strikes} losses in a row without any progress, last {what}; "
            "see job.logs(). If an iteration takes longer than the platform's time limit, use more "
            "memory, more workers or a smaller batch; a function that does not use "
            "session.prepare() has to finish within one time limit",
            job_id=job.job_id,
        )
        self._end(job, FAILED, error=error)
        return True

    def _out_of_memory(self, job: Record, generation: Generation, result: InvocationResult) -> None:
        limit_mb = generation.allocation.memory_mb
        wanted = job.heading_for or generation.allocation
        larger: Decision | None = Decision(wanted, "")
        if wanted.memory_mb <= limit_mb:
            facts = replace(self._facts(job), allocation=replace(wanted, memory_mb=limit_mb))
            larger = self._adaptation.after_out_of_memory(job, generation, facts, result.peak_mb)
        if larger is not None:
            self._roll_back(job, f"out of memory at {limit_mb} MB", decision=larger, strike=False)
            return
        error = OutOfMemory(
            f"job {job.job_id}: a worker ran out of memory: it reached {result.peak_mb:.0f} MB, "
            f"its limit is {limit_mb} MB. Give it more memory_mb, more workers (smaller parts of "
            "the batch), or a smaller batch",
            job_id=job.job_id,
            peak_mb=result.peak_mb,
            limit_mb=limit_mb,
        )
        self._end(job, FAILED, error=error)

    def _roll_back(
        self, job: Record, why: str, *, decision: Decision | None = None, strike: bool = True
    ) -> None:
        """Nobody has the newest state any more: begin again at the last checkpoint."""
        if strike and self._strike(job, why):
            return
        wanted = decision
        if wanted is None:
            heading_for = job.heading_for
            assert heading_for is not None  # it had a generation
            wanted = job.resize_to or Decision(heading_for, "")
        job.resize_to = None
        for generation in job.generations:
            self._close(job, generation)
        if job.ending:
            return
        self._plan_from_checkpoint(job, wanted, why)
        self._admit()

    def _check_hangs(self, job: Record, now: float) -> None:
        for generation in job.generations:
            if generation.closed or generation.left:
                continue
            for call in list(generation.calls.values()):
                worker = generation.workers[call.rank]
                if call.incarnation != worker.incarnation or call.hung:
                    continue
                if now - worker.sign_s > self._longest_silence_s(job, worker):
                    call.hung = True
                    self._cancel(call)

    def _longest_silence_s(self, job: Record, worker: Worker) -> float:
        """How long a worker may show no sign of life: judged by its own pace, or by the others'."""
        pace_s = worker.slowest_s or (job.slowest_s if worker.ready else job.boot_s)
        if not pace_s:
            return START_TIMEOUT_S
        return max(self._settings.hang_timeout_s, HANG_FACTOR * pace_s) + SIGNS_S

    # --- generations ----------------------------------------------------------------------------

    def _plan(
        self,
        job: Record,
        decision: Decision,
        reason: str,
        start: wire.Start | None,
        *,
        held: int = 0,
    ) -> Planned:
        now = self._clock.monotonic()
        plan = Planned(decision.allocation, reason, start, now, held, decision.reason)
        self._wait(job, plan)
        if start is not None and not job.ending and not job.paused:
            job.state.update(status=QUEUED if not job.generations else job.state.status)
        return plan

    def _wait(self, job: Record, plan: Planned) -> None:
        """Puts a plan in the queue, in the place of the one that the job may have had."""
        job.plan = plan
        insort(self._queue, (plan, job), key=_turn)

    def _plan_from_checkpoint(self, job: Record, decision: Decision, reason: str) -> None:
        try:
            start = wire.Start(self._checkpoints(job).latest())
        except BudgetExhausted as error:  # looking for it costs money too
            _LOG.info("job %s stops: %s", job.job_id, error)
            self._end(job, STOPPED, reason=BUDGET)
        else:
            self._plan(job, decision, reason, start)

    def _admit(self) -> None:
        """Starts the generations that wait, first come, first served.

        Those that take no more functions than their job has are first: they give as many back.
        """
        self._retry_s = self._clock.monotonic() + THROTTLE_PAUSE_S
        place = 0
        while place < len(self._queue):
            plan, job = self._queue[place]
            if job.plan is not plan or job.ending or job.paused:  # who is resumed waits anew
                del self._queue[place]
                continue
            if plan.allocation.workers > self._free_functions():
                self._adaptation.shares_changed()
                return  # nobody overtakes, or a large job would wait for ever
            try:
                self._launch(job, plan)
            except BudgetExhausted as error:
                self._without_money(job, error)
                place += 1

    def _launch(self, job: Record, plan: Planned) -> None:
        """Reserves and invokes all workers of a generation. Raises BudgetExhausted."""
        self._rent(plan.allocation.store)
        lease_s = self._leases.length_s(job, plan.allocation)
        number = job.next_number
        workers = [Worker(rank) for rank in range(plan.allocation.workers)]
        generation = Generation(number, plan.allocation, plan.start, workers, lease_s)
        self._reserve(job, generation, list(range(len(workers))))
        job.generations.append(generation)  # from here on it is closed if anything fails
        self._placed[job.job_id] = job
        job.next_number += 1
        job.plan = None
        now = self._clock.monotonic()
        job.begun_s = now if job.begun_s is None else job.begun_s
        entry = AllocationRecord(
            number,
            plan.allocation.workers,
            plan.allocation.memory_mb,
            plan.reason,
            self._elapsed_s(job),
            plan.allocation.store,
            plan.decision,
        )
        self._record("generation", job.job_id, vars(entry))
        job.state.update(allocations=[*job.state.allocations, entry])
        if self._settings.logs is not None:
            (self._settings.logs / job.job_id).mkdir(parents=True, exist_ok=True)
        names = self._keys.generation(job.job_id, number)
        said = {names.open: b"1"}
        if job.state.spec.lockstep:
            said[names.consumed] = str(job.acknowledged).encode()
        self._store.put(said, ttl_s=24 * TTL_S)
        self._store_is_gone = False
        generation.to_invoke = list(range(len(workers)))
        self._to_invoke += len(workers)
        self._invoke_rest(job, now)

    def _reserve(self, job: Record, generation: Generation, ranks: list[int]) -> None:
        """Reserves the worst case of invoking some ranks next: all of it or nothing."""
        worst = self._leases.worst_usd(generation.allocation, generation.lease_s)
        reserved: list[str] = []
        try:
            for rank in ranks:
                name = self._call_id(job, generation, generation.workers[rank])
                self._ledger.reserve(
                    name, job.job_id, worst, "a function", lasts_s=generation.lease_s
                )
                reserved.append(name)
        except Exception:
            for name in reserved:
                self._ledger.release(name)
                job.next_number = generation.number + 1  # the ledger knows this name for good
            raise
        generation.reserved.update(dict.fromkeys(reserved))

    def _call_id(self, job: Record, generation: Generation, worker: Worker) -> str:
        return f"{job.job_id}.g{generation.number}.r{worker.rank}.i{worker.incarnation + 1}"

    def _invoke_rest(self, job: Record, now: float) -> None:
        for generation in job.generations:
            if not generation.to_invoke or generation.closed or now < generation.invoke_after_s:
                continue
            for rank in list(generation.to_invoke):
                try:
                    self._invoke(job, generation, generation.workers[rank])
                except Throttled:
                    generation.invoke_after_s = now + THROTTLE_PAUSE_S
                    break
                except BudgetExhausted:
                    if generation is job.following:
                        self._close(job, generation)  # the job goes on as it is
                    else:  # nobody can go on without it: what the others hold may do for all
                        self._roll_back(job, "a replacement cannot be paid for", strike=False)
                    return
                except (PlatformError, InvalidInput) as error:
                    self._end(job, FAILED, error=JobError(str(error), job_id=job.job_id))
                    return
                generation.to_invoke.remove(rank)
                self._to_invoke -= 1

    def _invoke(self, job: Record, generation: Generation, worker: Worker) -> None:
        name = self._call_id(job, generation, worker)
        if name not in generation.reserved:
            alone = replace(generation.allocation, workers=1)
            generation.lease_s = self._leases.length_s(job, alone)
            self._reserve(job, generation, [worker.rank])
        incarnation = worker.incarnation + 1
        spec = self._spec(job, generation, worker.rank, incarnation)
        memory_mb = generation.allocation.memory_mb
        logs = self._settings.logs
        file = f"{name.removeprefix(job.job_id + '.')}.log"
        invocation = Invocation(
            invocation_id=name,
            memory_mb=memory_mb,
            timeout_s=generation.lease_s,
            payload=spec.encode(),
            log_path=None if logs is None else logs / job.job_id / file,
            bill_path=self._settings.bill,
        )
        now = self._clock.monotonic()
        call = Call(name, worker.rank, incarnation, memory_mb, now, generation.lease_s)
        generation.calls[name] = call
        self._calls[name] = job.job_id
        try:
            self._platform.invoke(invocation, self._on_done)
        except Exception:
            del generation.calls[name], self._calls[name]
            raise
        generation.reserved.pop(name, None)
        worker.incarnation, worker.joining = incarnation, generation.started
        worker.sign_s = now
        worker.slowest_s = 0.0

    def _spec(
        self, job: Record, generation: Generation, rank: int, incarnation: int
    ) -> wire.WorkerSpec:
        spec = job.state.spec
        puts, gets = self._leases.allowance(generation.lease_s)
        paid = self._settings.paid_requests
        return wire.WorkerSpec(
            fleet=self._settings.fleet,
            job=job.job_id,
            generation=generation.number,
            rank=rank,
            workers=generation.allocation.workers,
            incarnation=incarnation,
            joining=generation.started,
            shards=spec.shards,
            seed=spec.seed,
            function=spec.function,
            config=spec.config,
            datasets=self._datasets(),
            parameter_store=self._settings.parameter_store,
            object_store=self._settings.object_store,
            store_options=self._settings.store_options,
            vcpus=self._platform.vcpus(generation.allocation.memory_mb),
            timeout_s=generation.lease_s,
            checkpoint_s=PAID_CHECKPOINT_S if paid else CHECKPOINT_S,
            max_puts=puts if paid else None,
            max_gets=gets if paid else None,
            gradient_store=self._settings.gradient_stores.get(generation.allocation.store, ""),
            lockstep=spec.lockstep,
            fork=spec.start_from,
        )

    def _without_money(self, job: Record, error: BudgetExhausted) -> None:
        """Waits if others still hold reservations; otherwise the job stops where it is."""
        plan = job.plan
        current = job.current
        if current is not None and plan is not None:
            if not current.asked_to_leave:
                job.plan = None  # it goes on as it is, up to the end of its lease
            return
        held = self._ledger.reserved_usd > 0 and any(
            g.calls or g.reserved
            for j in self._active.values()
            for g in j.generations
            if j is not job
        )
        held = held or self._ledger.others_hold
        if plan is not None and (held or any(g.calls for g in job.generations)):
            return
        _LOG.info("job %s stops: %s", job.job_id, error)
        self._end(job, STOPPED, reason=BUDGET)

    def _free_functions(self) -> int:
        return self._platform.limits.functions - len(self._calls) - self._to_invoke

    def _plan_hand_over(self, job: Record, now: float) -> None:
        """Starts the next generation while this one still trains."""
        current = job.current
        if current is None or job.following or not current.steady:
            return
        lead_s = min(0.3 * current.lease_s, 2.0 + 2.0 * self._start_s)
        ending = current.ends_s() - now < lead_s
        if job.plan is not None:
            if ending:  # it cannot wait any longer for more functions than it has
                asked, most = job.plan.allocation, current.allocation.workers
                if asked.workers > most:
                    smaller = replace(asked, workers=most)
                    self._wait(job, replace(job.plan, allocation=smaller))
            self._make_room(job, current, job.plan)
            return
        if job.resize_to is None and ending:
            decision = None
            if self._adaptation.may_review(job):
                decision = self._adaptation.review(job, self._facts(job), "time limit")
            job.resize_to = decision or Decision(current.allocation, "")
        if job.resize_to is None:
            return
        wanted, job.resize_to = job.resize_to, None
        reason = "time limit" if wanted.allocation == current.allocation else "resize"
        plan = self._plan(job, wanted, reason, None, held=current.allocation.workers)
        self._make_room(job, current, plan)

    def _make_room(self, job: Record, current: Generation, plan: Planned) -> None:
        """Invokes the next generation, or lets the old go first where both have no room."""
        if plan.grows and self._waiting():
            return  # others wait for functions: it trains on until they have begun
        if plan.allocation.workers > self._free_functions():
            self._ask_to_leave(job, current)
        else:
            self._admit()

    def _review(self) -> None:
        """Looks at one job's allocation again, if there is an occasion."""
        found = self._adaptation.next_review(self._placed, self._shares)
        if found is not None:
            job, occasion = found
            job.resize_to = self._adaptation.review(job, self._facts(job), occasion)
            self._plan_hand_over(job, self._clock.monotonic())

    def _ask_to_leave(self, job: Record, generation: Generation) -> None:
        generation.asked_to_leave = True
        names = self._keys.generation(job.job_id, generation.number)
        wake = [names.tokens(0)]  # it may wait in a report
        self._store.put_once({names.leave: b"1"}, ttl_s=TTL_S, announce=wake)

    def _close(self, job: Record, generation: Generation, *, kill: bool = True) -> None:
        """Fences a generation off: from now on it may do what it wants."""
        if not generation.closed:
            generation.closed = True
            generation.closed_s = self._clock.monotonic()
            self._invoke_no_more(generation)
            names = self._keys.generation(job.job_id, generation.number)
            self._forget(partial(self._store.delete, [names.open]))
        if kill:
            for call in generation.calls.values():
                self._cancel(call)

    def _invoke_no_more(self, generation: Generation) -> None:
        self._to_invoke -= len(generation.to_invoke)
        generation.to_invoke = []
        while generation.reserved:
            self._ledger.release(generation.reserved.popitem()[0])

    def _forget(self, delete: Callable[[], object]) -> None:
        """Deletes keys; if the store is out of reach, nobody can be misled by them either."""
        if self._store_is_gone:
            return
        try:
            delete()
        except StoreUnavailable as error:
            self.abandon(error)

    def _forget_gradients(self, generation: Generation, prefix: str) -> None:
        name = generation.allocation.store
        store = self._gradient_stores.get(name)
        if store is not None and name not in self._silent_stores:
            try:
                store.delete_prefix(prefix)
            except StoreUnavailable as error:
                _LOG.warning("gradients are left to expire by themselves: %s", error)

    def _cancel(self, call: Call) -> None:
        if isinstance(self._platform, Cancels):
            self._platform.cancel(call.invocation_id)

    def _kill_stragglers(self, job: Record, now: float) -> None:
        for generation in job.generations:
            over = generation.closed or generation.left
            if over and generation.calls and now - generation.closed_s > GRACE_S:
                generation.closed_s = now
                self._close(job, generation)

    def _sweep(self, job: Record) -> None:
        """Forgets generations whose functions are gone; ends the job after the last."""
        for generation in list(job.generations):
            if (generation.closed or generation.left) and not generation.calls:
                self._close(job, generation)
                self._adaptation.generation_over(job, generation)
                prefix = self._keys.generation(job.job_id, generation.number).prefix
                self._forget(partial(self._store.delete_prefix, prefix))
                self._forget_gradients(generation, prefix)
                job.generations = [g for g in job.generations if g is not generation]
        if not job.generations:
            self._placed.pop(job.job_id, None)
        if job.ending and not job.generations and job.job_id in self._active:
            self._conclude(job)
        self._rest(job)

    # --- pauses ---------------------------------------------------------------------------------

    def _force_pause(self, job: Record, now: float) -> None:
        """It has come to no boundary for long enough."""
        if job.paused and job.current is not None and now - job.paused_s > GRACE_S:
            self._roll_back(job, "paused", strike=False)

    def _rest(self, job: Record) -> None:
        """A job that is paused has lost its last function."""
        resting = job.paused and not job.ending and not job.generations
        if resting and job.held_back == TARGET:
            self._end(job, STOPPED, reason=TARGET)
        elif resting and job.state.status != PAUSED:
            start = job.plan.start if job.plan else None
            assert start is not None  # where it will go on
            self._delete_old(job, start.checkpoint)
            self._adaptation.shares_changed()
            job.state.update(status=PAUSED)

    # --- when money or time will not do for all -------------------------------------------------

    def _ration(self, now: float) -> None:
        """Holds back whom there is not enough for, and lets go on whom there is."""
        if self._settings.metric is None or now < self._ration_s:
            return
        self._ration_s = now + RATION_PAUSE_S
        deadline = self._settings.deadline_s
        jobs = [
            job
            for job in self._active.values()
            if not job.ending and (not job.paused or job.held_back in (BUDGET, DEADLINE))
        ]
        held = self._rationing.held_back(
            jobs,
            money_usd=self._ledger.available_usd + self._unused_usd(),
            spent_usd=self._ledger.settled_usd + self._ledger.reserved_usd - self._unused_usd(),
            time_s=math.inf if deadline is None else deadline - now,
            start_s=self._ready_s,
            now=now,
        )
        for job in jobs:
            reason = held.get(job.job_id, "")
            if job.ending or bool(reason) == bool(job.held_back):
                continue
            if reason:
                self._hold_back(job, reason)
            else:
                self._go_on(job)
        if all(held.get(job.job_id) == DEADLINE and not job.generations for job in jobs):
            for job in jobs:  # there is nobody to wait for
                self._end(job, STOPPED, reason=DEADLINE)

    def _hold_back(self, job: Record, reason: str) -> None:
        self._record("paused", job.job_id, {"reason": reason})
        job.state.held_back = job.held_back = reason
        self._take_off(job)

    def _unused_usd(self) -> float:
        """What is reserved for jobs and not used yet, USD."""
        unused = 0.0
        for job_id in self._active:
            ledger = self._ledger
            unused += ledger.job_reserved_usd(job_id) + ledger.job_usd(job_id)
            unused -= self.cost_usd(job_id)
        return unused

    # --- the end of a job -----------------------------------------------------------------------

    def _end(
        self,
        job: Record,
        status: str,
        *,
        reason: str = "",
        error: JobError | None = None,
        kill: bool = True,
    ) -> None:
        """The job is decided; it is over once its functions are gone and paid for."""
        job.ending, job.reason, job.error = status, reason, error
        job.plan = None
        for generation in job.generations:
            self._close(job, generation, kill=kill)
        self._sweep(job)

    def _conclude(self, job: Record) -> None:
        del self._active[job.job_id]
        self._adaptation.shares_changed()
        newest = self._newest_checkpoint(job)
        needs = None
        if job.ending == FINISHED:
            self._rationing.finished(self._ledger.job_usd(job.job_id), self._elapsed_s(job))
        elif job.ending == STOPPED:
            needs = self._rationing.needs(job, self._ready_s)
        self._delete_old(job, newest)
        reports = tuple(job.state.reports)
        outcome = JobOutcome(
            job_id=job.job_id,
            status=job.ending,
            reason=job.reason,
            metrics=dict(reports[-1].metrics) if reports else {},
            value=job.value,
            reports=reports,
            allocations=tuple(job.state.allocations),
            cost_usd=self._ledger.job_usd(job.job_id),
            duration_s=self._elapsed_s(job),
            checkpoint=f"{self._objects.url}/{newest}" if newest else None,
        )
        body = {
            "status": outcome.status,
            "reason": outcome.reason,
            "value": outcome.value,
            "cost_usd": outcome.cost_usd,
            "duration_s": outcome.duration_s,
            "checkpoint": outcome.checkpoint,
            "left": job.left,
            "needs_usd": needs and needs[0],
            "error": [type(job.error).__name__, str(job.error)] if job.error else None,
        }
        try:
            self._record("ended", job.job_id, body)
        finally:  # whoever waits for the job must not wait for ever
            job.state.update(status=job.ending, outcome=outcome, error=job.error)

    def _newest_checkpoint(self, job: Record) -> str | None:
        if job.ending == FINISHED:
            return job.checkpoint
        try:
            return self._checkpoints(job).latest()
        except (StoreError, BudgetExhausted) as error:
            _LOG.warning("job %s: its checkpoints are out of reach: %s", job.job_id, error)
        return job.checkpoint

    def _delete_old(self, job: Record, newest: str | None) -> None:
        """Deletes all checkpoints but the newest, and those of the last reports."""
        urls = [report.checkpoint for report in job.state.reports[-KEEP_OF_REPORTS:]]
        keep = {newest, *(f"jobs/{url.rpartition('/jobs/')[2]}" for url in urls if url)}
        try:
            names = self._objects.list(keys.checkpoints(job.job_id))
            self._objects.delete([name for name in names if name not in keep])
        except (StoreError, BudgetExhausted) as error:
            _LOG.warning("job %s leaves checkpoints behind: %s", job.job_id, error)

    # --- small things ---------------------------------------------------------------------------

    def _checkpoints(self, job: Record) -> Checkpoints:
        return Checkpoints(self._objects, job.job_id)

    def _elapsed_s(self, job: Record) -> float:
        return 0.0 if job.begun_s is None else self._clock.monotonic() - job.begun_s

    def _facts(self, job: Record) -> JobFacts:
        spec, current, workload = job.state.spec, job.current, job.workload
        pinned = self._adaptation.is_pinned(job)  # then nobody asks for what could be had
        left = job.iterations_left
        if left is None and workload is not None:
            left = workload.iterations
        return JobFacts(
            job_id=self._adaptation.name(job.job_id),
            limits=self._platform.limits,
            goal=spec.goal,
            bounds=spec.bounds,
            allocation=current.allocation if current else None,
            peak_mb=job.peak_mb,
            workload=workload,
            iterations_left=left,
            left_sd=job.left_sd,
            other_share=job.other_share,
            elapsed_s=self._clock.monotonic() - job.submitted_s,
            spent_usd=self.cost_usd(job.job_id),
            functions=None if pinned else self._shares()(job),
            start_s=self._ready_s,
            store_load={} if pinned else self._store_load(job),
            stores=self._usable_stores(spec.bounds.store),
        )

    def _usable_stores(self, pinned: str | None) -> tuple[str, ...]:
        """Those that answer, and the one that the user insists on."""
        names = (DEFAULT_STORE, *self._gradient_stores)
        return tuple(n for n in names if n == pinned or n not in self._silent_stores)

    def _shares(self) -> Callable[[Record], int]:
        """How many functions each job may take: its fair share, or all that nobody uses.

        While others wait for functions, it may keep what exceeds its fair share and they do not
        need: a review may make it give back the rest.
        """
        most, free = self._platform.limits.functions, max(0, self._free_functions())
        fair = max(1, most // max(1, sum(not j.paused for j in self._active.values())))
        wanted = {j.job_id: j.plan.allocation.workers for j in self._waiting() if j.plan}
        total = sum(wanted.values())

        def share(job: Record) -> int:
            own = max((g.allocation.workers for g in job.generations if not g.closed), default=0)
            others = total - wanted.get(job.job_id, 0)
            room = min(0, free - others) if others else free
            return min(most, max(fair, own + room))

        return share

    def _waiting(self) -> list[Record]:
        """Jobs that have no functions, and want some."""
        return [job for plan, job in self._queue if job.plan is plan and job.waits]

    def _store_load(self, job: Record) -> dict[str, float]:
        """What the other jobs move through each store, bytes per second."""
        load = dict.fromkeys((DEFAULT_STORE, *self._gradient_stores), 0.0)
        for other in self._active.values():
            if other is job or other.workload is None or not other.iteration_s:
                continue
            current = other.current
            if current is None:
                continue
            at = current.allocation
            moved = at.workers * worker_bytes(other.workload.features.gradient_bytes, at.workers)
            load[at.store] = load.get(at.store, 0.0) + moved / other.iteration_s
        return load


def _turn(waiting: tuple[Planned, Record]) -> tuple[bool, float, int]:
    """Of a plan in the queue: those that give as many functions back as they take are first."""
    plan, job = waiting
    return plan.grows, plan.since_s, job.order


def _is_news(job: Record, event: wire.Reported) -> bool:
    """Whether it is the next report, or in lockstep one made again with another result.

    The latter comes from a program that keeps files, and went back to some that are older. The
    newer result belongs to what comes after it.
    """
    spec, known = job.state.spec, job.state.reports
    place = event.index - spec.first_report
    if not spec.lockstep or not 0 <= place < len(known):
        return place == len(known)
    before = known[place]
    return event.generation > before.generation and event.metrics != before.metrics


def _describe(call: Call, result: InvocationResult) -> str:
    if call.hung:
        return "showed no sign of life and was killed"
    if result.ending == "returned":
        return "returned without a word"
    if result.ending == "timed_out":
        return f"reached its time limit of {call.timeout_s:.0f} s"
    return f"{result.ending} {result.detail}".strip()
