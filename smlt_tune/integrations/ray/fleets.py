"""Which fleet runs the trials of an experiment."""

import threading
from pathlib import Path
from typing import Any

from ray.train._internal.storage import StorageContext

from smlt_tune.backend.fleet import Fleet
from smlt_tune.backend.platforms.base import Platform
from smlt_tune.errors import FleetClosed, InvalidInput

#: The fleet's folder inside the folder of its experiment, unless ``path`` names another one.
FOLDER = "smlt_fleet"

#: A job's ``status`` while it may still train.
UNFINISHED = ("queued", "running", "paused")


class Fleets:
    """The fleets of this process's experiments. May be used from several threads.

    Args:
        given: One fleet for all of them, which belongs to the user; None to open them here.
        path: Folder of the one fleet to open; None for one fleet in each experiment's folder.
        own_platform: Closed with them.
        options: Further arguments of ``Fleet``.
    """

    def __init__(
        self,
        given: Fleet | None,
        path: Path | None = None,
        own_platform: Platform | None = None,
        **options: Any,
    ) -> None:
        self._given, self._path = given, path
        self._own_platform, self._options = own_platform, options
        self._opened: dict[Path, Fleet] = {}
        self._lock = threading.Lock()

    def of(self, storage: StorageContext) -> Fleet:
        """The fleet of an experiment: opened, or continued, when its first trial asks for it.

        Raises:
            InvalidInput: It cannot be opened.
            FleetClosed: The fleet that the user gave is closed.
        """
        if self._given is not None:
            if self._given.closed:
                raise FleetClosed("the fleet that register_smlt was given is closed")
            return self._given
        folder = self._folder(storage)
        with self._lock:
            if folder not in self._opened:
                again = (folder / "history.sqlite3").exists()
                start = Fleet.open if again else Fleet
                self._opened[folder] = start(path=folder, **self._options)
            return self._opened[folder]

    def experiment_over(self, storage: StorageContext) -> None:
        """Closes the fleet that was opened for this experiment alone."""
        if self._given is None and self._path is None:
            with self._lock:
                fleet = self._opened.pop(self._folder(storage), None)
            if fleet is not None:
                fleet.close()

    def close(self) -> None:
        """Closes what was opened here. Idempotent."""
        with self._lock:
            while self._opened:
                self._opened.popitem()[1].close()
            if self._own_platform is not None:
                self._own_platform.close()

    def _folder(self, storage: StorageContext) -> Path:
        if self._path is not None:
            return self._path
        if storage.storage_filesystem.type_name != "local":
            raise InvalidInput(
                f"results of {storage.experiment_dir_name} go to {storage.storage_fs_path} on "
                f"{storage.storage_filesystem.type_name!r}, and a fleet needs a local folder: name "
                "one with register_smlt(path=...)"
            )
        return Path(storage.experiment_fs_path, FOLDER)


_current: Fleets | None = None


def current() -> Fleets | None:
    """What was registered last; None before ``register_smlt`` and after ``unregister_smlt``."""
    return _current


def replace(fleets: Fleets | None) -> None:
    """Registers them, and closes what those before have opened."""
    global _current
    before, _current = _current, fleets
    if before is not None:
        before.close()
