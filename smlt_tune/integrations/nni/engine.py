"""NNI's execution engine: every model that a strategy submits becomes a job of a fleet.

The strategy runs in the thread of the experiment and blocks in here until there is room for another
candidate. One thread per running job waits for its reports; the dispatcher tells the strategy what
happens, under the lock that checkpoints are made under: so none of them knows half of an event.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from nni.nas.execution.event import FinalMetricEvent, IntermediateMetricEvent, TrainingEndEvent
from nni.nas.space import ExecutableModelSpace, ModelStatus, SimplifiedModelSpace

from smlt_tune.backend.resource_manager.observations import Workload
from smlt_tune.errors import FleetClosed, InvalidInput
from smlt_tune.integrations.nni.candidates import Candidate
from smlt_tune.integrations.nni.config import SmltEngineConfig
from smlt_tune.integrations.nni.dispatching import DispatchingEngine
from smlt_tune.integrations.nni.features import CannotBuild, workload_of
from smlt_tune.integrations.nni.following import follow, start
from smlt_tune.integrations.nni.limits import Limits
from smlt_tune.integrations.nni.metrics import LOG, Metric

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet


class SmltExecutionEngine(DispatchingEngine):
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
        self.prefix, self._space, self._save, self._owns_fleet = prefix, space, save, owns_fleet
        self._candidates: list[Candidate] = []
        self._waiting: deque[Candidate] = deque()
        self._running: dict[Candidate, threading.Thread] = {}

    @property
    def fleet(self) -> "Fleet":
        """Where the candidates run."""
        return self._fleet

    def candidates(self) -> list[Candidate]:
        """All that were submitted, in that order."""
        with self.changed:
            return list(self._candidates)

    # --- what strategies ask for ----------------------------------------------------------------

    def submit_models(self, *models: ExecutableModelSpace) -> None:
        """Queues frozen models. One that cannot be started ends, which its listeners are told.

        Raises:
            RuntimeError: A model is not frozen, or was trained already.
        """
        for model in models:
            if not model.status.frozen() or model.status.completed():
                raise RuntimeError(f"a model must be frozen and not trained yet to run: {model}")
            workload, error = self._measured(model)
            with self.changed:
                number = len(self._candidates)
                name = f"{self.prefix}-{number:05d}"
                self._queue(Candidate(number, name, model, workload, error=error))
                self._save()
                self._start_waiting()

    def idle_worker_available(self) -> bool:
        """Waits until another candidate may start; False if none may any more."""
        with self.changed:
            while not self._over():
                self._start_waiting()
                busy = len(self._running) + len(self._waiting)
                if busy < self._limits.concurrency and self._limits.can_pay(busy, self._fleet):
                    return True
                self.changed.wait(self._limits.seconds_left())
            return False

    def budget_available(self) -> bool:
        """Whether further candidates may start, now or later. False is final."""
        with self.changed:
            return not self._over()

    def wait_models(self, *models: ExecutableModelSpace) -> None:
        """Waits until models have ended; all that were submitted if none is given."""

        def ended() -> bool:
            if models:
                return all(model.status.completed() for model in models)
            return all(candidate.over for candidate in self._candidates)

        with self.changed:
            self._start_waiting()
            self.changed.wait_for(lambda: self.closed or ended())

    def list_models(self, status: ModelStatus | None = None) -> Iterable[ExecutableModelSpace]:
        """All submitted models in the order of submission, each once."""
        models = {id(candidate.model): candidate.model for candidate in self.candidates()}
        return [m for m in models.values() if status is None or m.status == status]

    def kill_model(self, model: ExecutableModelSpace) -> None:
        """Stops the job of a model and its billing; the model ends ``interrupted``."""
        with self.changed:
            for candidate in self._candidates:
                if candidate.model is model and candidate.job is not None:
                    candidate.job.stop("killed")
                elif candidate.model is model and candidate in self._waiting:
                    self._waiting.remove(candidate)
                    self._decide(candidate, ModelStatus.Interrupted, "killed")

    def shutdown(self) -> None:
        """Stops what still runs; candidates that have not ended can be resumed. Idempotent."""
        self.close()
        with self.changed:
            running = dict(self._running)
        for candidate, thread in running.items():
            if candidate.job is not None:
                candidate.job.stop("interrupted")
            thread.join()
        if self._owns_fleet:
            self._fleet.close()
        for candidate in self.candidates():
            if not candidate.over:
                candidate.model.status = ModelStatus.Interrupted

    # --- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Candidates with their status and metrics; what they have spent is the fleet's record."""
        with self.changed:
            return {
                "seconds": self._limits.seconds(),
                "candidates": [candidate.to_state() for candidate in self._candidates],
            }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes candidates over. Those in flight go on once the strategy's state is loaded too."""
        with self.changed:
            self._limits.add_seconds(state_dict["seconds"])
            space, jobs = self._space(), {job.job_id: job for job in self._fleet.jobs()}
            for number, state in enumerate(state_dict["candidates"]):
                candidate = Candidate.from_state(number, state, space, jobs)
                if candidate.over:
                    self._candidates.append(candidate)
                    self._limits.ended(candidate.cost_usd, "")
                    continue
                if candidate.job is None:
                    candidate.workload, candidate.error = self._measured(candidate.model)
                self._queue(candidate)

    def in_flight(self) -> list[SimplifiedModelSpace]:
        """Models of a checkpoint that had not ended when it was made."""
        with self.changed:
            return [candidate.model for candidate in self._waiting]

    # --- what happens, under the lock -----------------------------------------------------------

    def _measured(self, model: SimplifiedModelSpace) -> tuple[Workload | None, str]:
        try:
            return workload_of(model, self._config), ""
        except CannotBuild as error:
            return None, str(error)

    def _queue(self, candidate: Candidate) -> None:
        candidate.model.status = ModelStatus.Training
        self._candidates.append(candidate)
        self._waiting.append(candidate)

    def _over(self) -> bool:
        return self.closed or self._limits.reached(len(self._candidates), self._fleet)

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self._limits.concurrency and not self.closed:
            self._start(self._waiting.popleft())

    def _start(self, candidate: Candidate) -> None:
        if candidate.error:
            self._decide(candidate, ModelStatus.Failed, candidate.error)
            return
        try:
            candidate.job = start(candidate, self._fleet, self._config)
        except InvalidInput as error:
            self._decide(candidate, ModelStatus.Failed, str(error))
        except FleetClosed as error:
            self._decide(candidate, ModelStatus.Interrupted, str(error))
        else:
            tell = partial(self._tell, candidate)
            thread = follow(candidate, candidate.job, self._config.metric, tell)
            self._running[candidate] = thread

    def _tell(self, candidate: Candidate, what: Metric | tuple[ModelStatus, str]) -> None:
        """Called by the thread that follows the job."""
        if isinstance(what, Metric):
            self.later(partial(self._on_metric, candidate, what))
        else:
            self.later(partial(self._on_end, candidate, *what))

    def _decide(self, candidate: Candidate, status: ModelStatus, error: str) -> None:
        """It ends without a job; listeners hear of it in the dispatcher's thread, as always."""
        self.later(partial(self._on_end, candidate, status, error))

    def _on_metric(self, candidate: Candidate, metric: Metric) -> None:
        kind = FinalMetricEvent if metric.final else IntermediateMetricEvent
        self.dispatch_model_event(kind(candidate.model, metric.value))

    def _on_end(self, candidate: Candidate, status: ModelStatus, error: str) -> None:
        self._running.pop(candidate, None)
        candidate.status, candidate.error = status, error
        if error:
            LOG.warning("%s: %s: %s", candidate, status.value, error)
        if candidate.job is not None:
            self._limits.ended(candidate.cost_usd, error)
        self.dispatch_model_event(TrainingEndEvent(candidate.model, status))
        self._start_waiting()
