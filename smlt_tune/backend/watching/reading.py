"""Reads the journal of a fleet that another process may have open, again and again."""

import errno
import math
import os
import struct
import threading
from pathlib import Path

from smlt_tune.backend.history import HistoryEvent, read_history
from smlt_tune.backend.watching.snapshot import Client, Snapshot, take
from smlt_tune.runtime.clock import SYSTEM_CLOCK, Clock

_JOURNAL = ("history.sqlite3", "history.sqlite3-wal")
_LOCK_FILE = "client.lock"

#: ``struct flock`` of 64-bit Linux: type, whence, start, length, process.
_FLOCK = "hhqqi4x"

#: Of the time goes into reading at most this share, so that watching never slows a fleet down much.
READING_SHARE = 0.1


class Watch:
    """A fleet's folder, looked at again and again. May be used from several threads.

    Args:
        folder: Of the fleet.
        clock: Time.

    Raises:
        InvalidInput: There is no history in the folder, or one of another version or program.
        ObjectDamaged: The history is damaged.
    """

    def __init__(self, folder: str | Path, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._folder, self._clock = Path(folder), clock
        self._lock = threading.Lock()
        self._next_s = -math.inf
        self._seen: object = None
        self._events: list[HistoryEvent] = []
        self._shot: Snapshot | None = None
        self.snapshot()

    def snapshot(self) -> Snapshot:
        """The fleet now; as it was a moment ago if that is much to read.

        Raises:
            SmltError: As for the constructor.
        """
        with self._lock:
            began = self._clock.monotonic()
            if self._shot is None or began >= self._next_s:
                # Asked before reading: of a client that ends in between, all is read.
                client = client_of(self._folder)
                self._read()
                self._shot = take(self._events, client=client, now_at=self._clock.wall())
                now = self._clock.monotonic()
                self._next_s = now + (now - began) / READING_SHARE
            return self._shot

    def _read(self) -> None:
        """Reads the journal if it has changed."""
        seen = [_stamp(self._folder / name) for name in _JOURNAL]
        if seen != self._seen:
            self._events = read_history(self._folder)
            self._seen = seen


def client_of(folder: str | Path) -> Client:
    """Who has a fleet open, told by the lock that its client holds.

    The question is asked on behalf of an open file description, not of this process: so it is
    answered truly even in the process that has the fleet open.
    """
    try:
        import fcntl

        get_lock = fcntl.F_OFD_GETLK
        file = _lock_file(Path(folder) / _LOCK_FILE)
    except (ImportError, AttributeError):  # another system than Linux
        return Client(known=False)
    except FileNotFoundError:
        return Client()
    except OSError:
        return Client(known=False)
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(file, get_lock, asked))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return Client(known=False)
    return Client() if kind == fcntl.F_UNLCK else Client(pid)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file does; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


_guard = threading.Lock()
_files: dict[tuple[int, int], int] = {}


def _lock_file(path: Path) -> int:
    """A descriptor that stays open: to close one gives up the lock that this process may hold."""
    with _guard:
        found = path.stat()
        key = (found.st_dev, found.st_ino)
        if key not in _files:
            _files[key] = os.open(path, os.O_RDONLY)
        return _files[key]
