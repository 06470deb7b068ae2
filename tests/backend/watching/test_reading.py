"""A fleet is read while another process writes it, and after that has died."""

import os
import signal
import subprocess
import sys

import pytest

from smlt_tune.backend.history import History
from smlt_tune.backend.watching.reading import Watch, client_of
from smlt_tune.backend.watching.snapshot import Client
from smlt_tune.errors import InvalidInput, ObjectDamaged
from tests.conftest import eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody can be told")

WRITER = """
import sys
from smlt_tune.backend.history import History
history = History(sys.argv[1])
history.append("fleet", "", {"name": "f"})
history.append("job", "a", {})
print("ready", flush=True)
for line in sys.stdin:
    history.append("job", line.strip(), {})
"""


@pytest.fixture
def writer(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_a_living_fleet_is_followed_and_its_death_is_seen(writer, tmp_path):
    watch = Watch(tmp_path)
    shot = watch.snapshot()
    assert (shot.state, shot.pid) == ("open", writer.pid)
    assert [job.status for job in shot.jobs] == ["queued"]
    writer.stdin.write("b\n")
    writer.stdin.flush()
    eventually(lambda: len(watch.snapshot().jobs) == 2)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    eventually(lambda: watch.snapshot().state == "crashed")
    assert [job.status for job in watch.snapshot().jobs] == ["interrupted", "interrupted"]


def test_to_look_at_a_fleet_of_this_process_does_not_give_up_its_lock(tmp_path):
    other = "import sys; from smlt_tune.backend.history import History; History(sys.argv[1])"
    with History(tmp_path):
        assert client_of(tmp_path) == Client(os.getpid())
        assert Watch(tmp_path).snapshot().state == "open"
        command = [sys.executable, "-c", other, str(tmp_path)]
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "InvalidInput" in refused.stderr
    assert client_of(tmp_path) == Client()
    assert Watch(tmp_path).snapshot().state == "closed"


def test_what_is_no_fleet_or_damaged_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="there is no fleet"):
        Watch(tmp_path)
    with History(tmp_path) as history:
        history.append("job", "a" * 500, {})
    path = tmp_path / "history.sqlite3"
    path.write_bytes(path.read_bytes().replace(b"a" * 500, b"a" * 4999 + b"b"))
    with pytest.raises(ObjectDamaged):
        Watch(tmp_path)
