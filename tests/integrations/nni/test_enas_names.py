import numpy as np
import pytest
import torch
from nni.nas.space import RawFormatModelSpace, SimplifiedModelSpace

from smlt_tune.errors import UsageError
from smlt_tune.integrations.nni.enas.names import model_space, supernet_names
from tests.integrations.nni import enas_spaces as spaces

SPACES = [
    spaces.Nested,
    spaces.Inputs,
    spaces.Deep,
    spaces.Cells,
    spaces.Widths,
    spaces.Tied,
]


def parameters(module):
    return dict(module.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("kind", SPACES, ids=lambda kind: kind.__name__)
def test_names_are_those_of_the_space(kind):
    space = SimplifiedModelSpace.from_model(kind())
    random, seen = np.random.RandomState(1), set()
    for _ in range(25):
        candidate = space.random(random_state=random)
        model, supernet = candidate.executable_model(), model_space(candidate)
        names = supernet_names(model, supernet, candidate.sample)
        mine, all_of_them = parameters(model), parameters(supernet)
        assert names.keys() == mine.keys()
        assert set(names.values()) <= all_of_them.keys()
        assert len(set(names.values())) == len(names)
        if kind is not spaces.Widths:
            assert all(mine[m].shape == all_of_them[t].shape for m, t in names.items())
        seen |= set(names.values())
    assert seen == all_of_them.keys()


def test_a_space_takes_no_memory():
    space = SimplifiedModelSpace.from_model(spaces.Widths())
    supernet = model_space(space.freeze({"width": 8}))
    assert {tensor.device.type for tensor in parameters(supernet).values()} == {"meta"}


def test_the_chosen_layer_gives_the_name():
    space = SimplifiedModelSpace.from_model(spaces.Nested())
    found = {}
    for outer, inner in [(0, "a"), (0, "b"), (1, "a"), (2, "a")]:
        candidate = space.freeze({"outer": outer, "inner": inner})
        names = supernet_names(
            candidate.executable_model(), model_space(candidate), candidate.sample
        )
        found[outer, inner] = {t for t in names.values() if t.endswith("weight")} - {"stem.weight"}
    assert found == {
        (0, "a"): {"block.0.a.weight"},
        (0, "b"): {"block.0.b.weight"},
        (1, "a"): set(),
        (2, "a"): {"block.2.0.weight", "block.2.1.weight"},
    }


@pytest.mark.parametrize(
    "candidate",
    [
        SimplifiedModelSpace.from_model(spaces.Widths()),
        RawFormatModelSpace.from_model(spaces.Widths()).freeze({"width": 4}),
        torch.nn.Linear(1, 1),
    ],
    ids=["not frozen", "another format", "a model"],
)
def test_what_does_not_tell_its_space_is_refused(candidate):
    with pytest.raises(UsageError, match="simplified"):
        model_space(candidate)
