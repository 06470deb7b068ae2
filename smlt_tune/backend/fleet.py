"""The facade: all jobs that share a budget, a deadline, the storage tiers and the history.

A fleet runs one thread that owns the task scheduler. Whatever happens (a call of the user, a
worker's event, the end of an invocation) is put into one queue and handled there in turn.
"""

import json
import logging
import math
import queue
import shutil
import tempfile
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from smlt_tune.backend.artifact_manager import ArtifactManager
from smlt_tune.backend.changes import Change, Changes
from smlt_tune.backend.dead_clients import next_bill, settlements
from smlt_tune.backend.embedded_store import EmbeddedStore
from smlt_tune.backend.goals import Cheapest, Fastest, Goal, Target
from smlt_tune.backend.gradient_stores import BACK, GONE, GradientStores, read_given
from smlt_tune.backend.history import History, HistoryEvent
from smlt_tune.backend.job import (
    AllocationRecord,
    DecisionRecord,
    Job,
    JobOutcome,
    JobSpec,
    JobState,
    Report,
    metric_mistakes,
    name_mistakes,
    train_mistakes,
    workload_from_json,
)
from smlt_tune.backend.late_policy import LatePolicy, options_of, planner, resource_manager
from smlt_tune.backend.leases import Leases
from smlt_tune.backend.ledger import Entry, Ledger, budget_nanos
from smlt_tune.backend.platforms import open_platform
from smlt_tune.backend.platforms.base import InvocationResult, Platform, Spreads
from smlt_tune.backend.prices import Prices, load_prices
from smlt_tune.backend.profiles import open_profiles
from smlt_tune.backend.project_ledger import ProjectLedger
from smlt_tune.backend.resource_manager.observations import (
    DEFAULT_STORE,
    Option,
    Profile,
    Workload,
    not_counts,
)
from smlt_tune.backend.resource_manager.policy import (
    AllocationPolicy,
    Bounds,
    JobFacts,
    check,
    is_pinned,
)
from smlt_tune.backend.store_costs import PaidObjectStore, StoreCosts
from smlt_tune.backend.task_scheduler import Settings, TaskScheduler
from smlt_tune.errors import (
    FleetClosed,
    InvalidInput,
    ObjectNotFound,
    SmltError,
    StoreUnavailable,
)
from smlt_tune.runtime import keys, wire
from smlt_tune.runtime.checkpoint import KEEP_OF_REPORTS, Checkpoints
from smlt_tune.runtime.clock import SYSTEM_CLOCK, Clock
from smlt_tune.runtime.features import ModelFeatures
from smlt_tune.runtime.frameworks.base import read_meta
from smlt_tune.runtime.stores.base import ObjectStore, ParameterStore
from smlt_tune.runtime.stores.opening import open_object_store, open_parameter_store

__all__ = ["Fleet", "Job", "JobOutcome", "Report"]

_LOG = logging.getLogger(__name__)

#: The scheduler looks at its time-outs this often, in seconds.
TICK_S = 0.1
#: How long a new fleet tries to reach its parameter store, in seconds.
FIRST_TRY_S = 3.0
#: How long one read of the workers' events blocks, and how often the listener asks whether the
#: parameter store is still the same one, in seconds.
READ_S = 0.5
#: Most events that are read at once.
READ_LIMIT = 1000


class Fleet:
    """Runs training functions as jobs on a platform, within one budget.

    Use it as a context manager: leaving it stops what still runs and frees everything.

    Args:
        platform: ``"local"``, ``"inline"``, ``"ray"``, or a platform object, which outlives the
            fleet.
        budget_usd: What everything together may cost, USD; None for no limit. Never exceeded.
        deadline_s: When everything has to be over, seconds from now; None for never.
        path: Folder for history, logs and (by default) objects, to look at or reopen later; None
            for a temporary one that vanishes with the fleet.
        parameter_store: ``redis://`` or ``rediss://`` URL of a Redis or Valkey server; None starts
            one for the fleet.
        parameter_store_price: Row of the price list that the parameter store is charged by;
            ``"own"`` costs nothing.
        parameter_stores: Further parameter stores that the gradients of a job may go through, by
            name: a URL, or a URL and a row of the price list, which is charged from the first use
            on. ``parameter_store`` is called ``"default"`` and carries everything else.
        object_store: ``file:///folder`` or ``s3://bucket/prefix``; None keeps objects in the
            fleet's folder.
        store_options: Further arguments of the object store: for S3 ``endpoint_url``,
            ``access_key``, ``secret_key``, ``region``.
        prices: Name or path of a price list.
        policy: Chooses allocations where the user pins none; None for the resource manager, which
            needs the extra ``smlt-tune[gp]``.
        project: Folder in which profiles of jobs are kept for later fleets, and those of earlier
            ones are found; None for ``path``.
        project_budget_usd: What all fleets of the project together may cost, USD, besides the
            budget of each. It is kept with the project and counts from then on: fleets that are
            opened later keep to it without naming it, and one that names another changes it. What
            was spent before it was first set is not part of it.
        metric: Reported number that jobs are compared by when money or time will not do for all of
            them: no new ones begin, and once half of the money is spent, the worst are paused, so
            that the best are finished. None to let all go on for as long as it lasts.
        mode: ``"max"`` or ``"min"``: which way the metric is better.
        hang_timeout_s: Shortest silence of a worker that is taken for a hang, seconds. The bound
            grows with the measured time of the job's iterations.
        clock: Time.

    Raises:
        InvalidInput: Lists everything that is wrong with the arguments.
    """

    def __init__(
        self,
        *,
        platform: str | Platform = "local",
        budget_usd: float | None = None,
        deadline_s: float | None = None,
        path: str | Path | None = None,
        parameter_store: str | None = None,
        parameter_store_price: str = "own",
        parameter_stores: Mapping[str, str | tuple[str, str]] | None = None,
        object_store: str | None = None,
        store_options: Mapping[str, str] | None = None,
        prices: str | Path = "aws-us-east-1-2026-01",
        policy: AllocationPolicy | None = None,
        project: str | Path | None = None,
        project_budget_usd: float | None = None,
        metric: str | None = None,
        mode: str = "max",
        hang_timeout_s: float = 30.0,
        clock: Clock = SYSTEM_CLOCK,
        _resume: bool = False,
    ) -> None:
        mistakes = _number_mistakes(
            budget_usd=budget_usd, deadline_s=deadline_s, hang_timeout_s=hang_timeout_s
        ) + metric_mistakes(metric, mode)
        with ExitStack() as stack:
            embedded = None if parameter_store else stack.enter_context(EmbeddedStore())
            self.path = _folder(path, embedded, stack)
            self._objects_url = object_store or f"file://{self.path.absolute()}/objects"
            options = dict(store_options or {})
            parts = _Parts.open(
                mistakes,
                stack,
                None if path is None else self.path,  # what vanishes needs no journal on disk
                platform,
                prices,
                parameter_store_price,
                parameter_stores or {},
                self._objects_url,
                options,
                project or path,
                project_budget_usd,
                clock,
                own_stores={
                    **({} if parameter_store else {"parameter_store": "redis://host:6379/0"}),
                    **({} if object_store else {"object_store": "s3://bucket/prefix"}),
                },
                resume=_resume,
            )
            url = embedded.url if embedded else str(parameter_store)
            with closing(open_parameter_store(url, retry_s=FIRST_TRY_S)) as probe:
                # Says at once if there is no server or the password is wrong.
                self._server = probe.server_id()
            self._store = open_parameter_store(url)
            stack.callback(self._store.close)
            self._platform, self._clock = parts.platform, clock
            self._history, self._name = parts.history, parts.name
            self._ledger = Ledger(
                budget_usd, self._record_entry, project=parts.project_ledger, clock=clock
            )
            self._ledger.restore(
                (Entry(**e.body) for e in parts.known if e.kind == "ledger"),
                settle_at=parts.settlements(),
            )
            self._objects: ObjectStore = parts.objects
            if parts.paid_requests:
                self._objects = PaidObjectStore(parts.objects, self._ledger, parts.prices)
            self._artifacts = ArtifactManager(self._objects)
            bill = parts.next_bill()
            now = clock.monotonic()
            settings = Settings(
                fleet=self._name,
                parameter_store=url,
                object_store=self._objects_url,
                store_options=options,
                hang_timeout_s=hang_timeout_s,
                deadline_s=None if deadline_s is None else now + deadline_s,
                logs=self.path / "logs",
                bill=self.path / bill if bill else None,
                paid_requests=parts.paid_requests,
                gradient_stores={name: url for name, (url, _) in parts.stores.items()},
                metric=metric,
                maximize=mode == "max",
            )
            self._gradients = GradientStores(
                parts.stores,
                self._ledger,
                parts.prices,
                clock,
                lambda name: self._scheduler.users(name),
                lambda job_id: self._scheduler.stop(job_id, "budget"),
                stack,
            )
            self._policy = policy or LatePolicy(
                partial(
                    resource_manager,
                    parts.platform,
                    parts.prices,
                    {DEFAULT_STORE: (url, parameter_store_price), **parts.stores},
                    parts.profiles,
                )
            )
            self._scheduler = TaskScheduler(
                settings,
                parts.platform,
                self._policy,
                self._ledger,
                parts.prices,
                self._store,
                self._objects,
                clock,
                parts.history.append,
                self._ended,
                lambda: self._artifacts.datasets,
                self._gradients.connections,
                self._gradients.rent,
                parts.keep_profile,
            )
            self._costs = StoreCosts(
                self._ledger, parts.prices, parameter_store_price, clock, self._out_of_money
            )
            self._states: dict[str, JobState] = {}
            self._followers: tuple[Changes, ...] = ()
            # Both may be asked for again by a signal's handler that calls close().
            self._lock, self._close_lock = threading.RLock(), threading.RLock()
            self._shut = self._freed = False
            self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
            self._closing = threading.Event()
            self._seen = (0, 0)
            unfinished = self._restore(parts.known)
            self._costs.begin()
            given = {"budget_usd": budget_usd, "deadline_s": deadline_s, "bill": bill}
            parts.history.append(
                "fleet", "", {"name": self._name, "platform": parts.platform.name, **given}
            )
            self._resources = stack.pop_all()
        self._begin(unfinished)

    @classmethod
    def open(cls, path: str | Path, **options: Any) -> Self:
        """Continues the fleet whose record lies in a folder.

        Jobs that had not ended go on from their checkpoints; what was spent stays spent. What the
        functions of a dead client did cost is what the platform has written down; where it has not,
        all that was reserved counts, up to what they can have used until now on a platform where
        they die with their client.

        Args:
            path: Its folder.
            **options: As for the constructor.

        Raises:
            InvalidInput: There is no fleet there, or another client has it open.
        """
        if not (Path(path) / "history.sqlite3").exists():
            raise InvalidInput(f"there is no fleet in {path}: Fleet(path=...) starts one")
        return cls(path=path, _resume=True, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Fleet({self._name!r}, platform={self._platform.name!r}, path={str(self.path)!r})"

    @property
    def name(self) -> str:
        """Unique name of the fleet; the same after ``open``."""
        return self._name

    @property
    def budget_usd(self) -> float | None:
        """What everything together may cost, USD; None for no limit."""
        return self._ledger.budget_usd

    @property
    def settled_usd(self) -> float:
        """What was spent so far, USD."""
        return self._ledger.settled_usd

    @property
    def reserved_usd(self) -> float:
        """Worst case of what is running, USD."""
        return self._ledger.reserved_usd

    @property
    def available_usd(self) -> float:
        """What may still be reserved, USD; infinite without a budget."""
        return self._ledger.available_usd

    @property
    def ledger(self) -> Ledger:
        """Every reservation and settlement."""
        return self._ledger

    @property
    def platform(self) -> Platform:
        """Where the functions run."""
        return self._platform

    @property
    def parameter_store(self) -> ParameterStore:
        """Where its workers meet."""
        return self._store

    @property
    def object_store(self) -> ObjectStore:
        """Where code, data and checkpoints lie."""
        return self._objects

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._shut

    def submit(
        self,
        train: Callable[[Any], Any],
        config: Any = None,
        *,
        goal: Goal | None = None,
        workers: int | None = None,
        memory_mb: int | None = None,
        min_workers: int = 1,
        max_workers: int | None = None,
        min_memory_mb: int | None = None,
        max_memory_mb: int | None = None,
        store: str | None = None,
        workload: Workload | None = None,
        target: Target | None = None,
        profiles: int = 0,
        lease_s: float | None = None,
        shards: int = 0,
        seed: int = 0,
        lockstep: bool = False,
        start_from: str | None = None,
        name: str | None = None,
    ) -> Job:
        """Starts a job and returns without waiting for it.

        The first job that leaves something to the resource manager waits until that is imported.

        Args:
            train: Training function; gets the configuration.
            config: Anything that can be pickled.
            goal: ``Cheapest`` or ``Fastest``.
            workers: Pins the number of workers.
            memory_mb: Pins the memory of a function, MB.
            min_workers: Fewest workers to choose.
            max_workers: Most workers to choose.
            min_memory_mb: Smallest memory to choose, MB.
            max_memory_mb: Largest memory to choose, MB.
            store: Pins the parameter store, by its name in the fleet.
            workload: What the job will compute, if that is known: its first allocation then is
                meant for it. Once it runs, the job says so itself.
            target: The job stops, at a checkpoint and with ``reason="target"``, once a reported
                metric is there; see :class:`~smlt_tune.backend.goals.Target`.
            profiles: How many allocations the job tries first, for some iterations each, where that
                tells most about all others. Without it the job begins with what is best by all
                that is known. It trains meanwhile, and pays from the same budget.
            lease_s: Longest time for which money is reserved for a function at once, seconds,
                because the job is expected to be done (or paused) by then. If it is not, it hands
                over to the next functions. None for the platform's time limit.
            shards: Shards per synchronisation (the paper's m); 0 chooses.
            seed: Everything random in the job derives from it.
            lockstep: ``session.report`` returns only after ``Job.acknowledge`` has said that the
                report was consumed, so that a job that is stopped at a report has not trained
                beyond it. Every report names a checkpoint of its boundary.
            start_from: ``Report.checkpoint`` or ``JobOutcome.checkpoint`` of a job of this fleet.
                The new job begins with its state (weights, optimizers' state, epochs done, number
                of reports), but with its own configuration: what it sets in an optimizer's
                ``param_groups``, and of schedulers, wins. The checkpoint is read here, and kept for
                the new job as it is now.
            name: Key of the job. A name that the fleet knows, from before a crash too, gives that
                job instead of a new one.

        Raises:
            InvalidInput: Lists everything that is wrong with the arguments; or the goal is out of
                reach for the workload, and which one is not.
            FleetClosed: The fleet was closed.
        """
        self._check_open()
        if isinstance(name, str) and name in self._states:
            return self._job(self._states[name])
        bounds = Bounds(
            workers,
            memory_mb,
            min_workers,
            max_workers,
            min_memory_mb,
            max_memory_mb,
            store,
            profiles,
            lease_s,
        )
        wanted = Cheapest() if goal is None else goal
        job_id = self._free_name() if name is None else name
        mistakes = _submit_mistakes(train, job_id, seed, shards, lockstep)
        mistakes += _workload_mistakes(workload)
        mistakes += _target_mistakes(target)
        donor = b""
        if start_from is not None:
            with _collected(mistakes, "start_from="):
                donor = self.read_checkpoint(start_from)
        facts = JobFacts(job_id, self._platform.limits, wanted, bounds, stores=self._store_names())
        mistakes += check(facts)
        function = digest = ""
        with _collected(mistakes):
            function = self._artifacts.store_code(train, "the training function")
        with _collected(mistakes):
            digest = self._artifacts.store_code(config, "the configuration")
        if mistakes:
            raise InvalidInput(mistakes)
        if workload is not None:
            workload = replace(workload, function=function)
            self._check_goal(replace(facts, workload=workload))
        if isinstance(self._policy, LatePolicy) and not is_pinned(facts):
            self._policy.made()  # here: the scheduler has others to look after meanwhile
        with self._lock:
            self._check_open()
            if name is None:
                job_id = self._free_name()  # another thread may have taken the one above
            elif job_id in self._states:
                return self._job(self._states[job_id])
            spec = JobSpec(
                job_id, function, digest, seed, bounds, wanted, shards, workload, lockstep
            )
            spec = replace(spec, target=target)
            if donor:
                spec = self._forked(spec, donor)
            self._history.append("job", job_id, spec.to_json())
            state = self._states[job_id] = JobState(spec, self._tell)
            self._queue.put(partial(self._scheduler.submit, state))
        return self._job(state)

    def jobs(self) -> list[Job]:
        """All jobs, those of earlier clients included, in the order of their submission."""
        return [self._job(state) for state in list(self._states.values())]

    def changes(self) -> Changes:
        """What happens to the jobs of the fleet from now on; see :mod:`~.changes`."""
        changes = Changes(threading.Condition(), self._unfollow)
        with self._lock:
            self._followers = (*self._followers, changes)
            if self._freed:
                changes.over()
        return changes

    def options(self, workload: Workload) -> tuple[Option, ...]:
        """What a job would take with each allocation, by all that is known now.

        Args:
            workload: What it computes, with its iterations.

        Raises:
            UsageError: The fleet's policy cannot tell.
        """
        facts = JobFacts("options", self._platform.limits, workload=workload)
        return options_of(self._policy, replace(facts, stores=self._store_names()))

    def read_checkpoint(self, url: str) -> bytes:
        """The content of a checkpoint of one of the fleet's jobs.

        Args:
            url: ``Report.checkpoint`` or ``JobOutcome.checkpoint``.

        Raises:
            InvalidInput: It is no such thing, or it was deleted.
            ObjectDamaged: It is not what was written.
        """
        key, job_id = self._checkpoint_key(url)
        checkpoints = Checkpoints(self._objects, job_id)
        for place in (key, keys.kept_checkpoint(key)):
            with suppress(ObjectNotFound):
                return checkpoints.load(place)
        raise InvalidInput(
            f"{url!r} does not exist (any more): a job keeps its newest checkpoint, one in "
            f"lockstep also those of its last {KEEP_OF_REPORTS} reports, and a fleet those of "
            "keep_checkpoint"
        )

    def keep_checkpoint(self, url: str) -> None:
        """Keeps a checkpoint readable under its URL after its job has deleted it. Idempotent.

        Args:
            url: ``Report.checkpoint`` or ``JobOutcome.checkpoint`` of one of the fleet's jobs.

        Raises:
            InvalidInput: It is no such thing, or it was deleted.
            ObjectDamaged: It is not what was written.
        """
        key, _ = self._checkpoint_key(url)
        self._objects.put(keys.kept_checkpoint(key), self.read_checkpoint(url), if_absent=True)

    def release_checkpoint(self, url: str) -> None:
        """Takes :meth:`keep_checkpoint` back. Idempotent.

        Args:
            url: ``Report.checkpoint`` or ``JobOutcome.checkpoint`` of one of the fleet's jobs.

        Raises:
            InvalidInput: It is no such thing.
        """
        key, _ = self._checkpoint_key(url)
        self._objects.delete([keys.kept_checkpoint(key)])

    def upload(self, name: str, data: Any) -> None:
        """Stores a data set for ``session.batches(name, ...)``.

        Args:
            name: What training functions call it.
            data: An array, or a tuple of arrays of equal length; first axis samples.

        Raises:
            InvalidInput: It is neither, or empty.
        """
        self._check_open()
        self._artifacts.upload(name, data)
        self._history.append(
            "dataset", "", {"name": name, "digest": self._artifacts.datasets[name]}
        )

    def close(self) -> None:
        """Stops what still runs, waits until it is gone, frees everything. Idempotent.

        If it is interrupted, call it again: it goes on where it was.
        """
        with self._close_lock:
            with self._lock:  # whatever was submitted is in the queue, nothing follows
                self._shut = True
                for job_id in [] if self._freed else list(self._states):
                    self._queue.put(partial(self._scheduler.stop, job_id, "the fleet was closed"))
                self._queue.put(self._closing.set)
            for thread in self._threads:
                if thread.ident is not None:  # it was started
                    thread.join()
            if self._freed:
                return
            self._costs.end()
            self._gradients.end()
            if isinstance(self._objects, PaidObjectStore):
                self._objects.settle()
            self._gradients.clean_up(keys.FleetKeys(self._name).prefix)
            try:
                self._store.delete_prefix(keys.FleetKeys(self._name).prefix)
            except SmltError as error:
                _LOG.warning("could not clean up the parameter store: %s", error)
            self._freed = True
            for changes in self._followers:
                changes.over()
            self._resources.close()

    def _begin(self, unfinished: list[tuple[JobState, int, float]]) -> None:
        for state, number, elapsed_s in unfinished:
            submit = partial(self._scheduler.submit, state, next_number=number, elapsed_s=elapsed_s)
            self._queue.put(submit)
        self._threads = [
            threading.Thread(target=self._schedule, name="smlt-scheduler", daemon=True),
            threading.Thread(target=self._listen, name="smlt-events", daemon=True),
        ]
        if self._gradients.connections:
            watch = threading.Thread(target=self._watch, name="smlt-stores", daemon=True)
            self._threads.append(watch)
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self.close()
            raise

    # --- the scheduler's thread -------------------------------------------------------------------

    def _schedule(self) -> None:
        next_tick_s = self._clock.monotonic()
        while not (self._closing.is_set() and self._scheduler.idle):
            now = self._clock.monotonic()
            if now >= next_tick_s:
                next_tick_s = now + TICK_S
                self._guarded(self._tick)
            with suppress(queue.Empty):
                self._guarded(self._queue.get(timeout=max(0.0, next_tick_s - now)))
        with suppress(SmltError):  # wakes the listener up, which then ends too
            self._store.append(keys.FleetKeys(self._name).events, b"", ttl_s=READ_S)

    def _tick(self) -> None:
        self._costs.tick()
        self._gradients.tick()
        self._scheduler.tick()

    def _guarded(self, handle: Callable[[], None]) -> None:
        """A fault here must not leave functions running that nobody watches."""
        try:
            handle()
        except Exception as error:  # noqa: BLE001 - the boundary of the thread
            if not isinstance(error, StoreUnavailable):
                _LOG.exception("the scheduler failed; its jobs are stopped")
            try:
                self._scheduler.abandon(error)
            except Exception:  # noqa: BLE001 - what is left is tried again
                _LOG.exception("the scheduler could not stop its jobs")

    def _ended(self, result: InvocationResult) -> None:
        """Called by the platform, from any thread."""
        self._queue.put(partial(self._on_ended, result))

    def _on_ended(self, result: InvocationResult) -> None:
        """Handles what a worker said last before the news of its end."""
        events = keys.FleetKeys(self._name).events
        with suppress(StoreUnavailable):
            messages = [("", b"")] * READ_LIMIT
            while len(messages) == READ_LIMIT:
                after = "{}-{}".format(*self._seen)
                messages = self._store.read(events, after, timeout_s=0.0, limit=READ_LIMIT)
                self._on_events(messages)
        self._scheduler.ended(result)

    def _out_of_money(self) -> None:
        for state in list(self._states.values()):
            self._scheduler.stop(state.spec.job_id, "budget")

    def _on_events(self, messages: list[tuple[str, bytes]]) -> None:
        """Handles events once, whoever has read them, then forgets them."""
        for message_id, content in messages:
            time, _, number = message_id.partition("-")
            if (int(time), int(number)) <= self._seen:
                continue
            self._seen = (int(time), int(number))
            try:
                self._scheduler.event(wire.WorkerEvent.decode(content))
            except InvalidInput as error:
                _LOG.warning("ignored what is no event of a worker: %s", error)
        if messages:  # not by the listener: what it has read may still wait in the queue
            self._store.trim(keys.FleetKeys(self._name).events, messages[-1][0])

    # --- the listener's thread --------------------------------------------------------------------

    def _listen(self) -> None:
        events, after, ask_s = keys.FleetKeys(self._name).events, "0", 0.0
        server = self._server
        while self._threads[0].is_alive():
            try:
                messages = self._store.read(events, after, timeout_s=READ_S)
                if (now := self._clock.monotonic()) >= ask_s:
                    server, ask_s = self._store.server_id(), now + READ_S
            except Exception as error:  # noqa: BLE001 - the boundary of the thread
                self._queue.put(partial(self._scheduler.abandon, error))
                self._clock.sleep(READ_S)
                continue
            if server != self._server:
                self._server = server
                self._queue.put(self._scheduler.store_lost)
            if messages:
                after = messages[-1][0]
                self._queue.put(partial(self._on_events, messages))

    def _watch(self) -> None:
        """A thread of its own: a store that does not answer must not delay events."""
        while self._threads[0].is_alive():
            for name, what in self._gradients.changes():
                if what != BACK:
                    _LOG.warning("the parameter store %s: %s", name, what)
                gone = {GONE: self._scheduler.store_gone, BACK: self._scheduler.store_back}
                self._queue.put(partial(gone.get(what, self._scheduler.store_lost), name))
            self._clock.sleep(READ_S)

    # --- history ----------------------------------------------------------------------------------

    def _record_entry(self, entry: Entry) -> None:
        self._history.append("ledger", entry.job, asdict(entry))

    def _restore(self, events: list[HistoryEvent]) -> list[tuple[JobState, int, float]]:
        """Takes over what an earlier client knew.

        Returns:
            The jobs that have to go on: state, number of the next generation, age in seconds.
        """
        numbers = _next_numbers(events)
        ages: dict[str, float] = {}
        for event in events:
            if event.kind == "dataset":
                self._artifacts.restore({event.body["name"]: event.body["digest"]})
            elif event.kind == "job":
                self._states[event.job] = JobState(JobSpec.from_json(event.body), self._tell)
                ages[event.job] = max(0.0, self._clock.wall() - event.at)
            elif event.kind == "generation":
                self._states[event.job].allocations.append(AllocationRecord(**event.body))
            elif event.kind == "decision":
                self._states[event.job].decisions.append(DecisionRecord.from_json(event.body))
            elif event.kind == "workload":
                self._states[event.job].workload = workload_from_json(event.body)
            elif event.kind == "report":
                self._states[event.job].add_report(Report(**event.body))
            elif event.kind in ("paused", "resumed", "resize"):
                self._states[event.job].restore_change(event.kind, event.body)
            elif event.kind == "ended":
                self._states[event.job].restore_end(event.body)
        return [(s, numbers[name], ages[name]) for name, s in self._states.items() if not s.over]

    # --- small things -----------------------------------------------------------------------------

    def _tell(self, state: JobState, report: Report | None) -> None:
        """Called by the scheduler's thread: followers have queues."""
        for changes in self._followers:
            changes.tell(Change(self._job(state), state.status, report))

    def _unfollow(self, changes: Changes) -> None:
        with self._lock:
            self._followers = tuple(one for one in self._followers if one is not changes)

    def _free_name(self) -> str:
        number = len(self._states)
        while f"job-{number:04d}" in self._states:
            number += 1
        return f"job-{number:04d}"

    def _store_names(self) -> tuple[str, ...]:
        return (DEFAULT_STORE, *self._gradients.urls)

    def _check_goal(self, facts: JobFacts) -> None:
        """Refuses a goal that no allocation can reach, before anything is spent on it."""
        if facts.workload is None or facts.goal in (Cheapest(), Fastest()):
            return
        able = planner(self._policy)
        if able is None:
            return
        plan = able.plan(
            replace(
                facts,
                iterations_left=facts.workload.iterations,
                functions=self._platform.limits.functions,
            )
        )
        if not plan.feasible:
            raise InvalidInput(plan.notes)

    def _checkpoint_key(self, url: object) -> tuple[str, str]:
        """Key and job of a checkpoint of one of the fleet's jobs.

        Raises:
            InvalidInput: It is no such thing.
        """
        place = f"{self._objects.url}/"
        key = str(url).removeprefix(place)
        job_id = keys.job_of_checkpoint(key)
        if not isinstance(url, str) or not url.startswith(place) or job_id is None:
            raise InvalidInput(
                f"{url!r} is no checkpoint of this fleet: give Report.checkpoint or "
                f"JobOutcome.checkpoint of one of its jobs, {place}jobs/..."
            )
        if job_id not in self._states:
            raise InvalidInput(
                f"{url!r} is a checkpoint of the job {job_id!r}, which this fleet does not know"
            )
        return key, job_id

    def _forked(self, spec: JobSpec, donor: bytes) -> JobSpec:
        """A job that begins with another one's checkpoint, of which it keeps a copy."""
        meta = read_meta(donor)
        key = keys.checkpoint(spec.job_id, meta["position"], donor)
        self._objects.put(key, donor)
        return replace(spec, start_from=key, first_report=len(json.loads(meta["reports"])))

    def _check_open(self) -> None:
        if self.closed:
            raise FleetClosed(
                "the fleet was closed; start another one, or continue this one with Fleet.open"
            )

    def _job(self, state: JobState) -> Job:
        job_id = state.spec.job_id
        return Job(
            state,
            stop=lambda i, reason: self._queue.put(partial(self._scheduler.stop, i, reason)),
            resize=self._resize,
            cost=self._scheduler.cost_usd,
            logs=self.path / "logs" / job_id,
            acknowledge=lambda i, n: self._queue.put(partial(self._scheduler.acknowledge, i, n)),
            pause=lambda i: self._queue.put(partial(self._scheduler.pause, i)),
            resume=lambda i: self._queue.put(partial(self._scheduler.resume, i)),
        )

    def _resize(self, job_id: str, bounds: Bounds) -> None:
        spec = self._states[job_id].spec
        facts = JobFacts(
            job_id, self._platform.limits, spec.goal, bounds, stores=self._store_names()
        )
        mistakes = check(facts)
        if bounds == Bounds():
            mistakes.append("resize() needs workers=, memory_mb=, store=, lease_s=, or several")
        if mistakes:
            raise InvalidInput(mistakes)
        self._check_open()
        self._queue.put(partial(self._scheduler.resize, job_id, bounds))


@dataclass(frozen=True)
class _Parts:
    """What a fleet is made of, once it is known that all of it can be had."""

    folder: Path | None
    prices: Prices
    platform: Platform
    objects: ObjectStore
    history: History
    known: list[HistoryEvent]
    name: str
    stores: dict[str, tuple[str, str]]
    profiles: list[Profile]
    keep_profile: Callable[[Profile], None] | None
    project_ledger: ProjectLedger | None
    clock: Clock
    paid_requests: bool

    def settlements(self) -> dict[str, float]:
        """What functions of an earlier client, which has died, did cost, USD, where it is known."""
        if self.folder is None:
            return {}
        leases = Leases(self.platform, self.prices, Ledger(None), paid_requests=self.paid_requests)
        return settlements(self.known, self.folder, self.platform, leases, self.clock.wall())

    def next_bill(self) -> str | None:
        """Where the platform writes down what it charges this client, in the fleet's folder."""
        if self.folder is None:
            return None
        bill = next_bill(self.known, self.platform)
        if bill is not None:
            (self.folder / bill).parent.mkdir(exist_ok=True)
        return bill

    @classmethod
    def open(
        cls,
        mistakes: list[str],
        stack: ExitStack,
        path: Path | None,
        platform: str | Platform,
        prices: str | Path,
        price_row: str,
        stores: Mapping[str, str | tuple[str, str]],
        objects_url: str,
        options: dict[str, str],
        project: str | Path | None,
        project_budget_usd: float | None,
        clock: Clock,
        *,
        own_stores: Mapping[str, str],
        resume: bool,
    ) -> Self:
        """Opens everything, or raises one InvalidInput that lists all mistakes."""
        found: dict[str, Any] = {
            "folder": path,
            "profiles": [],
            "keep_profile": None,
            "project_ledger": None,
            "clock": clock,
            "paid_requests": objects_url.startswith("s3:"),
        }
        with _collected(mistakes):
            found["prices"] = load_prices(prices)
            found["prices"].parameter_store_usd(price_row, 1.0)
        with _collected(mistakes):
            found["platform"] = open_platform(platform)
            if isinstance(platform, str):
                stack.callback(found["platform"].close)
            mistakes += _out_of_reach(found["platform"], own_stores)
        with _collected(mistakes):
            found["stores"] = read_given(stores, found.get("prices"))
        if project is not None and "platform" in found:
            with _collected(mistakes):
                found |= _open_project(project, found["platform"].fingerprint, stack)
        with _collected(mistakes):
            found["objects"] = open_object_store(objects_url, options)
        with _collected(mistakes):
            found["history"] = stack.enter_context(History(path, clock=clock))
            found["known"] = found["history"].read()
            found["name"] = _fleet_name(found["known"]) or uuid.uuid4().hex[:12]
            if found["known"] and not resume:
                mistakes.append(
                    f"path={str(path)!r} holds the record of an earlier fleet: continue it with "
                    "Fleet.open(path), or choose another folder"
                )
        with _collected(mistakes):
            budget = None
            if project_budget_usd is not None:
                budget = budget_nanos("project_budget_usd", project_budget_usd)
                if project is None:
                    mistakes.append("project_budget_usd needs project=, the folder of the project")
            if project is not None and not mistakes:  # else it might change the budget in vain
                opened = ProjectLedger.open(project, found["name"], budget, clock)
                if opened is not None:
                    stack.callback(opened.close)
                found["project_ledger"] = opened
        if mistakes:
            raise InvalidInput(mistakes)
        return cls(**found)


def _out_of_reach(platform: Platform, own_stores: Mapping[str, str]) -> list[str]:
    """Functions on other machines reach nothing that only this one can.

    Args:
        platform: Where they run.
        own_stores: Arguments that were left to the fleet, which then takes this machine's own
            store; with an example of each.
    """
    if not (isinstance(platform, Spreads) and platform.elsewhere):
        return []
    return [
        f"{name} must be given, because functions run on other machines too and cannot reach "
        f"the one that a fleet makes for itself: {name}={example!r}, say"
        for name, example in own_stores.items()
    ]


def _open_project(folder: str | Path, fingerprint: str, stack: ExitStack) -> dict[str, Any]:
    """What earlier jobs of the project have measured, and where to keep what these will."""
    store, profiles = open_profiles(folder, fingerprint)
    if store is None:
        return {}
    stack.callback(store.close)
    return {"profiles": profiles, "keep_profile": partial(store.add, fingerprint=fingerprint)}


@contextmanager
def _collected(mistakes: list[str], argument: str = "") -> Iterator[None]:
    """Adds what is wrong to the list instead of raising it, after the argument that it is."""
    try:
        yield
    except InvalidInput as error:
        mistakes += [f"{argument}{mistake}" for mistake in error.mistakes]
    except SmltError as error:
        mistakes.append(str(error))


def _folder(path: str | Path | None, embedded: EmbeddedStore | None, stack: ExitStack) -> Path:
    if path is not None:
        return Path(path)
    if embedded is not None:
        return embedded.folder / "fleet"
    folder = Path(tempfile.mkdtemp(prefix="smlt-fleet-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _fleet_name(events: list[HistoryEvent]) -> str | None:
    return next((str(e.body["name"]) for e in events if e.kind == "fleet"), None)


def _next_numbers(events: list[HistoryEvent]) -> defaultdict[str, int]:
    """Number of the next generation of each job.

    By the ledger, because a client may have died after it had reserved for a generation, and before
    it recorded that one.
    """
    numbers: defaultdict[str, int] = defaultdict(int)
    for event in events:
        if event.kind == "ledger" and event.job:
            number, _, _ = event.body["entry_id"].removeprefix(f"{event.job}.g").partition(".")
            numbers[event.job] = max(numbers[event.job], int(number) + 1)
    return numbers


def _number_mistakes(**numbers: float | None) -> list[str]:
    mistakes = []
    for name, value in numbers.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        least = 0.0 if name == "budget_usd" else 1e-9
        if value is not None and not (number and math.isfinite(value) and value >= least):
            kind = "at least 0" if name == "budget_usd" else "above 0"
            mistakes.append(f"{name} must be a number {kind}, or None, not {value!r}")
    return mistakes


def _workload_mistakes(workload: object) -> list[str]:
    if workload is None:
        return []
    if not isinstance(workload, Workload) or not isinstance(workload.features, ModelFeatures):
        return [f"workload must be a Workload with ModelFeatures, not {workload!r}"]
    given: dict[str, object] = {
        "workload.batch": workload.batch,
        "workload.features.parameters": workload.features.parameters,
    }
    if workload.iterations is not None:
        given["workload.iterations"] = workload.iterations
    return not_counts(given)


def _target_mistakes(target: object) -> list[str]:
    if target is None or isinstance(target, Target):
        return []
    return [f"target must be a Target(metric, value), not {target!r}"]


def _submit_mistakes(
    train: object, job_id: object, seed: object, shards: object, lockstep: object
) -> list[str]:
    mistakes = train_mistakes(train) + name_mistakes(job_id)
    for what, value in (("seed", seed), ("shards", shards)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            mistakes.append(f"{what} must be a whole number of at least 0, not {value!r}")
    if not isinstance(lockstep, bool):
        mistakes.append(f"lockstep must be True or False, not {lockstep!r}")
    return mistakes
