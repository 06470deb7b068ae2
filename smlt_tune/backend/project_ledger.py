"""One budget over all fleets of a project, in whatever processes they run.

A file, ``ledger.sqlite3``, in the project's folder. It holds the budget and, for every fleet, what
that has settled and reserved; so

    settled + reserved of all fleets <= budget        at every instant.

A fleet writes its own two sums whenever they change, as they are *after* the change, in one
transaction with the check. A sum can therefore be written again, and whatever kept a fleet from
writing one is mended by the next. A reservation is written here before the fleet's journal has it,
a settlement after: a client that dies in between has reserved too much here, never too little.

The budget stays with the project: a fleet that names none keeps to the one that is there, because
a budget that one may forget protects nothing. One that names another changes it, for all.

What a dead fleet had reserved goes on counting, as its functions may run up to their time limit and
are billed. ``Fleet.open`` takes it over. Nobody waits for it: with its sums every fleet says when
the last of its functions ends.
"""

import math
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from smlt_tune.backend.database import FileFormat, row_crc32
from smlt_tune.backend.prices import nanos_to_usd
from smlt_tune.errors import BudgetExhausted, FleetClosed, InvalidInput
from smlt_tune.runtime.clock import Clock

SCHEMA_VERSION = 1
FILE = "ledger.sqlite3"

_FORMAT = FileFormat(
    application_id=0x534D4C42,  # "SMLB"
    version=SCHEMA_VERSION,
    unit="the file",
    schema="""
CREATE TABLE IF NOT EXISTS budget (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    nanos INTEGER NOT NULL,
    crc32 INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS fleets (
    name TEXT PRIMARY KEY,
    settled INTEGER NOT NULL,
    reserved INTEGER NOT NULL,
    ends_at REAL NOT NULL,
    crc32 INTEGER NOT NULL
);
""",
)
_SELECT = "SELECT name, settled, reserved, ends_at, crc32 FROM fleets"
_REPLACE = "INSERT OR REPLACE INTO fleets VALUES (?, ?, ?, ?, ?)"


class ProjectLedger:
    """One fleet's access to the ledger of its project. May be used from several threads.

    Args:
        folder: Of the project; made if it does not exist.
        fleet: Name of the fleet.
        budget: What all fleets together may cost, nano-dollars; None for what the project has.
        clock: Time.

    Raises:
        InvalidInput: The folder cannot be used, or the file was written by another version or by
            another program.
        ObjectDamaged: The file is damaged. It is left as it was found.
        StoreError: It cannot be used.
    """

    def __init__(self, folder: str | Path, fleet: str, budget: int | None, clock: Clock) -> None:
        self._path = Path(folder) / FILE
        self._fleet, self._clock = fleet, clock
        self._lock = threading.Lock()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"cannot use the folder {folder}: {error.strerror}") from error
        self._connection: sqlite3.Connection | None = _FORMAT.open(self._path)
        if budget is not None:
            with self._transaction() as connection:
                row = (1, budget, row_crc32(budget))
                connection.execute("INSERT OR REPLACE INTO budget VALUES (?, ?, ?)", row)

    @classmethod
    def open(cls, folder: str | Path, fleet: str, budget: int | None, clock: Clock) -> Self | None:
        """The same; None if the project has no budget, and none is given."""
        if budget is None and not (Path(folder) / FILE).exists():
            return None
        ledger = cls(folder, fleet, budget, clock)
        if math.isinf(ledger.available()):
            ledger.close()
            return None
        return ledger

    def available(self) -> float:
        """What may still be reserved, nano-dollars; infinite without a budget.

        Raises:
            ObjectDamaged: The file is damaged.
            StoreError: It cannot be read.
        """
        with self._transaction(writes=False) as connection:
            return _available(connection)

    def reserve(self, settled: int, reserved: int, ends_at: float, what: str) -> None:
        """Writes the fleet's sums with one more reservation, if the budget covers that.

        Args:
            settled: What the fleet has spent, nano-dollars.
            reserved: Worst case of what is under way in it, the new reservation included.
            ends_at: When the last of it is over, seconds since the Unix epoch.
            what: What the new one is for, for people.

        Raises:
            BudgetExhausted: It does not. Nothing was written.
            StoreError: It could not be written.
        """
        with self._transaction() as connection:
            before = _sums(connection)
            self._write(connection, settled, reserved, ends_at)
            over = -_available(connection)
            if over > 0:
                own = before.get(self._fleet, (0, 0, 0.0))
                asked = settled + reserved - own[0] - own[1]
                raise BudgetExhausted(
                    f"{what} may cost {_usd(asked)}, but only {_usd(asked - int(over))} of the "
                    f"budget of the project in {self._path.parent} are available: its fleets have "
                    f"settled {_usd(sum(s for s, _, _ in before.values()))} and reserved "
                    f"{_usd(sum(r for _, r, _ in before.values()))}"
                )

    def settle(self, settled: int, reserved: int, ends_at: float) -> None:
        """Writes the fleet's sums, whatever they are: what was spent was spent.

        Raises:
            StoreError: They could not be written.
        """
        with self._transaction() as connection:
            self._write(connection, settled, reserved, ends_at)

    def others_hold(self) -> bool:
        """Whether another fleet has functions under way, whose money may soon be free."""
        now_at = self._clock.wall()
        with self._transaction(writes=False) as connection:
            return any(
                reserved > 0 and ends_at > now_at
                for name, (_, reserved, ends_at) in _sums(connection).items()
                if name != self._fleet
            )

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _write(
        self, connection: sqlite3.Connection, settled: int, reserved: int, ends_at: float
    ) -> None:
        row = (self._fleet, settled, reserved, ends_at)
        connection.execute(_REPLACE, (*row, row_crc32(*row)))

    @contextmanager
    def _transaction(self, *, writes: bool = True) -> Iterator[sqlite3.Connection]:
        """One instant for all fleets; an error undoes all of it."""
        with self._lock, _FORMAT.translated(str(self._path)):
            connection = self._connection
            if connection is None:
                raise FleetClosed(f"{self._path} was closed")
            connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise


def _usd(nanos: int) -> str:
    return f"{nanos_to_usd(nanos):.9f} USD"


def _available(connection: sqlite3.Connection) -> float:
    found = connection.execute("SELECT nanos, crc32 FROM budget").fetchone()
    if found is None:
        return math.inf
    nanos, crc32 = found
    if row_crc32(nanos) != crc32:
        raise sqlite3.DatabaseError("the budget is not what was written")
    return int(nanos) - sum(s + r for s, r, _ in _sums(connection).values())


def _sums(connection: sqlite3.Connection) -> dict[str, tuple[int, int, float]]:
    """Settled, reserved and the end of the last function, by fleet."""
    found = {}
    for name, settled, reserved, ends_at, crc32 in connection.execute(_SELECT):
        if row_crc32(name, settled, reserved, ends_at) != crc32:
            raise sqlite3.DatabaseError(f"the sums of {name} are not what was written")
        found[name] = (settled, reserved, ends_at)
    return found
