"""The study of a sweep, in memory or in a file that outlives its client."""

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages.journal import JournalFileBackend

from smlt_tune.backend.sweeps.sweep import Sweep
from smlt_tune.integrations.optuna.adoption import FLEET
from smlt_tune.integrations.optuna.pruners import pruner
from smlt_tune.integrations.optuna.samplers import sampler

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet


def study_of(sweep: Sweep, fleet: "Fleet", journal: Path | None) -> optuna.Study:
    """The study of a sweep, as far as it has come.

    Args:
        sweep: What is searched.
        fleet: The one that it belongs to.
        journal: File that it is kept in; None for memory.
    """
    storage = None
    if journal is not None:
        _mend(journal)
        # Optuna's own lock is a file, which a client that was killed leaves behind for 30 s. No
        # other process writes here: the folder of a fleet is open in one at a time.
        lock: Any = threading.Lock()
        backend = JournalFileBackend(str(journal), lock)
        storage = optuna.storages.JournalStorage(backend)
    study = optuna.create_study(
        study_name=sweep.name,
        storage=storage,
        direction="maximize" if sweep.maximize else "minimize",
        sampler=sampler(sweep),
        pruner=pruner(sweep.pruner),
        load_if_exists=True,
    )
    # No other fleet ever works on it, so that all trials that were left RUNNING are this one's.
    study.set_user_attr(FLEET, fleet.name)
    return study


def _mend(journal: Path) -> None:
    """Takes away the part of a line that a client has left which was killed while it wrote."""
    if not journal.exists():
        return
    with journal.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
