import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from smlt_tune.backend.embedded_store import EmbeddedStore
from smlt_tune.errors import InvalidInput, StorageFull, StoreUnavailable
from smlt_tune.runtime.stores.opening import open_parameter_store
from smlt_tune.runtime.stores.redis_store import RedisStore
from tests.clocks import FakeClock
from tests.conftest import eventually
from tests.contracts.parameter_store import ParameterStoreContract


class _OverServer(ParameterStoreContract):
    @pytest.fixture
    def url(self):
        raise NotImplementedError

    @pytest.fixture
    def store(self, url):
        store = open_parameter_store(url)
        yield store
        store.close()


class TestValkey(_OverServer):
    @pytest.fixture
    def url(self, valkey):
        return valkey.url


class TestValkeyOverUnixSocket(_OverServer):
    @pytest.fixture
    def url(self, valkey):
        return valkey.unix_url


class TestRedis62(_OverServer):
    @pytest.fixture
    def url(self, redis62):
        return redis62.url


class Proxy:
    """Stands before a server and cuts connections as told."""

    def __init__(self, target, tls=None):
        self.target = target
        self.tls = tls
        self.drop_replies = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.tls:
                try:
                    client = self.tls.wrap_socket(client, server_side=True)
                except ssl.SSLError:  # who does not trust the certificate hangs up
                    client.close()
                    continue
            server = socket.create_connection(self.target)
            for source, sink in ((client, server), (server, client)):
                threading.Thread(
                    target=self._pump, args=(source, sink, source is server), daemon=True
                ).start()

    def _pump(self, source, sink, is_reply):
        with source, sink:
            try:
                while data := source.recv(1 << 16):
                    if is_reply and b"+OK" not in data[:3] and self.drop_replies:
                        self.drop_replies -= 1
                        break
                    sink.sendall(data)
            except OSError:
                pass
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def store(valkey):
    store = RedisStore(valkey.url)
    yield store
    store.close()


def kill(server):
    """Kills the server; returns once the guard has started it again."""
    killed = server.pid
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: server.pid != killed)


def _refusing_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_unreachable_server_is_tried_for_the_bound_and_named_without_password():
    clock = FakeClock()
    port = _refusing_port()
    store = RedisStore(f"redis://user:secret@127.0.0.1:{port}/3", retry_s=30.0, clock=clock)
    with pytest.raises(StoreUnavailable) as caught:
        store.get(["key"])
    assert str(caught.value).startswith(
        f"the parameter store redis://127.0.0.1:{port}/3 did not answer for 30 s (Error 111 "
    )
    assert str(caught.value).endswith(
        "check that the server runs and that this machine may reach it"
    )
    assert "secret" not in str(caught.value) + repr(store)
    assert sum(clock.slept) == pytest.approx(30.0)
    assert max(clock.slept) <= 1.0


def test_a_server_that_hangs_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        store = RedisStore(f"redis://127.0.0.1:{port}", retry_s=0.1)
        with pytest.raises(StoreUnavailable, match=r"did not answer for 0.1 s \(Timeout"):
            store.wait("stream", "0", timeout_s=600)
        store.close()


@pytest.mark.parametrize(
    "change", [lambda url: url.replace(":", ":x", 2), lambda url: "redis://" + url.split("@")[1]]
)
def test_a_wrong_password_is_refused_at_once(redis62, change):
    clock = FakeClock()
    url = change(redis62.url).replace("redis:x//", "redis://")
    store = RedisStore(url, clock=clock)
    with pytest.raises(InvalidInput) as caught:
        store.get(["key"])
    assert "refuses the user name or password" in str(caught.value)
    assert str(caught.value).endswith("check them in its URL")
    assert clock.slept == []
    assert redis62.url.split("@")[0].rpartition(":")[2] not in str(caught.value)
    store.close()


@pytest.mark.parametrize(
    "url",
    [
        "redis://:se/cret@host",
        "redis://:secret@host:port",
        "redis://host:99999",
        "unix://",
        "unix://:secret@",
        "http://:secret@host",
        "",
        "redis://:secret@host?no_such_option=1",
        "redis://:secret@host?socket_timeout=abc",
    ],
)
def test_bad_urls_are_refused_without_repeating_them(url):
    with pytest.raises(InvalidInput) as caught:
        RedisStore(url)
    assert str(caught.value) == (
        "not the URL of a parameter store: expected redis://[[user]:password@]host[:port][/db], "
        "rediss://... or unix://[[user]:password@]/path with special characters of the password "
        "percent-encoded"
    )
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@host", "RedisStore('redis://host:6379')"),
        ("redis://:secret@host:1/2", "RedisStore('redis://host:1/2')"),
        ("rediss://:secret@host:1", "RedisStore('rediss://host:1')"),
        ("unix://:secret@/run/store", "RedisStore('unix:///run/store')"),
    ],
)
def test_the_password_is_never_shown(url, shown):
    assert repr(RedisStore(url)) == shown


def test_tls_is_asked_for(valkey):
    store = RedisStore(valkey.url.replace("redis://", "rediss://"), retry_s=0.0)
    with pytest.raises(StoreUnavailable, match=r"rediss://127\.0\.0\.1"):
        store.get(["key"])
    store.close()


@pytest.fixture
def tls(valkey, tmp_path):
    """A proxy that speaks TLS, and the file of its certificate."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    files = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "certificate")]
    kind = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", *kind, *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    proxy = Proxy(("127.0.0.1", _port(valkey.url)), context)
    url = valkey.url.replace(str(_port(valkey.url)), str(proxy.port))
    yield url.replace("redis://", "rediss://"), tmp_path / "certificate"
    proxy.close()


def _port(url):
    return int(url.rpartition(":")[2].removesuffix("/0"))


def test_tls_to_a_server_whose_certificate_is_trusted(tls):
    url, certificate = tls
    store = RedisStore(f"{url}?ssl_ca_certs={certificate}")
    store.put({"tls": bytes(100_000)}, ttl_s=60)
    assert store.get(["tls"]) == [bytes(100_000)]
    store.close()


def test_tls_to_a_server_whose_certificate_is_not_trusted(tls):
    url, _ = tls
    store = RedisStore(url, retry_s=0.0)
    with pytest.raises(StoreUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        store.get(["tls"])
    store.close()


def test_a_server_without_memory_left_says_so_and_keeps_what_it_has():
    with EmbeddedStore(maxmemory_mb=8) as server:
        store = RedisStore(server.url)
        store.put({"small": b"kept"}, ttl_s=60)

        def fill():
            for i in range(16):
                store.put_once({f"big{i}": bytes(2**20)}, ttl_s=60)

        with pytest.raises(StorageFull) as caught:
            fill()
        assert "has no memory left: raise the server's maxmemory" in str(caught.value)
        assert store.get(["small"]) == [b"kept"]
        store.delete_prefix("big")
        store.put({"small": b"again"}, ttl_s=60)
        store.close()


def test_too_large_a_value_is_refused_before_it_is_sent(store):
    class Huge(bytes):
        def __len__(self):
            return 2**29 + 1

    with pytest.raises(InvalidInput, match="the value of key has 536870913 bytes"):
        store.put({"key": Huge()}, ttl_s=60)


def test_a_killed_server_comes_back_empty_under_another_id():
    with EmbeddedStore() as server:
        store = RedisStore(server.url)
        before = store.server_id()
        store.put({"key": b"value"}, ttl_s=60)
        kill(server)
        assert store.get(["key"]) == [None]
        assert store.server_id() != before
        store.close()


def test_who_waits_notices_nothing_of_a_restart():
    with EmbeddedStore() as server:
        store = RedisStore(server.url)
        other = RedisStore(server.url)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(store.wait, "stream", "0", timeout_s=600)
            other.get(["key"])
            kill(server)
            other.put_once({"key": b""}, ttl_s=60, announce=["stream"])
            assert waiting.result() != "0"
        store.close()
        other.close()


def test_a_winner_whose_answer_was_lost_learns_that_it_won(valkey):
    port = _port(valkey.url)
    proxy = Proxy(("127.0.0.1", port))
    store = RedisStore(valkey.url.replace(str(port), str(proxy.port)))
    direct = RedisStore(valkey.url)
    direct.put({"lost:taken": b"other"}, ttl_s=60)
    store.server_id()
    proxy.drop_replies = 1

    # All of the pipeline's replies are one packet that begins with the null of the taken key.
    won = store.put_once(
        {"lost:taken": b"mine", "lost:new": bytes(10_000), "lost:same": b"mine"}, ttl_s=60
    )
    assert proxy.drop_replies == 0
    assert won == [False, True, True]
    assert direct.get(["lost:taken"]) == [b"other"]
    store.close()
    direct.close()
    proxy.close()


def test_many_threads_share_a_store(store):
    def work(i):
        key = f"threads:{i}"
        for j in range(50):
            store.put({key: bytes([j]) * 1000}, ttl_s=60)
            assert store.get([key]) == [bytes([j]) * 1000]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_one_round_trip_a_verb(valkey):
    """However many items: the number of packets must not grow with them when they are small."""
    store = RedisStore(valkey.url)
    sent = []
    connection = store._pool.get_connection()
    original = connection.send_packed_command
    connection.send_packed_command = lambda chunks: (sent.append(len(chunks)), original(chunks))
    store._pool.release(connection)
    store.put_once({f"many:{i}": b"x" for i in range(100)}, ttl_s=60, announce=["many:to"])
    store.get([f"many:{i}" for i in range(100)])
    assert sent == [1, 1]
    store.close()


@pytest.mark.parametrize("url", ["memcached://host", "host:6379", "s3://bucket", "://x", ""])
def test_unknown_kinds_are_refused(url):
    with pytest.raises(InvalidInput) as caught:
        open_parameter_store(url)
    given = url.partition("://")[0] + "://" if "://" in url else "a URL without ://"
    assert str(caught.value) == (
        f"unknown kind of parameter store '{given}': expected one of redis://, rediss://, unix://"
    )
