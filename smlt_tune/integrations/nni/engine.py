"""NNI's execution engine: every model that a strategy submits becomes a job of a fleet.

The strategy runs in the thread of the experiment and blocks in here until there is room for another
candidate. One thread per running job waits for its reports; one thread, the dispatcher, tells the
strategy everything that happens, in turn, under the lock that checkpoints are made under: so a
checkpoint never knows half of an event.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from nni.nas.execution import ExecutionEngine
from nni.nas.execution.event import (
    FinalMetricEvent,
    IntermediateMetricEvent,
    ModelEvent,
    TrainingEndEvent,
)
from nni.nas.space import ExecutableModelSpace, ModelStatus, SimplifiedModelSpace

from smlt_tune.errors import FleetClosed, InvalidInput
from smlt_tune.integrations.nni.candidate import config_of, function_of
from smlt_tune.integrations.nni.candidates import Candidate
from smlt_tune.integrations.nni.config import SmltEngineConfig
from smlt_tune.integrations.nni.features import CannotBuild, workload_of
from smlt_tune.integrations.nni.following import follow
from smlt_tune.integrations.nni.limits import Limits
from smlt_tune.integrations.nni.metrics import LOG, Metric

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet


class SmltExecutionEngine(ExecutionEngine):  # type: ignore[misc]
    """Runs candidates as jobs of one fleet.

    Args:
        fleet: Where.
        config: What all candidates have in common.
        limits: How many candidates, how long, for how much.
        prefix: Of the names of jobs; an experiment's id.
        space: Gives the model space, to make candidates of a checkpoint from.
        save: Makes a checkpoint of the experiment; called whenever a candidate was submitted.
        owns_fleet: Whether to close the fleet at the end.
    """

    def __init__(
        self,
        fleet: "Fleet",
        config: SmltEngineConfig,
        limits: Limits,
        *,
        prefix: str,
        space: Callable[[], ExecutableModelSpace],
        save: Callable[[], None],
        owns_fleet: bool,
    ) -> None:
        super().__init__()
        self._fleet, self._config, self._limits = fleet, config, limits
        self._prefix, self._space, self._save, self._owns_fleet = prefix, space, save, owns_fleet
        self._goal = config.goal_of_trials()
        self._candidates: list[Candidate] = []
        self._waiting: deque[Candidate] = deque()
        self._running: dict[Candidate, threading.Thread] = {}
        self._closed = False
        # Reentrant: a listener may submit a model again, in the dispatcher's thread.
        self._changed = threading.Condition(threading.RLock())
        self._events: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._dispatcher = threading.Thread(target=self._run, name="smlt-nni", daemon=True)
        self._dispatcher.start()

    @property
    def fleet(self) -> "Fleet":
        """Where the candidates run."""
        return self._fleet

    def candidates(self) -> list[Candidate]:
        """All that were submitted, in that order."""
        with self._changed:
            return list(self._candidates)

    # --- what strategies ask for ----------------------------------------------------------------

    def submit_models(self, *models: ExecutableModelSpace) -> None:
        """Queues frozen models. One that cannot be started ends, which its listeners are told.

        Raises:
            RuntimeError: A model is not frozen, or was trained already.
            InvalidInput: A model has another format than ``simplified``.
        """
        for model in models:
            if not isinstance(model, SimplifiedModelSpace):
                raise InvalidInput(
                    f"a {type(model).__name__} cannot travel to a function: the experiment needs "
                    "model_format='simplified'"
                )
            if not model.status.frozen() or model.status.completed():
                raise RuntimeError(f"a model must be frozen and not trained yet to run: {model}")
            workload, error = self._measured(model)
            with self._changed:
                number = len(self._candidates)
                name = f"{self._prefix}-{number:05d}"
                candidate = Candidate(number, name, model, workload, error=error)
                model.status = ModelStatus.Training
                self._candidates.append(candidate)
                self._waiting.append(candidate)
                self._save()
                self._start_waiting()

    def idle_worker_available(self) -> bool:
        """Waits until another candidate may start; False if none may any more."""
        with self._changed:
            while not self._over():
                self._start_waiting()
                if self._has_room():
                    return True
                self._changed.wait(self._limits.seconds_left())
            return False

    def budget_available(self) -> bool:
        """Whether further candidates may start, now or later. False is final."""
        with self._changed:
            return not self._over()

    def wait_models(self, *models: ExecutableModelSpace) -> None:
        """Waits until models have ended; all that were submitted if none is given."""
        with self._changed:
            self._start_waiting()
            self._changed.wait_for(lambda: self._closed or self._have_ended(models))

    def list_models(self, status: ModelStatus | None = None) -> Iterable[ExecutableModelSpace]:
        """All submitted models in the order of submission, each once."""
        models = {id(candidate.model): candidate.model for candidate in self.candidates()}
        return [m for m in models.values() if status is None or m.status == status]

    def kill_model(self, model: ExecutableModelSpace) -> None:
        """Stops the job of a model and its billing; the model ends ``interrupted``."""
        with self._changed:
            for candidate in self._candidates:
                if candidate.model is model and not candidate.over:
                    if candidate.job:
                        candidate.job.stop("killed")
                    elif candidate in self._waiting:
                        self._waiting.remove(candidate)
                        self._decide(candidate, ModelStatus.Interrupted, "killed")

    def shutdown(self) -> None:
        """Stops what still runs; candidates that have not ended can be resumed. Idempotent."""
        with self._changed:
            self._closed = True
            running = dict(self._running)
            self._changed.notify_all()
        for candidate in running:
            if candidate.job:
                candidate.job.stop("interrupted")
        if self._owns_fleet:
            self._fleet.close()
        for thread in running.values():
            thread.join()
        self._events.put(None)
        if threading.current_thread() is not self._dispatcher:
            self._dispatcher.join()
        for candidate in self.candidates():
            if not candidate.over:
                candidate.model.status = ModelStatus.Interrupted

    def state_dict(self) -> dict[str, Any]:
        """Candidates with their status and metrics; what they have spent is the fleet's record."""
        with self._changed:
            return {
                "seconds": self._limits.seconds(),
                "candidates": [candidate.to_state() for candidate in self._candidates],
            }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes candidates over. Those in flight go on once the strategy's state is loaded too."""
        with self._changed:
            self._limits.add_seconds(state_dict["seconds"])
            space = self._space()
            for number, state in enumerate(state_dict["candidates"]):
                candidate = Candidate.from_state(number, state, space)
                self._candidates.append(candidate)
                if not candidate.over:
                    candidate.model.status = ModelStatus.Training
                    self._waiting.append(candidate)

    def in_flight(self) -> list[SimplifiedModelSpace]:
        """Models of a checkpoint that had not ended when it was made."""
        with self._changed:
            return [candidate.model for candidate in self._waiting]

    # --- events ---------------------------------------------------------------------------------

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
                LOG.exception("a listener to %s events raised; it is ignored", event.event_type)
        if not event._canceled and not event._default_canceled:
            self.default_callback(event)

    def _run(self) -> None:
        """The dispatcher's thread."""
        while (handle := self._events.get()) is not None:
            with self._changed:
                if self._closed:
                    continue  # listeners are gone
                try:
                    handle()
                except Exception:  # noqa: BLE001 - the boundary of the thread
                    LOG.exception("an event could not be handled")
                self._changed.notify_all()

    def _on_metric(self, candidate: Candidate, metric: Metric) -> None:
        kind = FinalMetricEvent if metric.final else IntermediateMetricEvent
        self.dispatch_model_event(kind(candidate.model, metric.value))

    def _on_end(self, candidate: Candidate, status: ModelStatus, error: str) -> None:
        self._running.pop(candidate, None)
        candidate.status, candidate.error = status, error
        if error:
            LOG.warning("%s: %s: %s", candidate, status.value, error)
        job = candidate.job
        self._limits.ended(job.cost_usd if job else 0.0, error)
        self.dispatch_model_event(TrainingEndEvent(candidate.model, status))
        self._start_waiting()

    # --- jobs -----------------------------------------------------------------------------------

    def _measured(self, model: SimplifiedModelSpace) -> tuple[Any, str]:
        try:
            return workload_of(model, self._config), ""
        except CannotBuild as error:
            return None, str(error)

    def _have_ended(self, models: tuple[ExecutableModelSpace, ...]) -> bool:
        if models:
            return all(model.status.completed() for model in models)
        return all(candidate.over for candidate in self._candidates)

    def _over(self) -> bool:
        if self._closed:
            return True
        return self._limits.reached(len(self._candidates), self._fleet)

    def _has_room(self) -> bool:
        busy = len(self._running) + len(self._waiting)
        return busy < self._limits.concurrency and self._limits.can_pay(busy, self._fleet)

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self._limits.concurrency and not self._closed:
            self._start(self._waiting.popleft())

    def _start(self, candidate: Candidate) -> None:
        if candidate.error:
            self._decide(candidate, ModelStatus.Failed, candidate.error)
            return
        try:
            candidate.job = self._submit(candidate)
        except InvalidInput as error:
            self._decide(candidate, ModelStatus.Failed, str(error))
        except FleetClosed as error:
            self._decide(candidate, ModelStatus.Interrupted, str(error))
        else:
            tell = partial(self._tell, candidate)
            arguments = (candidate.job, self._config.metric, str(candidate), tell)
            thread = threading.Thread(target=follow, args=arguments, daemon=True)
            self._running[candidate] = thread
            thread.start()

    def _submit(self, candidate: Candidate) -> Any:
        return self._fleet.submit(
            function_of(candidate.model),
            config_of(candidate.model),
            goal=self._goal,
            workload=candidate.workload,
            seed=self._config.seed,
            name=candidate.name,
            **self._config.bounds(),
        )

    def _tell(self, candidate: Candidate, what: Metric | tuple[ModelStatus, str]) -> None:
        """Called by the thread that follows the job."""
        if isinstance(what, Metric):
            self._events.put(partial(self._on_metric, candidate, what))
        else:
            self._events.put(partial(self._on_end, candidate, *what))

    def _decide(self, candidate: Candidate, status: ModelStatus, error: str) -> None:
        """It ends without a job; listeners hear of it in the dispatcher's thread, as always."""
        self._events.put(partial(self._on_end, candidate, status, error))
