import contextlib
import errno
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smlt_tune.errors import InvalidInput, ObjectNotFound, StorageFull, StoreUnavailable
from smlt_tune.runtime.stores.directory import DirectoryStore
from smlt_tune.runtime.stores.opening import open_object_store
from tests.contracts.object_store import ObjectStoreContract

FULL = r"No space left on device\. Nothing was damaged"


class TestDirectory(ObjectStoreContract):
    @pytest.fixture
    def store(self, tmp_path):
        return DirectoryStore(tmp_path / "with space, ü and #")

    @pytest.fixture
    def reopened(self, store):
        return open_object_store(store.url)


@pytest.fixture
def store(tmp_path):
    return DirectoryStore(tmp_path / "store")


@pytest.fixture
def files(tmp_path):
    """Lists all files of the store, also what is no object."""

    def files():
        return sorted(path.name for path in tmp_path.rglob("*") if path.is_file())

    return files


def test_the_url_is_a_file_url(tmp_path):
    assert DirectoryStore(tmp_path).url == f"file://{tmp_path}"
    assert DirectoryStore("relative").url == f"file://{os.getcwd()}/relative"


def _refusing(number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("at", ["write", "fsync", "mkdir"])
@pytest.mark.parametrize("if_absent", [False, True])
def test_a_full_disk_damages_nothing(store, files, monkeypatch, number, at, if_absent):
    store.put("a/old", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, at, _refusing(number))
        for key in ["b/new"] if if_absent or at == "mkdir" else ["a/old", "b/new"]:
            with pytest.raises(StorageFull) as caught:
                store.put(key, b"new", if_absent=if_absent)
            assert str(caught.value) == (
                f"cannot store {key} in {store.url}: {os.strerror(number)}. Nothing was damaged; "
                "free some space, or name a larger disk"
            )
    assert files() == ["old"]
    assert store.get("a/old") == b"old"
    assert store.put("b/new", b"new")


def test_a_file_that_may_not_grow_any_further_is_removed(tmp_path):
    """A real limit of the kernel, in a process of its own; the write stops half-way."""
    code = f"""
import resource
from smlt_tune.errors import StorageFull
from smlt_tune.runtime.stores.directory import DirectoryStore
store = DirectoryStore({str(tmp_path)!r})
store.put("key", b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store.put("key", bytes(1_000_000))
except StorageFull as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "File too large. Nothing was damaged" in run.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert (tmp_path / "key").read_bytes() == b"old"


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 256 KB."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("needs root to mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_damages_nothing(tiny_disk):
    store = DirectoryStore(tiny_disk)
    store.put("old", bytes(100_000))
    for _ in range(3):
        with pytest.raises(StorageFull, match=FULL):
            store.put("old", b"x" * 200_000)
        with pytest.raises(StorageFull, match=FULL):
            store.put("new", b"x" * 200_000, if_absent=True)
    assert os.listdir(tiny_disk) == ["old"]
    assert store.get("old") == bytes(100_000)
    store.delete(["old"])
    assert store.put("new", b"x" * 200_000)


def test_a_writer_that_is_killed_leaves_no_object(tmp_path):
    code = f"""
import os, signal
from smlt_tune.runtime.stores.directory import DirectoryStore
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
DirectoryStore({str(tmp_path)!r}).put("a/key", b"half")
"""
    run = subprocess.run([sys.executable, "-c", code])
    assert run.returncode == -signal.SIGKILL
    store = DirectoryStore(tmp_path)
    assert store.list("") == []
    with pytest.raises(ObjectNotFound):
        store.get("a/key")
    assert store.put("a/key", b"whole", if_absent=True)


def test_an_unexpected_failure_is_named(store, monkeypatch):
    monkeypatch.setattr(os, "write", _refusing(errno.EIO))
    with pytest.raises(StoreUnavailable) as caught:
        store.put("key", b"content")
    assert str(caught.value) == (
        f"cannot store key in {store.url}: Input/output error: check that the file system is "
        "mounted and healthy"
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_missing_permission_is_the_users_to_give(store, monkeypatch, number):
    monkeypatch.setattr(os, "open", _refusing(number))
    with pytest.raises(InvalidInput) as caught:
        store.put("key", b"content")
    assert str(caught.value) == (
        f"cannot store key in {store.url}: {os.strerror(number)}: give this user the permission "
        "to write there, or name another directory as object store"
    )


@pytest.mark.parametrize("if_absent", [False, True])
@pytest.mark.parametrize(("first", "second"), [("a", "a/b"), ("a/b", "a"), ("a", "a/b/c")])
def test_a_key_may_not_be_the_folder_of_another(store, files, first, second, if_absent):
    store.put(first, b"first")
    with pytest.raises(InvalidInput, match="one key may not be the folder of another one"):
        store.put(second, b"second", if_absent=if_absent)
    assert store.get(first) == b"first"
    assert files() == [first[-1]]


def test_a_lost_race_to_be_first_is_no_error(store, monkeypatch):
    link = os.link

    def overtaken(source, target):
        DirectoryStore(store.url.removeprefix("file://")).put("key", b"other")
        link(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", overtaken)
        assert store.put("key", b"mine", if_absent=True) is False
    assert store.get("key") == b"other"


def test_partial_writes_are_continued(store, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    store.put("key", b"0123456789")
    assert store.get("key") == b"0123456789"


def test_the_directory_must_be_one(tmp_path):
    (tmp_path / "file").touch()
    for root, message in [
        ("", "the directory of an object store has no name"),
        (tmp_path / "file", f"{tmp_path}/file is no directory: an object store needs one"),
    ]:
        with pytest.raises(InvalidInput) as caught:
            DirectoryStore(root)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("file://x", {}, "file://x is no object store: expected file:///absolute/path, with three"
         " slashes"),
        ("file://", {}, "file:// is no object store: expected file:///absolute/path, with three"
         " slashes"),
        ("file:///x", {"region": "x", "a": "b"}, "object store file:///x: unknown option 'a'\n"
         "object store file:///x: unknown option 'region'"),
        ("/x", {}, "unknown kind of object store 'a URL without ://': expected one of file://,"
         " s3://"),
        ("gs://x", {}, "unknown kind of object store 'gs://': expected one of file://, s3://"),
    ],
)  # fmt: skip
def test_bad_urls_are_refused(url, options, message):
    with pytest.raises(InvalidInput) as caught:
        open_object_store(url, options)
    assert str(caught.value) == message


@settings(deadline=None, max_examples=200)
@given(
    key=st.text("ab./~-_\\ \0é", max_size=12) | st.text(max_size=12),
    content=st.binary(max_size=20),
)
def test_whatever_the_key_nothing_happens_outside(tmp_path_factory, key, content):
    outer = tmp_path_factory.mktemp("outer")
    store = DirectoryStore(outer / "store")
    try:
        store.put(key, content)
    except InvalidInput:
        assert list(outer.iterdir()) == []
    else:
        assert store.list("") == store.list(key) == [key]
        assert store.get(key) == content
        assert [path.name for path in outer.iterdir()] == ["store"]
        store.delete([key])
        assert store.list("") == []


def test_opening_does_not_touch_the_disk(tmp_path):
    store = open_object_store(f"file://{tmp_path}/deep/down")
    assert store.list("") == []
    with contextlib.suppress(ObjectNotFound):
        store.get("key")
    store.delete(["key"])
    assert list(tmp_path.iterdir()) == []
