"""Inside a function: what ``tune.report``, ``get_checkpoint`` and ``get_context`` talk to.

Those are functions of Ray that look up one global, ``ray.train._internal.session._session``. Here
that is a :class:`TuneSession`, which passes everything on to the job's session. Ray is never
imported for it: where the user's code does so later, the global is set at that moment.
"""

import functools
import importlib.abc
import importlib.machinery
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from smlt_tune.runtime.session import Session

MODULE = "ray.train._internal.session"

#: A metric that holds, as JSON, those that are no plain numbers or strings.
NESTED = "smlt/nested"


@dataclass(frozen=True)
class Trial:
    """What a trial's functions know of it.

    Attributes:
        trial_id: As in Tune.
        name: As in Tune.
        experiment: Name of the experiment.
        config: What the trainable is called with.
        resources: Arguments of the trial's ``SmltResources``.
    """

    trial_id: str
    name: str
    experiment: str
    config: dict[str, Any]
    resources: dict[str, Any]


class TuneSession:
    """Has what Ray's functions look for in a session.

    Args:
        trial: Whose.
        session: Of the job.
        folder: Where to put files; it vanishes with the invocation.
    """

    world_rank = None
    run_id = None

    def __init__(self, trial: Trial, session: Session, folder: Path) -> None:
        self.trial_id, self.trial_name = trial.trial_id, trial.name
        self.experiment_name, self.trial_dir = trial.experiment, str(folder)
        self._resources, self._session = trial.resources, session

    @property
    def trial_resources(self) -> Any:
        """The ``SmltResources`` of the trial."""
        from smlt_tune.integrations.ray import SmltResources

        return SmltResources(**self._resources)

    @functools.cached_property
    def restored(self) -> Path | None:
        """Folder with the files that the trial starts from; None at the beginning.

        Asking says that the trial keeps its state in files.
        """
        into = Path(self.trial_dir, "restored")
        return into if self._session.restored_files(into) else None

    @functools.cached_property
    def loaded_checkpoint(self) -> Any:
        """The same as Ray's ``Checkpoint``."""
        from ray.tune import Checkpoint

        return self.restored and Checkpoint.from_directory(str(self.restored))

    def report(
        self, metrics: Mapping[str, Any], checkpoint: Any = None, checkpoint_dir_name: object = None
    ) -> None:
        """What ``tune.report`` calls. The files of the checkpoint are the state to start from."""
        plain = _plain(metrics)
        if checkpoint is None:
            self._session.report(**plain)
            return
        with checkpoint.as_directory() as folder:
            self._session.report_files(plain, folder)
        self.loaded_checkpoint = checkpoint


@contextmanager
def serving(trial: Trial, session: Session) -> Iterator[TuneSession]:
    """While it lasts, ``tune.report`` and its like work in this process."""
    with tempfile.TemporaryDirectory(prefix="smlt-tune-") as folder:
        tune_session = TuneSession(trial, session, Path(folder))

        def use(module: ModuleType) -> None:
            module._session = tune_session  # type: ignore[attr-defined]

        hook = _AfterImport(MODULE, use)
        sys.meta_path.insert(0, hook)
        if MODULE in sys.modules:
            use(sys.modules[MODULE])
        try:
            yield tune_session
        finally:
            sys.meta_path.remove(hook)
            if MODULE in sys.modules:
                sys.modules[MODULE]._session = None  # type: ignore[attr-defined]


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module as soon as it has been imported."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Finds the module as usual, and extends how it is loaded."""
        if fullname != self._name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and strings as they are; everything else, which Tune allows too, as JSON."""
    plain = {str(name): _item(value) for name, value in metrics.items()}
    simple = (bool, int, float, str, type(None))
    nested = {name: value for name, value in plain.items() if not isinstance(value, simple)}
    if nested:
        plain = {name: value for name, value in plain.items() if name not in nested}
        plain[NESTED] = json.dumps(nested, default=_jsonable)
    return plain


def _item(value: Any) -> Any:
    """The one number in an array or tensor; anything else as it is."""
    try:
        return value.item()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return value


def _jsonable(value: Any) -> Any:
    item = _item(value)
    if item is not value:
        return item
    return value.tolist() if hasattr(value, "tolist") else str(value)
