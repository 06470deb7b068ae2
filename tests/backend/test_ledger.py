import logging
import math
import random
import re
import threading
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from smlt_tune.backend.ledger import Entry, Ledger, Totals
from smlt_tune.backend.prices import load_prices, nanos_to_usd, usd_to_nanos
from smlt_tune.errors import BudgetExhausted, InvalidInput

BAD_AMOUNTS = [-1e-9, -1, math.inf, math.nan]
amounts = st.integers(0, 3 * 10**9)


def test_money_is_reserved_then_settled():
    ledger = Ledger(1.0)
    ledger.reserve("i-1", "job-1", 0.4, "invocation 1")
    assert (ledger.reserved_usd, ledger.settled_usd, ledger.available_usd) == (0.4, 0, 0.6)
    assert (ledger.job_usd("job-1"), ledger.job_reserved_usd("job-1")) == (0, 0.4)
    ledger.settle("i-1", 0.1)
    assert (ledger.reserved_usd, ledger.settled_usd, ledger.available_usd) == (0, 0.1, 0.9)
    assert (ledger.job_usd("job-1"), ledger.job_reserved_usd("job-1")) == (0.1, 0)
    assert ledger.job_usd("job-2") == 0
    assert ledger.entries() == [Entry("i-1", "job-1", "invocation 1", 0.4, 0.1)]


def test_a_released_reservation_costs_nothing():
    ledger = Ledger(1.0)
    ledger.reserve("i-1", "job-1", 1.0, "invocation 1")
    ledger.release("i-1")
    ledger.release("i-1")
    assert (ledger.available_usd, ledger.settled_usd) == (1.0, 0)


def test_what_the_budget_does_not_cover_is_refused_with_every_figure():
    ledger = Ledger(5)
    ledger.reserve("i-1", "job-1", 4.5, "invocation 1")
    ledger.settle("i-1", 4.4)
    ledger.reserve("i-2", "job-1", 0.5, "invocation 2")
    with pytest.raises(
        BudgetExhausted,
        match=re.escape(
            "invocation 3 of job-2 may cost 0.100000001 USD, but only 0.10 USD of the budget of "
            "5.00 USD are available (4.40 USD settled, 0.50 USD reserved)"
        ),
    ):
        ledger.reserve("i-3", "job-2", 0.100000001, "invocation 3")
    with pytest.raises(BudgetExhausted, match=r"^the store may cost 0\.156 USD, but only"):
        ledger.reserve("s-1", "", 0.156, "the store")
    assert [entry.entry_id for entry in ledger.entries()] == ["i-1", "i-2"]
    ledger.reserve("i-3", "job-2", 0.1, "invocation 3")
    assert ledger.available_usd == 0


def test_sums_are_exact_where_those_of_floats_are_not():
    ledger = Ledger(0.3)
    assert 0.1 + 0.1 + 0.1 > 0.3
    for name in "abc":
        ledger.reserve(name, "job-1", 0.1, "invocation")
    assert ledger.totals() == Totals(3 * 10**8, 0, 3 * 10**8)
    assert ledger.reserved_usd == 0.3


@pytest.mark.parametrize(("budget", "nanos"), [(1e-10, 0), (1.9e-9, 1), (0.3, 3 * 10**8), (0, 0)])
def test_the_budget_is_rounded_down(budget, nanos):
    assert Ledger(budget).totals().budget == nanos


def test_without_a_budget_nothing_is_refused():
    ledger = Ledger(None)
    ledger.reserve("i-1", "job-1", 1e6, "invocation 1")
    assert ledger.available_usd == math.inf
    assert ledger.budget_usd is None


@pytest.mark.parametrize("budget", [*BAD_AMOUNTS, "5", True])
def test_an_impossible_budget_is_refused(budget):
    message = f"budget_usd must be a finite number of at least 0, or None, not {budget!r}"
    with pytest.raises(InvalidInput, match=f"^{re.escape(message)}$"):
        Ledger(budget)


@pytest.mark.parametrize("usd", BAD_AMOUNTS)
def test_an_impossible_amount_is_refused_and_changes_nothing(usd):
    ledger = Ledger(1.0)
    ledger.reserve("i-1", "job-1", 0.5, "invocation 1")
    message = f"an amount in USD must be a finite number of at least 0, not {float(usd)!r}"
    with pytest.raises(InvalidInput, match=f"^{re.escape(message)}$"):
        ledger.reserve("i-2", "job-1", usd, "invocation 2")
    with pytest.raises(InvalidInput, match=f"^{re.escape(message)}$"):
        ledger.settle("i-1", usd)
    assert ledger.totals() == Totals(10**9, 0, 5 * 10**8)


def test_an_entry_is_reserved_once_and_must_be_known():
    ledger = Ledger(1.0)
    ledger.reserve("i-1", "job-1", 0.5, "invocation 1")
    with pytest.raises(InvalidInput, match=r"^the ledger has an entry 'i-1' already$"):
        ledger.reserve("i-1", "job-1", 0.5, "invocation 1")
    for verb in (lambda: ledger.settle("i-2", 0.1), lambda: ledger.release("i-2")):
        with pytest.raises(InvalidInput, match=r"^the ledger has no entry 'i-2'$"):
            verb()


def test_the_first_settlement_counts(caplog):
    told = []
    ledger = Ledger(1.0, told.append)
    ledger.reserve("i-1", "job-1", 0.5, "invocation 1")
    ledger.settle("i-1", 0.2)
    ledger.settle("i-1", 0.2)
    assert not caplog.records
    ledger.settle("i-1", 0.3)
    ledger.release("i-1")
    assert ledger.settled_usd == 0.2
    assert len(told) == 2
    assert caplog.messages == [
        "i-1 was settled at 0.200000000 USD; ignored that it cost 0.300000000 USD"
    ]


def test_an_overrun_is_booked_told_and_stops_further_spending(caplog):
    ledger = Ledger(1.0)
    ledger.reserve("i-1", "job-1", 0.5, "invocation 1")
    ledger.settle("i-1", 0.7)
    assert (ledger.settled_usd, ledger.available_usd, ledger.overrun_usd) == (0.7, 0.3, 0.2)
    ledger.reserve("i-2", "job-1", 0.3, "invocation 2")
    ledger.settle("i-2", 0.4)
    assert (ledger.settled_usd, ledger.available_usd, ledger.overrun_usd) == (1.1, -0.1, 0.3)
    assert [entry.overrun_usd for entry in ledger.entries()] == [0.2, 0.1]
    with pytest.raises(BudgetExhausted, match=r"but only -0\.10 USD of the budget"):
        ledger.reserve("i-3", "job-1", 0.0, "invocation 3")
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert caplog.messages[0] == (
        "i-1 (invocation 1) cost 0.700000000 USD, but its worst case was to be 0.500000000 USD"
    )


def test_changes_are_told_in_order_before_they_take_effect():
    told = []
    ledger = Ledger(1.0, lambda entry: told.append((entry, ledger.totals())))
    ledger.reserve("i-1", "job-1", 0.5, "invocation 1")
    ledger.settle("i-1", 0.2)
    ledger.reserve("i-2", "job-1", 0.5, "invocation 2")
    ledger.release("i-2")
    assert [entry for entry, _ in told] == [
        Entry("i-1", "job-1", "invocation 1", 0.5),
        Entry("i-1", "job-1", "invocation 1", 0.5, 0.2),
        Entry("i-2", "job-1", "invocation 2", 0.5),
        Entry("i-2", "job-1", "invocation 2", 0.5, 0.0),
    ]
    assert [totals.reserved for _, totals in told] == [0, 5 * 10**8, 0, 5 * 10**8]


def test_a_change_that_cannot_be_recorded_is_not_made():
    failing = False

    def record(entry):
        if failing:
            raise OSError("disk")

    ledger = Ledger(1.0, record)
    ledger.reserve("i-1", "job-1", 0.5, "invocation 1")
    failing = True
    with pytest.raises(OSError, match="disk"):
        ledger.reserve("i-2", "job-1", 0.1, "invocation 2")
    with pytest.raises(OSError, match="disk"):
        ledger.settle("i-1", 0.1)
    assert ledger.totals() == Totals(10**9, 0, 5 * 10**8)
    failing = False
    ledger.settle("i-1", 0.1)
    assert ledger.totals() == Totals(10**9, 10**8, 0)


JOURNAL = [
    Entry("i-1", "job-1", "invocation 1", 0.5),
    Entry("i-2", "job-2", "invocation 2", 0.3),
    Entry("i-1", "job-1", "invocation 1", 0.5, 0.1),
    Entry("i-3", "job-2", "invocation 3", 0.2),
]


def test_what_a_dead_client_had_reserved_is_settled_at_its_worst_case():
    told = []
    ledger = Ledger(1.0, told.append)
    ledger.restore(JOURNAL)
    assert ledger.totals() == Totals(10**9, 6 * 10**8, 0)
    assert (ledger.job_usd("job-1"), ledger.job_usd("job-2")) == (0.1, 0.5)
    assert [(entry.entry_id, entry.settled_usd) for entry in told] == [("i-2", 0.3), ("i-3", 0.2)]


def test_unless_more_is_known_about_it():
    ledger = Ledger(1.0)
    ledger.restore(JOURNAL, settle_at={"i-2": 0.05}, still_running=["i-3"])
    assert ledger.totals() == Totals(10**9, 15 * 10**7, 2 * 10**8)
    ledger.settle("i-3", 0.1)
    assert ledger.totals() == Totals(10**9, 25 * 10**7, 0)


def test_what_was_spent_is_taken_over_even_if_the_budget_is_now_smaller():
    ledger = Ledger(0.5)
    ledger.restore(JOURNAL)
    assert ledger.available_usd == -0.1
    with pytest.raises(BudgetExhausted):
        ledger.reserve("i-4", "job-1", 0.01, "invocation 4")


def test_a_ledger_in_use_cannot_be_restored():
    ledger = Ledger(1.0)
    ledger.reserve("i-1", "job-1", 0.5, "invocation 1")
    with pytest.raises(InvalidInput, match=r"^entries can be restored only into an empty ledger$"):
        ledger.restore(JOURNAL)


@settings(max_examples=60, deadline=None)
class Books(RuleBasedStateMachine):
    """Any sequence of events, beside books kept in the plainest way."""

    ids = Bundle("ids")
    done = Bundle("done")

    def __init__(self):
        super().__init__()
        self.budget = 5 * 10**9
        self.journal = []
        self.ledger = Ledger(5, self.record)
        self.open = {}
        self.bill = {}

    def record(self, entry):
        self.journal.append(entry)
        self.within_budget()

    @rule(target=ids, nanos=amounts, job=st.sampled_from(["job-1", "job-2"]))
    def reserve(self, nanos, job):
        name = f"i-{len(self.open) + len(self.bill)}"
        fits = nanos + sum(self.open.values()) + sum(self.bill.values()) <= self.budget
        try:
            self.ledger.reserve(name, job, nanos_to_usd(nanos), "invocation")
        except BudgetExhausted:
            assert not fits
            name = f"refused-{name}"
            self.bill.setdefault(name, 0)
        else:
            assert fits
            self.open[name] = nanos
        return name

    @rule(target=done, name=consumes(ids), share=st.fractions(0, 1))
    def settle(self, name, share):
        if name in self.open:
            self.bill[name] = int(self.open.pop(name) * share)
            self.ledger.settle(name, nanos_to_usd(self.bill[name]))
        return name

    @rule(target=done, name=consumes(ids))
    def release(self, name):
        if name in self.open:
            self.bill[name] = 0
            del self.open[name]
            self.ledger.release(name)
        return name

    @rule(name=done, nanos=amounts)
    def settle_again(self, name, nanos):
        if not name.startswith("refused"):
            self.ledger.settle(name, nanos_to_usd(nanos))

    @rule()
    def resume(self):
        self.ledger = Ledger(5, self.record)
        self.ledger.restore(list(self.journal), still_running=self.open)

    @invariant()
    def within_budget(self):
        totals = self.ledger.totals()
        assert totals.settled + totals.reserved <= self.budget
        assert totals.available == self.budget - totals.settled - totals.reserved

    @invariant()
    def the_books_agree(self):
        totals = self.ledger.totals()
        assert totals.settled == sum(self.bill.values())
        assert totals.reserved == sum(self.open.values())
        by_job = sum(usd_to_nanos(self.ledger.job_usd(job)) for job in ("job-1", "job-2"))
        assert by_job == totals.settled


test_any_sequence_of_events = Books.TestCase


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), budget=st.floats(0.001, 0.02))
def test_threads_never_exceed_the_budget_and_the_sum_is_the_platforms_bill(seed, budget):
    prices = load_prices()
    bills, broken = [], []

    def watch(entry):
        totals = ledger.totals()
        if totals.settled + totals.reserved > totals.budget:
            broken.append(totals)

    ledger = Ledger(budget, watch)

    def platform(number):
        """Starts what it may, and charges it by its own books."""
        rng, bill = random.Random(seed + number), 0
        for k in range(40):
            memory_mb, timeout_s = rng.randint(128, 10240), rng.choice([1, 3, 60])
            name = f"{number}-{k}"
            try:
                worst = prices.worst_case_usd(memory_mb, timeout_s, deliveries=2)
                ledger.reserve(name, f"job-{k % 3}", worst, "invocation")
            except BudgetExhausted:
                continue
            starts = rng.choice([0, 1, 2])
            billed_ms = sum(rng.randint(1, timeout_s * 1000) for _ in range(starts))
            if starts:
                ledger.settle(name, prices.invocation_usd(memory_mb, billed_ms / 1000, starts))
            else:
                ledger.release(name)
            # 166,667 / 10 nano-dollars a GB-s, in integers, rounded up
            bill += -(-(memory_mb * billed_ms * 166_667) // (1024 * 1000 * 10)) + 200 * starts
            watch(None)
        bills.append(bill)

    threads = [threading.Thread(target=platform, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not broken
    assert len(bills) == 4
    assert ledger.totals() == Totals(ledger.totals().budget, sum(bills), 0)
    assert ledger.overrun_usd == 0


def test_no_thread_slips_in_between_the_check_and_the_booking():
    both = threading.Barrier(2)
    refused = []

    def meet(entry):
        with suppress(threading.BrokenBarrierError):  # nobody can come: the ledger is locked
            both.wait(0.2)

    def reserve(name):
        try:
            ledger.reserve(name, "job-1", 0.6, "invocation")
        except BudgetExhausted:
            refused.append(name)

    ledger = Ledger(1.0, meet)
    threads = [threading.Thread(target=reserve, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1
    assert ledger.reserved_usd == 0.6
