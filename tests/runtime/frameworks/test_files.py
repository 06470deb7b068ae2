"""State in files: what goes in comes out."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save

from smlt_tune.errors import InvalidInput, ObjectDamaged
from smlt_tune.runtime.frameworks.base import META, read_meta
from smlt_tune.runtime.frameworks.files import FILES, pack, unpack


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def test_files_come_back_as_they_were(tmp_path):
    source, target = tmp_path / "from", tmp_path / "deep" / "to"
    (source / "a" / "b").mkdir(parents=True)
    (source / "weights.bin").write_bytes(bytes(range(256)) * 100)
    (source / "empty.txt").write_bytes(b"")
    (source / "a" / "b" / "ü.json").write_bytes(b"{}")
    content = pack(source, {"position": "e1"})
    assert read_meta(content) == {"position": "e1", FILES: "3"}
    assert content == pack(str(source), {"position": "e1"})
    unpack(content, target)
    assert contents(target) == contents(source)
    assert len(contents(target)) == 3


def test_a_folder_without_files_is_a_state_too(tmp_path):
    unpack(pack(tmp_path, {}), tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []


def test_what_cannot_be_kept_is_refused_all_at_once(tmp_path):
    with pytest.raises(InvalidInput, match=r"needs a folder, or None: '.*none' is none"):
        pack(tmp_path / "none", {})
    (tmp_path / "__metadata__").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / os.fsdecode(b"\xff")).touch()
    with pytest.raises(InvalidInput) as refused:
        pack(tmp_path, {})
    assert len(refused.value.mistakes) == 3
    assert "cannot keep a file called __metadata__: rename it" in str(refused.value)


@pytest.mark.parametrize("name", ["/tmp/x", "../x", "a/../../x"])
def test_no_file_is_written_outside_of_the_folder(tmp_path, name):
    content = save({name: np.zeros(1, np.uint8)}, {META: json.dumps({FILES: "1"})})
    with pytest.raises(ObjectDamaged, match="outside of its folder"):
        unpack(content, tmp_path / "to")
    assert not list(tmp_path.rglob("x"))
