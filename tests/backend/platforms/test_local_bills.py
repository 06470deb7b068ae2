"""Whatever is killed: the bill that the local platform leaves is what its functions did take."""

import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smlt_tune.backend.platforms.base import Invocation
from smlt_tune.backend.platforms.local import LocalPlatform, linux, probe
from smlt_tune.errors import PlatformError
from smlt_tune.runtime.clock import SYSTEM_CLOCK
from tests.conftest import eventually
from tests.contracts.platform import PATIENCE_S
from tests.contracts.platform_functions import ENTRY, order

ROOT = Path(__file__).parents[3]
#: It runs functions and tells how those have ended that end by themselves.
CLIENT = """\
import sys, time
from pathlib import Path
from smlt_tune.backend.platforms.base import Invocation
from smlt_tune.backend.platforms.local import LocalPlatform
from tests.contracts.platform_functions import ENTRY, order

bill, notes, preload = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
platform = LocalPlatform(entry=ENTRY, preload=preload, concurrency=4, duplicates=not preload)
def told(result):
    print(result.invocation_id, result.ending, result.billed_s, result.deliveries, flush=True)
def invoke(name, payload):
    platform.invoke(Invocation(name, 256, 60.0, payload, bill_path=bill), told)
invoke("ends", order("nothing"))
invoke("runs", order("tick", path=notes))
print("invoked", platform._helper.pid, flush=True)
time.sleep(600)
"""


class Client:
    def __init__(self, folder, *preload):
        self.bill, self.notes = folder / "0.jsonl", folder / "notes"
        self.began_s = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, self.bill, self.notes, *preload],
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"},
            stdout=subprocess.PIPE,
            text=True,
        )

    def lines(self, number):
        """The next lines that it prints, in words; sorted, because threads print them."""
        return sorted(self.process.stdout.readline().split() for _ in range(number))

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def started(tmp_path):
    """Starts a client."""
    clients = []

    def start(*preload):
        clients.append(Client(tmp_path, *preload))
        return clients[-1]

    yield start
    for client in clients:
        client.kill()
        client.process.stdout.close()


@pytest.fixture
def charged(tmp_path):
    """Seconds, deliveries and ending by what the next client reads."""
    with LocalPlatform(entry=ENTRY, preload=(), concurrency=1) as platform:

        def charged(client):
            found = platform.charged(client.bill, ["ends", "runs", "never"])
            results = {name: charge and charge.result for name, charge in found.items()}
            return {
                name: result and (result.billed_s, result.deliveries, result.ending)
                for name, result in results.items()
            }

        yield charged


def ticks(client):
    """When each process of a function was seen alive, seconds."""
    seen = {}
    for line in client.notes.read_text().splitlines():
        pid, at_s = line.split()
        seen.setdefault(int(pid), []).append(float(at_s))
    return seen


def test_the_functions_of_a_killed_client(started, charged):
    client = started()
    [ended, (_, helper)] = client.lines(2)
    assert ended[:2] == ["ends", "returned"]
    eventually(lambda: client.notes.exists() and sum(map(len, ticks(client).values())) > 20)
    client.kill()
    found = charged(client)
    over_s = time.monotonic()
    assert linux.start_ticks(int(helper)) == 0
    assert found["ends"] == (float(ended[2]), 2, "returned")  # as the client was told
    assert found["never"] is None
    billed_s, deliveries, ending = found["runs"]
    seen = ticks(client)
    assert (deliveries, ending, len(seen)) == (2, "cancelled", 2)
    assert sum(max(times) - min(times) for times in seen.values()) <= billed_s
    assert billed_s <= 2 * (over_s - client.began_s)


def test_the_functions_of_a_client_that_was_killed_with_its_helper(started, charged):
    client = started()
    [ended, (_, helper)] = client.lines(2)
    eventually(lambda: client.notes.exists() and len(ticks(client)) == 2)
    os.kill(int(helper), signal.SIGSTOP)
    client.kill()
    os.kill(int(helper), signal.SIGKILL)
    eventually(lambda: linux.start_ticks(int(helper)) == 0)
    probe.find("auto").reap(SYSTEM_CLOCK)  # as the next start would
    # Nobody has seen how the others ended; but that one never began is certain.
    assert charged(client) == {"ends": (float(ended[2]), 2, "returned"), "never": None}


def test_a_client_killed_before_its_helper_was_ready_is_charged_nothing(started, charged, tmp_path):
    gate = tmp_path / "gate"
    (tmp_path / "slow_to_load.py").write_text(
        f"import pathlib, time\nwhile not pathlib.Path({str(gate)!r}).exists(): time.sleep(0.01)\n"
    )
    client = started("slow_to_load")
    [(_, helper)] = client.lines(1)
    client.kill()
    assert linux.start_ticks(int(helper)) > 0
    gate.touch()
    assert charged(client) == {"ends": None, "runs": None, "never": None}
    assert linux.start_ticks(int(helper)) == 0
    assert not client.notes.exists()


def test_whatever_befalls_functions_the_bill_says_what_the_client_is_told(tmp_path, charged):
    bill, told = tmp_path / "0.jsonl", queue.Queue()
    platform = LocalPlatform(entry=ENTRY, preload=(), concurrency=4)

    def invoke(name, payload, timeout_s=60.0):
        invocation = Invocation(name, 256, timeout_s, payload, bill_path=bill)
        platform.invoke(invocation, told.put)

    results = {}

    def end():
        result = told.get(timeout=PATIENCE_S)
        results[result.invocation_id] = result

    with platform:
        invoke("too early", order("wait"))
        platform.cancel("too early")  # most likely while the helper still starts
        end()
        invoke("fails", order("fail", message="x"))
        invoke("dies", order("kill"))
        invoke("too long", order("wait"), timeout_s=0.2)
        for _ in range(3):
            end()
        invoke("lost", order("tick", path=str(tmp_path / "notes")))
        helper = platform._helper.pid
        eventually(lambda: (tmp_path / "notes").exists())
        os.kill(helper, signal.SIGKILL)
        end()
        invoke("returns", order("nothing"))  # by another helper
        end()
        invoke("at the end", order("wait"))
    end()
    assert {name: result.ending for name, result in results.items()} == {
        "too early": "cancelled",
        "fails": "crashed",
        "dies": "crashed",
        "too long": "timed_out",
        "lost": "crashed",
        "returns": "returned",
        "at the end": "cancelled",
    }
    found = platform.charged(bill, list(results))
    assert {name: charge.result.billed_s for name, charge in found.items()} == {
        name: result.billed_s for name, result in results.items()
    }
    assert platform.bill().requests == len(found)
    total = sum(charge.memory_mb / 1024 * charge.result.billed_s for charge in found.values())
    assert platform.bill().gb_s == pytest.approx(total, rel=1e-9)


def test_without_a_bill_nothing_runs(tmp_path):
    with LocalPlatform(entry=ENTRY, preload=(), concurrency=1) as platform:
        invocation = Invocation(
            "a", 256, 60.0, order("nothing"), bill_path=tmp_path / "no" / "bill"
        )
        with pytest.raises(PlatformError, match="cannot write the bill"):
            platform.invoke(invocation, print)
        assert platform.bill().requests == 0
