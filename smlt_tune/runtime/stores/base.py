"""The two storage tiers, as the rest of the package sees them.

A parameter store holds small, hot, short-lived values in memory (paper 3b). An object store holds
code, data and checkpoints (paper 3a). Implementations raise only :mod:`smlt_tune.errors`, retry
what is worth retrying themselves, and may be used from several threads.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

Buffer = bytes | bytearray | memoryview


class ParameterStore(Protocol):
    """In-memory key-value store with streams.

    Every verb raises StoreUnavailable once the server has not answered for the retry bound.
    """

    def put_once(
        self, items: Mapping[str, Buffer], *, ttl_s: float, announce: Sequence[str] = ()
    ) -> list[bool]:
        """Stores each value unless its key exists already; the first writer wins.

        All in one round trip. After the values an empty token is appended to every stream in
        ``announce``, so that a reader blocked in :meth:`wait` looks again.

        Args:
            items: Values by key.
            ttl_s: Time after which the values (and the announced streams) vanish.
            announce: Streams to append a token to.

        Returns:
            For each item, in order: whether this call stored it.
        """

    def put(self, items: Mapping[str, Buffer], *, ttl_s: float) -> None:
        """Stores each value, replacing what was there."""

    def get(self, keys: Sequence[str]) -> list[bytes | None]:
        """The values under the keys, None where there is none. One round trip."""

    def delete(self, keys: Sequence[str]) -> None:
        """Removes the keys; those that do not exist are ignored."""

    def delete_prefix(self, prefix: str) -> int:
        """Removes every key that starts with the prefix; returns how many."""

    def append(self, stream: str, message: Buffer, *, ttl_s: float) -> None:
        """Appends a message to a stream and renews the stream's time to live."""

    def read(
        self, stream: str, after: str, *, timeout_s: float, limit: int = 1000
    ) -> list[tuple[str, bytes]]:
        """Messages of a stream after the id ``after`` ("0" for all), oldest first.

        Blocks up to ``timeout_s`` while there is none; 0 does not block. Returns (id, message).
        """

    def trim(self, stream: str, before: str) -> None:
        """Forgets the messages up to and including the id ``before``."""

    def wait(self, stream: str, after: str, *, timeout_s: float) -> str:
        """Blocks until the stream has a token after the id ``after``, or the time is over.

        Returns:
            The id of the newest token ("after" itself if there is none), to pass next time.
        """

    def server_id(self) -> str:
        """Changes when the server was restarted, that is, when it lost what it held."""

    def close(self) -> None:
        """Releases connections. Idempotent."""


class ObjectStore(Protocol):
    """Durable store of immutable or atomically replaced objects.

    Keys are ``/``-separated names of letters, digits, ``.``, ``_``, ``-``. Every verb raises
    StoreUnavailable after bounded retries, StorageFull when there is no space.
    """

    @property
    def url(self) -> str:
        """Address from which ``open_object_store`` makes an equal store; holds no secret."""

    def put(self, key: str, content: Buffer, *, if_absent: bool = False) -> bool:
        """Stores an object atomically: a reader sees the whole old or the whole new content.

        Args:
            key: Its name.
            content: Its bytes.
            if_absent: Store only if no object has that name.

        Returns:
            Whether it was stored (always true without ``if_absent``).
        """

    def get(self, key: str) -> bytes:
        """The whole object. Raises ObjectNotFound; never returns a part of it."""

    def list(self, prefix: str) -> list[str]:
        """Keys that start with the prefix, sorted."""

    def delete(self, keys: Sequence[str]) -> None:
        """Removes objects; those that do not exist are ignored."""
