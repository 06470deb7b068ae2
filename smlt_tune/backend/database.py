"""SQLite files of this package: opened with care, checked before use, never repaired.

Each holds a table whose rows end in a CRC-32: SQLite notices a broken page, but not a changed
figure in it. The application id tells files of this package from those of other programs, the
version tells releases apart that write another schema.
"""

import json
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smlt_tune.errors import InvalidInput, ObjectDamaged, StorageFull, StoreError

_BUSY_TIMEOUT_S = 30.0
_CREATE = """
BEGIN IMMEDIATE;
{schema}
PRAGMA application_id = {application_id};
PRAGMA user_version = {version};
COMMIT;
"""


@dataclass(frozen=True)
class FileFormat:
    """What lies in a file.

    Attributes:
        application_id: Of this kind of file.
        version: Raised whenever the schema changes.
        schema: Statements that make the tables and may be run again.
        unit: What a user moves away to start anew, such as ``the folder``.
        synchronous: ``FULL``: what was written survives a lost machine. ``NORMAL``: only a killed
            process; cheaper.
    """

    application_id: int
    version: int
    schema: str
    unit: str
    synchronous: Literal["FULL", "NORMAL"] = "FULL"

    def open(self, path: Path) -> sqlite3.Connection:
        """A connection for writing, with a write-ahead log; the file is made if there is none.

        Raises:
            InvalidInput: Another program or another version has written it.
            ObjectDamaged: It is damaged. It is left as it was found.
            StoreError: It cannot be used.
        """
        with self.translated(str(path)):
            connection = _connect(str(path))
            try:
                if not _is_new(connection):
                    self._check(connection, path)
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute(f"PRAGMA synchronous = {self.synchronous}")
                if _is_new(connection):
                    connection.executescript(self._script)
            except BaseException:
                connection.close()
                raise
            return connection

    def open_to_read(self, path: Path) -> sqlite3.Connection | None:
        """A connection that writes nothing; None if nothing was made in the file yet.

        Raises:
            InvalidInput: Another program or another version has written it.
            ObjectDamaged: It is damaged.
        """
        with self.translated(str(path)):
            connection = _connect(f"{path.absolute().as_uri()}?mode=ro")
            try:
                if not _is_new(connection):
                    self._check(connection, path)
                    return connection
            except BaseException:
                connection.close()
                raise
            connection.close()
            return None

    @contextmanager
    def translated(self, where: str) -> Iterator[None]:
        """Translates SQLite's errors."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
                raise StorageFull(f"no space is left to write {where}") from error
            raise StoreError(f"{where} cannot be used: {error}") from error
        except (sqlite3.DatabaseError, json.JSONDecodeError) as error:
            raise self._damaged(where, error) from error

    @property
    def _script(self) -> str:
        return _CREATE.format(
            schema=self.schema, application_id=self.application_id, version=self.version
        )

    def _check(self, connection: sqlite3.Connection, path: Path) -> None:
        """Refuses what this version cannot read."""
        if connection.execute("PRAGMA application_id").fetchone() != (self.application_id,):
            raise InvalidInput(f"{path} was not written by smlt_tune; it was left as it is")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version != self.version:
            raise InvalidInput(
                f"{path} has version {version}; this smlt_tune reads and writes version "
                f"{self.version}. Open it with the version that wrote it, or choose another folder"
            )
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise self._damaged(str(path), " ".join(verdict.split()))

    def _damaged(self, where: str, detail: object) -> ObjectDamaged:
        return ObjectDamaged(
            f"{where} is damaged ({detail}). Nothing was deleted: move {self.unit} away to start "
            f"anew, or put a copy of it back"
        )


def row_crc32(*values: str | float) -> int:
    """Checksum of a row, to be kept as its last column."""
    texts = (value if isinstance(value, str) else repr(value) for value in values)
    return zlib.crc32("\0".join(texts).encode())


def _connect(database: str) -> sqlite3.Connection:
    """A connection that commits every statement by itself."""
    connection = sqlite3.connect(
        database,
        uri=database.startswith("file:"),
        timeout=_BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.text_factory = _text
    return connection


def _text(stored: bytes) -> str:
    """Text as it was stored; damage is found by its checksum."""
    return stored.decode(errors="replace")


def _is_new(connection: sqlite3.Connection) -> bool:
    """Whether nothing was made in it yet; a client may have died before it came to that."""
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    return bool(tables == 0)
