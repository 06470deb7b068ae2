"""A Ray cluster as a platform: what the end client talks to."""

# ruff: noqa: D102 - the contracts stand on the protocols

from __future__ import annotations

import asyncio
import logging
import math
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Any

from smlt_tune.backend.platforms.base import (
    MB_PER_VCPU,
    Bill,
    Done,
    Invocation,
    InvocationResult,
    PlatformLimits,
    check_invocation,
)
from smlt_tune.backend.platforms.local.options import (
    MAX_MEMORY_MB,
    MIN_MEMORY_MB,
    PRELOAD,
    check_delivery,
)
from smlt_tune.backend.platforms.local.probe import IsolationName
from smlt_tune.backend.platforms.ray_cluster.cluster import Cluster, check_gpus, last_line
from smlt_tune.backend.platforms.ray_cluster.instance import Accepted
from smlt_tune.backend.platforms.ray_cluster.instances import Actor, Instances
from smlt_tune.backend.platforms.ray_cluster.options import ACTOR_MB, Options
from smlt_tune.errors import InvalidInput, PlatformError
from smlt_tune.runtime.clock import SYSTEM_CLOCK, Clock

_log = logging.getLogger(__name__)

#: How long an actor may take to end a function that it was told to end; then it is killed, seconds.
END_S = 10.0


class RayPlatform:
    """Functions as actors of a Ray cluster, limited on their nodes as by the local platform.

    Memory gives the CPU share: a function reserves ``memory_mb`` and 96 MB for the actor itself,
    and ``cores_per_vcpu`` CPUs of Ray for each 1,769 MB, and gets no more. Its output is sent to
    the client. Actors belong to the client's process: they end with it, however it ends. Safe to
    use from several threads; a forked child of the client must not use it.

    On a cluster of several machines, workers need a parameter store and an object store that all
    nodes reach: give the fleet both.

    Args:
        address: ``"auto"`` or ``"host:port"`` for a running cluster, ``"local"`` for a new one on
            this machine, None for Ray's own choice: ``RAY_ADDRESS``, else a new one. A cluster that
            this process is connected to is used in any case, and stays; one that was started here
            ends with the platform.
        concurrency: How many functions may run at once, warm ones that wait included. None: as
            many of 1,769 MB as the cluster has room for now.
        time_limit_s: Longest time an invocation may ask for, seconds. Ray knows none; an hour keeps
            small what is lost with a node, and makes handing over cost less than a percent.
        cores_per_vcpu: CPUs of Ray behind one virtual CPU.
        gpus: GPUs of each function: a share of one, or a whole number.
        autoscaling: Whether the cluster adds nodes when asked. What does not fit is throttled until
            it has.
        keep_alive_s: How long an idle actor stays warm and keeps its resources, seconds.
        isolation: How limits are enforced, as for the local platform.
        entry: Function that is run with the payload, as ``package.module:function``.
        preload: Modules that actors import beforehand; those that are not installed are left out.
        runtime_env: For ``ray.init``, if nodes lack smlt_tune or what functions need: ``{"pip":
            [...]}``, say, or ``{"py_modules": [smlt_tune]}`` where only the package is missing.
            Where this process is connected already, ``ray.init`` was to have it.
        clock: Source of time.

    Raises:
        InvalidInput: Options are wrong; lists every mistake.
        PlatformError: There is no Ray, no cluster, or a node that cannot run functions.
    """

    name = "ray"

    def __init__(
        self,
        address: str | None = None,
        *,
        concurrency: int | None = None,
        time_limit_s: float = 3600.0,
        cores_per_vcpu: float = 1.0,
        gpus: float = 0,
        autoscaling: bool = False,
        keep_alive_s: float = 60.0,
        isolation: IsolationName = "auto",
        entry: str = "smlt_tune.runtime.worker:run",
        preload: Sequence[str] = PRELOAD,
        runtime_env: Mapping[str, Any] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._options = Options(
            address=address,
            concurrency=concurrency,
            time_limit_s=time_limit_s,
            cores_per_vcpu=cores_per_vcpu,
            gpus=gpus,
            autoscaling=autoscaling,
            keep_alive_s=keep_alive_s,
            isolation=isolation,
            entry=entry,
            preload=preload,
            runtime_env=runtime_env,
        )
        self._clock = clock
        self._owner = os.getpid()
        self._cluster = Cluster(address, runtime_env)
        with ExitStack() as undo:
            undo.callback(self._cluster.close)
            if not autoscaling:
                check_gpus(self._cluster, gpus)
            self._limits = self._find_limits()
            undo.pop_all()
        # The state. While it is held, Ray is asked for nothing that waits for an actor.
        self._lock = threading.Lock()
        self._instances = Instances(self._cluster, self._options, self._limits.concurrency)
        self._executions: dict[str, _Execution] = {}
        self._mb_ms = 0
        self._requests = 0
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._follower = threading.Thread(
            target=self._loop.run_forever, name="smlt-ray-events", daemon=True
        )
        self._results: queue.SimpleQueue[tuple[Done, InvocationResult] | None] = queue.SimpleQueue()
        self._teller = threading.Thread(
            target=self._tell_results, name="smlt-ray-results", daemon=True
        )
        self._follower.start()
        self._teller.start()

    def _find_limits(self) -> PlatformLimits:
        """What the cluster allows as it stands."""
        options, cluster = self._options, self._cluster
        total, needs = cluster.total(), options.resources(MB_PER_VCPU)
        room = int(min(total.get(name, 0.0) / amount for name, amount in needs.items()))
        concurrency = options.concurrency or max(1, room)
        most_mb = MAX_MEMORY_MB
        if not options.autoscaling:
            most_mb = min(most_mb, int(cluster.largest("memory") / 2**20) - ACTOR_MB)
            most_cores = cluster.largest("CPU")
            while most_mb > MIN_MEMORY_MB and options.cores(most_mb) > most_cores:
                most_mb -= 1
        if most_mb < MIN_MEMORY_MB:
            raise PlatformError(
                f"no node of the cluster has room for the smallest function: {MIN_MEMORY_MB} MB "
                f"and {ACTOR_MB} MB for its actor; start Ray with more memory"
            )
        return PlatformLimits(
            min_memory_mb=MIN_MEMORY_MB,
            max_memory_mb=most_mb,
            time_limit_s=float(options.time_limit_s),
            concurrency=concurrency,
            max_workers=concurrency,
        )

    @property
    def fingerprint(self) -> str:
        options = self._options
        gpus = f":{options.gpus:g}gpus" if options.gpus else ""
        of_nodes = "+".join(self._cluster.processors)
        return f"ray:{options.isolation}:{options.cores_per_vcpu:.4g}{gpus}:{of_nodes}"

    @property
    def limits(self) -> PlatformLimits:
        return self._limits

    @property
    def elsewhere(self) -> bool:
        return self._options.autoscaling or self._cluster.elsewhere

    def vcpus(self, memory_mb: int) -> float:
        return self._options.vcpus(memory_mb)

    def cores(self, memory_mb: int) -> float:
        """Real cores that a function of that size may use."""
        return self._options.cores(memory_mb)

    def bill(self) -> Bill:
        with self._lock:
            return Bill(gb_s=self._mb_ms / 1024 / 1000, requests=self._requests)

    def invoke(self, invocation: Invocation, on_done: Done) -> None:
        check_invocation(invocation, self._limits)
        check_delivery(invocation)
        name = invocation.invocation_id
        with self._lock, ExitStack() as undo:
            if self._closed:
                raise PlatformError("the Ray platform is closed; make a new one")
            if name in self._executions:
                raise InvalidInput(f"invocation_id={name!r}: an invocation of that name is running")
            log = None
            if invocation.log_path is not None:
                log = undo.enter_context(invocation.log_path.open("ab", buffering=0))
            try:
                self._cluster.check_connected()
                actor = self._instances.take(invocation.memory_mb)
                undo.callback(self._instances.drop, actor)
                stream = actor.run(invocation)
            except self._cluster.ray.exceptions.RayError as error:
                raise PlatformError(f"Ray cannot run a function: {last_line(error)}") from error
            undo.pop_all()
            execution = _Execution(invocation, on_done, actor, log, self._clock.monotonic())
            self._executions[name] = execution
            self._requests += 1
            execution.followed = asyncio.run_coroutine_threadsafe(
                self._follow(execution, stream), self._loop
            )

    def cancel(self, invocation_id: str) -> None:
        """Ends it at once; ``on_done`` follows with ``cancelled``. Unknown ids are ignored."""
        with self._lock:
            execution = self._executions.get(invocation_id)
            if execution is not None:
                self._end(execution, "cancelled")

    def close(self) -> None:
        """Ends all functions, waits for them, frees everything. Idempotent.

        Functions that are still running end as ``cancelled``.
        """
        if os.getpid() != self._owner:  # a forked child: nothing here is its own
            return
        with self._lock:
            already, self._closed = self._closed, True
            running = list(self._executions.values())
            for execution in running:
                self._end(execution, "the platform was closed")
        wait([execution.followed for execution in running if execution.followed])
        if not already:
            with self._lock:
                self._instances.close(END_S)
            self._cluster.close()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._results.put(None)
        self._follower.join()
        self._loop.close()
        if self._teller is not threading.current_thread():
            self._teller.join()

    def __enter__(self) -> RayPlatform:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RayPlatform(concurrency={self._limits.concurrency})"

    def _end(self, execution: _Execution, why: str) -> None:
        """Ends what runs. Holds the lock."""
        if execution.ended_because:
            return
        execution.ended_because = why
        if not execution.actor.used:  # it waits for its actor, which may wait for a node
            self._instances.drop(execution.actor)
            return
        if execution.accepted is not None:
            execution.actor.cancel(execution.invocation.invocation_id)
        # else it is about to be accepted: see _on_accepted
        self._loop.call_soon_threadsafe(self._end_in_time, execution)

    # In the thread that follows what functions say

    def _end_in_time(self, execution: _Execution) -> None:
        execution.last_resort = self._loop.call_later(END_S, self._force_end, execution)

    def _force_end(self, execution: _Execution) -> None:
        """The actor has not ended what it was told to end: Ray kills it, and nobody waits."""
        with self._lock:
            self._instances.drop(execution.actor)
        if execution.following is not None:
            execution.following.cancel()

    async def _follow(self, execution: _Execution, stream: Any) -> None:
        execution.following = asyncio.current_task()
        result, lost = None, ""
        try:
            async for reference in stream:
                said = await reference
                if isinstance(said, Accepted):
                    self._on_accepted(execution)
                elif isinstance(said, bytes):
                    execution.write(said)
                else:
                    result = said
        except asyncio.CancelledError:  # by _force_end
            lost = "it did not answer"
        except Exception as error:  # noqa: BLE001 - whatever Ray raises: the actor is lost
            lost = last_line(error)
        if execution.last_resort is not None:
            execution.last_resort.cancel()
        with self._lock:
            if result is None:
                self._instances.drop(execution.actor)
                result = self._of_lost(execution, lost)
            else:
                self._keep_warm(execution.actor)
                result = self._of_ended(execution, result)
            self._mb_ms += round(result.billed_s * 1000) * execution.invocation.memory_mb
            del self._executions[result.invocation_id]
            self._instances.ask_for_what_there_is()
        if execution.log is not None:
            execution.log.close()
        self._results.put((execution.on_done, result))

    def _on_accepted(self, execution: _Execution) -> None:
        with self._lock:
            execution.accepted = self._clock.monotonic()
            execution.actor.used = True
            if execution.ended_because:
                execution.actor.cancel(execution.invocation.invocation_id)

    def _keep_warm(self, actor: Actor) -> None:
        now = self._clock.monotonic()
        self._instances.give_back(actor, now)
        self._loop.call_later(self._options.keep_alive_s, self._end_idle, actor, now)

    def _end_idle(self, actor: Actor, since: float) -> None:
        with self._lock:
            if actor.idle_since == since:
                self._instances.drop(actor)
                self._instances.ask_for_what_there_is()

    def _of_lost(self, execution: _Execution, how: str) -> InvocationResult:
        """The result of an invocation whose actor cannot tell it any more."""
        invocation, accepted = execution.invocation, execution.accepted
        ran_s = 0.0 if accepted is None else self._clock.monotonic() - accepted
        why = execution.ended_because
        return InvocationResult(
            invocation_id=invocation.invocation_id,
            ending="cancelled" if why else "crashed",
            billed_s=max(1, math.ceil(min(ran_s, invocation.timeout_s) * 1000)) / 1000,
            start_s=0.0 if accepted is None else accepted - execution.called,
            detail=why or f"the function's actor died: {how}",
        )

    def _of_ended(self, execution: _Execution, told: InvocationResult) -> InvocationResult:
        """The result of an invocation that the actor has told, seen from here."""
        began = execution.called if execution.accepted is None else execution.accepted
        detail = told.detail
        if told.ending == "cancelled":
            detail = execution.ended_because or told.detail
        return replace(told, start_s=began - execution.called + told.start_s, detail=detail)

    def _tell_results(self) -> None:
        while (item := self._results.get()) is not None:
            on_done, result = item
            try:
                on_done(result)
            except Exception:  # noqa: BLE001 - the caller's code; results of others must go on
                _log.exception("on_done of %s raised", result.invocation_id)


@dataclass(eq=False)
class _Execution:
    """One invocation that runs.

    Attributes:
        invocation: Which.
        on_done: Called when it is over.
        actor: Where.
        log: Where its output goes, if anywhere.
        called: When it was invoked, seconds.
        accepted: When its actor had it, seconds.
        ended_because: Why the client has ended it, if it has.
        followed: Done when everything that it says has been read.
        following: The task that reads it.
        last_resort: Kills the actor if it does not end it when told to.
    """

    invocation: Invocation
    on_done: Done
    actor: Actor
    log: IO[bytes] | None
    called: float
    accepted: float | None = None
    ended_because: str = ""
    followed: Future[None] | None = None
    following: asyncio.Task[None] | None = None
    last_resort: asyncio.TimerHandle | None = None

    def write(self, output: bytes) -> None:
        """Appends to the log; one that cannot be written must not end the function."""
        try:
            if self.log is not None:
                self.log.write(output)
        except OSError as error:
            _log.warning("output of %s is lost: %s", self.invocation.invocation_id, error)
            self.log = None


if TYPE_CHECKING:
    from smlt_tune.backend.platforms.base import Cancels, Platform, Scales, Spreads

    _: Platform = RayPlatform()
    _cancels: Cancels = RayPlatform()
    _scales: Scales = RayPlatform()
    _spreads: Spreads = RayPlatform()
