"""A scheduler driven by hand: no threads, no processes, and time passes when a test says so."""

from collections import Counter

from smlt_tune.backend.job import JobSpec, JobState
from smlt_tune.backend.ledger import Ledger
from smlt_tune.backend.platforms.base import InvocationResult, PlatformLimits
from smlt_tune.backend.prices import load_prices
from smlt_tune.backend.resource_manager.policy import Bounds, PinnedOrDefault
from smlt_tune.backend.task_scheduler import (
    Settings,
    TaskScheduler,
)
from smlt_tune.errors import (
    StoreUnavailable,
    Throttled,
)
from smlt_tune.runtime import keys, wire
from smlt_tune.runtime.checkpoint import Checkpoints
from smlt_tune.runtime.position import Position
from smlt_tune.runtime.stores.directory import DirectoryStore

PRICES = load_prices()
LIMITS = PlatformLimits(
    min_memory_mb=128, max_memory_mb=8192, time_limit_s=100.0, concurrency=8, max_workers=8
)
WORST = PRICES.worst_case_usd(1024, 100.0, 1, init_s=0.0)


class FakeClock:
    now = 1000.0

    def monotonic(self):
        return self.now

    wall = monotonic

    def sleep(self, seconds):
        raise AssertionError("the scheduler must not wait")


class FakeStore:
    """As much of a parameter store as a scheduler uses."""

    def __init__(self):
        self.values = {}
        self.broken = False

    def put(self, items, *, ttl_s):
        self._check()
        self.values.update(items)

    def put_once(self, items, *, ttl_s, announce=()):
        self._check()
        fresh = [key not in self.values for key in items]
        self.values = {**items, **self.values}
        return fresh

    def delete(self, names):
        self._check()
        for name in names:
            self.values.pop(name, None)

    def delete_prefix(self, prefix):
        self._check()
        self.delete([name for name in self.values if name.startswith(prefix)])

    def _check(self):
        if self.broken:
            raise StoreUnavailable("no answer")


class FakePlatform:
    """Runs nothing: the test says what invocations do."""

    name = fingerprint = "fake"

    def __init__(self, limits):
        self.limits = limits
        self.calls = {}
        self.invoked = []
        self.cancelled = set()
        self.room = 10**9
        self.error = None

    def invoke(self, invocation, on_done):
        if self.error:
            raise self.error
        if self.room <= 0:
            raise Throttled("too many")
        self.room -= 1
        spec = wire.WorkerSpec.decode(invocation.payload)
        assert invocation.invocation_id not in self.invoked
        self.invoked.append(invocation.invocation_id)
        self.calls[invocation.invocation_id] = (invocation, spec)

    def vcpus(self, memory_mb):
        return memory_mb / 1769


class CancellingPlatform(FakePlatform):
    def cancel(self, invocation_id):
        self.cancelled.add(invocation_id)


class World:
    """A scheduler and everything around it."""

    def __init__(
        self,
        folder,
        *,
        budget_usd=None,
        limits=LIMITS,
        platform=CancellingPlatform,
        policy=None,
        gradient_stores=(),
        rent=lambda store: None,
        **settings,
    ):
        self.clock, self.store = FakeClock(), FakeStore()
        self.platform = platform(limits)
        self.objects = DirectoryStore(folder / "objects")
        self.journal = []
        self.ledger = Ledger(budget_usd, self.journal.append)
        self.history, self.profiles = [], []
        self.gradient_stores = {name: FakeStore() for name in gradient_stores}
        self.states = {}
        options = {
            "fleet": "f",
            "parameter_store": "redis://",
            "object_store": self.objects.url,
            "store_options": {},
            "hang_timeout_s": 30.0,
            "deadline_s": None,
            "logs": folder / "logs",
            "gradient_stores": {name: f"redis://{name}" for name in gradient_stores},
        }
        self.scheduler = TaskScheduler(
            Settings(**{**options, **settings}),
            self.platform,
            policy or PinnedOrDefault(),
            self.ledger,
            PRICES,
            self.store,
            self.objects,
            self.clock,
            lambda kind, job, body: self.history.append((kind, job, body)),
            lambda result: None,
            dict,
            self.gradient_stores,
            rent,
            self.profiles.append,
        )

    def submit(
        self,
        name="a",
        workers=1,
        memory_mb=1024,
        number=0,
        *,
        workload=None,
        lockstep=False,
        first_report=0,
        **bounds,
    ):
        spec = JobSpec(
            name,
            "f",
            "c",
            0,
            Bounds(workers, memory_mb, **bounds),
            workload=workload,
            lockstep=lockstep,
            first_report=first_report,
        )
        state = self.states[name] = JobState(spec)
        self.scheduler.submit(state, next_number=number)
        return state

    def running(self, job="a", generation=None):
        """Ids of the invocations under way, in the order of their ranks."""
        return sorted(
            name
            for name, (_, spec) in self.platform.calls.items()
            if spec.job == job and generation in (None, spec.generation)
        )

    def say(self, kind, job, generation, rank, incarnation=0, **content):
        event = kind(job, generation, rank, incarnation, **content)
        self.scheduler.event(wire.WorkerEvent.decode(event.encode()))

    def ready(self, job="a", generation=0, ranks=(0,), incarnation=0):
        for rank in ranks:
            self.say(wire.Ready, job, generation, rank, incarnation)

    def workload(self, job="a", generation=0, batch=64, iterations=1000, parameters=1000, rank=0):
        content = {"parameters": parameters, "gradient_bytes": 4 * parameters}
        content |= {"flops_per_sample": 6.0 * parameters, "activation_bytes": 100.0}
        content |= {"batch": batch, "iterations": iterations}
        self.say(wire.Workload, job, generation, rank, **content)

    def progress(
        self,
        job="a",
        generation=0,
        ranks=(0,),
        at=0,
        *,
        incarnation=0,
        waiting=False,
        slowest=0.1,
        **measured,
    ):
        content = {"chunk": 0, "iteration_s": 0.0, "sync_s": 0.0, "left": None}
        content |= {"other_share": None, "peak_mb": 100.0, **measured}
        for rank in ranks:
            self.say(
                wire.Progress,
                job,
                generation,
                rank,
                incarnation,
                position=Position(0, 1, at).encode(),
                iterations=at,
                slowest_s=slowest,
                batch=10,
                waiting=waiting,
                **content,
            )

    def train(self, job="a", workers=1, generation=0, at=1):
        """All workers of a generation come in and begin."""
        self.ready(job, generation, range(workers))
        self.progress(job, generation, range(workers), at)

    def finished(
        self, job="a", generation=0, rank=0, value=None, reports=(), incarnation=0,
        other_share=None, end_s=None,
    ):  # fmt: skip
        self.say(
            wire.Finished,
            job,
            generation,
            rank,
            incarnation,
            checkpoint=None,
            value=value,
            reports=list(reports),
            other_share=other_share,
            end_s=end_s,
        )

    def save(self, job="a", at=5):
        return Checkpoints(self.objects, job).save(Position(0, 1, at), b"state")

    def hand_over(self, job="a", generation=0, ranks=(0,), at=5):
        key = self.save(job, at)
        for rank in ranks:
            self.say(wire.HandedOver, job, generation, rank, checkpoint=key)
        return key

    def end(self, name, ending="returned", seconds=1.0, **facts):
        invocation, _ = self.platform.calls.pop(name)
        self.platform.room += 1
        assert seconds <= invocation.timeout_s
        self.scheduler.ended(InvocationResult(name, ending, seconds, **facts))

    def end_all(self, job="a", generation=None, ending="returned", **facts):
        for name in self.running(job, generation):
            self.end(name, ending, **facts)

    def after(self, seconds):
        self.clock.now += seconds
        self.scheduler.tick()

    def key(self, what, job="a", generation=0):
        names = keys.FleetKeys("f").generation(job, generation)
        return self.store.values.get(getattr(names, what))

    def start(self, job="a", generation=0):
        return wire.Start.decode(self.key("start", job, generation)).checkpoint

    def over(self, *jobs):
        """Everything is over and paid for once; every job was told so once."""
        told = Counter(job for kind, job, _ in self.history if kind == "ended")
        assert told == Counter(jobs or ["a"])
        assert self.platform.calls == {}
        assert self.ledger.reserved_usd == 0
        entries = Counter(
            (e.entry_id, "settled" if e.settled_usd is not None else "reserved")
            for e in self.journal
        )
        assert set(entries.values()) <= {1}
        assert len(entries) == 2 * len(self.ledger.entries())
        assert not [key for key in self.store.values if key.endswith((":open", ":start"))]
        assert self.scheduler.idle
        assert self.scheduler._free_functions() == self.platform.limits.functions
        return [self.states[job].status for job in (jobs or ["a"])]


def names(generation, ranks, incarnation=0, job="a"):
    return [f"{job}.g{generation}.r{rank}.i{incarnation}" for rank in ranks]
