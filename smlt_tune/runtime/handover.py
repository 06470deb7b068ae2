"""How a worker comes in, keeps in touch, and goes: its side of the hand-over (invariant 3).

Coming in. A fresh generation waits until the scheduler has written its ``start`` key, which names a
checkpoint. The replacement of a dead worker asks the survivors instead: they are blocked in the
iteration that the dead one did not finish, and one of them saves the state of that iteration's
beginning. Nobody rolls back.

Going. The scheduler (or a worker whose time is up) asks for a hand-over; the aggregator makes all
workers agree on the iteration; rank 0 saves the checkpoint, and the others stay until it is safe.
While a job in lockstep waits in a report, there is nothing to agree on: rank 0 leaves, and the
others, who cannot get past the next synchronisation without it, follow.
"""

import json
from collections.abc import Callable
from typing import Any

from smlt_tune.runtime import wire
from smlt_tune.runtime.aggregator import LOOK_AROUND_S, TTL_S, HierarchicalAggregator
from smlt_tune.runtime.clock import Clock
from smlt_tune.runtime.keys import FleetKeys
from smlt_tune.runtime.stores.base import ParameterStore

#: A waiting worker gives a sign of life this often, in seconds.
SIGN_OF_LIFE_S = 0.5

#: How long leaving workers wait for rank 0's checkpoint before they save one themselves, seconds.
LAST_WORD_S = 5.0


class Leave(BaseException):
    """Ends the training function in this invocation; not an error.

    Derived from BaseException so that an ``except Exception`` in user code does not swallow it.
    """


class Membership:
    """One worker's place in its generation.

    Args:
        spec: Who it is.
        store: Where the generation meets.
        clock: Time.
        give: Saves the state of the iteration's beginning and returns (key, leaving); key is None
            if there is none because the job begins. Raises :class:`CannotGive`.
        sign_of_life: Called while the worker waits, about once a second.
        gradients: Where gradients are added up, if not in ``store``.
    """

    def __init__(
        self,
        spec: wire.WorkerSpec,
        store: ParameterStore,
        clock: Clock,
        give: Callable[[], tuple[str | None, bool]],
        sign_of_life: Callable[[], None],
        gradients: ParameterStore | None = None,
    ) -> None:
        self._spec = spec
        self._store = store
        self._clock = clock
        self._give = give
        self._sign_of_life = sign_of_life
        self._fleet = FleetKeys(spec.fleet)
        self.keys = self._fleet.generation(spec.job, spec.generation)
        self._last_asked = self._last_sign = clock.monotonic()
        self._inside = self._asking = False
        self._token = "0"
        self._control = self._aggregator(store)
        self.aggregator = self._control
        if gradients is not None:
            self.aggregator = self._aggregator(gradients, self._leave_is_wanted)

    def _aggregator(
        self, store: ParameterStore, leave_is_wanted: Callable[[], bool] | None = None
    ) -> HierarchicalAggregator:
        return HierarchicalAggregator(
            store,
            self.keys,
            rank=self._spec.rank,
            workers=self._spec.workers,
            shards=self._spec.shards,
            on_idle=self.look_around,
            leave_is_wanted=leave_is_wanted,
        )

    def _leave_is_wanted(self) -> bool:
        """The ``leave`` key lies in another store than gradients: a round trip, so now and then."""
        now = self._clock.monotonic()
        if now - self._last_asked < self._spec.progress_s:
            return False
        self._last_asked = now
        return self.asked_to_leave()

    def tell(self, kind: type[wire.WorkerEvent], **content: Any) -> None:
        """Sends the scheduler an event."""
        spec = self._spec
        event = kind(
            job=spec.job,
            generation=spec.generation,
            rank=spec.rank,
            incarnation=spec.incarnation,
            **content,
        )
        self._store.append(self._fleet.events, event.encode(), ttl_s=TTL_S)

    def enter(self) -> wire.Gift:
        """Waits until this worker may begin, and says where.

        Raises:
            Leave: The generation was closed.
        """
        self.tell(wire.Ready)
        if self._spec.joining:
            gift = self._ask_survivors()
        else:
            found = self._control.wait_for([self.keys.start])[self.keys.start]
            gift = wire.Gift(wire.Start.decode(found).checkpoint, leaving=False)
        self._inside = True  # from here on this worker can help others in
        return gift

    def agree_on_init(self, save: Callable[[], str]) -> str | None:
        """At the very beginning of a job: rank 0's state becomes everybody's.

        Returns:
            The checkpoint to load, None on the rank that wrote it.
        """
        if self._spec.rank == 0:
            (known,) = self._store.get([self.keys.init])
            if known is not None:
                return known.decode()
            key = save()
            wake = [self.keys.tokens(r) for r in range(1, self._spec.workers)]
            (first,) = self._store.put_once(
                {self.keys.init: key.encode()}, ttl_s=TTL_S, announce=wake
            )
            return None if first else self.agree_on_init(save)
        return self._control.wait_for([self.keys.init])[self.keys.init].decode()

    def keep_reports(self, reports: dict[str, Any]) -> None:
        """Remembers what rank 0 has told, for those who save or replace it."""
        content = json.dumps(list(reports.items())).encode()
        self._store.put({self.keys.reports: content}, ttl_s=TTL_S)

    def kept_reports(self) -> dict[str, Any] | None:
        """What rank 0 of this generation has told, by place; None if nothing yet."""
        (content,) = self._store.get([self.keys.reports])
        return None if content is None else dict(json.loads(content))

    def asked_to_leave(self) -> bool:
        """Whether the scheduler wants a hand-over; also notices that the generation is closed."""
        opened, leave = self._store.get([self.keys.open, self.keys.leave])
        if opened is None:
            raise Leave
        return leave is not None

    def look_around(self) -> None:
        """What a waiting worker does now and then: notice the end, help a replacement."""
        spec = self._spec
        wants = [self.keys.want(r) for r in range(spec.workers) if r != spec.rank]
        singles = [self.keys.open, self.keys.end, self.keys.away]
        opened, end, away, *requests = self._store.get([*singles, *wants])
        if opened is None:
            raise Leave
        if end is not None and self._asking:
            raise _AllGone(end.decode())
        if away is not None:
            self.tell(wire.HandedOver, checkpoint=away.decode())
            raise Leave
        for request in requests:
            if request is not None and self._inside:
                self._answer(request.decode())
        now = self._clock.monotonic()
        if now - self._last_sign >= SIGN_OF_LIFE_S:
            self._last_sign = now
            self._sign_of_life()

    def consumed(self) -> int:
        """How many reports of the job the client has consumed, as far as it has said so."""
        (count,) = self._store.get([self.keys.consumed])
        return 0 if count is None else int(count)

    def wait_until_consumed(
        self, count: int, may_leave: bool, time_is_up: Callable[[], bool]
    ) -> int:
        """Waits until the client has consumed so many reports.

        Args:
            count: How many.
            may_leave: A hand-over that is asked for ends the wait.
            time_is_up: So does this worker's time limit.

        Returns:
            How many were consumed; fewer than ``count`` if this worker is to leave.

        Raises:
            Leave: The generation was closed.
        """
        names = [self.keys.open, self.keys.consumed, self.keys.leave]
        while True:
            opened, consumed, leave = self._store.get(names)
            if opened is None:
                raise Leave
            known = 0 if consumed is None else int(consumed)
            if known >= count or (may_leave and (leave is not None or time_is_up())):
                return known
            before = self._token
            stream = self.keys.tokens(self._spec.rank)
            self._token = self._store.wait(stream, before, timeout_s=LOOK_AROUND_S)
            if self._token == before:
                self.look_around()

    def go_first(self, checkpoint: str) -> None:
        """Rank 0 leaves out of a report: the others, wherever they wait for it, follow."""
        key = checkpoint.encode()
        self._store.put_once({self.keys.end: key, self.keys.away: key}, ttl_s=TTL_S)

    def last_word(self, save: Callable[[], str]) -> str:
        """Before all leave together: the state is saved once, and nobody goes before it is safe.

        Returns:
            Key of the checkpoint.
        """
        spec = self._spec
        if spec.workers == 1:
            return save()
        deadline = self._clock.monotonic() + LAST_WORD_S
        while spec.rank != 0 and self._clock.monotonic() < deadline:
            (key,) = self._store.get([self.keys.end])
            if key is not None:
                return key.decode()
            self.look_around()
            self._clock.sleep(0.005)
        key = save().encode()
        self._store.put_once({self.keys.end: key}, ttl_s=TTL_S)
        return key.decode()

    def _ask_survivors(self) -> wire.Gift:
        spec = self._spec
        request = f"{spec.rank}.{spec.incarnation}"
        gift = self.keys.gift(request)
        self._store.put({self.keys.want(spec.rank): request.encode()}, ttl_s=TTL_S)
        self._asking = True
        try:
            return wire.Gift.decode(self._control.wait_for([gift])[gift])
        except _AllGone as error:  # and nobody is left who would answer
            return wire.Gift(error.checkpoint, leaving=True)
        finally:
            self._asking = False

    def _answer(self, request: str) -> None:
        (answered,) = self._store.get([self.keys.gift(request)])
        if answered is not None:
            return
        (mine,) = self._store.put_once({self.keys.lock(request): b"1"}, ttl_s=2 * LAST_WORD_S)
        if not mine:
            return
        try:
            checkpoint, leaving = self._give()
        except CannotGive:
            self.tell(wire.Stuck)
            return
        gift = wire.Gift(checkpoint, leaving).encode()
        wake = [self.keys.tokens(int(request.split(".")[0]))]
        self._store.put_once({self.keys.gift(request): gift}, ttl_s=TTL_S, announce=wake)


class _AllGone(Exception):
    """The others have saved the last checkpoint of the generation and may have gone."""

    def __init__(self, checkpoint: str) -> None:
        super().__init__(checkpoint)
        self.checkpoint = checkpoint


class CannotGive(Exception):
    """The state of the iteration's beginning is gone: the optimizer has stepped since."""
