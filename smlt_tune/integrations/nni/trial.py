"""``python -m smlt_tune.integrations.nni.trial FILE``: what NNI starts for every trial of a tuner.

It stands for the trial's job: it lives as long as the job, ends like it, and if it dies, however,
the job is stopped. It asks the driver, whose address lies in the file, for everything else, and
imports nothing but the standard library: a tuner may run dozens of trials at once on one machine.
"""

import http.client
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any


def main(file: str) -> int:
    """Has the driver run this trial; returns the exit code, 0 if it trained to its end."""
    # NNI counts a trial that it has interrupted as cancelled only if the signal ends it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    driver = json.loads(Path(file).read_text(encoding="utf-8"))
    environment = os.environ  # noqa: TID251 - the entry point; NNI says there who we are
    hello = {
        "token": driver["token"],
        "trial": environment["NNI_TRIAL_JOB_ID"],
        "channel": environment["NNI_TRIAL_COMMAND_CHANNEL"],
    }
    end = _ask(driver["socket"], hello)
    if end is None:
        print("the driver of this experiment has died: the experiment is stopped", file=sys.stderr)  # noqa: T201
        _stop_experiment(driver["port"], driver["prefix"])
        return 1
    if end["error"]:
        print(end["error"], file=sys.stderr)  # noqa: T201 - NNI shows it
    return 1 if end["error"] else 0


def _ask(address: str, hello: dict[str, str]) -> dict[str, Any] | None:
    """What the driver says when the job is over; None if it is not there, or dies before."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address)
            connection.sendall(json.dumps(hello).encode() + b"\n")
            answer = connection.makefile("rb").readline()
        except OSError:
            return None
    found: dict[str, Any] | None = json.loads(answer) if answer else None
    return found


def _stop_experiment(port: int, prefix: str) -> None:
    """Otherwise NNI would start, and fail, trial after trial."""
    path = f"/{prefix}/api/v1/nni/experiment" if prefix else "/api/v1/nni/experiment"
    connection = http.client.HTTPConnection("localhost", port, timeout=20)
    try:
        connection.request("DELETE", path)
        connection.getresponse()
    except OSError:
        pass  # another trial was faster
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
