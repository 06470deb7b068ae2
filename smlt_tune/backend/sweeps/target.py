"""The training function that a sweep file names."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from smlt_tune.backend.sweeps.document import Mistake, did_you_mean

Train = Callable[[Any], Any]


def load(target: Any, folder: Path) -> Train:
    """The function named by ``file.py:function`` or ``package.module:function``.

    A file is looked for relative to the sweep file. The code travels to the workers by value.

    Args:
        target: As in the file.
        folder: Of the sweep file.

    Raises:
        Mistake: There is no such function; the text says what is wrong.
    """
    if not isinstance(target, str) or target.count(":") != 1:
        raise Mistake(f"expected file.py:function or package.module:function, not {target!r}")
    place, name = target.split(":")
    module = _from_file(folder / place) if place.endswith(".py") else _from_name(place)
    function = getattr(module, name, None)
    if function is None:
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise Mistake(f"{place} has no function {name!r}{did_you_mean(name, functions)}")
    if not callable(function):
        raise Mistake(f"{target} is no function")
    found: Train = function
    return found


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise Mistake(f"there is no file {path}")
    name = f"smlt_sweep_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise Mistake(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        del sys.modules[name]
        raise Mistake(f"{path} cannot be imported: {_say(error)}") from error
    return module


def _from_name(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the user's module raises
        raise Mistake(f"module {name} cannot be imported: {_say(error)}") from error


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
