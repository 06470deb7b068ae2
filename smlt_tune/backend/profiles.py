"""Sibling history: the profiles of all jobs of a project, kept for every later fleet.

One file, ``profiles.sqlite3``, in a folder of the user's choice. Any number of processes may write
to it at once; each :meth:`ProfileStore.add` is one transaction. A profile replaces the older one of
the same job, workload and allocation. Profiles are bound to the fingerprint of the platform they
were measured on: those of other platforms are kept, and not returned.

Unlike the journal of a fleet it is no record that anything depends on: a fleet whose profiles are
damaged runs without them (see :func:`open_profiles`).
"""

import hashlib
import json
import logging
import math
import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from smlt_tune.backend.database import FileFormat, row_crc32
from smlt_tune.backend.resource_manager.observations import (
    Allocation,
    Profile,
    Workload,
    not_counts,
)
from smlt_tune.errors import FleetClosed, InvalidInput, StoreError
from smlt_tune.runtime.features import ModelFeatures

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

SCHEMA_VERSION = 3
FILE = "profiles.sqlite3"
#: Most profiles that are returned: more siblings than a decision ever looks at.
NEWEST = 5_000

_FORMAT = FileFormat(
    application_id=0x534D4C50,  # "SMLP"
    version=SCHEMA_VERSION,
    unit="the file",
    synchronous="NORMAL",
    schema="""
CREATE TABLE IF NOT EXISTS profiles (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    fingerprint TEXT NOT NULL,
    subject TEXT NOT NULL,
    body TEXT NOT NULL,
    crc32 INTEGER NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS one_of_each ON profiles (fingerprint, subject);
CREATE INDEX IF NOT EXISTS by_age ON profiles (fingerprint, seq);
""",
)
_SELECT = """
SELECT fingerprint, subject, body, crc32 FROM profiles
WHERE fingerprint = ? ORDER BY seq DESC LIMIT ?
"""
_REPLACE = """
INSERT OR REPLACE INTO profiles (fingerprint, subject, body, crc32) VALUES (?, ?, ?, ?)
"""


class ProfileStore:
    """The profiles of a project. May be used from several threads.

    Args:
        folder: Where the file lies; both are made if they do not exist.

    Raises:
        InvalidInput: The folder cannot be used, or the file was written by another version or by
            another program.
        ObjectDamaged: The file is damaged. It is left as it was found.
        StoreError: It cannot be used.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / FILE
        self._lock = threading.Lock()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"cannot use the folder {folder}: {error.strerror}") from error
        self._connection: sqlite3.Connection | None = _FORMAT.open(self._path)

    def add(self, profile: Profile, fingerprint: str) -> None:
        """Keeps a profile, in place of the older one of the same job, workload and allocation.

        Args:
            profile: What was measured.
            fingerprint: Of the platform it was measured on.

        Raises:
            InvalidInput: Lists everything that cannot have been measured.
            FleetClosed: The store was closed.
            StoreError: It could not be written; what was kept before is safe.
        """
        if mistakes := _mistakes(profile, fingerprint):
            raise InvalidInput([f"profile of {profile.job_id!r}: {each}" for each in mistakes])
        body = _encoded(asdict(profile))
        row = (fingerprint, _subject(profile), body)
        with self._lock, _FORMAT.translated(str(self._path)):
            self._opened().execute(_REPLACE, (*row, row_crc32(*row)))

    def profiles(self, fingerprint: str, *, newest: int = NEWEST) -> list[Profile]:
        """The profiles of a platform, oldest first.

        Args:
            fingerprint: Of the platform.
            newest: How many at most; the older ones stay in the file.

        Raises:
            FleetClosed: The store was closed.
            ObjectDamaged: The file is damaged.
        """
        with self._lock, _FORMAT.translated(str(self._path)):
            rows = self._opened().execute(_SELECT, (fingerprint, newest)).fetchall()
            return [_decoded(row) for row in reversed(rows)]

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ProfileStore({str(self._path.parent)!r})"

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise FleetClosed(f"{self._path} was closed")
        return self._connection


def open_profiles(
    folder: str | Path, fingerprint: str
) -> tuple[ProfileStore | None, list[Profile]]:
    """The store, and what it knows of a platform; for those who can do without.

    A store that is damaged or cannot be read is logged and left alone.

    Returns:
        The store and its profiles; (None, []) if it must not be used.

    Raises:
        InvalidInput: The folder cannot be used, or the file was written by another version or by
            another program: somebody has mixed up folders.
    """
    store = None
    try:
        store = ProfileStore(folder)
        return store, store.profiles(fingerprint)
    except StoreError as error:
        if store is not None:
            store.close()
        _LOG.warning("going on without the profiles of earlier jobs: %s", error)
        return None, []


def _subject(profile: Profile) -> str:
    """What was measured, apart from how it came out."""
    what = (profile.job_id, asdict(profile.workload), asdict(profile.allocation))
    return hashlib.sha256(_encoded(what).encode()).hexdigest()[:32]


def _encoded(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _decoded(row: tuple[str, str, str, int]) -> Profile:
    *content, crc32 = row
    if row_crc32(*content) != crc32:
        raise sqlite3.DatabaseError("a profile is not what was written")
    body = json.loads(row[2])
    try:
        workload = dict(body["workload"])
        workload["features"] = _made(ModelFeatures, workload["features"])
        parts = {
            "workload": _made(Workload, workload),
            "allocation": _made(Allocation, body["allocation"]),
        }
        return _made(Profile, {**body, **parts})
    except (KeyError, TypeError, ValueError) as error:
        raise sqlite3.DatabaseError(f"a profile has the wrong form: {error}") from error


def _made(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of exactly these values; a default would hide what is missing."""
    names = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    if names != set(values):
        raise TypeError(f"{kind.__name__} with {sorted(values)}")
    return kind(**values)


def _mistakes(profile: Profile, fingerprint: str) -> list[str]:
    """What cannot have been measured."""
    workload = profile.workload
    counts = {"batch": workload.batch}
    amounts: dict[str, float] = {
        "parameters": workload.features.parameters,
        "gradient_bytes": workload.features.gradient_bytes,
        "flops_per_sample": workload.features.flops_per_sample,
        "activation_bytes": workload.features.activation_bytes,
        "iteration_s": profile.iteration_s,
        "sync_s": profile.sync_s,
        "other_share": profile.other_share or 0.0,
        "start_s": profile.start_s,
        "hold_up_s": profile.hold_up_s,
        "end_s": profile.end_s or 0.0,
        "peak_mb": profile.peak_mb,
    }
    if workload.iterations is not None:
        counts["workload.iterations"] = workload.iterations
    if not profile.out_of_memory:  # else there are no times
        counts["iterations"] = profile.iterations
    mistakes = not_counts(counts) + [
        f"{name} must be a finite number of at least 0, not {value!r}"
        for name, value in amounts.items()
        if not _is_amount(value)
    ]
    texts = {"job_id": profile.job_id, "fingerprint": fingerprint}
    mistakes += [f"{name} must not be empty" for name, text in texts.items() if not text]
    if not mistakes and not profile.out_of_memory:
        if not profile.iteration_s > 0:
            mistakes.append("iteration_s must be above 0")
        if profile.sync_s > profile.iteration_s:
            mistakes.append(
                f"sync_s={profile.sync_s!r} is part of iteration_s={profile.iteration_s!r} and "
                "cannot be more"
            )
    return mistakes


def _is_amount(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0
