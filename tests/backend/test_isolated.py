"""Calls in a process of their own: what comes back, and what is left behind when they go wrong."""

import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from smlt_tune.backend import isolated
from smlt_tune.errors import FunctionLost, InvalidInput, TrainingFunctionError, UsageError
from tests.jobs import alive

ROOT = Path(__file__).parents[2]


def where_it_runs(*args, **kwargs):
    sys.stdout.write("what it prints is no answer\n")
    return os.getpid(), os.getpgrp(), args, kwargs


def deep(config):
    return deeper(config)


def deeper(config):
    raise ZeroDivisionError(f"no {config['name']}")


def raises(error):
    raise error


def dies(how):
    sys.stderr.write("last words\n")
    sys.stderr.flush()
    os._exit(3) if how == "exits" else os.kill(os.getpid(), how)


def forks_and_hangs(folder):
    """The call, and a child of its own, never end by themselves."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(folder, "pids.new").write_text(f"{os.getpid()} {child.pid}")
    Path(folder, "pids.new").rename(Path(folder, "pids"))
    time.sleep(600)


def pids_in(folder, timeout_s=60):
    until = time.monotonic() + timeout_s
    while not Path(folder, "pids").exists():
        assert time.monotonic() < until, "the call did not begin"
        time.sleep(0.02)
    return [int(pid) for pid in Path(folder, "pids").read_text().split()]


def assert_gone(pids, timeout_s=20):
    until = time.monotonic() + timeout_s
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < until, f"{pids} still run"
        time.sleep(0.02)


def test_the_answer_comes_from_another_process_that_leads_its_group():
    pid, group, args, kwargs = isolated.call(where_it_runs, 1, timeout_s=60, b=2)
    assert pid == group != os.getpid()
    assert (args, kwargs) == ((1,), {"b": 2})
    assert not alive(pid)


def test_an_error_of_the_function_brings_its_traceback():
    with pytest.raises(TrainingFunctionError, match="ZeroDivisionError: no luck") as caught:
        isolated.call(deep, {"name": "luck"}, timeout_s=60)
    trace = caught.value.worker_traceback
    assert trace.index("in deep\n") < trace.index("in deeper\n")
    assert "in serve\n" not in trace


@pytest.mark.parametrize(
    "error", [InvalidInput(["one", "two"]), UsageError("no session"), FunctionLost("f", job_id="j")]
)
def test_errors_of_this_package_come_as_they_are(error):
    with pytest.raises(type(error)) as caught:
        isolated.call(raises, error, timeout_s=60)
    assert (str(caught.value), vars(caught.value)) == (str(error), vars(error))


@pytest.mark.parametrize("error", [SystemExit(4), KeyboardInterrupt()])
def test_an_attempt_to_end_the_process_is_an_error_of_the_function(error):
    with pytest.raises(TrainingFunctionError, match=type(error).__name__):
        isolated.call(raises, error, timeout_s=60)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("exits", "ended \\(exit code 3\\) before it answered: last words"),
        (signal.SIGKILL, "SIGKILL.*may have run out of memory: last words"),
        (signal.SIGSEGV, "SIGSEGV"),
    ],
)
def test_a_process_that_dies_says_how_and_what_it_said(how, message):
    with pytest.raises(FunctionLost, match=message):
        isolated.call(dies, how, timeout_s=60)


def test_an_answer_that_cannot_be_sent_says_so():
    with pytest.raises(FunctionLost, match="cannot pickle"):
        isolated.call(threading.Lock, timeout_s=60)


def test_what_cannot_be_sent_is_refused_before_anything_starts():
    with pytest.raises(InvalidInput, match="cannot be sent"):
        isolated.call(where_it_runs, threading.Lock(), timeout_s=60)


def test_when_the_time_is_over_it_and_its_children_are_gone(tmp_path, monkeypatch):
    def over(connection, timeout_s):
        return not pids_in(tmp_path)

    monkeypatch.setattr(Connection, "poll", over)
    with pytest.raises(FunctionLost, match="no answer within 4 s; try less"):
        isolated.call(forks_and_hangs, str(tmp_path), timeout_s=4, advice="try less")
    assert_gone(pids_in(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_it_ends_with_its_client(tmp_path, number):
    code = (
        "from smlt_tune.backend import isolated; from tests.backend.test_isolated import *; "
        f"isolated.call(forks_and_hangs, {str(tmp_path)!r}, timeout_s=600)"
    )
    client = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        pids = pids_in(tmp_path)
        client.send_signal(number)
        assert client.wait(60) != 0
        assert_gone(pids)
    finally:
        client.kill()
        client.wait()
