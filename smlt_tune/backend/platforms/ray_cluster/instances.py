"""Actors that run functions or wait to be used again, and whether there is room for one more."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from smlt_tune.backend.platforms.base import Invocation
from smlt_tune.backend.platforms.ray_cluster.cluster import Cluster
from smlt_tune.backend.platforms.ray_cluster.instance import FunctionInstance
from smlt_tune.backend.platforms.ray_cluster.options import Options
from smlt_tune.errors import Throttled

#: How many pieces of output may be under way: a function that prints faster than the client reads
#: waits, instead of filling the client's memory.
_PIECES = 64


@dataclass(eq=False)
class Actor:
    """The client's handle on one actor.

    Attributes:
        handle: Ray's.
        memory_mb: Size of its functions.
        needs: What Ray has reserved for it.
        used: It has started a function: so it is up.
        idle_since: When it ended its last function, seconds; None while it runs one.
    """

    handle: Any
    memory_mb: int
    needs: dict[str, float]
    used: bool = False
    idle_since: float | None = None

    def run(self, invocation: Invocation) -> Any:
        """Starts a function; the stream of what it says."""
        known = Invocation(
            invocation.invocation_id, invocation.memory_mb, invocation.timeout_s, b""
        )
        method = self.handle.run.options(
            num_returns="streaming", _generator_backpressure_num_objects=_PIECES
        )
        return method.remote(known, invocation.payload, logs=invocation.log_path is not None)

    def cancel(self, invocation_id: str) -> None:
        """Asks it to end a function; returns at once."""
        self.handle.cancel.options(concurrency_group=CONTROL).remote(invocation_id)

    def close(self) -> Any:
        """Asks it to end everything; a reference to wait for."""
        return self.handle.close.options(concurrency_group=CONTROL).remote()


#: Calls that do not wait for the function that runs.
CONTROL = "control"


class Instances:
    """The actors of a platform. Not thread-safe: the platform holds its lock.

    Args:
        cluster: Where they live.
        options: Of the platform.
        concurrency: How many may exist.
    """

    def __init__(self, cluster: Cluster, options: Options, concurrency: int) -> None:
        self._cluster = cluster
        self._options = options
        self._concurrency = concurrency
        self._actors: OrderedDict[Actor, None] = OrderedDict()  # least recently used first
        self._kind = cluster.ray.remote(
            concurrency_groups={CONTROL: 1}, max_restarts=0, max_task_retries=0
        )(FunctionInstance)
        self._of_node = {
            "time_limit_s": options.time_limit_s,
            "cores_per_vcpu": options.cores_per_vcpu,
            "keep_alive_s": options.keep_alive_s,
            "isolation": options.isolation,
            "entry": options.entry,
            "preload": tuple(options.preload),
        }

    def take(self, memory_mb: int) -> Actor:
        """An idle actor of that size, else a new one.

        Raises:
            Throttled: There is no room for one.
        """
        for actor in self._idle():
            if actor.memory_mb == memory_mb:
                actor.idle_since = None
                self._actors.move_to_end(actor)
                return actor
        needs = self._options.resources(memory_mb)
        self._make_room(needs)
        made = Actor(
            handle=self._kind.options(
                num_cpus=needs["CPU"],
                num_gpus=needs.get("GPU"),
                memory=int(needs["memory"]),
            ).remote(self._of_node),
            memory_mb=memory_mb,
            needs=needs,
        )
        self._actors[made] = None
        return made

    def give_back(self, actor: Actor, now: float) -> None:
        """It has ended its function and may be used again; ``now`` in seconds."""
        if self._options.keep_alive_s == 0:
            self.drop(actor)
        elif actor in self._actors:
            actor.idle_since = now

    def drop(self, actor: Actor) -> None:
        """Ends an actor at once, with all that it runs."""
        if actor in self._actors:
            del self._actors[actor]
            actor.idle_since = None
            with suppress(self._cluster.ray.exceptions.RayError):  # Ray itself is gone
                self._cluster.ray.kill(actor.handle)

    def close(self, timeout_s: float) -> None:
        """Ends all actors; waits for what they have started, seconds at most."""
        ray = self._cluster.ray
        with suppress(ray.exceptions.RayError):
            closing = [actor.close() for actor in self._actors if actor.used]
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=timeout_s)
        for actor in list(self._actors):
            self.drop(actor)

    def ask_for_what_there_is(self) -> None:
        """A request that stands may shrink: whoever still waits for room asks again."""
        if self._cluster.asked:
            self._cluster.ask_for([actor.needs for actor in self._actors])

    def _idle(self) -> list[Actor]:
        return [actor for actor in self._actors if actor.idle_since is not None]

    def _make_room(self, needs: dict[str, float]) -> None:
        """Ends idle actors of other sizes for a new one. Raises Throttled."""
        total = self._cluster.total()
        idle = self._idle()
        while len(self._actors) >= self._concurrency or self._lacking(needs, total):
            if not idle:
                raise Throttled(self._why_not(needs, total))
            self.drop(idle.pop(0))

    def _lacking(self, needs: dict[str, float], total: dict[str, float]) -> list[str]:
        """Resources of which the cluster has less than all actors need together with this one."""
        return [
            name
            for name, amount in needs.items()
            if amount + sum(a.needs[name] for a in self._actors) > total.get(name, 0.0) + 1e-6
        ]

    def _why_not(self, needs: dict[str, float], total: dict[str, float]) -> str:
        running = len(self._actors)
        if running >= self._concurrency:
            return (
                f"{running} functions are running, concurrency={self._concurrency} allows no "
                "more: wait until one has ended"
            )
        lacking = " and ".join(self._lacking(needs, total))
        told = f"{running} functions are running and the cluster has no {lacking} left for another"
        if not self._options.autoscaling:
            return f"{told}: wait until one has ended"
        # NOTE: how many functions wait is not known here. Ask for twice as many as there are: so
        # does Ray's own autoscaler (upscaling_speed 1.0).
        more = min(max(1, running), self._concurrency - running)
        self._cluster.ask_for([*(actor.needs for actor in self._actors), *[needs] * more])
        return f"{told}: wait until the autoscaler, which was asked, has added nodes"
