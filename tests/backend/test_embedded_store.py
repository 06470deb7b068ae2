import contextlib
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from smlt_tune.backend import embedded_store, guard
from smlt_tune.backend.embedded_store import EmbeddedStore
from smlt_tune.errors import InvalidInput, PlatformError
from smlt_tune.runtime.stores.redis_store import RedisStore
from tests.conftest import eventually

CLIENT = """
import os, sys
from smlt_tune.backend.embedded_store import EmbeddedStore
store = EmbeddedStore()
print(store.pid, store.guard_pid, store._directory, flush=True)
sys.stdin.readline()
"""


def _runs(pid):
    """Whether the process runs; one that only waits to be reaped does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def kill(server):
    """Kills the server; returns once the guard has started it again."""
    killed = server.pid
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: server.pid != killed)


def _gone(server, guard_pid, directory):
    return not _runs(server) and not _runs(guard_pid) and not Path(directory).exists()


@contextlib.contextmanager
def _client(code=CLIENT):
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        server, guard_pid, directory = process.stdout.readline().split()
        assert _runs(server)
        assert _runs(guard_pid)
        yield process, (int(server), int(guard_pid), directory)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def server():
    with EmbeddedStore() as server:
        yield server


@pytest.fixture
def store(server):
    store = RedisStore(server.url)
    yield store
    store.close()


def test_both_addresses_lead_to_the_same_server(server, store):
    over_socket = RedisStore(server.unix_url)
    assert over_socket.server_id() == store.server_id()
    over_socket.close()


def test_nothing_is_left_after_close(server):
    facts = server.pid, server.guard_pid, server._directory
    assert not _gone(*facts)
    server.close()
    assert _gone(*facts)
    server.close()


def test_a_block_closes_however_it_ends():
    facts = []

    def work():
        with EmbeddedStore() as server:
            facts.extend([server.pid, server.guard_pid, server._directory])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert _gone(*facts)


def test_the_password_is_wanted_and_shown_nowhere(server):
    password = server.url.split("@")[0].rpartition(":")[2]
    assert len(password) >= 32
    with pytest.raises(InvalidInput, match="refuses the user name or password"):
        RedisStore(f"redis://127.0.0.1:{server.port}").get(["key"])
    assert repr(server) == f"EmbeddedStore(port={server.port})"
    for pid in (server.pid, server.guard_pid):
        for public in ("cmdline", "environ"):
            assert password.encode() not in Path(f"/proc/{pid}/{public}").read_bytes()
    files = [path for path in server._directory.iterdir() if path.is_file()]
    assert all(password not in path.read_text() for path in files)
    assert stat.S_IMODE(server._directory.stat().st_mode) == 0o700


def test_nothing_is_evicted_and_nothing_written_to_disk(server, store):
    store.put({"key": b"value"}, ttl_s=60)
    configuration = store._run(
        [("CONFIG", "GET", name) for name in ("maxmemory-policy", "save", "appendonly", "bind")]
    )
    assert [value for _, value in configuration] == [b"noeviction", b"", b"no", b"127.0.0.1"]
    assert sorted(path.name for path in server._directory.iterdir()) == ["log", "pid", "socket"]


@pytest.mark.parametrize("times", [3])
def test_a_killed_server_starts_again_on_the_same_port(server, store, times):
    seen = {server.pid}
    for _ in range(times):
        store.put({"key": b"value"}, ttl_s=60)
        kill(server)
        assert store.get(["key"]) == [None]
        seen.add(server.pid)
    assert len(seen) == times + 1
    facts = server.pid, server.guard_pid, server._directory
    server.close()
    assert _gone(*facts)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_client_is_killed(number):
    with _client() as (process, facts):
        os.kill(process.pid, number)
        process.wait()
        eventually(lambda: _gone(*facts))


def test_nothing_is_left_after_ctrl_c_of_the_whole_group():
    with _client() as (process, facts):
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        eventually(lambda: _gone(*facts))


def test_nothing_is_left_when_the_client_exits_without_closing():
    with _client() as (process, facts):
        process.stdin.write("\n")
        process.stdin.flush()
        process.wait()
        eventually(lambda: _gone(*facts))


def test_nothing_is_left_when_a_forked_child_outlives_the_client():
    code = CLIENT.replace("sys.stdin.readline()", "os.fork() and os._exit(0)\nos.read(0, 1)")
    with _client(code) as (process, facts):
        process.wait()
        assert _group_lives(process.pid)
        eventually(lambda: _gone(*facts))
        assert _group_lives(process.pid)


def _group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_server_dies_with_its_guard(server):
    facts = server.pid, server.guard_pid, server._directory
    os.kill(server.guard_pid, signal.SIGKILL)
    eventually(lambda: not _runs(facts[0]))
    server.close()
    assert _gone(*facts)


def test_a_guard_that_is_asked_to_end_cleans_up(server):
    facts = server.pid, server.guard_pid, server._directory
    os.kill(server.guard_pid, signal.SIGTERM)
    eventually(lambda: not Path(facts[2]).exists())
    server.close()
    assert _gone(*facts)


def test_a_forked_child_cannot_close_it(server, store):
    child = multiprocessing.get_context("fork").Process(target=server.close)
    child.start()
    child.join()
    assert child.exitcode == 0
    store.put({"key": b"value"}, ttl_s=60)
    assert store.get(["key"]) == [b"value"]


def test_two_do_not_meet(server, store):
    with EmbeddedStore() as second:
        other = RedisStore(second.url)
        assert other.server_id() != store.server_id()
        other.close()
    store.put({"key": b"value"}, ttl_s=60)


def test_a_bad_limit_is_refused():
    with pytest.raises(InvalidInput, match="maxmemory_mb must not be negative, got -1"):
        EmbeddedStore(maxmemory_mb=-1)


@pytest.mark.parametrize(
    ("binary", "reason"),
    [
        ("/no/such/server", "/no/such/server: [Errno 2] No such file or directory"),
        ("/bin/false", "it did not begin to listen"),
    ],
)
def test_a_server_that_cannot_start_says_why(monkeypatch, tmp_path, binary, reason):
    monkeypatch.setattr(embedded_store, "_binary", lambda: binary)
    monkeypatch.setattr(embedded_store, "_base", lambda: str(tmp_path))
    with pytest.raises(PlatformError) as caught:
        EmbeddedStore()
    assert str(caught.value) == (
        f"the embedded parameter store did not start: {reason}\n"
        "Name a Redis or Valkey server of your own as parameter store instead"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_a_server_is_told(monkeypatch):
    def missing():
        raise embedded_store.ValkeyBinaryNotFoundError("Unsupported architecture: riscv64")

    monkeypatch.setattr(embedded_store, "get_binary_path", missing)
    with pytest.raises(PlatformError, match=r"no Valkey server for this machine \(Unsupported"):
        EmbeddedStore()


def test_the_path_of_the_socket_stays_short(monkeypatch, tmp_path):
    deep = tmp_path / ("x" * 80)
    monkeypatch.setattr(embedded_store.tempfile, "tempdir", str(deep))
    assert embedded_store._base() == "/tmp"


def test_the_guard_needs_nothing_but_the_standard_library():
    command = [sys.executable, "-I", "-S", guard.__file__, "1", "/tmp", "/bin/false"]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
