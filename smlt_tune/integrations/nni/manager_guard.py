"""Ends NNI's manager when its driver has died; runs by itself, as ``python -m ... ID PORT``.

The driver starts it before the manager, in a session of its own, and holds the other end of its
standard input. A driver that has stopped its manager writes a byte; one that dies, however, does
not. Then the manager is told to end in order, which takes its tuner and its trials along and keeps
the experiment resumable.
"""

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from typing import Any

import psutil  # type: ignore[import-untyped]

#: Time for the manager to end in order, seconds; by itself it gives up after 60.
STOP_S = 90.0
_TICK_S = 1.0


class ManagerGuard:
    """The driver's end.

    Args:
        experiment: Its id.
        port: Of the manager that will be started.
    """

    def __init__(self, experiment: str, port: int) -> None:
        command = [sys.executable, "-P", "-m", __name__, experiment, str(port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def close(self) -> None:
        """The manager has ended, or was never started. Idempotent."""
        if self._process.returncode is None:
            self._process.communicate(b"!")


def main(experiment: str, port: str) -> None:
    """Waits for the end of the driver, and then for the manager's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _driver_says_goodbye():
        return
    found = _managers(experiment, port)
    trees = [process for manager in found for process in (manager, *_children(manager))]
    for manager in found:
        with suppress(psutil.NoSuchProcess):
            manager.terminate()
    _, alive = psutil.wait_procs(trees, timeout=STOP_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _driver_says_goodbye() -> bool:
    driver = os.getppid()
    while os.getppid() == driver:  # a fork of the driver may hold its end of the pipe open
        readable, _, _ = select.select([0], [], [], _TICK_S)
        if readable:
            return bool(os.read(0, 1))
    return False


def _managers(experiment: str, port: str) -> list[Any]:
    """The process that was started as this experiment's manager on this port, if there is one."""
    arguments = {"--experiment-id": experiment, "--port": port}

    def starts_with(command: list[str]) -> bool:
        return set(pairwise(command)) >= arguments.items()

    processes = psutil.process_iter(["cmdline"])
    return [each for each in processes if starts_with(each.info["cmdline"] or [])]


def _children(manager: Any) -> list[Any]:
    try:
        found: list[Any] = manager.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
