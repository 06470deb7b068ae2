"""Entry point of the helper process from which instances are forked.

It imports the heavy modules once and has trained a tiny network, so that a forked instance is ready
within milliseconds and shares the memory. It must stay single-threaded: a fork of a process whose
thread pools have run leaves the child waiting for threads that do not exist.
"""

import contextlib
import gc
import importlib
import os
import socket
import sys
import traceback

from smlt_tune.backend.platforms.local import channel, linux, probe
from smlt_tune.backend.platforms.local.supervisor import Settings, Supervisor, single_threaded
from smlt_tune.runtime.clock import SystemClock

#: Before torch and numpy are imported: no thread pools here. Instances raise the number for
#: themselves; waiting threads must sleep, because a spinning one uses up the quota of the others.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


def main(fd: int, mark: str) -> None:
    """Serves the client at the other end of a socket until it closes or dies.

    Args:
        fd: The socket.
        mark: By which the client recognises what functions leave behind if this process dies.
    """
    # Read when libgomp is loaded.
    os.environ.update(_ENVIRONMENT, SMLT_HELPER=mark)  # noqa: TID251 - an entry point
    control = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)
    frame = channel.receive(control)
    if frame is None:
        return
    settings = Settings(**frame[0])
    linux.adopt_orphans()
    _preload([*settings.preload, settings.entry.partition(":")[0]])
    for stream in (sys.stdout, sys.stderr):  # of the instances: nothing is lost when one is killed
        with contextlib.suppress(AttributeError):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    if not single_threaded():
        print("warning: a preloaded module has started threads", file=sys.stderr)  # noqa: T201
    gc.collect()
    gc.freeze()
    isolation = probe.find(settings.isolation)
    Supervisor(control, settings, isolation, SystemClock()).run()
    os._exit(0)  # everything is cleaned up; unloading torch would take another quarter of a second


def _preload(modules: list[str]) -> None:
    """Imports what is installed; the rest fails, or not, in the instance that needs it."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        except Exception:  # noqa: BLE001 - whatever a module raises, functions may not need it
            traceback.print_exc()
    if "torch" in sys.modules:
        try:
            _train_once()
        except Exception:  # noqa: BLE001 - only makes the first step of an instance faster
            traceback.print_exc()


def _train_once() -> None:
    """One step of a tiny network: loads what torch loads at first use."""
    import torch

    torch.set_num_threads(1)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(72, 2)
    )
    optimizer = torch.optim.Adam(model.parameters())
    loss = torch.nn.functional.cross_entropy(model(torch.ones(2, 1, 8, 8)), torch.tensor([0, 1]))
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
