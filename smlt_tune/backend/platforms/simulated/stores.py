"""The two storage tiers of a simulation, in memory of this process."""

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from smlt_tune.backend.platforms.simulated.virtual_time import VirtualTime
from smlt_tune.errors import ObjectNotFound
from smlt_tune.runtime.stores.base import Buffer

#: What both are called in payloads. Nobody connects to it: simulated workers have it at hand.
URL = "simulated://memory"


class _Names:
    """A sorted set of names, to find those with a prefix."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def add(self, name: str) -> None:
        insort(self._names, name)

    def remove(self, name: str) -> None:
        del self._names[bisect_left(self._names, name)]

    def below(self, prefix: str) -> list[str]:
        begin = end = bisect_left(self._names, prefix)
        while end < len(self._names) and self._names[end].startswith(prefix):
            end += 1
        return self._names[begin:end]


class SimulatedParameterStore:
    """As much of a parameter store as the scheduler and simulated workers use.

    There are no gradients, and workers hand their events to the fleet without a stream. Nothing
    else happens while somebody asks, so nobody ever waits here: who wants to be woken up says so
    with :meth:`watch`. All keys are deleted by those who wrote them: times to live do not count.
    Not thread-safe.

    Args:
        time: Of the simulation.
    """

    def __init__(self, time: VirtualTime) -> None:
        self._time = time
        self._values: dict[str, bytes] = {}
        self._watchers: dict[str, Callable[[], None]] = {}
        self._names = _Names()

    def watch(self, stream: str, call: Callable[[], None]) -> None:
        """Calls after each announcement in a stream, right after what goes on then."""
        self._watchers[stream] = call

    def unwatch(self, stream: str) -> None:
        """Does so no more."""
        self._watchers.pop(stream, None)

    def put_once(  # noqa: D102 - the contract stands on the protocol
        self, items: Mapping[str, Buffer], *, ttl_s: float, announce: Sequence[str] = ()
    ) -> list[bool]:
        fresh = [key not in self._values for key in items]
        self.put({k: v for k, v in items.items() if k not in self._values}, ttl_s=ttl_s)
        for stream in announce:
            if stream in self._watchers:
                self._time.after(0.0, self._watchers[stream])
        return fresh

    def put(self, items: Mapping[str, Buffer], *, ttl_s: float) -> None:  # noqa: D102
        for key, value in items.items():
            if key not in self._values:
                self._names.add(key)
            self._values[key] = bytes(value)

    def get(self, keys: Sequence[str]) -> list[bytes | None]:  # noqa: D102
        return [self._values.get(key) for key in keys]

    def delete(self, keys: Sequence[str]) -> None:  # noqa: D102
        for key in keys:
            if self._values.pop(key, None) is not None:
                self._names.remove(key)

    def delete_prefix(self, prefix: str) -> int:  # noqa: D102
        names = self._names.below(prefix)
        self.delete(names)
        return len(names)


class SimulatedObjectStore:
    """An object store in memory. Not thread-safe."""

    url = URL

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._names = _Names()

    def put(self, key: str, content: Buffer, *, if_absent: bool = False) -> bool:  # noqa: D102
        known = key in self._objects
        if known and if_absent:
            return False
        if not known:
            self._names.add(key)
        self._objects[key] = bytes(content)
        return True

    def get(self, key: str) -> bytes:  # noqa: D102
        if key not in self._objects:
            raise ObjectNotFound(f"there is no object {key} in the simulated object store")
        return self._objects[key]

    def list(self, prefix: str) -> list[str]:  # noqa: D102
        return self._names.below(prefix)

    def delete(self, keys: Sequence[str]) -> None:  # noqa: D102
        for key in keys:
            if self._objects.pop(key, None) is not None:
                self._names.remove(key)


if TYPE_CHECKING:
    from smlt_tune.runtime.stores.base import ObjectStore

    _objects: ObjectStore = SimulatedObjectStore()
