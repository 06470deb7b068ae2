"""State that a program keeps in files of its own, whatever it was made with.

A checkpoint of such a program holds its files as they are: one array of bytes each, under the path
below the folder, with ``/`` between names. Empty folders, modes and times of files are not kept.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from safetensors.numpy import load, save

from smlt_tune.errors import InvalidInput, ObjectDamaged
from smlt_tune.runtime.frameworks.base import META

#: Says in the header of a checkpoint that it holds files.
FILES = "files"

#: No array may be called that in safetensors.
_RESERVED = "__metadata__"


def pack(folder: str | Path, meta: Mapping[str, str]) -> bytes:
    """A checkpoint of all files below a folder.

    Args:
        folder: Where they lie.
        meta: Goes into the header.

    Raises:
        InvalidInput: There is no such folder, or files in it cannot be kept.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InvalidInput(f"report_files() needs a folder, or None: {str(folder)!r} is none")
    paths = sorted(Path(place) / name for place, _, names in os.walk(root) for name in names)
    arrays, mistakes = {}, []
    for path in paths:
        name = path.relative_to(root).as_posix()
        if name == _RESERVED:
            mistakes.append(f"report_files() cannot keep a file called {_RESERVED}: rename it")
            continue
        try:
            name.encode()
            arrays[name] = np.fromfile(path, np.uint8)
        except (OSError, ValueError) as error:
            mistakes.append(f"report_files() cannot keep {str(path)!r}: {error}")
    if mistakes:
        raise InvalidInput(mistakes)
    return save(arrays, {META: json.dumps({**meta, FILES: str(len(arrays))})})


def unpack(content: bytes, into: Path) -> None:
    """Writes the files of a checkpoint below a folder, which is made if it does not exist.

    Raises:
        ObjectDamaged: A name in it leads out of the folder.
    """
    into.mkdir(parents=True, exist_ok=True)
    for name, array in load(content).items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ObjectDamaged(f"the checkpoint names a file outside of its folder: {name!r}")
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        array.tofile(into / path)
