import sys
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from smlt_tune.errors import (
    InvalidInput,
    ObjectDamaged,
    ObjectNotFound,
    StorageFull,
    StoreError,
    StoreUnavailable,
)
from smlt_tune.runtime.stores.opening import open_object_store
from smlt_tune.runtime.stores.s3 import S3Store
from tests.clocks import FakeClock
from tests.contracts.faulty_s3 import FaultyHandler, faulty_s3
from tests.contracts.object_store import ObjectStoreContract

pytest.importorskip("boto3")


class _OverServer(ObjectStoreContract):
    buckets_must_exist = True

    @pytest.fixture
    def endpoint(self):
        raise NotImplementedError

    @pytest.fixture
    def store(self, endpoint):
        store = open_object_store(f"{endpoint.url}/{uuid.uuid4().hex}/deep", endpoint.options)
        yield store
        store.close()

    @pytest.fixture
    def reopened(self, store, endpoint):
        store = open_object_store(store.url, endpoint.options)
        yield store
        store.close()

    def test_more_objects_than_fit_on_a_page(self, store):
        keys = [f"many/{i:04d}" for i in range(1001)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: store.put(key, b""), keys))
        assert store.list("many/") == keys
        store.delete(keys)
        assert store.list("") == []

    def test_a_missing_bucket_is_named(self, endpoint):
        store = S3Store("s3://no-such-bucket/x", **endpoint.options)
        calls = [lambda: store.get("a"), lambda: store.list(""), lambda: store.put("a", b"")]
        for call in calls[: 3 if self.buckets_must_exist else 2]:
            with pytest.raises(InvalidInput, match="make the bucket no-such-bucket, or correct"):
                call()
        store.close()


class TestSeaweed(_OverServer):
    buckets_must_exist = False  # it makes them for an administrator

    @pytest.fixture
    def endpoint(self, seaweed):
        return seaweed

    @pytest.mark.parametrize("wrong", ["access_key", "secret_key"])
    def test_wrong_credentials_are_refused_and_not_repeated(self, endpoint, wrong):
        store = S3Store(f"{endpoint.url}/x", **{**endpoint.options, wrong: "wrong-one"})
        with pytest.raises(InvalidInput) as caught:
            store.put("a", b"")
        assert f"cannot store a in {endpoint.url}/x at {endpoint.endpoint_url}: " in str(
            caught.value
        )
        assert "check the credentials; they must allow s3:GetObject, s3:PutObject" in str(
            caught.value
        )
        assert endpoint.secret_key not in str(caught.value)
        store.close()


class TestMiniStack(_OverServer):
    @pytest.fixture
    def endpoint(self, ministack):
        return ministack


PASSING = ["SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "TooManyRequests"]
PASSING += ["ConditionalRequestConflict", "reset", "hang"]


@pytest.fixture
def server():
    with faulty_s3() as server:
        yield server


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def store(server, clock):
    store = S3Store(
        "s3://bucket/prefix",
        endpoint_url=server.url,
        access_key="id",
        secret_key="very-secret",
        answer_s=0.3,
        clock=clock,
    )
    yield store
    store.close()


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(server, store, clock, fault):
    times = 1 if fault == "hang" else 3
    for call, expected in [
        (lambda: store.put("key", b"content"), True),
        (lambda: store.put("other", b"content", if_absent=True), True),
        (lambda: store.get("key"), b"content"),
        (lambda: store.list("k"), ["key"]),
        (lambda: store.delete(["other"]), None),
    ]:
        server.faults += [fault] * times
        assert call() == expected
        assert server.faults == []
    assert len(clock.slept) == 5 * times
    assert store.list("") == ["key"]


def test_pauses_grow_and_differ(server, store, clock):
    server.faults += ["SlowDown"] * 6
    store.put("key", b"")
    assert [0.05 * 2**i <= pause <= 0.1 * 2**i for i, pause in enumerate(clock.slept)] == [True] * 6
    assert len({pause / 2**i for i, pause in enumerate(clock.slept)}) == 6


@pytest.mark.parametrize("fault", ["SlowDown", "InternalError", "reset"])
def test_what_does_not_pass_is_given_up(server, store, clock, fault):
    server.faults += [fault] * 1000
    with pytest.raises(StoreUnavailable) as caught:
        store.put("key", b"content")
    assert sum(clock.slept) == pytest.approx(30.0)
    assert str(caught.value).startswith(f"cannot store key in s3://bucket/prefix at {server.url}: ")
    assert str(caught.value).endswith(
        "; tried again for 30 s: check the network and the server, or ask for less at once"
    )
    assert "very-secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_given_up(clock):
    store = S3Store(
        "s3://bucket",
        endpoint_url="http://127.0.0.1:1",
        access_key="id",
        secret_key="very-secret",
        clock=clock,
    )
    with pytest.raises(StoreUnavailable, match="Could not connect to the endpoint URL"):
        store.get("key")
    store.close()


def test_a_truncated_body_is_never_returned(server, store, clock):
    content = bytes(range(256)) * 100
    store.put("key", content)
    server.faults += ["truncate"] * 3
    assert store.get("key") == content
    assert len(clock.slept) == 3
    server.faults += ["truncate"] * 1000
    with pytest.raises(StoreUnavailable, match="cannot read key"):
        store.get("key")


def test_damage_on_the_way_is_read_again(server, store):
    store.put("key", b"content")
    server.faults += ["damage"] * 2
    assert store.get("key") == b"content"


def test_a_damaged_object_is_not_returned(server, store):
    store.put("key", b"content")
    content, metadata = server.objects["/bucket/prefix/key"]
    server.objects["/bucket/prefix/key"] = b"cantent", metadata
    with pytest.raises(ObjectDamaged) as caught:
        store.get("key")
    assert str(caught.value) == (
        f"cannot read key in s3://bucket/prefix at {server.url}: its checksum is not "
        f"{zlib.crc32(content):08x} (read 3 times): the object was damaged; delete it"
    )


def test_an_object_that_something_else_stored_is_read(server, store):
    server.objects["/bucket/prefix/key"] = b"content", {}
    assert store.get("key") == b"content"


def test_a_winner_whose_answer_was_lost_learns_that_it_won(server, store):
    server.faults += ["answer lost"]
    assert store.put("key", b"mine", if_absent=True) is True
    assert server.requests == {"PUT": 2, "HEAD": 1}


def test_a_loser_whose_answer_was_lost_learns_that_it_lost(server, store):
    store.put("key", b"same")
    server.faults += ["reset", "SlowDown"]
    assert store.put("key", b"same", if_absent=True) is False


@pytest.mark.parametrize("fault", ["InternalError", "SlowDown"])
def test_what_was_not_deleted_is_deleted_again(server, store, fault):
    keys = [str(i) for i in range(5)]
    for key in keys:
        store.put(key, b"")
    server.faults += [""]
    assert store.list("") == keys
    original = FaultyHandler._delete
    faults = [fault, fault]
    try:
        FaultyHandler._delete = lambda self, body, _: original(
            self, body, faults.pop() if faults else ""
        )
        store.delete(keys)
    finally:
        FaultyHandler._delete = original
    assert store.list("") == []


def test_a_missing_permission_to_delete_is_told_at_once(server, store, clock, monkeypatch):
    store.put("a", b"")
    store.put("b", b"")
    original = FaultyHandler._delete
    monkeypatch.setattr(
        FaultyHandler, "_delete", lambda self, body, _: original(self, body, "AccessDenied")
    )
    with pytest.raises(InvalidInput, match="the credentials must allow s3:DeleteObject"):
        store.delete(["a", "b"])
    assert clock.slept == []


@pytest.mark.parametrize(
    ("fault", "error", "advice"),
    [
        ("NoSuchBucket", InvalidInput, "make the bucket bucket, or correct its name"),
        ("AccessDenied", InvalidInput, "check the credentials; they must allow s3:GetObject, "
         "s3:PutObject, s3:DeleteObject and s3:ListBucket on the bucket bucket, and the clock of "
         "this machine must be right"),
        ("RequestTimeTooSkewed", InvalidInput, "check the credentials; they must allow "
         "s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket on the bucket bucket, and "
         "the clock of this machine must be right"),
        ("AuthorizationHeaderMalformed", InvalidInput, "correct the region of the bucket bucket"),
        ("NotImplemented", StoreError, "the server must support this part of the S3 protocol"),
        ("MalformedXML", StoreError, "the server must support this part of the S3 protocol"),
    ],
)  # fmt: skip
def test_what_no_second_attempt_heals_is_told_at_once(server, store, clock, fault, error, advice):
    server.faults += [fault]
    with pytest.raises(error) as caught:
        store.put("key", b"content", if_absent=True)
    assert str(caught.value) == (
        f"cannot store key in s3://bucket/prefix at {server.url}: An error occurred ({fault}) when "
        f"calling the PutObject operation: told to: {advice}"
    )
    assert clock.slept == []


@pytest.mark.parametrize("fault", ["InsufficientStorage", "XMinioStorageFull"])
def test_a_full_store_says_so(server, store, clock, fault):
    store.put("key", b"old")
    server.faults += [fault]
    with pytest.raises(StorageFull, match=r"told to\. Nothing was damaged; free some space"):
        store.put("key", b"new")
    assert clock.slept == []
    assert store.get("key") == b"old"


def test_not_found_is_told_at_once(store, clock):
    with pytest.raises(ObjectNotFound, match=r"no object in s3://bucket/prefix at .*read a/b"):
        store.get("a/b")
    assert clock.slept == []


def test_missing_credentials_are_asked_for(server, clock, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    store = S3Store("s3://bucket", endpoint_url=server.url, clock=clock)
    with pytest.raises(InvalidInput) as caught:
        store.get("key")
    assert str(caught.value) == (
        f"cannot read key in s3://bucket at {server.url}: Unable to locate credentials: give "
        "access_key and secret_key, or configure boto3"
    )
    store.close()


def test_secrets_are_never_shown(store, server):
    assert repr(store) == f"S3Store('s3://bucket/prefix', endpoint_url='{server.url}')"
    assert store.url == "s3://bucket/prefix"


URL_HELP = "expected s3://bucket or s3://bucket/prefix, the bucket of 3 to 63 small letters, "
URL_HELP += "digits, '-', '.'"


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("s3://", {}, f"s3:// is no object store: {URL_HELP}"),
        ("s3://ab", {}, f"s3://ab is no object store: {URL_HELP}"),
        ("s3://Bucket/x", {}, f"s3://Bucket/x is no object store: {URL_HELP}"),
        ("s3://bucket", {"access_key": "id"}, "object store s3://bucket: access_key and secret_key"
         " go together; give both or neither"),
        ("s3://bucket", {"password": "hidden"}, "object store s3://bucket: unknown option"
         " 'password', known are endpoint_url, access_key, secret_key, session_token, region"),
        ("s3://bucket", {"endpoint_url": "localhost"}, "object store s3://bucket: Invalid endpoint:"
         " localhost"),
    ],
)  # fmt: skip
def test_bad_urls_are_refused(url, options, message):
    with pytest.raises(InvalidInput) as caught:
        open_object_store(url, options)
    assert str(caught.value) == message


@pytest.mark.parametrize("prefix", ["/a", "a//b", "../a", "a b"])
def test_bad_prefixes_are_refused(prefix):
    with pytest.raises(InvalidInput, match="is no key of an object"):
        S3Store(f"s3://bucket/{prefix}")


def test_without_boto3_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(StoreError) as caught:
        open_object_store("s3://bucket")
    assert str(caught.value) == (
        "object store s3://bucket: s3:// needs boto3, install it with: pip install 'smlt-tune[aws]'"
    )
