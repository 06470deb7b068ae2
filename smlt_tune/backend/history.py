"""The durable record of a fleet: a journal of events that is only ever appended to.

What a fleet knows (jobs, reports, entries of the ledger, profiles) is what its events say, read in
order. Nothing is ever changed or removed, so a client may die at any instant and the next one reads
what the dead one knew.

One folder per fleet:

| file | what |
|---|---|
| ``history.sqlite3`` (and ``-wal``, ``-shm``) | the events |
| ``client.lock`` | locked by the one client that writes; holds its process id |

The events lie in SQLite with a write-ahead log. :meth:`History.append` returns once SQLite has
handed the event to the disk (``synchronous = FULL``), so that neither ``kill -9`` nor a lost
machine loses it. The lock is one of the operating system's that ends with its process: it needs no
clean-up, and children do not inherit it, so functions that outlive a dead client do not keep the
folder closed.

The shape, two verbs over a journal, is that of Optuna's journal storage backends.
"""

import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from smlt_tune.backend.database import FileFormat, row_crc32
from smlt_tune.errors import FleetClosed, InvalidInput
from smlt_tune.runtime.clock import SYSTEM_CLOCK, Clock

SCHEMA_VERSION = 1

_FILE = "history.sqlite3"
_LOCK_FILE = "client.lock"

_SELECT = "SELECT seq, at, kind, job, body, crc32 FROM events ORDER BY seq"
_INSERT = "INSERT INTO events (at, kind, job, body, crc32) VALUES (?, ?, ?, ?, ?)"
_FORMAT = FileFormat(
    application_id=0x534D4C54,  # "SMLT"
    version=SCHEMA_VERSION,
    unit="the folder",
    schema="""
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    job TEXT NOT NULL,
    body TEXT NOT NULL,
    crc32 INTEGER NOT NULL
);
""",
)


@dataclass(frozen=True)
class HistoryEvent:
    """Something that happened in a fleet.

    Attributes:
        seq: Position in the history, from 1; larger is later.
        at: When it was appended, seconds since the Unix epoch.
        kind: What happened; the writer's vocabulary.
        job: The job it happened to, or "".
        body: What else is known, as it comes out of JSON (tuples became lists).
    """

    seq: int
    at: float
    kind: str
    job: str
    body: Mapping[str, Any]


class History:
    """The history of one fleet, open for writing. May be used from several threads.

    Args:
        folder: Of the fleet; made if it does not exist. None keeps the history in memory.
        clock: Gives the time of the events.

    Raises:
        InvalidInput: Another client has the folder open; or it was written by another version, or
            by another program; or it cannot be used.
        ObjectDamaged: The history is damaged. It is left as it was found.
    """

    def __init__(self, folder: str | Path | None, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._where = "the history in memory"
        self._folder_lock = None
        self._connection: sqlite3.Connection | None = None
        self._rows: list[tuple[float, str, str, str]] | None = None
        if folder is None:
            self._rows = []
            return
        path = Path(folder) / _FILE
        self._where = str(path)
        self._folder_lock = _FolderLock(Path(folder))
        try:
            self._connection = _FORMAT.open(path)
        except BaseException:
            self._folder_lock.release()
            raise

    def append(self, kind: str, job: str, body: Mapping[str, Any]) -> None:
        """Adds an event and returns once it is durable.

        Args:
            kind: What happened.
            job: The job it happened to, or "".
            body: Values that JSON can hold; NaN and infinities may be among them.

        Raises:
            InvalidInput: JSON cannot hold the body.
            FleetClosed: The history was closed.
            StorageFull: There is no space left; the event was not added, the others are safe.
            StoreError: It could not be written.
        """
        try:
            text = json.dumps(dict(body), separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"a {kind} event cannot be written as JSON: {error}") from error
        with self._lock, _FORMAT.translated(self._where):
            row = (self._clock.wall(), kind, job, text)
            if self._rows is not None:
                self._rows.append(row)
            else:
                self._opened().execute(_INSERT, (*row, row_crc32(*row)))

    def read(self) -> list[HistoryEvent]:
        """Every event, oldest first.

        Raises:
            FleetClosed: The history was closed.
            ObjectDamaged: The history is damaged.
        """
        with self._lock, _FORMAT.translated(self._where):
            if self._rows is not None:
                return [
                    HistoryEvent(seq, at, kind, job, json.loads(text))
                    for seq, (at, kind, job, text) in enumerate(self._rows, 1)
                ]
            return _events(self._opened())

    def close(self) -> None:
        """Frees the folder for the next client. Idempotent."""
        with self._lock:
            connection, self._connection, self._rows = self._connection, None, None
        if connection is not None:
            connection.close()
        if self._folder_lock is not None:
            self._folder_lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise FleetClosed(f"{self._where} was closed")
        return self._connection


def read_history(folder: str | Path) -> list[HistoryEvent]:
    """The events of a fleet that another client may have open; takes no lock and writes nothing.

    Raises:
        InvalidInput: There is no history in the folder, or one of another version or program.
        ObjectDamaged: The history is damaged.
    """
    path = Path(folder) / _FILE
    if not path.is_file():
        raise InvalidInput(f"there is no fleet in {folder}: it holds no {_FILE}")
    connection = _FORMAT.open_to_read(path)
    if connection is None:
        return []
    with _FORMAT.translated(str(path)), closing(connection):
        return _events(connection)


def _events(connection: sqlite3.Connection) -> list[HistoryEvent]:
    events = []
    for seq, at, kind, job, body, crc32 in connection.execute(_SELECT):
        if row_crc32(at, kind, job, body) != crc32:
            raise sqlite3.DatabaseError(f"event {seq} is not what was written")
        events.append(HistoryEvent(seq, at, kind, job, json.loads(body)))
    return events


class _FolderLock:
    """One client per folder, told by the operating system, and one per process, told by a set.

    Locks of ``fcntl.lockf`` belong to the process: they end with it, however it ends, and a child
    made by ``fork`` does not inherit them. But they never conflict within a process, and closing
    *any* descriptor of the file gives them up; hence the set, looked at before the file is opened.
    """

    _guard = threading.Lock()
    _held: set[tuple[int, Path]] = set()  # noqa: RUF012 - shared on purpose, by the whole process

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._name = (os.getpid(), folder.resolve())
            with self._guard:
                if self._name in self._held:
                    raise _in_use(folder, str(os.getpid()))
                self._file = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
                self._take(folder)
                self._held.add(self._name)
        except OSError as error:
            raise InvalidInput(f"cannot use the folder {folder}: {error.strerror}") from error

    def _take(self, folder: Path) -> None:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either
            holder = os.pread(self._file, 32, 0).decode(errors="replace").strip()
            os.close(self._file)
            raise _in_use(folder, holder or "unknown") from error
        except OSError:
            os.close(self._file)
            raise

    def release(self) -> None:
        """Lets the next client in. Idempotent."""
        with self._guard:
            if self._name in self._held and self._name[0] == os.getpid():
                self._held.remove(self._name)
                with suppress(OSError):
                    os.close(self._file)


def _in_use(folder: Path, pid: str) -> InvalidInput:
    return InvalidInput(
        f"the fleet in {folder} is open in process {pid}; close it there, or end that process"
    )
