"""Functions in this process."""

import threading

import pytest

from smlt_tune.backend.platforms.base import Cancels, Invocation
from smlt_tune.backend.platforms.inline import InlinePlatform
from smlt_tune.errors import InvalidInput
from tests.contracts import platform_functions
from tests.contracts.platform import PlatformContract, call


@pytest.fixture
def make():
    """Platforms that run the functions of the tests."""
    made = []

    def make(concurrency=1):
        assert concurrency == 1
        made.append(InlinePlatform(entry=platform_functions.ENTRY))
        return made[-1]

    yield make
    for each in made:
        each.close()


class TestInline(PlatformContract):
    """What all platforms do; nothing is enforced here."""


def test_runs_in_a_thread_of_this_process(make, monkeypatch):
    seen = []
    monkeypatch.setattr(
        platform_functions, "nothing", lambda: seen.append(threading.current_thread())
    )
    assert call(make(), "nothing").result().ending == "returned"
    assert seen[0] is not threading.current_thread()


def test_an_overrun_is_not_ended_but_billed_up_to_the_time_out(make):
    result = call(make(), "wait", seconds=0.1, timeout_s=0.02).result()
    assert (result.ending, result.billed_s) == ("returned", 0.02)


def test_offers_no_cancel(make):
    assert not isinstance(make(), Cancels)


def test_close_waits_for_the_running_function(make, tmp_path):
    platform = make()
    told = []
    platform.invoke(
        Invocation("x", 256, 60.0, platform_functions.order("wait", seconds=0.05)), told.append
    )
    platform.close()
    assert [result.ending for result in told] == ["returned"]


@pytest.mark.parametrize("entry", ["", "module", "module:", ":function", "a.b:c:d", "a b:c", 3])
def test_refuses_an_entry_that_is_none(entry):
    with pytest.raises(InvalidInput) as caught:
        InlinePlatform(entry=entry)
    assert str(caught.value) == f"entry={entry!r}: must be 'package.module:function'"


def test_an_entry_that_does_not_exist_is_a_crash(make):
    with InlinePlatform(entry="tests.contracts.platform_functions:missing") as platform:
        result = call(platform, "nothing").result()
    assert result.ending == "crashed"
    assert "has no attribute 'missing'" in result.detail
