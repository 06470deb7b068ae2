"""An object store that counts what it does, and stops before it costs more than was allowed."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from smlt_tune.errors import BudgetExhausted
from smlt_tune.runtime.stores.base import Buffer, ObjectStore


@dataclass(frozen=True)
class Usage:
    """What was asked of an object store.

    Attributes:
        puts: Objects that were to be stored, also in vain.
        gets: Objects that were to be read, also in vain.
        lists: Listings.
        deletes: Objects that were to be deleted.
        bytes_in: Bytes sent to the store.
        bytes_out: Bytes that came from the store.
    """

    puts: int = 0
    gets: int = 0
    lists: int = 0
    deletes: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class MeteredObjectStore:
    """Counts the verbs asked of another store. May be used from several threads.

    Counted is before it is done, so that failures count too. What the inner store tries again by
    itself, or splits into pages, is one verb here.

    Args:
        inner: The store that does it.
        max_puts: After so many puts BudgetExhausted is raised; None for no limit.
        max_gets: The same for gets.
    """

    def __init__(
        self, inner: ObjectStore, *, max_puts: int | None = None, max_gets: int | None = None
    ) -> None:
        self._inner = inner
        self._max_puts = max_puts
        self._max_gets = max_gets
        self._usage = Usage()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"MeteredObjectStore({self._inner!r})"

    @property
    def usage(self) -> Usage:
        """What was asked so far."""
        return self._usage

    @property
    def url(self) -> str:  # noqa: D102 - the contract stands on the protocol
        return self._inner.url

    def put(  # noqa: D102
        self, key: str, content: Buffer, *, if_absent: bool = False
    ) -> bool:
        self._count(puts=1, bytes_in=memoryview(content).nbytes)
        return self._inner.put(key, content, if_absent=if_absent)

    def get(self, key: str) -> bytes:  # noqa: D102
        self._count(gets=1)
        content = self._inner.get(key)
        self._count(bytes_out=len(content))
        return content

    def list(self, prefix: str) -> list[str]:  # noqa: D102
        self._count(lists=1)
        return self._inner.list(prefix)

    def delete(self, keys: Sequence[str]) -> None:  # noqa: D102
        self._count(deletes=len(keys))
        self._inner.delete(keys)

    def _count(self, *, puts: int = 0, gets: int = 0, **others: int) -> None:
        with self._lock:
            old = self._usage
            _check(puts, old.puts, self._max_puts, "stored")
            _check(gets, old.gets, self._max_gets, "read")
            more = {"puts": puts, "gets": gets, **others}
            self._usage = replace(old, **{name: getattr(old, name) + more[name] for name in more})


def _check(asked: int, so_far: int, allowed: int | None, verb: str) -> None:
    if asked and allowed is not None and so_far + asked > allowed:
        raise BudgetExhausted(
            f"the {allowed} objects that may be {verb} were {verb}: the budget covers no more "
            "requests to the object store; save or read less often, or raise the budget"
        )


if TYPE_CHECKING:
    from smlt_tune.runtime.stores.directory import DirectoryStore

    _: ObjectStore = MeteredObjectStore(DirectoryStore(""))
