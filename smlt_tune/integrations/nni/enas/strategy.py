"""ENAS with a job for every child."""

import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

from nni.mutable import SampleValidationError
from nni.nas.execution import ExecutionEngine
from nni.nas.execution.event import ModelEventType, TrainingEndEvent
from nni.nas.space import ExecutableModelSpace
from nni.nas.strategy import Strategy

from smlt_tune.errors import InvalidInput
from smlt_tune.integrations.nni.enas.choices import choices_of
from smlt_tune.integrations.nni.enas.controller import Controller
from smlt_tune.integrations.nni.engine import SmltExecutionEngine
from smlt_tune.runtime.shared import HOT_BYTES, SharedTensors, SharedTensorsWriter

#: After so many samples in a row that break a constraint of the space, the search ends.
PATIENCE = 1000


class SmltEnas(Strategy):  # type: ignore[misc]
    """Efficient neural architecture search (Pham et al., 2018) over the jobs of a fleet.

    A controller samples children, each trains as one job of its own size, many at once, and the
    controller learns from their final metrics, of which more is better. Children whose training
    function uses :class:`~smlt_tune.integrations.nni.enas.SharedWeights` inherit what earlier ones
    have learnt; see :mod:`smlt_tune.runtime.shared` for what concurrent ones see.

    After a crash, the controller continues from the experiment's checkpoint, and the weights from
    the object store.

    Args:
        learning_rate: Of the controller.
        entropy_weight: How long it keeps exploring.
        baseline_decay: Of the moving average that rewards are compared with, per reward.
        hidden: Size of its LSTM.
        seed: Of its parameters and samples.
        hot_bytes: How much of the shared weights is kept in the parameter store.
    """

    def __init__(
        self,
        *,
        learning_rate: float = 5e-3,
        entropy_weight: float = 1e-3,
        baseline_decay: float = 0.9,
        hidden: int = 64,
        seed: int = 0,
        hot_bytes: int = HOT_BYTES,
    ) -> None:
        super().__init__()
        self._settings: dict[str, Any] = {
            "learning_rate": learning_rate,
            "entropy_weight": entropy_weight,
            "baseline_decay": baseline_decay,
            "hidden": hidden,
            "seed": seed,
        }
        self._hot_bytes = hot_bytes
        self._controller: Controller | None = None
        self._weights: SharedTensorsWriter | None = None
        # Samples and final metrics of children that have ended, from the engine's thread.
        self._ended: deque[tuple[dict[str, Any], float | None]] = deque()
        # Also so that no checkpoint holds half of what was learnt.
        self._lock = threading.Lock()

    def extra_repr(self) -> str:
        """For NNI's log."""
        return ", ".join(f"{name}={value}" for name, value in self._settings.items())

    def state_dict(self) -> dict[str, Any]:
        """The controller, and what it has still to learn."""
        with self._lock:
            state: dict[str, Any] = {"ended": list(self._ended)}
            if self._controller is not None:
                state["controller"] = self._controller.state_dict()
            return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from what :meth:`state_dict` gave."""
        with self._lock:
            self._ended.extend(state_dict["ended"])
            if self._controller is not None:
                self._controller.load_state_dict(state_dict["controller"])

    def _initialize(
        self, model_space: ExecutableModelSpace, engine: ExecutionEngine
    ) -> ExecutableModelSpace:
        self._controller = Controller(choices_of(model_space.simplify()), **self._settings)
        self._weights = SharedTensorsWriter(_shared(engine), hot_bytes=self._hot_bytes)
        engine.register_model_event_callback(ModelEventType.TrainingEnd, self._on_end)
        return model_space

    def _cleanup(self) -> None:
        self.engine.unregister_model_event_callback(ModelEventType.TrainingEnd, self._on_end)

    def _run(self) -> None:
        while self.wait_for_resource():
            self._learn()
            self.engine.submit_models(self._child())
        self.engine.wait_models()
        self._learn()

    def _on_end(self, event: TrainingEndEvent) -> None:
        with self._lock:
            self._ended.append((event.model.sample, event.model.metric))

    def _learn(self) -> None:
        """From the children that have ended: their weights first, then their rewards."""
        assert self._controller is not None
        assert self._weights is not None
        if self._ended:
            self._weights.merge()
        while self._ended:
            with self._lock:
                sample, reward = self._ended.popleft()
                if reward is not None:
                    self._controller.learn(sample, reward)

    def _child(self) -> ExecutableModelSpace:
        assert self._controller is not None
        for _ in range(PATIENCE):
            with self._lock:
                sample = self._controller.sample()
            try:
                return self.model_space.freeze(sample)
            except SampleValidationError:
                continue  # breaks a constraint
        raise RuntimeError(
            f"the controller sampled {PATIENCE} architectures that the space forbids: express its "
            "constraints as choices"
        )


def _shared(engine: ExecutionEngine) -> SharedTensors:
    """The shared tensors of the search that an engine, below its middlewares, runs."""
    while not isinstance(engine, SmltExecutionEngine):
        if not hasattr(engine, "engine"):
            raise InvalidInput(
                "SmltEnas shares weights through the stores of a fleet: run it with "
                "NasExperimentConfig('smlt', 'simplified', ...) in a SmltNasExperiment"
            )
        engine = engine.engine
    fleet = engine.fleet
    return SharedTensors(fleet.name, engine.prefix, fleet.parameter_store, fleet.object_store)
