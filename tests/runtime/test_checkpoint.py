import re

import pytest

from smlt_tune.errors import ObjectDamaged, ObjectNotFound
from smlt_tune.runtime import keys
from smlt_tune.runtime.checkpoint import Checkpoints
from smlt_tune.runtime.position import Position
from smlt_tune.runtime.stores.directory import DirectoryStore


@pytest.fixture
def store(tmp_path):
    return DirectoryStore(tmp_path)


def test_a_checkpoint_comes_back_as_it_was(store):
    checkpoints = Checkpoints(store, "job")
    key = checkpoints.save(Position(2, 1, 5), b"state")
    assert checkpoints.load(key) == b"state"
    assert re.fullmatch(
        r"jobs/job/checkpoints/e000003-l00001-i0000000005-[0-9a-f]{8}\.safetensors", key
    )
    assert Position.decode(key.rsplit("/", 1)[1]) == Position(2, 1, 5)


def test_the_newest_in_training_order_is_the_latest(store):
    checkpoints = Checkpoints(store, "job", keep=10)
    for position in [Position(9), Position(10, 1, 2), Position(10, 1, 11), Position(), Position(2)]:
        checkpoints.save(position, position.encode().encode())
    assert checkpoints.load(checkpoints.latest()) == Position(10, 1, 11).encode().encode()


def test_there_may_be_none(store):
    Checkpoints(store, "other").save(Position(), b"x")
    assert Checkpoints(store, "job").latest() is None
    assert Checkpoints(store, "oth").latest() is None


def test_only_the_last_few_that_were_saved_here_stay(store):
    mine, other = Checkpoints(store, "job", keep=2), Checkpoints(store, "job", keep=2)
    foreign = other.save(Position(0), b"by another worker")
    saved = [mine.save(Position(0, 1, i), bytes([i])) for i in range(5)]
    assert store.list(keys.checkpoints("job")) == sorted([foreign, *saved[-2:]])


def test_saving_the_same_again_deletes_nothing(store):
    checkpoints = Checkpoints(store, "job", keep=2)
    first = checkpoints.save(Position(0, 1, 1), b"a")
    for _ in range(5):
        assert checkpoints.save(Position(0, 1, 2), b"b") != first
    assert len(store.list(keys.checkpoints("job"))) == 2


def test_damage_is_detected_and_the_one_before_is_taken(store):
    checkpoints = Checkpoints(store, "job")
    good = checkpoints.save(Position(0, 1, 1), b"good")
    bad = checkpoints.save(Position(0, 1, 2), b"will be damaged")
    store.put(bad, b"will be damaged"[:-1] + b"?")
    with pytest.raises(ObjectDamaged) as caught:
        checkpoints.load(bad)
    assert str(caught.value) == (
        f"checkpoint {bad} is damaged: its checksum does not match; delete it, and the job "
        "continues from the one before"
    )
    assert checkpoints.latest() == good
    store.put(good, b"")
    assert checkpoints.latest() is None


def test_what_is_gone_is_not_found(store):
    checkpoints = Checkpoints(store, "job")
    key = checkpoints.save(Position(), b"x")
    store.delete([key])
    with pytest.raises(ObjectNotFound):
        checkpoints.load(key)


class Racing(DirectoryStore):
    """While somebody looks for the latest, its worker saves newer ones and deletes the old."""

    races = 3

    def list(self, prefix):
        found = super().list(prefix)
        if self.races:
            self.races -= 1
            self.delete(found)
            Checkpoints(DirectoryStore(self._root), "job").save(Position(0, 1, 9 - self.races), b"")
        return found


def test_checkpoints_may_vanish_while_one_looks(tmp_path):
    Checkpoints(DirectoryStore(tmp_path), "job").save(Position(0, 1, 1), b"old")
    latest = Checkpoints(Racing(tmp_path), "job").latest()
    assert latest is not None
    assert Position.decode(latest.rsplit("/", 1)[1]) == Position(0, 1, 9)
