"""Weights that candidates share: the runtime's sessions over real stores, without a platform."""

import numpy as np
import pytest
import torch
from nni.nas.space import SimplifiedModelSpace
from torch import nn

import smlt_tune as smlt
from smlt_tune.errors import UsageError
from smlt_tune.integrations.nni.candidate import BUILDING
from smlt_tune.integrations.nni.enas import SharedWeights
from smlt_tune.runtime.checkpoint import Checkpoints
from smlt_tune.runtime.shared import SharedTensors, SharedTensorsWriter, TensorUpdate
from tests.integrations.nni.enas_spaces import Small
from tests.runtime.harness import Job, Killed

SPACE = SimplifiedModelSpace.from_model(Small())


class Search(Job):
    """The jobs of a search, one after the other."""

    name = "s-0"

    def spec(self, rank, workers, **changes):
        return super().spec(rank, workers, job=self.name, **changes)

    @property
    def names(self):
        return self.keys.generation(self.name, self.generation)

    def latest(self):
        return Checkpoints(self.objects, self.name).latest()

    def push(self, name, updates):
        """What another job of the search does."""
        SharedTensors(self.fleet, "s", self.store, self.objects, name).push(updates)


@pytest.fixture
def job(valkey, tmp_path):
    made = Search(valkey, tmp_path)
    yield made
    made.close()


@pytest.fixture
def shared(job):
    return SharedTensors(job.fleet, "s", job.store, job.objects)


@pytest.fixture
def writer(shared):
    return SharedTensorsWriter(shared)


def give(job, writer, tensors):
    """Makes these the shared tensors."""
    arrays = {name: np.float32(value) for name, value in tensors.items()}
    job.push("giver", {name: TensorUpdate(array, array, 0) for name, array in arrays.items()})
    writer.merge()


def candidate(width, op="none"):
    return SPACE.freeze({"width": width, "op": op})


def built(chosen):
    with BUILDING:  # NNI keeps what it builds in global variables, and workers are threads here
        torch.manual_seed(0)
        return chosen.executable_model()


def train(chosen, *, steps=4, disturb=None, seen=None):
    """A training function: some steps, a push; ``disturb`` is called with the number of each."""

    def function():
        session = smlt.session()
        model = built(chosen)
        weights = SharedWeights(model, chosen)
        if seen is not None:
            seen.append({n: t.detach().clone() for n, t in weights._by_name.items()})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, weights = session.prepare(model, optimizer, weights)
        data = torch.linspace(-1, 1, 32).reshape(8, 4), torch.arange(8) % 2
        for epoch in session.epochs(steps):
            if disturb:
                disturb(epoch)
            for x, y in session.batches(data, batch_size=8):
                loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        weights.push()
        if disturb:
            disturb("pushed")
        return {name: tensor.tolist() for name, tensor in weights._by_name.items()}

    return function


def test_a_candidate_inherits_by_name_and_trains_nothing_else(job, shared, writer):
    [first] = job.run(train(candidate(4, "norm")))
    writer.merge()
    before = shared.read(["hidden.weight", "op.norm.weight", "op.norm.bias", "out.bias"])
    seen = []
    job.name = "s-1"
    job.run(train(candidate(4, "none"), seen=seen))
    np.testing.assert_array_equal(seen[0]["hidden.weight"], first.value["hidden.weight"])
    assert writer.merge() == ["s-1"]
    after = shared.read(list(before))
    for name in ("op.norm.weight", "op.norm.bias"):  # the second one lacks them
        np.testing.assert_array_equal(after[name].value, before[name].value)
        assert after[name].version == 1
    assert after["hidden.weight"].version == 2
    assert not np.array_equal(after["hidden.weight"].value, before["hidden.weight"].value)


def test_wide_and_narrow_candidates_share_leading_slices(job, shared, writer):
    give(job, writer, {"hidden.weight": np.full((4, 4), 7), "out.weight": np.full((2, 4), 5)})
    seen = []
    job.run(train(candidate(2), seen=seen, steps=0))
    job.name = "s-1"
    job.run(train(candidate(8), seen=seen, steps=0))
    narrow, wide = seen
    assert narrow["hidden.weight"].shape == (2, 4)
    assert (narrow["hidden.weight"] == 7).all()
    assert (narrow["out.weight"] == 5).all()
    assert (wide["hidden.weight"][:4] == 7).all()
    assert (wide["hidden.weight"][4:].abs() < 1).all()  # its own
    assert (wide["out.weight"][:, :4] == 5).all()
    writer.merge()
    grown = shared.read(["hidden.weight"])["hidden.weight"].value
    np.testing.assert_array_equal(grown, wide["hidden.weight"])


def test_a_worker_that_is_killed_after_its_push_pushes_once(job, shared, writer):
    def dies(when):
        if when == "pushed" and job.generation == 0:
            raise Killed

    give(job, writer, {"hidden.weight": np.ones((2, 4))})
    chosen = candidate(2)
    job.begin(train(chosen, disturb=dies))
    assert [work.how for work in job.join()] == ["killed"]
    [work] = job.run(train(chosen, disturb=dies), start=job.latest())
    assert writer.merge() == ["s-0"]
    assert writer.merge() == []
    found = shared.read(["hidden.weight"])["hidden.weight"]
    assert found.version == 2
    np.testing.assert_allclose(found.value, work.value["hidden.weight"], rtol=1e-6)


def test_a_restarted_worker_remembers_what_it_began_with(job, shared, writer):
    """What was merged while it trained stays: its change counts from where it had begun."""
    give(job, writer, {"hidden.weight": np.ones((2, 4))})
    chosen = candidate(2)
    job.run(train(chosen), leave=True)
    checkpoint = job.handed_over()
    values = np.ones((2, 4), np.float32)
    job.push("meanwhile", {"hidden.weight": TensorUpdate(values, 9 * values, 1)})
    writer.merge()
    [work] = job.run(train(chosen), start=checkpoint)
    assert writer.merge() == ["s-0"]
    change = np.float32(work.value["hidden.weight"]) - 1  # not: - 9
    found = shared.read(["hidden.weight"])["hidden.weight"].value
    np.testing.assert_allclose(found, 9 + change / 2, rtol=1e-5)


def test_all_workers_inherit_alike_and_one_of_them_pushes(job, shared, writer):
    give(job, writer, {"hidden.weight": np.ones((4, 4))})
    works = job.run(train(candidate(4, "norm")), 2)
    assert works[0].value == works[1].value
    assert writer.merge() == ["s-0"]
    found = shared.read(["hidden.weight"])["hidden.weight"].value
    np.testing.assert_allclose(found, works[0].value["hidden.weight"], rtol=1e-6)


def test_a_model_that_has_diverged_passes_nothing_on(job, shared, writer, caplog):
    def function():
        chosen = candidate(4)
        model = built(chosen)
        weights = SharedWeights(model, chosen)
        with torch.no_grad():
            model.out.bias[0] = float("nan")
        return weights.push()

    [work] = job.run(function)
    assert work.value is False
    assert writer.merge() == []
    assert "out.bias is not finite" in caplog.text


def test_alone_a_model_is_as_it_is_built():
    chosen = candidate(4)
    model = built(chosen)
    weights = SharedWeights(model, chosen)
    torch.testing.assert_close(model.state_dict(), built(chosen).state_dict())
    assert not weights.push()
    assert set(weights.names) == {"hidden.weight", "hidden.bias", "out.weight", "out.bias"}


def test_without_a_candidate_there_are_no_names():
    with pytest.raises(UsageError, match="outside of a trial"):
        SharedWeights(built(candidate(4)))


def test_a_tensor_with_another_number_of_dimensions_is_told(job, shared, writer):
    give(job, writer, {"hidden.weight": np.ones(4), "out.weight": np.ones((1, 2, 3))})
    with pytest.raises(UsageError, match=r"hidden.weight has 2 .* 1 in(.|\n)*out.weight has 2"):
        job.run(train(candidate(4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_shared_as_float32(job, shared, writer, dtype):
    give(job, writer, {"hidden.weight": np.full((4, 4), 0.5)})

    def function():
        chosen = candidate(4)
        model = built(chosen).to(dtype)
        SharedWeights(model, chosen).push()
        return model.hidden.weight.dtype == dtype and float(model.hidden.weight.detach().sum())

    [work] = job.run(function)
    assert work.value == 8.0
    writer.merge()
    assert shared.read(["out.weight"])["out.weight"].value.dtype == np.float32
