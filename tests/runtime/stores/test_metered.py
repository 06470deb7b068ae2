import sys
from concurrent.futures import ThreadPoolExecutor
from subprocess import run

import pytest

from smlt_tune.errors import BudgetExhausted, ObjectNotFound
from smlt_tune.runtime.stores.directory import DirectoryStore
from smlt_tune.runtime.stores.metered import MeteredObjectStore, Usage
from smlt_tune.runtime.stores.opening import open_object_store
from tests.contracts.object_store import ObjectStoreContract


class TestMetered(ObjectStoreContract):
    @pytest.fixture
    def store(self, tmp_path):
        return MeteredObjectStore(DirectoryStore(tmp_path))

    @pytest.fixture
    def reopened(self, store):
        return open_object_store(store.url)


@pytest.fixture
def inner(tmp_path):
    return DirectoryStore(tmp_path)


def test_everything_is_counted(inner):
    store = MeteredObjectStore(inner)
    store.put("a", b"123")
    store.put("a", memoryview(b"12345"), if_absent=True)
    store.get("a")
    with pytest.raises(ObjectNotFound):
        store.get("b")
    store.list("")
    store.delete(["a", "b"])
    assert store.usage == Usage(puts=2, gets=2, lists=1, deletes=2, bytes_in=8, bytes_out=3)


def test_no_more_than_allowed(inner):
    store = MeteredObjectStore(inner, max_puts=2, max_gets=1)
    store.put("a", b"1")
    store.get("a")
    store.put("b", b"2")
    with pytest.raises(BudgetExhausted) as caught:
        store.put("c", b"3")
    assert str(caught.value) == (
        "the 2 objects that may be stored were stored: the budget covers no more requests to the "
        "object store; save or read less often, or raise the budget"
    )
    with pytest.raises(BudgetExhausted, match="the 1 objects that may be read were read"):
        store.get("a")
    assert store.list("") == ["a", "b"]
    store.delete(["a", "b"])
    assert store.usage == Usage(puts=2, gets=1, lists=1, deletes=2, bytes_in=2, bytes_out=1)


def test_the_limit_holds_for_all_threads_together(inner):
    store = MeteredObjectStore(inner, max_puts=10)

    def put(i):
        try:
            return store.put(f"{i}", b"x")
        except BudgetExhausted:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(put, range(50))).count(True) == 10
    assert len(inner.list("")) == 10
    assert store.usage.bytes_in == 10


def test_opening_a_directory_loads_no_sdk():
    code = (
        "import sys\n"
        "from smlt_tune.runtime.stores import opening, metered, redis_store\n"
        "opening.open_object_store('file:///x')\n"
        "heavy = ('boto', 'pandas', 'scipy', 'ray', 'optuna', 'nni', 'torch')\n"
        "heavy += ('smlt_tune.backend',)\n"
        "print([name for name in sys.modules if name.startswith(heavy)])"
    )
    result = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
