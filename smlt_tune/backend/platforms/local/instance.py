"""What a forked instance does: waits for a payload, runs the entry point, tells how it went.

Requests and answers are single datagrams of JSON. The payload itself comes as a file descriptor:
of any size, and the helper never waits for an instance to read.
"""

import contextlib
import faulthandler
import json
import os
import random
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from smlt_tune.backend.platforms.base import load_entry
from smlt_tune.backend.platforms.local import linux

#: Longest datagram; the kernel's default allows three times that. Bytes.
MAX_DATAGRAM = 65_536
#: Longest description of an error, characters.
MAX_ERROR = 8_000


def main(sock: socket.socket, entry: str, parent: int, enter: Callable[[], None]) -> NoReturn:
    """Serves requests until the helper closes the socket or an invocation fails.

    Args:
        sock: To the helper.
        entry: ``module:function`` to run.
        parent: The helper's process.
        enter: Applies the limits of this instance to the calling process.
    """
    try:
        _begin(parent)
        enter()
        while _serve_one(sock, entry):
            pass
    except BaseException as error:  # noqa: BLE001 - the process boundary; nothing above us
        with contextlib.suppress(OSError):
            sock.send(_answer(False, f"the instance could not start: {error!r}"))
    finally:
        os._exit(0)


def _begin(parent: int) -> None:
    """Undoes what the fork has inherited from the helper."""
    linux.die_with_parent(parent)
    # NOTE: a session, not only a group: the scheduler weighs sessions (sched_autogroup), and all
    # instances in one would together count as one competitor of the rest of the machine.
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number, handler in (
        (signal.SIGCHLD, signal.SIG_DFL),
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGINT, signal.default_int_handler),
    ):
        signal.signal(number, handler)
    _redirect(None)
    with contextlib.suppress(OSError):  # if the machine runs out of memory: functions first
        Path("/proc/self/oom_score_adj").write_text("500")
    faulthandler.enable()
    random.seed()
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed()  # noqa: NPY002 - its global state, as that of a process just started
    if "torch" in sys.modules:
        import torch

        torch.default_generator.seed()


def _serve_one(sock: socket.socket, entry: str) -> bool:
    """Runs one invocation; False if this instance must not run another."""
    data, fds, _, _ = socket.recv_fds(sock, MAX_DATAGRAM, 1)
    if not data:
        return False
    request = json.loads(data)
    payload = _read_and_close(fds[0])
    if not request["cold"]:
        linux.forget_peak()
    error: BaseException | None = None
    process = os.getpid()
    try:
        _redirect(request["log"])
        function = load_entry(entry)
        sock.send(json.dumps({"running": True}).encode())
        function(payload)
    except BaseException as raised:  # noqa: BLE001 - SystemExit too ends the invocation, not us
        error = raised
        traceback.print_exc()
    _flush()
    if os.getpid() != process:  # forked by the function, which let the child return as well
        os._exit(0)
    if error is None:
        sock.send(_answer(True, ""))
    else:
        sock.send(_answer(False, _describe(error), isinstance(error, MemoryError)))
    del payload
    with contextlib.suppress(OSError):
        _redirect(None)
    return error is None


def _read_and_close(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return file.read()


def _redirect(log: str | None) -> None:
    """Output of this process and of those it starts goes to the end of a file, or nowhere."""
    if log is None:
        target = os.open(os.devnull, os.O_WRONLY)
    else:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _describe(error: BaseException) -> str:
    """The error on a line of its own, then the traceback."""
    summary = "".join(traceback.format_exception_only(error)).strip()
    lines = "".join(traceback.format_exception(error))
    return f"{summary[: MAX_ERROR // 2]}\n{lines[-MAX_ERROR // 2 :]}"


def _answer(ok: bool, error: str, no_memory: bool = False) -> bytes:
    own = resource.getrusage(resource.RUSAGE_SELF)
    below = resource.getrusage(resource.RUSAGE_CHILDREN)
    now = linux.resident(os.getpid())
    answer = {
        "ok": ok,
        "error": error,
        "no_memory": no_memory,
        "cpu_s": own.ru_utime + own.ru_stime + below.ru_utime + below.ru_stime,
        "peak": linux.status_bytes(os.getpid(), "VmHWM"),
        "files": now.files if now else 0,
    }
    return json.dumps(answer).encode()
