"""A fleet in virtual time: the real scheduler, ledger, policy and journal on a simulated platform.

Nothing happens by itself: time passes while somebody waits, in :meth:`SimulatedFleet.run_until`,
in ``Job.result``, for the next of ``Job.reports``. So hours of thousands of jobs take seconds, and
equal simulations are equal event for event.

```python
platform = SimulatedPlatform(SimulationOptions(concurrency=1000, crashes_per_hour=0.1))
with SimulatedFleet(platform, budget_usd=5.0) as fleet:
    jobs = [fleet.submit(describe, {"lr": lr}, workers=4, memory_mb=1769) for lr in (0.1, 0.01)]
    fleet.run_until_idle()
    best = max(jobs, key=lambda job: job.result().metrics["accuracy"])
```

``describe(config)`` returns a ``SimulatedTraining``. A driver that follows many jobs at once asks
for :meth:`SimulatedFleet.changes`; no time passes until it asks for the next one.
"""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Self, cast

from smlt_tune.backend.changes import Change, Changes
from smlt_tune.backend.goals import Cheapest, Goal, Target
from smlt_tune.backend.history import History
from smlt_tune.backend.job import (
    PAUSED,
    Job,
    JobSpec,
    JobState,
    Report,
    metric_mistakes,
    name_mistakes,
    train_mistakes,
)
from smlt_tune.backend.late_policy import LatePolicy, options_of, resource_manager
from smlt_tune.backend.ledger import Entry, Ledger
from smlt_tune.backend.platforms.base import InvocationResult, is_positive
from smlt_tune.backend.platforms.simulated import SimulatedPlatform, SimulatedTraining
from smlt_tune.backend.platforms.simulated.changing_prices import ChangingPrices
from smlt_tune.backend.platforms.simulated.stores import URL
from smlt_tune.backend.prices import load_prices
from smlt_tune.backend.resource_manager.observations import DEFAULT_STORE, Option, Workload
from smlt_tune.backend.resource_manager.policy import AllocationPolicy, Bounds, JobFacts, check
from smlt_tune.backend.store_costs import StoreCosts
from smlt_tune.backend.task_scheduler import Settings, TaskScheduler
from smlt_tune.errors import FleetClosed, InvalidInput, UsageError
from smlt_tune.runtime import keys, wire
from smlt_tune.runtime.checkpoint import Checkpoints
from smlt_tune.runtime.position import Position
from smlt_tune.runtime.stores.base import ParameterStore

#: The scheduler looks at its time-outs this often, in seconds of virtual time.
TICK_S = 0.1

#: Simulated functions print nothing, so this folder is never made.
_NO_LOGS = Path("/nonexistent")

Describe = Callable[[Any], SimulatedTraining]


@contextmanager
def without_collections() -> Iterator[None]:
    """No search for cycles meanwhile: a quarter of a large simulation, and it has hardly any.

    For programs that do nothing else in this time: it holds for the whole process.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class SimulatedFleet:
    """Runs simulated training functions as jobs, within one budget. Not thread-safe.

    Use it as a context manager. What it shares with :class:`~smlt_tune.backend.fleet.Fleet` has the
    same names and means the same.

    Args:
        platform: Where functions run; other fleets may use it too, under other names.
        budget_usd: What everything together may cost, USD; None for no limit. Never exceeded.
        deadline_s: When everything has to be over, seconds from now; None for never.
        path: Folder for the history, to explain or report on later; None to keep it in memory.
        prices: Name or path of a price list; the platform's price changes apply to it.
        parameter_store_price: Row of the price list that the parameter store is charged by.
        policy: Chooses allocations where the user pins none; None for the resource manager.
        metric: What jobs are compared by when money or time will not do for all of them.
        mode: ``max`` or ``min``: which way the metric is better.
        hang_timeout_s: Shortest silence of a worker that is taken for a hang, seconds; has to be
            above the platform's ``progress_s``.
        tick_s: How often the scheduler looks at its time-outs, seconds. A look costs some
            microseconds of real time for each job under way.
        name: Of the fleet.

    Raises:
        InvalidInput: Lists everything that is wrong with the arguments.
    """

    def __init__(
        self,
        platform: SimulatedPlatform,
        *,
        budget_usd: float | None = None,
        deadline_s: float | None = None,
        path: str | Path | None = None,
        prices: str | Path = "aws-us-east-1-2026-01",
        parameter_store_price: str = "own",
        policy: AllocationPolicy | None = None,
        metric: str | None = None,
        mode: str = "max",
        hang_timeout_s: float = 30.0,
        tick_s: float = TICK_S,
        name: str = "simulated",
    ) -> None:
        mistakes = [
            f"{what} must be a number above 0, not {value!r}"
            for what, value in {"tick_s": tick_s, "deadline_s": deadline_s}.items()
            if not is_positive(value) and not (what == "deadline_s" and value is None)
        ]
        least_s = platform.options.progress_s
        if not is_positive(hang_timeout_s) or hang_timeout_s <= least_s:
            mistakes.append(
                f"hang_timeout_s={hang_timeout_s!r} must be above the platform's progress_s="
                f"{least_s}, or every worker is taken for hung"
            )
        mistakes += metric_mistakes(metric, mode)
        if name in platform.listeners:
            mistakes.append(f"name={name!r}: another fleet on the platform has it")
        if mistakes:
            raise InvalidInput(mistakes)
        self._platform, self._time = platform, platform.time
        self._name, self._tick_s = name, tick_s
        self._followers: tuple[Changes, ...] = ()
        listed = load_prices(prices)
        changes = platform.options.price_changes
        current = ChangingPrices.of(listed, changes, self._time) if changes else listed
        self._states: dict[str, JobState] = {}
        self._handles: dict[str, Job] = {}
        self._unfinished: set[str] = set()
        self._paused: set[str] = set()
        self._asked = 0
        with ExitStack() as stack:
            self._history = stack.enter_context(History(path, clock=self._time))
            if self._history.read():
                raise InvalidInput(f"path={str(path)!r} holds the record of an earlier fleet")
            self._ledger = Ledger(budget_usd, self._record_entry)
            self._costs = StoreCosts(
                self._ledger, current, parameter_store_price, self._time, self._out_of_money
            )
            self._policy = policy or LatePolicy(
                partial(
                    resource_manager,
                    platform,
                    current,
                    {DEFAULT_STORE: (URL, parameter_store_price)},
                    (),
                )
            )
            settings = Settings(
                fleet=name,
                parameter_store=URL,
                object_store=URL,
                store_options={},
                hang_timeout_s=hang_timeout_s,
                deadline_s=None if deadline_s is None else self._time.monotonic() + deadline_s,
                logs=None,
                metric=metric,
                maximize=mode == "max",
            )
            self._scheduler = TaskScheduler(
                settings,
                platform,
                self._policy,
                self._ledger,
                current,
                cast(ParameterStore, platform.parameter_store),
                platform.objects,
                self._time,
                self._record,
                self._ended,
                dict,
            )
            self._costs.begin()
            given = {"budget_usd": budget_usd, "deadline_s": deadline_s, "bill": None}
            self._history.append("fleet", "", {"name": name, "platform": platform.name, **given})
            self._resources = stack.pop_all()
        platform.listeners[name] = self._heard
        self._ticking = self._time.after(tick_s, self._tick)
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def ledger(self) -> Ledger:
        """Every reservation and settlement."""
        return self._ledger

    @property
    def platform(self) -> SimulatedPlatform:
        """Where the functions run."""
        return self._platform

    @property
    def history(self) -> History:
        """The journal of everything that has happened."""
        return self._history

    @property
    def now_s(self) -> float:
        """Virtual time, seconds."""
        return self._time.monotonic()

    def submit(
        self,
        train: Describe,
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
        lease_s: float | None = None,
        workload: Workload | None = None,
        target: Target | None = None,
        seed: int = 0,
        lockstep: bool = False,
        start_from: str | None = None,
        name: str | None = None,
    ) -> Job:
        """Starts a job; see ``Fleet.submit`` for the arguments.

        Args:
            train: Describes what a function would do, given the configuration; called in the
                (simulated) worker, so what it raises fails the job.
            config: Anything.
            goal: ``Cheapest`` or ``Fastest``.
            workers: Pins the number of workers.
            memory_mb: Pins the memory of a function, MB.
            min_workers: Fewest workers to choose.
            max_workers: Most workers to choose.
            min_memory_mb: Smallest memory to choose, MB.
            max_memory_mb: Largest memory to choose, MB.
            store: There is ``default`` only.
            lease_s: Longest time for which money is reserved for a function at once, seconds.
            workload: What the job will compute, if that is known.
            target: When it has trained long enough.
            seed: Recorded only: what is random in a simulation follows from the platform's seed.
            lockstep: Every report waits until ``Job.acknowledge``.
            start_from: ``Report.checkpoint`` or ``JobOutcome.checkpoint`` of a job of this fleet:
                the new job begins where that was.
            name: Key of the job.

        Raises:
            InvalidInput: Lists everything that is wrong with the arguments.
            FleetClosed: The fleet was closed.
        """
        self._check_open()
        job_id = name or f"job-{len(self._states):04d}"
        bounds = Bounds(
            workers,
            memory_mb,
            min_workers,
            max_workers,
            min_memory_mb,
            max_memory_mb,
            store,
            lease_s=lease_s,
        )
        wanted = Cheapest() if goal is None else goal
        mistakes = check(JobFacts(job_id, self._platform.limits, wanted, bounds))
        mistakes += train_mistakes(train) + name_mistakes(job_id)
        if job_id in self._states:
            mistakes.append(f"name={job_id!r} is taken")
        if start_from is not None and not self._known(start_from):
            mistakes.append(f"start_from={start_from!r} is no checkpoint of this fleet, or deleted")
        if mistakes:
            raise InvalidInput(mistakes)
        function = f"{train.__module__}.{getattr(train, '__qualname__', type(train).__name__)}"
        if workload is not None:
            workload = replace(workload, function=function)
        self._platform.programs[self._name, job_id] = cache(partial(train, config))
        spec = JobSpec(job_id, function, "", seed, bounds, wanted, 0, workload, lockstep)
        spec = replace(spec, target=target)
        if start_from is not None:
            spec = self._forked(spec, start_from)
        self._history.append("job", job_id, spec.to_json())
        state = self._states[job_id] = JobState(spec, self._tell)
        state.changed = _Happening(self)
        self._unfinished.add(job_id)
        self._ask(self._scheduler.submit, state)
        return self._job(state)

    def jobs(self) -> list[Job]:
        """All jobs, in the order of their submission."""
        return [self._job(state) for state in self._states.values()]

    def changes(self) -> Changes:
        """What happens to the jobs of the fleet from now on; see :mod:`~.changes`."""
        changes = Changes(_Happening(self), self._unfollow)
        self._followers = (*self._followers, changes)
        if self._closed:
            changes.over()
        return changes

    def options(self, workload: Workload) -> tuple[Option, ...]:
        """What a job would take with each allocation; see ``Fleet.options``."""
        return options_of(
            self._policy, JobFacts("options", self._platform.limits, workload=workload)
        )

    def run_until(self, condition: Callable[[], bool]) -> bool:
        """Lets time pass until something holds, or nothing goes on any more.

        Args:
            condition: Looked at after everything that happens.

        Returns:
            Whether it holds.
        """
        while not condition():
            if self.idle or not self._time.step():
                return condition()
        return True

    def run_until_idle(self) -> None:
        """Lets time pass until every job is over, or paused."""
        self.run_until(lambda: False)

    @property
    def idle(self) -> bool:
        """Whether every job is over, or paused."""
        if self._unfinished or self._asked:
            return False
        return all(self._states[job_id].status == PAUSED for job_id in self._paused)

    def close(self) -> None:
        """Stops what still runs, waits until it is gone, frees everything. Idempotent."""
        if self._closed:
            return
        for job_id in [*self._unfinished, *self._paused]:
            self._ask(self._scheduler.stop, job_id, "the fleet was closed")
        while self._unfinished or self._paused:
            self._time.step()
        self._closed = True
        for changes in self._followers:
            changes.over()
        self._ticking.cancel()
        self._costs.end()
        del self._platform.listeners[self._name]
        self._platform.parameter_store.delete_prefix(keys.FleetKeys(self._name).prefix)
        self._resources.close()

    # --- what happens -----------------------------------------------------------------------------

    def _ask(self, call: Callable[..., None], *args: Any) -> None:
        """A request of the driver, or to it, which counts as something that goes on."""

        def ask() -> None:
            self._asked -= 1
            call(*args)

        self._asked += 1
        self._soon(ask)

    def _soon(self, call: Callable[[], None]) -> None:
        """Right after what goes on now."""
        self._time.after(0.0, call)

    def _tick(self) -> None:
        self._costs.tick()
        self._scheduler.tick()
        self._ticking = self._time.after(self._tick_s, self._tick)

    def _heard(self, event: wire.WorkerEvent) -> None:
        self._soon(partial(self._scheduler.event, event))

    def _ended(self, result: InvocationResult) -> None:
        """Comes after the last event of the worker, which is on the agenda already."""
        self._soon(partial(self._scheduler.ended, result))

    def _out_of_money(self) -> None:
        for job_id in list(self._states):
            self._scheduler.stop(job_id, "budget")

    def _record_entry(self, entry: Entry) -> None:
        self._history.append("ledger", entry.job, vars(entry))

    def _record(self, kind: str, job_id: str, body: dict[str, Any]) -> None:
        self._history.append(kind, job_id, body)
        if kind == "paused" and not body.get("reason"):  # those held back wait for others
            self._unfinished.discard(job_id)
            self._paused.add(job_id)
        elif kind == "resumed":
            self._paused.discard(job_id)
            self._unfinished.add(job_id)
        elif kind == "ended":
            self._unfinished.discard(job_id)
            self._paused.discard(job_id)
            del self._platform.programs[self._name, job_id]

    def _tell(self, state: JobState, report: Report | None) -> None:
        for changes in self._followers:
            changes.tell(Change(self._job(state), state.status, report))

    def _unfollow(self, changes: Changes) -> None:
        self._followers = tuple(one for one in self._followers if one is not changes)

    # --- small things -----------------------------------------------------------------------------

    def _known(self, url: str) -> bool:
        key = url.removeprefix(f"{URL}/")
        job_id = keys.job_of_checkpoint(key)
        return job_id in self._states and key in self._platform.objects.list(key)

    def _forked(self, spec: JobSpec, url: str) -> JobSpec:
        """A job that begins with another one's checkpoint, of which it keeps a copy."""
        donor = url.removeprefix(f"{URL}/")
        at = Position.decode(donor.rpartition("/")[2])
        content = self._platform.objects.get(donor)
        key = Checkpoints(self._platform.objects, spec.job_id).save(at, content)
        return replace(spec, start_from=key, first_report=max(0, at.epoch))

    def _check_open(self) -> None:
        if self._closed:
            raise FleetClosed("the simulated fleet was closed; make another one")

    def _job(self, state: JobState) -> Job:
        job = self._handles.get(state.spec.job_id)
        if job is None:
            job = self._handles[state.spec.job_id] = self._handle(state)
        return job

    def _handle(self, state: JobState) -> Job:
        scheduler = self._scheduler
        return Job(
            state,
            stop=partial(self._ask, scheduler.stop),
            resize=self._resize,
            cost=scheduler.cost_usd,
            logs=_NO_LOGS,
            acknowledge=partial(self._ask, scheduler.acknowledge),
            pause=partial(self._ask, scheduler.pause),
            resume=partial(self._ask, scheduler.resume),
        )

    def _resize(self, job_id: str, bounds: Bounds) -> None:
        goal = self._states[job_id].spec.goal
        mistakes = check(JobFacts(job_id, self._platform.limits, goal, bounds))
        if mistakes:
            raise InvalidInput(mistakes)
        self._ask(self._scheduler.resize, job_id, bounds)


class _Happening(threading.Condition):
    """Whoever waits for it lets virtual time pass."""

    def __init__(self, fleet: SimulatedFleet) -> None:
        super().__init__()
        self._fleet = fleet

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        """Lets time pass until something holds, at most for a time in seconds of it.

        Raises:
            UsageError: Nothing goes on that could make it hold.
        """
        fleet = self._fleet
        until_s = float("inf") if timeout is None else fleet.now_s + timeout
        fleet.run_until(lambda: predicate() or fleet.now_s >= until_s)
        if not predicate() and fleet.idle:
            raise UsageError("nothing goes on any more in the simulated fleet: jobs are paused")
        return predicate()
