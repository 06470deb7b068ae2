"""From a job's reports to Tune's results and checkpoints."""

import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import ray
from ray.train._internal.session import _TrainingResult
from ray.train._internal.storage import StorageContext
from ray.tune import Checkpoint
from ray.tune.result import DEBUG_METRICS

from smlt_tune.backend.job import Report
from smlt_tune.errors import InvalidInput
from smlt_tune.integrations.ray.tune_session import NESTED
from smlt_tune.runtime.clock import SYSTEM_CLOCK
from smlt_tune.runtime.frameworks.files import unpack

#: In the folder of every checkpoint that Tune gets to see.
POINTER_FILE = "smlt.json"


@dataclass(frozen=True)
class Pointer:
    """Where in which job a checkpoint was taken.

    Attributes:
        uri: URL of the state itself.
        job: Name of the job.
        index: The report it belongs to.
    """

    uri: str
    job: str
    index: int

    @classmethod
    def of(cls, checkpointed: _TrainingResult) -> "Pointer":
        """From what Tune hands to ``restore``.

        The metrics are looked at first: Tune may have deleted the folder of a checkpoint that
        another trial is to start from.

        Raises:
            InvalidInput: It is no checkpoint of a trial of this kind.
        """
        metrics = checkpointed.metrics
        checkpoint: Any = checkpointed.checkpoint
        if metrics.get("smlt/checkpoint"):
            return cls(metrics["smlt/checkpoint"], metrics["smlt/job"], metrics["smlt/report"])
        try:
            with checkpoint.filesystem.open_input_stream(f"{checkpoint.path}/{POINTER_FILE}") as f:
                return cls(**json.loads(f.readall()))
        except FileNotFoundError:
            raise InvalidInput(
                f"the checkpoint {checkpoint.path} holds no {POINTER_FILE}: it was not made by a "
                'trial with resources "smlt", and such a trial cannot start from it'
            ) from None


class Results:
    """Makes results of one trial, counting as ``ray.tune.Trainable`` does."""

    def __init__(self, trial_id: str, config: Mapping[str, Any]) -> None:
        self._trial_id, self._config = trial_id, dict(config)
        self._iteration = self._since_restore = 0
        self._total_s = self._since_restore_s = 0.0
        self.last: dict[str, Any] = {}

    def restore(self, metrics: Mapping[str, Any]) -> None:
        """Counts on from the metrics of a checkpoint."""
        self._iteration = metrics.get("training_iteration", 0)
        self._total_s = metrics.get("time_total_s", 0.0)

    def make(self, job_id: str, report: Report, elapsed_s: float) -> dict[str, Any]:
        """The result for a report.

        Args:
            job_id: Whose.
            report: It.
            elapsed_s: Time that it took, if the report does not say so, seconds.
        """
        result = dict(report.metrics)
        result |= json.loads(result.pop(NESTED, "{}"))
        this_s = float(result.get("time_this_iter_s") or elapsed_s)
        self._iteration += 1
        self._since_restore += 1
        self._total_s += this_s
        self._since_restore_s += this_s
        result.setdefault("done", False)
        result.setdefault("training_iteration", self._iteration)
        result |= self.filled_in()
        result |= {
            "time_this_iter_s": this_s,
            "smlt/cost_usd": report.cost_usd,
            "smlt/workers": report.workers,
            "smlt/memory_mb": report.memory_mb,
            "smlt/job": job_id,
            "smlt/report": report.index,
            "smlt/checkpoint": report.checkpoint,
        }
        self.last = result
        return result

    def filled_in(self, *, debug_metrics_only: bool = False) -> dict[str, Any]:
        """What Tune expects in every result."""
        now = datetime.fromtimestamp(SYSTEM_CLOCK.wall())
        filled = {
            "trial_id": self._trial_id,
            "date": now.strftime("%Y-%m-%d_%H-%M-%S"),
            "timestamp": int(now.timestamp()),
            "time_total_s": self._total_s,
            "pid": os.getpid(),
            "hostname": platform.node(),
            "node_ip": ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
            "config": self._config,
            "time_since_restore": self._since_restore_s,
            "iterations_since_restore": self._since_restore,
        }
        if debug_metrics_only:
            return {name: filled[name] for name in filled if name in DEBUG_METRICS}
        return filled


def write_checkpoint(storage: StorageContext, pointer: Pointer, content: bytes) -> Any:
    """Makes the folder that Tune takes for the checkpoint, a new one for each.

    Args:
        storage: Of the trial.
        pointer: To the state.
        content: The state, if it consists of files of the user's; else nothing.
    """
    storage._update_checkpoint_index({})
    path, filesystem = storage.checkpoint_fs_path, storage.storage_filesystem
    if content:
        with tempfile.TemporaryDirectory(prefix="smlt-tune-") as folder:
            unpack(content, Path(folder))
            storage.persist_current_checkpoint(Checkpoint.from_directory(folder))
    else:  # after every report: to copy a folder with one small file takes five times as long
        filesystem.create_dir(path)
    with filesystem.open_output_stream(f"{path}/{POINTER_FILE}") as file:
        file.write(json.dumps(asdict(pointer)).encode())
    return Checkpoint(path, filesystem)
