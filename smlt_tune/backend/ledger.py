"""What has been reserved and what has been spent.

Money is reserved before it is spent: before anything is started that a platform will charge for,
its worst case is reserved; once it is over, the truth is settled and the rest is free again. So

    settled + reserved <= budget        at every instant.

Amounts are whole nano-dollars, as integers, because the line above is a comparison: with floats a
thousand small additions drift, and what was refused or accepted would depend on their order. What
comes in is rounded up, reservations and settlements by the same rule, so that a settlement that
does not exceed its reservation does not exceed it in nano-dollars either; the budget is rounded
down. Amounts that go out are floats that convert back to the same nano-dollars.

Fleets of one project may have a budget in common, too: then every reservation needs room in both,
see :mod:`smlt_tune.backend.project_ledger`.

The line can break in two ways only, and both show. A platform may charge more than its worst case:
that is a bug of the platform or of its prices, and the truth is booked all the same (see
:meth:`Ledger.settle`). Or a fleet is resumed with a budget below what was spent already. Then
``available_usd`` is negative, and every further reservation is refused until it no longer is.
"""

import logging
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from smlt_tune.backend.prices import nanos_to_usd, usd_to_nanos
from smlt_tune.backend.project_ledger import ProjectLedger
from smlt_tune.errors import BudgetExhausted, InvalidInput, StoreError
from smlt_tune.runtime.clock import SYSTEM_CLOCK, Clock

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Attributes:
        entry_id: Unique name; for an invocation, its id, as it appears in the platform's bill.
        job: The job that pays, or "" where the fleet does.
        what: What it is for, for people.
        reserved_usd: The worst case that was reserved, USD.
        settled_usd: What it did cost, USD; None while that is not known. 0 once it was released.
    """

    entry_id: str
    job: str
    what: str
    reserved_usd: float
    settled_usd: float | None = None

    @property
    def overrun_usd(self) -> float:
        """How much more it did cost than was reserved, USD; 0 unless a platform broke its word."""
        if self.settled_usd is None:
            return 0.0
        return nanos_to_usd(max(0, usd_to_nanos(self.settled_usd) - self._reserved_nanos))

    @property
    def _reserved_nanos(self) -> int:
        return usd_to_nanos(self.reserved_usd)

    @property
    def _held_nanos(self) -> int:
        """What it keeps from being spent otherwise."""
        return self._reserved_nanos if self.settled_usd is None else 0

    @property
    def _spent_nanos(self) -> int:
        return 0 if self.settled_usd is None else usd_to_nanos(self.settled_usd)


@dataclass(frozen=True)
class Totals:
    """All sums at one instant, in nano-dollars, so that they add up exactly.

    Attributes:
        budget: The budget, None if there is no limit.
        settled: What was spent.
        reserved: Worst case of what is under way.
    """

    budget: int | None
    settled: int
    reserved: int

    @property
    def available(self) -> float:
        """What may still be reserved; an integer, or infinity without a budget."""
        return math.inf if self.budget is None else self.budget - self.settled - self.reserved


class Ledger:
    """The ledger of one fleet. May be used from several threads.

    Args:
        budget_usd: What may be spent in all, USD; None for no limit.
        on_entry: Told of every change, in order, *before* it takes effect: a client that dies in
            between has recorded a reservation that was never used, but never used one that was not
            recorded. If it raises, nothing changes and the error reaches the caller. Called with
            the ledger's lock held: it may read this ledger, but must not change it or wait for a
            thread that uses it.
        project: Of the project's budget, which then has to cover every reservation as well.
        clock: Time; tells other fleets of the project for how long they may wait for this one.

    Raises:
        InvalidInput: The budget is negative or not a finite number.
    """

    def __init__(
        self,
        budget_usd: float | None,
        on_entry: Callable[[Entry], None] | None = None,
        *,
        project: ProjectLedger | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._budget = None if budget_usd is None else budget_nanos("budget_usd", budget_usd)
        self._on_entry = on_entry
        self._project, self._clock = project, clock
        self._ends_at = 0.0
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}
        self._settled = 0
        self._reserved = 0
        self._settled_of: defaultdict[str, int] = defaultdict(int)
        self._reserved_of: defaultdict[str, int] = defaultdict(int)
        self._overrun = 0

    @property
    def budget_usd(self) -> float | None:
        """The budget, USD, None if there is no limit."""
        return None if self._budget is None else nanos_to_usd(self._budget)

    @property
    def settled_usd(self) -> float:
        """What was spent, USD."""
        return nanos_to_usd(self.totals().settled)

    @property
    def reserved_usd(self) -> float:
        """Worst case of what is under way, USD."""
        return nanos_to_usd(self.totals().reserved)

    @property
    def available_usd(self) -> float:
        """What may still be reserved, USD; infinite without a budget, negative if overspent.

        Of the fleet's budget or the project's, whichever leaves less.
        """
        available = self.totals().available
        if self._project is not None:
            available = min(available, self._project.available())
        return available if math.isinf(available) else nanos_to_usd(int(available))

    @property
    def others_hold(self) -> bool:
        """Whether other fleets of the project have reserved what may soon be free."""
        return self._project is not None and self._project.others_hold()

    @property
    def overrun_usd(self) -> float:
        """By how much platforms charged more than was reserved, USD, all entries together."""
        with self._lock:
            return nanos_to_usd(self._overrun)

    def totals(self) -> Totals:
        """All sums at one instant; properties read one after the other may lie between changes."""
        with self._lock:
            return Totals(self._budget, self._settled, self._reserved)

    def job_usd(self, job: str) -> float:
        """What a job has spent so far, USD, without what is reserved for it."""
        with self._lock:
            return nanos_to_usd(self._settled_of.get(job, 0))

    def job_reserved_usd(self, job: str) -> float:
        """Worst case of what is under way for a job, USD."""
        with self._lock:
            return nanos_to_usd(self._reserved_of.get(job, 0))

    def entries(self) -> list[Entry]:
        """Every entry as it stands, in the order in which they were reserved."""
        with self._lock:
            return list(self._entries.values())

    def reserve(
        self, entry_id: str, job: str, usd: float, what: str, *, lasts_s: float = 0.0
    ) -> None:
        """Sets the worst case of something aside, before it is started.

        Args:
            entry_id: Unique name of what will be paid.
            job: Who pays, "" for the fleet.
            usd: The most that it can cost, USD.
            what: For people.
            lasts_s: How long it may go on at most, seconds.

        Raises:
            BudgetExhausted: Less than that is available. Nothing was reserved.
            InvalidInput: The amount is negative or no number, or the id is in the ledger already.
        """
        nanos = usd_to_nanos(usd)
        with self._lock:
            if entry_id in self._entries:
                raise InvalidInput(f"the ledger has an entry {entry_id!r} already")
            totals = self.totals()
            if nanos > totals.available:
                raise BudgetExhausted(_refusal(totals, nanos, job, what))
            if self._project is not None:
                self._ends_at = max(self._ends_at, self._clock.wall() + lasts_s)
                reserved = totals.reserved + nanos
                self._project.reserve(totals.settled, reserved, self._ends_at, _whose(what, job))
            self._write(Entry(entry_id, job, what, nanos_to_usd(nanos)))

    def settle(self, entry_id: str, usd: float) -> None:
        """Books what something did cost and frees its reservation.

        The first settlement of an entry counts; to settle again, or after :meth:`release`, changes
        nothing, and is logged if it names another amount.

        More than was reserved is booked as it is, because it was charged: the difference adds to
        :attr:`overrun_usd` and :attr:`Entry.overrun_usd`, and an error is logged. It comes out of
        what is available. If that is not enough, :attr:`available_usd` is negative from then on,
        and every reservation is refused. It does not raise, as the result that came with the
        charge is good, and whoever called back with it could do nothing about the bill.

        Args:
            entry_id: As it was reserved.
            usd: What it did cost, USD.

        Raises:
            InvalidInput: The amount is negative or no number, or there is no such entry.
        """
        settled = nanos_to_usd(usd_to_nanos(usd))
        with self._lock:
            entry = self._find(entry_id)
            if entry.settled_usd is None:
                self._write(replace(entry, settled_usd=settled))
            elif entry.settled_usd != settled:
                _LOG.warning(
                    "%s was settled at %.9f USD; ignored that it cost %.9f USD",
                    entry_id,
                    entry.settled_usd,
                    settled,
                )

    def release(self, entry_id: str) -> None:
        """Frees a reservation of something that was never started: settles it at nothing.

        Raises:
            InvalidInput: There is no such entry.
        """
        with self._lock:
            entry = self._find(entry_id)
            if entry.settled_usd is None:
                self._write(replace(entry, settled_usd=0.0))

    def restore(
        self,
        entries: Iterable[Entry],
        *,
        settle_at: Mapping[str, float] | None = None,
        still_running: Collection[str] = (),
    ) -> None:
        """Takes over the entries of a client that died, once, before anything else.

        Of entries that occur several times, as in a journal of changes, the last one counts. What
        the dead client had reserved and not settled is settled at its worst case, which it may
        have cost, unless more is known about it. Entries are taken over even if they exceed the
        budget: they were spent.

        Args:
            entries: As ``on_entry`` was told of them.
            settle_at: What open entries did cost, USD by id, where that is known.
            still_running: Ids whose reservation stays open, for what was found running; settle
                them as usual.

        Raises:
            InvalidInput: An amount is negative or no number, or the ledger is in use already.
        """
        known = dict(settle_at or {})
        with self._lock:
            if self._entries:
                raise InvalidInput("entries can be restored only into an empty ledger")
            last = {entry.entry_id: entry for entry in entries}
            for entry in last.values():
                self._book(entry)
            for entry in last.values():
                if entry.settled_usd is None and entry.entry_id not in still_running:
                    self.settle(entry.entry_id, known.get(entry.entry_id, entry.reserved_usd))
            self._tell_project()

    def _find(self, entry_id: str) -> Entry:
        try:
            return self._entries[entry_id]
        except KeyError:
            raise InvalidInput(f"the ledger has no entry {entry_id!r}") from None

    def _write(self, entry: Entry) -> None:
        """Records the change, then makes it."""
        try:
            if self._on_entry is not None:
                self._on_entry(entry)
            self._book(entry)
        finally:  # after a settlement; or a reservation that could not be recorded is taken back
            if entry.settled_usd is not None or entry.entry_id not in self._entries:
                self._tell_project()
        if entry.overrun_usd:
            _LOG.error(
                "%s (%s) cost %.9f USD, but its worst case was to be %.9f USD",
                entry.entry_id,
                entry.what,
                entry.settled_usd,
                entry.reserved_usd,
            )

    def _tell_project(self) -> None:
        if self._project is None:
            return
        try:
            self._project.settle(self._settled, self._reserved, self._ends_at)
        except StoreError as error:  # too much is reserved there until the next time
            _LOG.warning("the ledger of the project could not be written: %s", error)

    def _book(self, entry: Entry) -> None:
        before = self._entries.get(entry.entry_id)
        held = entry._held_nanos - (before._held_nanos if before else 0)
        spent = entry._spent_nanos - (before._spent_nanos if before else 0)
        self._reserved += held
        self._reserved_of[entry.job] += held
        self._settled += spent
        self._settled_of[entry.job] += spent
        self._overrun += usd_to_nanos(entry.overrun_usd)
        self._entries[entry.entry_id] = entry


def budget_nanos(name: str, budget_usd: object) -> int:
    """A budget in whole nano-dollars, rounded down.

    Args:
        name: Of the argument.
        budget_usd: Its value, USD.

    Raises:
        InvalidInput: It is negative or not a finite number.
    """
    if (
        isinstance(budget_usd, bool)
        or not isinstance(budget_usd, int | float)
        or not (math.isfinite(budget_usd) and budget_usd >= 0)
    ):
        raise InvalidInput(
            f"{name} must be a finite number of at least 0, or None, not {budget_usd!r}"
        )
    up = usd_to_nanos(budget_usd)
    return up - 1 if nanos_to_usd(up) > budget_usd else up


def _refusal(totals: Totals, asked: int, job: str, what: str) -> str:
    available = int(totals.available)
    return (
        f"{_whose(what, job)} may cost {_shown(asked)}, but only "
        f"{_shown(available)} of the budget of {_shown(totals.budget or 0)} are available "
        f"({_shown(totals.settled)} settled, {_shown(totals.reserved)} reserved)"
    )


def _whose(what: str, job: str) -> str:
    return f"{what} of {job}" if job else what


def _shown(nanos: int) -> str:
    """An amount for people: to the nano-dollar, but at least cents."""
    text = f"{nanos / 10**9:.9f}"
    whole, fraction = text.split(".")
    return f"{whole}.{fraction.rstrip('0').ljust(2, '0')} USD"
