"""The actor: one function instance on a node of the cluster.

It is a local platform of one function. So a function ends with its actor, and all that it has
started ends with it, however the actor ends; the actor in turn ends with the client.
"""

import os
import select
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smlt_tune.backend.platforms.base import Invocation, InvocationResult
from smlt_tune.backend.platforms.local import LocalPlatform

#: Largest piece of a function's output that is sent at once: Ray keeps objects below 100 KB in the
#: messages themselves, so that none has to be fetched from the node. Bytes.
PIECE = 64 * 1024


@dataclass(frozen=True)
class Accepted:
    """The function has been started."""


Said = Accepted | bytes | InvocationResult


class FunctionInstance:
    """Runs invocations, one at a time. Its methods are called by Ray, in threads of their own.

    Args:
        options: Of the node's :class:`LocalPlatform`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._platform = LocalPlatform(concurrency=1, **options)

    def run(self, invocation: Invocation, payload: bytes, *, logs: bool) -> Iterator[Said]:
        """Runs a function; tells that it has begun, what it prints, and how it ended.

        Args:
            invocation: What to run, without payload and log.
            payload: The payload.
            logs: Whether the function's output is wanted.
        """
        ended: list[InvocationResult] = []
        with _Pipe() as end, _Pipe() as output:

            def on_done(result: InvocationResult) -> None:
                ended.append(result)
                os.write(end.writer, b".")

            # A path to the pipe: whatever becomes of this process, no file is left on the node.
            path = Path(f"/proc/{os.getpid()}/fd/{output.writer}") if logs else None
            self._platform.invoke(
                Invocation(
                    invocation.invocation_id,
                    invocation.memory_mb,
                    invocation.timeout_s,
                    payload,
                    path,
                ),
                on_done,
            )
            yield Accepted()
            while not ended:
                if output.reader in _readable(output.reader, end.reader):
                    yield os.read(output.reader, PIECE)
            while _readable(output.reader, timeout_ms=0):
                yield os.read(output.reader, PIECE)
        yield ended[0]

    def cancel(self, invocation_id: str) -> None:
        """Ends it at once; :meth:`run` tells how."""
        self._platform.cancel(invocation_id)

    def close(self) -> None:
        """Ends everything and waits for it."""
        self._platform.close()


def _readable(*fds: int, timeout_ms: int | None = None) -> list[int]:
    """Waits until one of the files can be read; those that can."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(timeout_ms)]


class _Pipe:
    """Two file descriptors that are closed in the end."""

    def __enter__(self) -> "_Pipe":
        self.reader, self.writer = os.pipe()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.reader)
        os.close(self.writer)
