"""Inside a function: Tune's kinds of trainables as training functions of SMLT."""

import inspect
import json
import pickle
import tempfile
from collections.abc import Callable
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smlt_tune.integrations.ray.tune_session import Trial, TuneSession, serving
from smlt_tune.runtime.session import session

if TYPE_CHECKING:
    from ray.tune.trainable import Trainable

Program = Callable[[Trial], None]

#: What the client fills in.
_FILLED_IN = (
    "trial_id", "date", "timestamp", "time_total_s", "pid", "hostname", "node_ip", "config",
    "time_since_restore", "iterations_since_restore",
)  # fmt: skip

#: Beside the files of a class trainable: the counts that go with them.
_COUNTS_FILE = "smlt_trainable.json"
_COUNTS = ("training_iteration", "time_total_s", "timesteps_total", "episodes_total")


class Pickled:
    """A program that was pickled once for all trials of a trainable.

    Args:
        content: What cloudpickle has made of it.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __call__(self, trial: Trial) -> None:
        """Runs it."""
        # A part of what was unpickled just now, whose SHA-256 was checked.
        program: Program = pickle.loads(self._content)
        program(trial)


class FunctionProgram:
    """A function of the configuration that reports, yields, or returns metrics.

    Args:
        function: It.
        keeps_files: Whether its state can only be what it passes to ``tune.report``.
    """

    def __init__(self, function: Callable[[dict[str, Any]], Any], *, keeps_files: bool) -> None:
        self._function, self._keeps_files = function, keeps_files

    def __call__(self, trial: Trial) -> None:
        """Runs it to its end."""
        with serving(trial, session()) as tune:
            if self._keeps_files:
                _ = tune.restored  # so that nobody waits for signs of life between its reports
            output = self._function(trial.config)
            for metrics in output if inspect.isgenerator(output) else [output]:
                _report_output(tune, metrics)


class ClassProgram:
    """A class with ``setup``, ``step``, ``save_checkpoint``, ``load_checkpoint``.

    Every step is a report, and ends with a checkpoint if the class has ``save_checkpoint``.

    Args:
        trainable: The class.
        parameters: Values that ``tune.with_parameters`` passes to ``setup``.
    """

    def __init__(self, trainable: "type[Trainable]", parameters: dict[str, Any]) -> None:
        self._trainable, self._parameters = trainable, parameters

    def __call__(self, trial: Trial) -> None:
        """Steps until the trainable says ``done``; usually it is stopped before."""
        with serving(trial, session()) as tune:
            trainable = self._make(trial, tune)
            try:
                self._run(trainable, tune)
            finally:
                trainable.stop()  # type: ignore[no-untyped-call]

    def _make(self, trial: Trial, tune: TuneSession) -> "Trainable":
        from ray.tune.result import TRIAL_INFO

        parameters, folder = self._parameters, tune.trial_dir

        class Hosted(self._trainable):  # type: ignore[name-defined, misc]
            def setup(self, config: dict[str, Any]) -> None:
                super().setup(config, **parameters)

            def _setup_logdir(self) -> None:
                self._logdir = folder

        Hosted.__name__ = self._trainable.__name__
        return Hosted(config={**trial.config, TRIAL_INFO: tune})

    def _run(self, trainable: "Trainable", tune: TuneSession) -> None:
        from ray.tune import Trainable

        if tune.restored is not None:
            _restore(trainable, tune.restored)
        saves = type(trainable).save_checkpoint is not Trainable.save_checkpoint
        done = False
        while not done:
            result = trainable.train()  # type: ignore[no-untyped-call]
            done = bool(result["done"])
            told = {name: value for name, value in result.items() if name not in _FILLED_IN}
            with tempfile.TemporaryDirectory(dir=tune.trial_dir) as folder:
                tune.report(told, _save(trainable, folder, result) if saves else None)


def _save(trainable: "Trainable", folder: str, result: dict[str, Any]) -> Any:
    from ray.tune import Checkpoint

    trainable.save(folder)
    counts = {name: result[name] for name in _COUNTS if name in result}
    Path(folder, _COUNTS_FILE).write_text(json.dumps(counts))
    return Checkpoint.from_directory(folder)


def _restore(trainable: "Trainable", folder: Path) -> None:
    from ray.train._internal.session import _TrainingResult
    from ray.tune import Checkpoint

    counts = json.loads((folder / _COUNTS_FILE).read_text())
    trainable.restore(_TrainingResult(Checkpoint.from_directory(str(folder)), counts))


def _report_output(tune: TuneSession, output: Any) -> None:
    """What a function returns or yields is a report, as in Tune."""
    if not output:
        return
    if isinstance(output, dict):
        tune.report(output)
    elif isinstance(output, Number):
        tune.report({"_metric": output})
    else:
        raise TypeError(
            f"the training function returned or yielded a {type(output).__name__}: Tune takes a "
            "number or a dictionary of metrics"
        )
