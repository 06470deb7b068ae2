"""What every parameter store does. Override the fixture ``store``."""

import threading
import uuid
from array import array
from concurrent.futures import ThreadPoolExecutor

import pytest

from smlt_tune.errors import InvalidInput, StoreUnavailable

TTL_S = 600.0
LONG_S = 60.0


class ParameterStoreContract:
    """Subclass it, name the subclass ``Test...``, and override ``store``."""

    @pytest.fixture
    def store(self):
        """A store; other tests may use the same server."""
        raise NotImplementedError

    @pytest.fixture
    def name(self):
        """A prefix that no other test uses."""
        return f"test:{uuid.uuid4().hex}:"

    def test_what_was_put_is_found_in_the_order_asked_for(self, store, name):
        store.put({name + "a": b"1", name + "b": b"2"}, ttl_s=TTL_S)
        assert store.get([name + "b", name + "none", name + "a", name + "b"]) == [
            b"2",
            None,
            b"1",
            b"2",
        ]

    def test_put_replaces(self, store, name):
        store.put({name: b"old"}, ttl_s=TTL_S)
        store.put({name: b"new"}, ttl_s=TTL_S)
        assert store.get([name]) == [b"new"]

    @pytest.mark.parametrize(
        "value",
        [
            b"",
            b"\x00\r\n\xff$5\r\n",
            bytearray(b"array"),
            memoryview(b"view"),
            memoryview(array("f", [1.5, -2.0, 3.25])),
            memoryview(array("f", range(100_000))),
            memoryview(array("d", range(10_000)))[::2],
            memoryview(bytes(range(256)) * 12_000),
        ],
        ids=lambda value: f"{type(value).__name__}-{memoryview(value).nbytes}",
    )
    def test_values_come_back_byte_for_byte(self, store, name, value):
        expected = memoryview(value).tobytes()
        store.put({name + "put": value}, ttl_s=TTL_S)
        assert store.put_once({name + "once": value}, ttl_s=TTL_S) == [True]
        store.append(name + "stream", value, ttl_s=TTL_S)
        assert store.get([name + "put", name + "once"]) == [expected, expected]
        assert [message for _, message in store.read(name + "stream", "0", timeout_s=0)] == [
            expected
        ]

    def test_a_caller_may_reuse_its_buffer(self, store, name):
        buffer = array("f", [1.0] * 10_000)
        store.put_once({name: memoryview(buffer)}, ttl_s=TTL_S)
        expected = buffer.tobytes()
        buffer[0] = 2.0
        assert store.get([name]) == [expected]

    def test_nothing_asked_nothing_done(self, store):
        assert store.get([]) == []
        assert store.put_once({}, ttl_s=TTL_S) == []
        store.put({}, ttl_s=TTL_S)
        store.delete([])

    def test_first_writer_wins(self, store, name):
        assert store.put_once({name + "a": b"first"}, ttl_s=TTL_S) == [True]
        assert store.put_once({name + "a": b"second", name + "b": b"x"}, ttl_s=TTL_S) == [
            False,
            True,
        ]
        assert store.get([name + "a", name + "b"]) == [b"first", b"x"]

    def test_exactly_one_of_many_writers_wins(self, store, name):
        writers = [str(i).encode() for i in range(16)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda w: store.put_once({name: w}, ttl_s=TTL_S), writers))
        assert won.count([True]) == 1
        assert store.get([name]) == [writers[won.index([True])]]

    def test_who_waits_is_woken_up_and_finds_the_values(self, store, name):
        found = []

        def wait():
            store.wait(name + "to0", "0", timeout_s=LONG_S)
            found.extend(store.get([name + "a", name + "b"]))

        waiter = threading.Thread(target=wait)
        waiter.start()
        store.put_once(
            {name + "a": b"1", name + "b": b"2"}, ttl_s=TTL_S, announce=[name + "to0", name + "to1"]
        )
        waiter.join()
        assert found == [b"1", b"2"]
        assert store.wait(name + "to1", "0", timeout_s=0) != "0"

    def test_losers_announce_too(self, store, name):
        store.put_once({name: b""}, ttl_s=TTL_S)
        store.put_once({name: b""}, ttl_s=TTL_S, announce=[name + "to0"])
        assert store.wait(name + "to0", "0", timeout_s=0) != "0"

    def test_every_token_is_waited_for_once_by_each_reader(self, store, name):
        stream = name + "to0"
        assert store.wait(stream, "0", timeout_s=0) == "0"
        store.put_once({}, ttl_s=TTL_S, announce=[stream])
        store.put_once({}, ttl_s=TTL_S, announce=[stream])
        newest = store.wait(stream, "0", timeout_s=LONG_S)
        assert store.wait(stream, newest, timeout_s=0.01) == newest
        store.put_once({}, ttl_s=TTL_S, announce=[stream])
        assert store.wait(stream, newest, timeout_s=LONG_S) != newest
        assert store.wait(stream, "0", timeout_s=0) != "0"

    def test_tokens_without_a_reader_do_not_pile_up_forever(self, store, name):
        for _ in range(1000):
            store.put_once({}, ttl_s=TTL_S, announce=[name])
        assert len(store.read(name, "0", timeout_s=0, limit=10_000)) < 1000

    def test_values_and_streams_vanish_after_their_time(self, store, name):
        store.put({name + "put": b"1"}, ttl_s=0.02)
        store.put_once({name + "once": b"1"}, ttl_s=0.02, announce=[name + "to0"])
        store.append(name + "stream", b"1", ttl_s=0.02)
        store.put({name + "stays": b"1"}, ttl_s=TTL_S)
        keys = [name + key for key in ("put", "once", "to0", "stream", "stays")]
        while store.get(keys[:2]) != [None, None]:
            store.wait(name + "pause", "0", timeout_s=0.01)
        while store.wait(name + "to0", "0", timeout_s=0) != "0":
            store.wait(name + "pause", "0", timeout_s=0.01)
        while store.read(name + "stream", "0", timeout_s=0):
            store.wait(name + "pause", "0", timeout_s=0.01)
        assert store.get([name + "stays"]) == [b"1"]
        assert store.put_once({name + "once": b"2"}, ttl_s=TTL_S) == [True]

    def test_a_message_renews_the_life_of_its_stream(self, store, name):
        store.append(name + "stream", b"1", ttl_s=0.2)
        store.append(name + "stream", b"2", ttl_s=TTL_S)
        store.put({name + "other": b""}, ttl_s=0.3)
        while store.get([name + "other"]) != [None]:
            store.wait(name + "pause", "0", timeout_s=0.01)
        assert len(store.read(name + "stream", "0", timeout_s=0)) == 2

    def test_delete(self, store, name):
        store.put({name + "a": b"1", name + "b": b"2"}, ttl_s=TTL_S)
        store.delete([name + "a", name + "none"])
        assert store.get([name + "a", name + "b"]) == [None, b"2"]

    @pytest.mark.parametrize("special", ["", "*", "?", "[ab]", "\\"])
    def test_delete_prefix_takes_it_literally(self, store, name, special):
        below = {f"{name}{special}:{i}": b"" for i in range(2500)}
        others = {f"{name}xa:1": b"", f"{name}a:1": b"", f"{name}b": b""}
        store.put(below, ttl_s=TTL_S)
        store.put(others, ttl_s=TTL_S)
        store.append(f"{name}{special}:stream", b"", ttl_s=TTL_S)
        assert store.delete_prefix(f"{name}{special}:") == 2501
        assert store.delete_prefix(f"{name}{special}:") == 0
        assert store.get([*below, *others]) == [None] * 2500 + [b""] * 3

    def test_messages_are_read_oldest_first_from_any_place(self, store, name):
        for message in (b"1", b"2", b"3"):
            store.append(name, message, ttl_s=TTL_S)
        entries = store.read(name, "0", timeout_s=0)
        assert [message for _, message in entries] == [b"1", b"2", b"3"]
        assert store.read(name, entries[0][0], timeout_s=0) == entries[1:]
        assert store.read(name, "0", timeout_s=0, limit=2) == entries[:2]
        assert store.read(name, entries[2][0], timeout_s=0.01) == []

    def test_a_reader_waits_for_a_message(self, store, name):
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit(store.read, name, "0", timeout_s=LONG_S)
            store.append(name, b"hello", ttl_s=TTL_S)
            assert [message for _, message in read.result()] == [b"hello"]

    def test_trim_forgets_what_was_read(self, store, name):
        for message in (b"1", b"2", b"3"):
            store.append(name, message, ttl_s=TTL_S)
        entries = store.read(name, "0", timeout_s=0)
        store.trim(name, entries[1][0])
        assert store.read(name, "0", timeout_s=0) == entries[2:]
        store.trim(name, entries[2][0])
        store.trim(name, "0")
        assert store.read(name, "0", timeout_s=0) == []
        store.append(name, b"4", ttl_s=TTL_S)
        assert [message for _, message in store.read(name, entries[2][0], timeout_s=0)] == [b"4"]

    def test_trim_of_nothing(self, store, name):
        store.trim(name, "12-3")
        assert store.read(name, "0", timeout_s=0) == []

    def test_server_keeps_its_id(self, store):
        assert store.server_id()
        assert store.server_id() == store.server_id()

    @pytest.mark.parametrize("ttl_s", [0, -1, float("nan")])
    def test_what_would_vanish_at_once_is_refused(self, store, name, ttl_s):
        for call in (
            lambda: store.put({name: b""}, ttl_s=ttl_s),
            lambda: store.put_once({name: b""}, ttl_s=ttl_s),
            lambda: store.append(name, b"", ttl_s=ttl_s),
        ):
            with pytest.raises(InvalidInput, match=f"ttl_s must be positive, got {ttl_s}"):
                call()

    def test_a_closed_store_says_so(self, store, name):
        store.get([name])
        store.close()
        store.close()
        with pytest.raises(StoreUnavailable, match="closed"):
            store.get([name])

    def test_closing_ends_a_wait(self, store, name):
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(store.wait, name, "0", timeout_s=10 * LONG_S)
            while not (waiting.running() or waiting.done()):
                pass
            store.close()
            with pytest.raises(StoreUnavailable, match="closed"):
                waiting.result()
