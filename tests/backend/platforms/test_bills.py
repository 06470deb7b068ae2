"""What the local platform has written down of the invocations of a client that is dead."""

import json
import os
import subprocess

import pytest

from smlt_tune.backend.platforms.local import bills, linux
from smlt_tune.runtime.clock import SYSTEM_CLOCK
from tests.clocks import FakeClock


def order(path, name="a.g0.r0.i0", delivery=1, deliveries=1):
    return {
        "bill": str(path),
        "invocation": name,
        "delivery": delivery,
        "deliveries": deliveries,
        "memory_mb": 1024,
        "timeout_s": 60.0,
    }


@pytest.fixture
def dead():
    """A process that is over."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def path(tmp_path, dead):
    """A bill of a helper that is gone."""
    path = tmp_path / "0.jsonl"
    bills.write_opened(path, dead)
    return path


def read(path, *names, clock=SYSTEM_CLOCK):
    found = bills.read(path, names, clock)
    return {
        name: charge and (charge.result.billed_s, charge.result.deliveries)
        for name, charge in found.items()
    }


def test_what_has_ended_was_charged_and_what_was_not_begun_never_ran(path):
    bills.write_begun(order(path))
    bills.write_ended(order(path), "returned", 1234)
    charge = bills.read(path, ["a.g0.r0.i0"], SYSTEM_CLOCK)["a.g0.r0.i0"]
    assert (charge.memory_mb, charge.timeout_s) == (1024, 60.0)
    assert (charge.result.ending, charge.result.billed_s) == ("returned", 1.234)
    assert read(path, "a.g0.r0.i0", "never") == {"a.g0.r0.i0": (1.234, 1), "never": None}


def test_where_nothing_was_to_run_nothing_ran(tmp_path):
    assert read(tmp_path / "0.jsonl", "never") == {"never": None}


def test_what_was_lost_with_the_helper_is_not_known(path):
    bills.write_begun(order(path))
    assert read(path, "a.g0.r0.i0", "never") == {"never": None}


def test_deliveries_add_up_and_the_first_end_of_each_counts(path):
    both = [order(path, delivery=number, deliveries=2) for number in (1, 2)]
    bills.write_ended(both[0], "cancelled", 1)  # by the client, before the helper had it
    for each in both:
        bills.write_begun(each)
    assert read(path, "a.g0.r0.i0") == {}  # one of them was lost
    for each in both:
        bills.write_ended(each, "cancelled", 500)
    assert read(path, "a.g0.r0.i0") == {"a.g0.r0.i0": (0.501, 2)}


def test_a_delivery_that_was_not_begun_does_not_count(path):
    bills.write_begun(order(path, delivery=1, deliveries=2))
    bills.write_ended(order(path, delivery=1, deliveries=2), "cancelled", 7)
    assert read(path, "a.g0.r0.i0") == {"a.g0.r0.i0": (0.007, 1)}


@pytest.mark.parametrize(
    "damage", [b'{"line":"begun","invoc', b"\0\0\0\n", b"7\n", b'{"line":"begun"}\n', b'{"x":1}\n']
)
def test_if_a_line_cannot_be_read_only_what_is_there_is_known(path, damage):
    bills.write_ended(order(path), "returned", 5)
    bills.write_ended(order(path, "half", deliveries=2), "returned", 5)
    assert read(path, "half", "never") == {"half": (0.005, 1), "never": None}
    with path.open("ab") as file:
        file.write(damage)
    assert read(path, "a.g0.r0.i0", "half", "never") == {"a.g0.r0.i0": (0.005, 1)}


def test_a_machine_that_went_down_may_have_forgotten_lines(path, monkeypatch):
    bills.write_ended(order(path), "returned", 5)
    monkeypatch.setattr(bills, "_here", lambda: "another start of the machine")
    assert read(path, "a.g0.r0.i0", "never") == {"a.g0.r0.i0": (0.005, 1)}


def test_a_helper_that_still_runs_is_waited_for(tmp_path):
    path, running = tmp_path / "0.jsonl", subprocess.Popen(["sleep", "600"])
    bills.write_opened(path, running.pid)
    bills.write_begun(order(path))

    class Clock(FakeClock):
        def sleep(self, seconds):
            super().sleep(seconds)
            if self.monotonic() > 2.0 and running.poll() is None:
                bills.write_ended(order(path), "cancelled", 99)
                running.kill()
                running.wait()

    clock = Clock()
    assert read(path, "a.g0.r0.i0", "never", clock=clock) == {
        "a.g0.r0.i0": (0.099, 1),
        "never": None,
    }
    assert 2.0 < clock.monotonic() < 3.0


def test_one_that_hangs_is_not_waited_for_without_end(tmp_path):
    path, clock = tmp_path / "0.jsonl", FakeClock()
    bills.write_opened(path, os.getpid())
    assert read(path, "never", clock=clock) == {}
    assert clock.monotonic() >= bills.HELPER_ENDS_S


def test_another_process_of_the_same_number_is_not_the_helper(path):
    line = json.loads(path.read_text())
    line |= {"helper": os.getpid(), "ticks": linux.start_ticks(os.getpid()) + 1}
    path.write_text(json.dumps(line) + "\n")
    assert read(path, "never", clock=FakeClock()) == {"never": None}


def test_without_a_bill_nothing_is_written(tmp_path):
    bills.write_begun({**order(tmp_path), "bill": None})
    bills.write_ended({**order(tmp_path), "bill": None}, "returned", 1)
    assert list(tmp_path.iterdir()) == []
