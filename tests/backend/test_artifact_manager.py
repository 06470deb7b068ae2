"""The user's code and data travel by value, once per content."""

import importlib
import json
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import cloudpickle
import numpy as np
import pytest

from smlt_tune.backend import artifact_manager
from smlt_tune.backend.artifact_manager import ArtifactManager
from smlt_tune.errors import InvalidInput
from smlt_tune.runtime import keys
from smlt_tune.runtime.data import UploadedDataset
from smlt_tune.runtime.stores.directory import DirectoryStore

ELSEWHERE = """
import cloudpickle, json, sys
function = cloudpickle.loads(open(sys.argv[1], "rb").read())
print(json.dumps(function(int(sys.argv[2]))))
"""


@pytest.fixture
def store(tmp_path):
    return DirectoryStore(tmp_path / "objects")


@pytest.fixture
def manager(store):
    return ArtifactManager(store)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Modules of a user, which no other interpreter can import."""
    folder = tmp_path / "project"
    (folder / "mine" / "deep").mkdir(parents=True)
    files = {
        "plain.py": "OFFSET = 100\ndef add(x):\n    return x + OFFSET\n",
        "mine/__init__.py": "",
        "mine/deep/__init__.py": "",
        "mine/deep/model.py": "class Model:\n    def out(self, x):\n        return 2 * x\n",
        "mine/train.py": (
            "import json\nimport plain\nfrom mine.deep.model import Model\n"
            "def train(x):\n    return [plain.add(x), Model().out(x), json.loads('3')]\n"
        ),
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        del sys.modules[name]


def elsewhere(store, digest, argument, tmp_path):
    """What the stored function gives in an interpreter that knows nothing of the project."""
    file = tmp_path / "function"
    file.write_bytes(store.get(keys.code(digest)))
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(file), str(argument)],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_users_modules_travel_along(project, manager, store, tmp_path):
    train = importlib.import_module("mine.train").train
    digest = manager.store_code(train, "the training function")
    assert elsewhere(store, digest, 4, tmp_path) == [104, 8, 3]
    assert cloudpickle.list_registry_pickle_by_value() == set()


def test_a_lambda_over_a_nested_module(project, manager, store, tmp_path):
    model = importlib.import_module("mine.deep.model")
    digest = manager.store_code(lambda x: model.Model().out(x) + 1, "the training function")
    assert elsewhere(store, digest, 4, tmp_path) == 9


def test_a_module_under_two_names(project, manager, store, tmp_path, monkeypatch):
    plain = importlib.import_module("plain")
    monkeypatch.setitem(sys.modules, "old_name_of_plain", plain)
    digest = manager.store_code(plain.add, "the training function")
    assert elsewhere(store, digest, 1, tmp_path) == 101
    assert cloudpickle.list_registry_pickle_by_value() == set()


def test_modules_that_load_late_are_left_asleep(project, manager, monkeypatch):
    class Late(types.ModuleType):
        def __getattr__(self, name):
            raise ImportError(f"{name} needs a package that is not installed")

    strange = Late("strange")
    del strange.__dict__["__spec__"]
    monkeypatch.setitem(sys.modules, "strange", strange)
    monkeypatch.setitem(sys.modules, "no_module", object())
    assert manager.store_code(importlib.import_module("plain").add, "it")


def test_what_was_registered_before_stays_registered(project, manager):
    plain = importlib.import_module("plain")
    cloudpickle.register_pickle_by_value(plain)
    try:
        manager.store_code(plain.add, "the training function")
        assert cloudpickle.list_registry_pickle_by_value() == {"plain"}
    finally:
        cloudpickle.unregister_pickle_by_value(plain)


def test_what_cannot_be_pickled(manager, store):
    with pytest.raises(InvalidInput) as refused:
        manager.store_code(threading.Lock(), "the configuration")
    assert refused.value.mistakes == (
        "the configuration cannot be sent to a worker: TypeError: cannot pickle '_thread.lock' "
        "object; open files, locks, connections and generators must be made inside the training "
        "function",
    )
    assert cloudpickle.list_registry_pickle_by_value() == set()
    assert store.list("") == []


def test_same_content_is_stored_once(manager, store, monkeypatch):
    puts = []
    put = store.put
    monkeypatch.setattr(store, "put", lambda key, *a, **k: puts.append(key) or put(key, *a, **k))
    first = manager.store_code({"lr": 0.1}, "the configuration")
    assert manager.store_code({"lr": 0.1}, "the configuration") == first
    assert manager.store_code({"lr": 0.2}, "the configuration") != first
    assert len(puts) == 2
    assert ArtifactManager(store).store_code({"lr": 0.1}, "the configuration") == first
    assert len(store.list("code/")) == 2


def test_a_store_that_fails_once_is_asked_again(manager, store, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(store, "put", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            manager.store_code(1, "the configuration")
    digest = manager.store_code(1, "the configuration")
    assert cloudpickle.loads(store.get(keys.code(digest))) == 1


def test_from_many_threads(project, manager, store):
    train = importlib.import_module("mine.train").train
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(lambda n: manager.store_code((train, n % 4), "it"), range(64)))
    assert [digests.index(d) for d in digests] == [n % 4 for n in range(64)]
    assert len(store.list("code/")) == 4
    assert cloudpickle.list_registry_pickle_by_value() == set()


@pytest.mark.parametrize("shard_bytes", [1, 64, 200, 10**6])
def test_uploads_in_shards(manager, store, monkeypatch, shard_bytes):
    monkeypatch.setattr(artifact_manager, "DATA_SHARD_BYTES", shard_bytes)
    x, y = np.arange(60.0).reshape(10, 6), np.arange(10)
    manager.upload("d", (x, y))
    digest = manager.datasets["d"]
    rows = max(1, shard_bytes // (7 * 8))
    assert len(store.list(f"data/{digest}/0")) == -(-10 // rows)
    dataset = UploadedDataset(store, digest)
    assert len(dataset) == 10
    got_x, got_y = dataset.take(np.array([9, 0, 3, 3]))
    np.testing.assert_array_equal(got_x, x[[9, 0, 3, 3]])
    np.testing.assert_array_equal(got_y, [9, 0, 3, 3])


def test_an_upload_replaces_the_name_and_keeps_the_content(manager, store):
    manager.upload("d", np.arange(3))
    first = manager.datasets["d"]
    manager.upload("e", np.arange(3))
    manager.upload("d", np.arange(4))
    assert manager.datasets["e"] == first != manager.datasets["d"]
    later = ArtifactManager(store)
    later.restore(manager.datasets)
    assert later.datasets == manager.datasets


@pytest.mark.parametrize(
    "data",
    [
        np.array(["a", "b"]),
        np.array([1 + 2j]),
        np.array(["2020-01-01"], dtype="M8[D]"),
        np.array([{}], dtype=object),
        np.float64(3),
        (np.zeros(2), [[1, 2], [3]]),
        None,
    ],
)
def test_what_is_no_array_of_numbers(manager, store, data):
    with pytest.raises(InvalidInput, match=r"^data set 'd': .*is no array of numbers"):
        manager.upload("d", data)
    assert manager.datasets == {}
    assert store.list("") == []


def test_a_tensor_that_wants_gradients(manager):
    torch = pytest.importorskip("torch")
    with pytest.raises(InvalidInput, match=r"Tensor is no array of numbers: .*detach"):
        manager.upload("d", torch.zeros(3, requires_grad=True))
    manager.upload("d", torch.zeros(3))


@pytest.mark.parametrize("data", [(), np.zeros((0, 2)), (np.zeros(0), np.zeros(0))])
def test_an_empty_data_set(manager, data):
    with pytest.raises(InvalidInput, match=r"^data set 'd' is empty$"):
        manager.upload("d", data)
