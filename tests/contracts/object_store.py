"""What every object store does. Override the fixtures ``store`` and ``reopened``."""

import threading
from array import array
from concurrent.futures import ThreadPoolExecutor

import pytest

from smlt_tune.errors import InvalidInput, ObjectNotFound

BAD_KEYS = ["", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", "a b", "a\\b", "ä"]
BAD_KEYS += ["a\n", "~a", "x" * 201, "/".join(["x" * 100] * 8)]


class ObjectStoreContract:
    """Subclass it, name the subclass ``Test...``, and override ``store`` and ``reopened``."""

    @pytest.fixture
    def store(self):
        """A store without objects."""
        raise NotImplementedError

    @pytest.fixture
    def reopened(self, store):
        """Another store, made from the URL of the first."""
        raise NotImplementedError

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\x00\xff",
            bytearray(b"array"),
            memoryview(b"view"),
            memoryview(array("f", [1.5, -2.0])),
            memoryview(array("d", range(10)))[::2],
            bytes(range(256)) * 20_000,
        ],
        ids=lambda content: f"{type(content).__name__}-{memoryview(content).nbytes}",
    )
    def test_contents_come_back_byte_for_byte(self, store, content):
        assert store.put("a/b.c_d-e", content)
        assert store.get("a/b.c_d-e") == memoryview(content).tobytes()
        assert type(store.get("a/b.c_d-e")) is bytes

    def test_put_replaces(self, store):
        store.put("key", b"the longer old content")
        assert store.put("key", b"new")
        assert store.get("key") == b"new"

    def test_if_absent_never_replaces(self, store):
        assert store.put("key", b"first", if_absent=True) is True
        assert store.put("key", b"second", if_absent=True) is False
        assert store.get("key") == b"first"
        store.delete(["key"])
        assert store.put("key", b"third", if_absent=True) is True

    def test_exactly_one_of_many_writers_wins(self, store):
        writers = [str(i).encode() * 1000 for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda w: store.put("key", w, if_absent=True), writers))
        assert won.count(True) == 1
        assert store.get("key") == writers[won.index(True)]

    def test_a_reader_sees_the_whole_old_or_the_whole_new_content(self, store):
        contents = [bytes([i]) * 100_000 for i in range(10)]
        store.put("key", contents[0])
        seen, done = [], threading.Event()

        def read():
            while not done.is_set():
                seen.append(store.get("key"))

        reader = threading.Thread(target=read)
        reader.start()
        for content in contents[1:]:
            store.put("key", content)
        done.set()
        reader.join()
        assert set(seen) <= set(contents)

    def test_what_is_not_there_is_not_found(self, store):
        with pytest.raises(ObjectNotFound, match=r"no object.*a/b"):
            store.get("a/b")
        store.put("a/b/c", b"")
        with pytest.raises(ObjectNotFound, match=r"no object.*a/b"):
            store.get("a/b")

    def test_list_gives_the_keys_that_start_so(self, store):
        keys = ["jobs/a/2", "jobs/a/1", "jobs/ab/1", "jobs/b", "code/x", "job"]
        for key in keys:
            store.put(key, b"")
        assert store.list("") == sorted(keys)
        assert store.list("jobs/a/") == ["jobs/a/1", "jobs/a/2"]
        assert store.list("jobs/a") == ["jobs/a/1", "jobs/a/2", "jobs/ab/1"]
        assert store.list("job") == ["job", "jobs/a/1", "jobs/a/2", "jobs/ab/1", "jobs/b"]
        assert store.list("jobs/c/") == []
        assert store.list("none") == []

    def test_keys_sort_as_text(self, store):
        keys = ["a/b", "a-b", "a.b", "ab", "A", "a0", "a_"]
        for key in keys:
            store.put(key, b"")
        assert store.list("") == sorted(keys)

    def test_an_empty_store_lists_nothing(self, store):
        assert store.list("") == []

    def test_delete_ignores_what_is_not_there(self, store):
        store.put("a/1", b"")
        store.put("a/2", b"")
        store.delete(["a/1", "a/none", "none/at/all", "a"])
        store.delete(["a/1"])
        store.delete([])
        assert store.list("") == ["a/2"]

    def test_from_its_url_an_equal_store_is_made(self, store, reopened):
        store.put("a/b", b"content")
        assert reopened.url == store.url
        assert reopened.get("a/b") == b"content"
        assert reopened.list("") == ["a/b"]

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_bad_keys_are_refused(self, store, key):
        for call in (
            lambda: store.put(key, b""),
            lambda: store.get(key),
            lambda: store.delete([key]),
        ):
            with pytest.raises(InvalidInput, match="is no key of an object: it must be"):
                call()

    @pytest.mark.parametrize("prefix", ["/", "/a", "../", "a/../b", "a//", "ä", "*", "./a"])
    def test_bad_prefixes_are_refused(self, store, prefix):
        with pytest.raises(InvalidInput, match="no key starts with it"):
            store.list(prefix)
