"""The process that stands for a job in NNI's eyes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

COMMAND = [sys.executable, "-P", "-m", "smlt_tune.integrations.nni.trial"]
ENVIRONMENT = {
    "NNI_TRIAL_JOB_ID": "Trial",
    "NNI_TRIAL_COMMAND_CHANNEL": "http://localhost:1/env/local/Trial",
}


@pytest.fixture
def manager():
    """Remembers what it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_DELETE(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    asked = []
    with HTTPServer(("localhost", 0), Handler) as server:
        server.asked = asked
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def driver(tmp_path, manager):
    """A socket where clients arrive, and the file that leads there."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/s")
        listener.listen()
        listener.settimeout(60)
        address = {"socket": f"{tmp_path}/s", "token": "secret", "port": manager.server_port,
                   "prefix": "p"}  # fmt: skip
        (tmp_path / "smlt.json").write_text(json.dumps(address))
        yield listener


def client(tmp_path):
    return subprocess.Popen(
        [*COMMAND, str(tmp_path / "smlt.json")], env=os.environ | ENVIRONMENT,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(("error", "code"), [("", 0), ("ValueError: no", 1)])
def test_it_ends_like_its_job(driver, tmp_path, error, code):
    with client(tmp_path) as process:
        connection, _ = driver.accept()
        with connection, connection.makefile("rb") as stream:
            hello = json.loads(stream.readline())
            assert hello == {
                "token": "secret", "trial": "Trial",
                "channel": ENVIRONMENT["NNI_TRIAL_COMMAND_CHANNEL"],
            }  # fmt: skip
            connection.sendall(json.dumps({"error": error}).encode() + b"\n")
        assert process.wait(60) == code
        assert process.stderr.read().strip() == error


def test_an_interrupt_ends_it_as_a_signal(driver, tmp_path):
    with client(tmp_path) as process:
        connection, _ = driver.accept()
        with connection, connection.makefile("rb") as stream:
            stream.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == -signal.SIGINT
            assert stream.read() == b""  # the driver hears of it


@pytest.mark.parametrize("dies", ["before", "meanwhile"])
def test_without_a_driver_it_has_the_experiment_stopped(driver, manager, tmp_path, dies):
    if dies == "before":
        driver.close()
    with client(tmp_path) as process:
        if dies == "meanwhile":
            driver.accept()[0].close()
        assert process.wait(60) == 1
        assert "the driver of this experiment has died" in process.stderr.read()
    assert manager.asked == ["/p/api/v1/nni/experiment"]


def test_it_needs_nothing_but_the_standard_library():
    program = "import smlt_tune.integrations.nni.trial, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    packages = {name.partition(".")[0] for name in loaded}
    assert not packages & {"nni", "numpy", "torch", "requests", "cloudpickle", "redis"}
