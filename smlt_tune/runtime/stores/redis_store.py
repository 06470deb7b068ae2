"""Parameter store over Redis or Valkey (paper 3b), through redis-py.

Every verb is one pipeline without a transaction: one round trip. All retrying happens in
:meth:`RedisStore._retrying`; redis-py's own is switched off.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry

from smlt_tune.errors import InvalidInput, StorageFull, StoreError, StoreUnavailable
from smlt_tune.runtime.clock import SYSTEM_CLOCK, Clock
from smlt_tune.runtime.stores.base import Buffer

T = TypeVar("T")
Command = tuple[str | int | Buffer, ...]

#: Field of every stream entry that carries the message; empty in a token.
_FIELD = b"m"
#: Tokens that are kept of a stream at least. A reader only needs to learn that there is a new one.
_TOKENS = 100
#: Largest value that a server accepts (proto-max-bulk-len), in bytes.
_LARGEST = 512 * 2**20
#: Values below this size, in bytes, are sent in one system call with what is around them.
_SMALL = 6000
#: A connection that has shown no byte for this long, in seconds, is given up.
_SILENCE_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 1.0


class RedisStore:
    """A Redis 6.2+ or Valkey server as parameter store.

    Connects on first use. May be used from several threads. A process that was forked must make its
    own store. After a lost connection a verb is sent again: a message may then lie in a stream
    twice; a value that :meth:`put_once` finds stored already counts as its own if it is equal.

    Args:
        url: ``redis://[[user]:password@]host[:port][/db]``, ``rediss://...`` for TLS, or
            ``unix://[[user]:password@]/path``. Percent-encode special characters of the password.
        retry_s: How long to keep trying to reach the server before StoreUnavailable, in seconds.
        clock: Source of time.

    Raises:
        InvalidInput: The URL is none, or (from every verb) the server refuses the password.
    """

    def __init__(self, url: str, *, retry_s: float = 30.0, clock: Clock = SYSTEM_CLOCK) -> None:
        self._retry_s = retry_s
        self._clock = clock
        self._closed = False
        self._random = random.Random()
        self._silence_s = min(_SILENCE_S, max(0.5, retry_s / 2))
        self._address, self._pool = _pool(url, self._silence_s)

    def __repr__(self) -> str:
        return f"RedisStore({self._address!r})"

    def put_once(  # noqa: D102 - the contract stands on the protocol
        self, items: Mapping[str, Buffer], *, ttl_s: float, announce: Sequence[str] = ()
    ) -> list[bool]:
        values, ttl = _values(items), _milliseconds(ttl_s)
        # The values first: who is woken up by a token must find them.
        commands: list[Command] = [("SET", key, values[key], "NX", "PX", ttl) for key in values]
        for stream in announce:
            commands += _append(stream, b"", ttl, "MAXLEN", "~", _TOKENS)
        attempts = 0

        def send() -> list[bool]:
            nonlocal attempts
            attempts += 1
            return [reply is not None for reply in self._send(commands)[: len(values)]]

        stored = self._retrying(send)
        return stored if attempts == 1 else self._recognised(values, stored)

    def _recognised(self, values: Mapping[str, Buffer], stored: Sequence[bool]) -> list[bool]:
        """Counts what an earlier attempt of the same call stored before its connection broke."""
        doubtful = [key for key, done in zip(values, stored, strict=True) if not done]
        found = dict(zip(doubtful, self.get(doubtful), strict=True))
        return [done or found[key] == values[key] for key, done in zip(values, stored, strict=True)]

    def put(self, items: Mapping[str, Buffer], *, ttl_s: float) -> None:  # noqa: D102
        ttl = _milliseconds(ttl_s)
        self._run([("SET", key, value, "PX", ttl) for key, value in _values(items).items()])

    def get(self, keys: Sequence[str]) -> list[bytes | None]:  # noqa: D102
        return self._run([("GET", key) for key in keys])

    def delete(self, keys: Sequence[str]) -> None:  # noqa: D102
        if keys:
            self._run([("UNLINK", *keys)])

    def delete_prefix(self, prefix: str) -> int:  # noqa: D102
        pattern = re.sub(r"([\\*?\[\]])", r"\\\1", prefix) + "*"
        cursor, removed = b"0", 0
        while True:
            [[cursor, keys]] = self._run([("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)])
            if keys:
                removed += self._run([("UNLINK", *keys)])[0]
            if cursor == b"0":
                return removed

    def append(self, stream: str, message: Buffer, *, ttl_s: float) -> None:  # noqa: D102
        self._run(_append(stream, _bytes_view(stream, message), _milliseconds(ttl_s)))

    def read(  # noqa: D102
        self, stream: str, after: str, *, timeout_s: float, limit: int = 1000
    ) -> list[tuple[str, bytes]]:
        entries = self._entries(stream, after, timeout_s, "COUNT", limit)
        return [(identity.decode(), message) for identity, (_, message) in entries]

    def trim(self, stream: str, before: str) -> None:  # noqa: D102
        time, _, sequence = before.partition("-")
        self._run([("XTRIM", stream, "MINID", f"{time}-{int(sequence or 0) + 1}")])

    def wait(self, stream: str, after: str, *, timeout_s: float) -> str:  # noqa: D102
        entries = self._entries(stream, after, timeout_s)
        newest: str = entries[-1][0].decode() if entries else after
        return newest

    def _entries(self, stream: str, after: str, timeout_s: float, *options: str | int) -> list[Any]:
        """Blocks in slices shorter than the socket's time-out, so that a dead server is noticed."""
        until = self._clock.monotonic() + timeout_s
        while True:
            left_s = min(until - self._clock.monotonic(), self._silence_s / 2)
            block = ("BLOCK", max(1, round(left_s * 1000))) if left_s > 0 else ()
            [reply] = self._run([("XREAD", *options, *block, "STREAMS", stream, after)])
            if reply:
                [[_, entries]] = reply
                return list(entries)
            if self._clock.monotonic() >= until:
                return []

    def server_id(self) -> str:  # noqa: D102
        [info] = self._run([("INFO", "server")])
        facts = dict(line.partition(":")[::2] for line in info.decode().splitlines())
        return str(facts["run_id"])

    def close(self) -> None:  # noqa: D102
        self._closed = True
        self._pool.disconnect()

    def _run(self, commands: Sequence[Command]) -> list[Any]:
        return self._retrying(lambda: self._send(commands))

    def _send(self, commands: Sequence[Command]) -> list[Any]:
        """One round trip. All replies are read; then the first error among them is raised."""
        if not commands:
            return []
        connection: Any = self._pool.get_connection()
        try:
            self._check_open()  # from here on, close() cuts this connection
            connection.send_packed_command(_frame(commands))
            replies = [_reply(connection) for _ in commands]
        except BaseException:
            connection.disconnect()  # replies may be on their way
            raise
        finally:
            self._pool.release(connection)
        for reply in replies:
            if isinstance(reply, redis.ResponseError):
                raise reply
        return replies

    def _retrying(self, call: Callable[[], T]) -> T:
        """The only retry loop: bounded by ``retry_s`` since the first failure of the call."""
        give_up: float | None = None
        pause_s = _FIRST_PAUSE_S
        while True:
            self._check_open()
            try:
                with self._translated():
                    return call()
            except (redis.ConnectionError, redis.TimeoutError) as error:
                self._check_open()
                now = self._clock.monotonic()
                give_up = now + self._retry_s if give_up is None else give_up
                if now >= give_up:
                    raise StoreUnavailable(
                        f"the parameter store {self._address} did not answer for "
                        f"{self._retry_s:g} s ({error}): check that the server runs and that this "
                        "machine may reach it"
                    ) from error
                self._clock.sleep(min(pause_s * self._random.uniform(0.5, 1.0), give_up - now))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable(
                f"the parameter store {self._address} was closed in this process: make a new one"
            )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of redis-py to ours, but for those worth a retry."""
        try:
            yield
        except (redis.AuthenticationError, redis.exceptions.AuthorizationError) as error:
            raise InvalidInput(
                f"the parameter store {self._address} refuses the user name or password "
                f"({error}): check them in its URL"
            ) from error
        except redis.exceptions.NoPermissionError as error:
            raise InvalidInput(
                f"the user of the parameter store {self._address} lacks a permission ({error})"
            ) from error
        except redis.exceptions.OutOfMemoryError as error:
            raise StorageFull(
                f"the parameter store {self._address} has no memory left: raise the server's "
                "maxmemory, or run fewer workers or jobs at once"
            ) from error
        except redis.ResponseError as error:
            raise StoreError(
                f"the parameter store {self._address} refused a command ({error}): it must be "
                "Redis 6.2 or newer, or Valkey"
            ) from error


def _pool(url: str, silence_s: float) -> tuple[str, redis.ConnectionPool]:
    """A pool of connections that are not open yet, and the address to show: without password."""
    try:
        options = parse_url(url)  # type: ignore[no-untyped-call]
        address = _address(url, options)
        if "path" not in options:
            options.setdefault("socket_keepalive", True)
        pool = redis.ConnectionPool(
            max_connections=2**16,
            socket_timeout=silence_s,
            socket_connect_timeout=silence_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            **options,
        )
        pool.make_connection()  # refuses options that no connection knows
    except (ValueError, TypeError, redis.RedisError):
        # Not chained, not quoted: whatever could not be parsed may be a piece of the password.
        raise InvalidInput(
            "not the URL of a parameter store: expected redis://[[user]:password@]host[:port][/db],"
            " rediss://... or unix://[[user]:password@]/path with special characters of the "
            "password percent-encoded"
        ) from None
    return address, pool


def _address(url: str, options: Mapping[str, Any]) -> str:
    database = f"/{options['db']}" if options.get("db") else ""
    if url.startswith("unix:"):
        return f"unix://{options['path'] or ''}" if "path" in options else _no_path()
    scheme = url.split(":", 1)[0]
    return f"{scheme}://{options.get('host', 'localhost')}:{options.get('port', 6379)}{database}"


def _no_path() -> str:
    raise ValueError("unix:// without a path")


def _append(stream: str, value: Buffer, ttl: int, *options: str | int) -> list[Command]:
    return [("XADD", stream, *options, "*", _FIELD, value), ("PEXPIRE", stream, ttl)]


def _frame(commands: Sequence[Command]) -> list[Buffer]:
    """Commands as the server reads them. Large values are not copied (redis-py: twice)."""
    chunks: list[Buffer] = []
    text = bytearray()
    for command in commands:
        text += b"*%d\r\n" % len(command)
        for part in command:
            data = part if isinstance(part, Buffer) else str(part).encode()
            text += b"$%d\r\n" % len(data)
            if len(data) < _SMALL:
                text += data
            else:
                chunks += (text, data)
                text = bytearray()
            text += b"\r\n"
    chunks.append(text)
    return chunks


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error


def _milliseconds(ttl_s: float) -> int:
    if not ttl_s > 0:
        raise InvalidInput(f"ttl_s must be positive, got {ttl_s!r}")
    return max(1, round(ttl_s * 1000))


def _values(items: Mapping[str, Buffer]) -> dict[str, Buffer]:
    return {key: _bytes_view(key, value) for key, value in items.items()}


def _bytes_view(key: str, value: Buffer) -> Buffer:
    """The value with its length in bytes, where a view of an array says it in elements."""
    if isinstance(value, memoryview):
        value = value.cast("B") if value.c_contiguous else value.tobytes()
    if len(value) > _LARGEST:
        raise InvalidInput(
            f"the value of {key} has {len(value)} bytes, a parameter store takes {_LARGEST} at "
            "most: cut it into more shards"
        )
    return value


if TYPE_CHECKING:
    from smlt_tune.runtime.stores.base import ParameterStore

    _: ParameterStore = RedisStore("")
