"""What the functions of the platform tests do. Each is chosen by the payload."""

# ruff: noqa: T201 - what functions print is what some tests look at

import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ENTRY = "tests.contracts.platform_functions:run"


def order(do, **arguments):
    """A payload."""
    return json.dumps({"do": do, **arguments}).encode()


def run(payload):
    if not payload.startswith(b"{"):
        return digest(payload)
    arguments = json.loads(payload)
    return globals()[arguments.pop("do")](**arguments)


def nothing():
    pass


def digest(payload):
    """Prints what arrived."""
    print(hashlib.sha256(payload).hexdigest())


def write_ids(path):
    """Appends the process and its parent to a file, in one piece."""
    with open(path, "a") as file:
        file.write(f"{os.getpid()} {os.getppid()}\n")


def say(text, error=""):
    print(text)
    print(error, file=sys.stderr)
    subprocess.run(["echo", f"child of {text}"], check=True)


def say_environment(name):
    print(os.environ.get(name))


def say_where(module):
    """Where a module was found."""
    print(importlib.import_module(module).__file__)


def fail(message, secret=""):
    raise ValueError(message)


def leave(code):
    sys.exit(code)


def leave_at_once(code):
    print("last words")
    os._exit(code)


def kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)
    time.sleep(60)


def wait(path="", seconds=60.0, secret=""):
    """Says that it runs, then sleeps."""
    if path:
        write_ids(path)
    time.sleep(seconds)


def tick(path, seconds=60.0):
    """Says again and again that it is alive, and when, until it is killed."""
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        with open(path, "a") as file:
            file.write(f"{os.getpid()} {now}\n")
        time.sleep(0.005)


def wait_for(path, seconds=60.0):
    """Waits until somebody has made a file."""
    deadline = time.monotonic() + seconds
    while not Path(path).exists() and time.monotonic() < deadline:
        time.sleep(0.005)


def first_returns(path):
    """Of several deliveries only one returns."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        raise RuntimeError("delivered before") from None


def grow(mb):
    """Touches that much memory."""
    return [bytearray(b"x") * (1 << 20) for _ in range(mb)]


def grow_below(mb):
    """A child process touches that much memory."""
    pid = os.fork()
    if pid == 0:
        grow(mb)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError("the child process died")


def fork_and_return():
    """Lets the child return as well."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)


def burn(seconds):
    """Computes for that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def compute(cpu_s):
    """Uses that much CPU time."""
    end = time.process_time() + cpu_s
    while time.process_time() < end:
        pass


def leave_behind(path, then="wait"):
    """Starts a process in a session of its own, which outlives its parent."""
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    with open(path, "a") as file:
        file.write(f"{child.pid} {os.getpid()} {os.getppid()}\n")
    if then == "wait":
        time.sleep(60)


def train(threads):
    """A step of a tiny network, with the threads that the worker would choose."""
    import torch

    torch.set_num_threads(threads)
    model = torch.nn.Linear(400, 400)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(400, 400)).sum().backward()
        optimizer.step()
    print(os.environ["OMP_WAIT_POLICY"], torch.get_num_threads(), torch.initial_seed())
