"""Jobs without a platform: workers are threads, and the test is the scheduler.

Threads share the global random generators, so training functions for several workers must not use
them.
"""

import contextlib
import threading
import time
import uuid
from dataclasses import replace

from smlt_tune.runtime import keys, wire
from smlt_tune.runtime.aggregator import Superseded
from smlt_tune.runtime.checkpoint import Checkpoints
from smlt_tune.runtime.handover import Leave
from smlt_tune.runtime.session import Home, Session
from smlt_tune.runtime.stores.directory import DirectoryStore
from smlt_tune.runtime.stores.redis_store import RedisStore


class Killed(BaseException):
    """Raised in a training function: its worker vanishes without a word."""


class Work(threading.Thread):
    """One invocation. Afterwards ``value`` is what the function returned, ``error`` what it raised;
    ``how`` is "finished", "left", "superseded", "killed" or "failed"."""

    def __init__(self, job, function, spec):
        super().__init__(daemon=True)
        self.job, self.function, self.spec = job, function, spec
        self.value = self.error = None
        self.how = "running"

    def run(self):
        store = RedisStore(self.job.url)
        try:
            with Session(Home(self.spec, store, self.job.objects)) as session:
                self.value = self.function()
                session.finish(self.value)
            self.how = "finished"
        except Leave:
            self.how = "left"
        except Superseded:
            self.how = "superseded"
        except Killed:
            self.how = "killed"
        except BaseException as error:
            self.how, self.error = "failed", error
        finally:
            store.close()


class Job:
    """One job over a parameter store and a directory."""

    def __init__(self, server, folder, *, seed=1, datasets=None):
        self.url = server.unix_url
        self.store = RedisStore(self.url)
        self.objects = DirectoryStore(folder)
        self.fleet = uuid.uuid4().hex
        self.keys = keys.FleetKeys(self.fleet)
        self.seed = seed
        self.datasets = datasets or {}
        self.generation = -1
        self.works = []
        self._cursor = "0"
        self._events = []

    def spec(self, rank, workers, **changes):
        spec = wire.WorkerSpec(
            fleet=self.fleet,
            job="j",
            generation=self.generation,
            rank=rank,
            workers=workers,
            incarnation=0,
            joining=False,
            shards=0,
            seed=self.seed,
            function="",
            config="",
            datasets=self.datasets,
            parameter_store=self.url,
            object_store=self.objects.url,
            store_options={},
            vcpus=1.0,
            timeout_s=600.0,
            progress_s=0.0,
        )
        return replace(spec, **changes)

    @property
    def names(self):
        return self.keys.generation("j", self.generation)

    def begin(self, function, workers=1, *, start=None, leave=False, **changes):
        """Starts a generation and returns its invocations."""
        self.generation += 1
        said = {self.names.open: b"1", self.names.start: wire.Start(start).encode()}
        if leave:
            said[self.names.leave] = b"1"
        if changes.get("lockstep"):  # with a client that consumes everything at once
            said[self.names.consumed] = b"1000000"
        self.store.put(said, ttl_s=600)
        self.works = [
            Work(self, function, self.spec(r, workers, **changes)) for r in range(workers)
        ]
        for work in self.works:
            work.start()
        return self.works

    def replace(self, rank, function):
        """Starts the replacement of a worker that was killed."""
        spec = self.works[rank].spec
        spec = replace(spec, incarnation=spec.incarnation + 1, joining=True)
        self.works[rank] = Work(self, function, spec)
        self.works[rank].start()

    def join(self, timeout_s=60):
        """Waits until every worker has ended; fences those off that have not."""
        until = time.monotonic() + timeout_s
        for work in self.works:
            work.join(max(0.0, until - time.monotonic()))
        hang = [work.spec.rank for work in self.works if work.is_alive()]
        self.store.delete([self.names.open])
        for work in self.works:
            work.join(10)
        assert not hang, f"workers {hang} hang"
        return self.works

    def run(self, function, workers=1, **changes):
        """Runs one generation to its end; raises what a worker raised."""
        self.begin(function, workers, **changes)
        for work in self.join():
            if work.error is not None:
                raise work.error
        return self.works

    def run_with_leaves(self, function, workers, *, most=300, **changes):
        """Hands over after every training iteration until the job is done.

        ``workers`` is a function of the generation. Returns the last generation's values.
        """
        checkpoint = None
        for generation in range(most):
            n = workers(generation)
            works = self.run(function, n, start=checkpoint, leave=True, **changes)
            how = {work.how for work in works}
            assert len(how) == 1, how
            if how == {"finished"}:
                return [work.value for work in works], generation
            assert how == {"left"}
            checkpoint = self.handed_over()
        raise AssertionError(f"not done after {most} generations")

    def events(self, kind=wire.WorkerEvent):
        """All events up to now."""
        while found := self.store.read(self.keys.events, self._cursor, timeout_s=0):
            self._cursor = found[-1][0]
            self._events += [wire.WorkerEvent.decode(message) for _, message in found]
        return [event for event in self._events if isinstance(event, kind)]

    def handed_over(self):
        """The one checkpoint that a generation has left behind."""
        told = self.events(wire.HandedOver)
        found = {e.checkpoint for e in told if e.generation == self.generation}
        assert len(found) == 1, found
        return found.pop()

    def latest(self):
        return Checkpoints(self.objects, "j").latest()

    def reports(self):
        """What the scheduler takes of the reports: those in turn."""
        taken = []
        for event in self.events(wire.Reported):
            if event.index == len(taken):
                taken.append(event.metrics)
        return taken

    def close(self):
        with contextlib.suppress(Exception):
            self.store.delete([self.names.open])
        for work in self.works:
            work.join(10)
        self.store.delete_prefix(self.keys.prefix)
        self.store.close()
