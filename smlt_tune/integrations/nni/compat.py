"""Every way around a fault of NNI 3.0, in one place; each says which."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nni.experiment import launcher
from nni.nas.experiment import NasExperiment
from nni.nas.strategy import GridSearch, RegularizedEvolution
from nni.nas.strategy.base import Strategy
from nni.nas.strategy.hpo import HPOTunerStrategy
from nni.nas.strategy.middleware import Chain
from nni.nas.utils.serializer import TorchSerializer, get_default_serializer, set_default_serializer
from nni.runtime import log

from smlt_tune.errors import InvalidInput
from smlt_tune.integrations.nni.metrics import LOG

if TYPE_CHECKING:
    from smlt_tune.integrations.nni.engine import SmltExecutionEngine


#: How long NNI's manager may take to start, in seconds.
MANAGER_START_S = 60


class CheckpointSerializer(TorchSerializer):  # type: ignore[misc]
    """Saves and loads NNI's checkpoints.

    Faults: NNI writes over the only checkpoint, so that a driver that is killed meanwhile has none;
    and since PyTorch 2.6 ``torch.load`` refuses what strategies keep (populations, generators),
    because unpickling it can run code. So it is unpickled only from a file that nobody else could
    have written.
    """

    suffix = ".torch"

    def save(self, checkpoint: Any, path: Path) -> None:
        """Writes it under another name first."""
        target, fresh = Path(f"{path}{self.suffix}"), Path(f"{path}{self.suffix}.new")
        torch.save(checkpoint, fresh)
        fresh.replace(target)

    def load(self, path: Path) -> Any:
        """Reads it.

        Raises:
            FileNotFoundError: There is none.
            InvalidInput: Another user could have written it.
        """
        source = Path(f"{path}{self.suffix}")
        facts = source.stat()
        if facts.st_uid != os.getuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise InvalidInput(
                f"{source} belongs to another user, or others may write to it; loading it could "
                "run their code. If it is yours: chown, and chmod go-w"
            )
        return torch.load(source, weights_only=False)


def checkpoints(experiment: NasExperiment, folder: Path) -> Callable[[], None]:
    """How to make a checkpoint of an experiment at any time.

    Fault: NNI makes one when an experiment starts and one when it is stopped in order, none
    between; a driver that is killed loses everything that the strategy has learnt.
    """
    set_default_serializer(CheckpointSerializer())
    said: list[str] = []

    def save() -> None:
        try:
            get_default_serializer().save(experiment.state_dict(), folder / "state.ckpt")
        except Exception as error:  # noqa: BLE001 - a strategy of the user need not be resumable
            if said:
                return
            said.append(str(error))
            LOG.warning(
                "no checkpoint could be made; a driver that is killed is resumed from the last one "
                "that could: %s: %s",
                type(error).__name__,
                error,
            )

    return save


def close_log(experiment_id: str) -> None:
    """Ends an experiment's log.

    Fault: NNI forgets the handler of the file and leaves the file open.
    """
    handler = log._handlers.get(experiment_id)
    log.stop_experiment_logging(experiment_id)
    if handler is not None:
        handler.close()


def wait_for_manager() -> None:
    """Gives NNI's manager time to start.

    Fault: NNI gives up on it after three seconds, which it takes longer on a busy machine.
    """
    launcher._check_rest_server.__defaults__ = (MANAGER_START_S, None)


def mend_one_shot() -> None:
    """Has one-shot strategies know which batches are for weights and which for the architecture.

    Fault: NNI expects Lightning to pass the number of the data set on together with each batch,
    which Lightning does no longer since 2.1; NNI fails with "too many values to unpack". So every
    batch comes with the name of its data set, as NNI expects of Lightning 1.
    """
    from nni.nas.oneshot.pytorch import _dataloader as loaders

    class Named(loaders._Sequential):  # type: ignore[misc]
        """Batches of data sets in turn: (batch, name), number, number of the data set."""

        def __next__(self) -> Any:
            batch, number, dataset = super().__next__()
            return (batch, ("train", "val")[dataset]), number, dataset

    mode = loaders._CombinationMode(fn=sum, iterator=Named)
    loaders._SUPPORTED_MODES["_nni_concat"] = mode


def outlast(strategy: Strategy, engine: "SmltExecutionEngine") -> None:
    """Has the middlewares of a chain stay until the last candidate has ended.

    Faults: a chain takes its middlewares off the engine once its strategy has submitted its last
    model, so that what ends later is not retried or averaged; and strategies that wait before wait
    for a second at most, because NNI's middlewares look a second time through an iterator that is
    at its end.
    """
    if not isinstance(strategy, Chain):
        return
    while isinstance(strategy, Chain):
        for middleware in strategy._middlewares:
            middleware.wait_models = engine.wait_models
        strategy = strategy[0]
    explore = strategy.run

    def run() -> None:
        explore()
        engine.wait_models()

    strategy.run = run


def adopt(strategy: Strategy, engine: "SmltExecutionEngine") -> None:
    """Gives a resumed strategy what its own state does not hold.

    Faults: strategies forget the models that were in flight, and would ignore their rewards
    (RegularizedEvolution) or fail on them (tuners); tuners forget everything; GridSearch takes all
    samples that it has shuffled for tried. (PolicyBasedRL does not learn from models that were in
    flight: how they were sampled is lost.)
    """
    while isinstance(strategy, Chain):
        strategy = strategy[0]
    if isinstance(strategy, RegularizedEvolution):
        strategy._running_models += engine.in_flight()
    elif isinstance(strategy, HPOTunerStrategy):
        _adopt_tuner(strategy, engine)
    elif isinstance(strategy, GridSearch) and strategy._dedup is not None:
        strategy._dedup.reset()
        for candidate in engine.candidates():
            strategy._dedup.dedup(candidate.sample)


def _adopt_tuner(strategy: HPOTunerStrategy, engine: "SmltExecutionEngine") -> None:
    """Tells a tuner of the results so far; those to come reach it the same way."""
    tuner = strategy.tuner
    simplified = strategy.model_space.simplify()
    tuner.update_search_space({label: m.as_legacy_dict() for label, m in simplified.items()})
    known = [c for c in engine.candidates() if c.over and c.metric is not None]
    tuner.import_data([{"parameter": dict(c.sample), "value": c.metric} for c in known])
    adopted = set(engine.in_flight())
    heard, ended = strategy.on_metric, strategy.on_training_end

    def on_metric(event: Any) -> None:
        if event.model not in adopted:
            heard(event)
            return
        with strategy._thread_lock:
            tuner.import_data([{"parameter": event.model.sample, "value": event.metric}])

    def on_training_end(event: Any) -> None:
        if event.model not in adopted:
            ended(event)

    for kind, old, new in (
        ("final_metric", heard, on_metric),
        ("training_end", ended, on_training_end),
    ):
        strategy.engine.unregister_model_event_callback(kind, old)
        strategy.engine.register_model_event_callback(kind, new)
    # It unregisters under these names when it is done.
    strategy.on_metric, strategy.on_training_end = on_metric, on_training_end
