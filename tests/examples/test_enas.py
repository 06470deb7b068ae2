"""The search spaces of the example, and the whole of it at tiny size."""

import csv
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nni")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # as in tests/integrations/nni/conftest.py
    from nni.nas.space import SimplifiedModelSpace

    from examples.enas.spaces import SPACES
    from examples.enas.training import load_data, some_of
    from smlt_tune.integrations.nni.enas.names import model_space, supernet_names

ROOT = Path(__file__).parents[2]
INPUTS = {
    "macro": torch.zeros(2, 1, 8, 8),
    "micro": torch.zeros(2, 1, 8, 8),
    "recurrent": torch.zeros(2, 5, dtype=torch.int64),
}


@pytest.mark.parametrize("kind", SPACES)
def test_candidates_of_a_space_train_and_differ_tenfold_in_size(kind):
    space, sizes = SimplifiedModelSpace.from_model(SPACES[kind]()), []
    widths = space.simplify()["width"].values
    for number in range(4):
        sample = dict(space.random(random_state=np.random.RandomState(number)).sample)
        candidate = space.freeze({**sample, "width": widths[-(number % 2)]})
        model = candidate.executable_model()
        output = model(INPUTS[kind])
        output.sum().backward()
        assert len(output) == (2 if kind != "recurrent" else 10)
        named = supernet_names(model, model_space(candidate), candidate.sample)
        assert named.keys() == dict(model.named_parameters()).keys()
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert max(sizes) >= 10 * min(sizes)


def test_the_text_comes_in_windows_whose_labels_are_the_next_characters():
    train, search, test = load_data("recurrent", 100, 20)
    assert [len(part[0]) for part in (train, search, test)] == [100, 20, 20]
    for inputs, labels in (train, search, test):
        assert torch.equal(inputs[:, 1:], labels[:, :-1])
    chosen = [some_of(train, 10, str(key))[0] for key in range(20)]
    assert all(len(each) == 10 for each in chosen)
    assert len({tuple(each[0].tolist()) for each in chosen}) > 5


@pytest.mark.timeout(300)
def test_the_example_searches_and_trains_the_best(tmp_path):
    command = [sys.executable, "-m", "examples.enas", "--small", "--candidates", "3"]
    done = subprocess.run(
        [*command, "--budget", "2", "--platform", "local", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        env=os.environ | {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 candidates" in done.stdout
    assert "from scratch, on the test set: {'epoch': 1" in done.stdout
    with (tmp_path / "out" / "candidates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == ["0", "1", "2"]
    assert all(int(row["parameters"]) > 0 and float(row["cost_usd"]) > 0 for row in rows)
    assert (tmp_path / "out" / "candidates.png").stat().st_size > 10_000
    assert list(tmp_path.glob("smlt-*")) == []
