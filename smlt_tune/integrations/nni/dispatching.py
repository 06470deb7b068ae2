"""How a strategy is told what happens: in turn, by one thread, whatever its listeners do."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from nni.nas.execution import ExecutionEngine
from nni.nas.execution.event import ModelEvent

from smlt_tune.integrations.nni.metrics import LOG


class DispatchingEngine(ExecutionEngine):  # type: ignore[misc]
    """An engine with a thread that handles events, each under the lock.

    Attributes:
        changed: The lock, and who waits for a change. Reentrant: a listener may submit a model.
        closed: No more events are handled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition(threading.RLock())
        self.closed = False
        self._events: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._dispatcher = threading.Thread(target=self._dispatch, name="smlt-nni", daemon=True)
        self._dispatcher.start()

    def later(self, handle: Callable[[], None]) -> None:
        """Has something done by the dispatcher, after all that was asked for before."""
        self._events.put(handle)

    def close(self) -> None:
        """Whoever waits goes on; what is asked of the dispatcher is not done any more."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self._events.put(None)

    def dispatch_model_event(self, event: ModelEvent, **_: Any) -> None:
        """Tells the listeners, and then does what the event says.

        A listener that raises is logged: the others, and the model, hear of the event all the same.
        """
        for listener in list(self._callbacks[event.event_type]):
            if event._canceled:
                return
            try:
                listener(event)
            except Exception:  # noqa: BLE001 - whatever the user's code raises
                LOG.exception("a listener to %s raised; it is ignored", event.event_type.value)
        if not event._canceled and not event._default_canceled:
            self.default_callback(event)

    def _dispatch(self) -> None:
        while (handle := self._events.get()) is not None:
            with self.changed:
                if self.closed:
                    continue
                try:
                    handle()
                except Exception:  # noqa: BLE001 - the boundary of the thread
                    LOG.exception("an event could not be handled")
                self.changed.notify_all()
