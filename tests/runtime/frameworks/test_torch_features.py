import contextlib
import copy
import random
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smlt_tune.errors import InvalidInput, UsageError
from smlt_tune.runtime.dry_run import model_features
from smlt_tune.runtime.features import ModelFeatures
from smlt_tune.runtime.frameworks.torch import TorchObjects
from smlt_tune.runtime.frameworks.torch_features import IterationMeter, tensors_in

BATCH = 4


def lstm(time, inputs, hidden):
    """Operations of a sequence: the products with both weights, three times."""
    return 3 * 2 * time * 4 * hidden * (inputs + hidden)


def encoder(length, width, wide):
    """Operations of a layer: four projections, two products of attention, two of the network."""
    return 3 * 2 * length * (4 * width * width + 2 * length * width + 2 * width * wide)


class Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


# Model, its inputs, operations and bytes kept per sample. Where the inputs need no gradient, the
# first layer has none to compute for them. None: compared with a real run only.
CLOSED_FORMS = {
    "linear": (nn.Linear(100, 50), torch.ones(BATCH, 100), 2 * 2 * 5000, 4 * (100 + 50)),
    "two linear": (
        nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10)),
        torch.ones(BATCH, 100),
        2 * 2 * 5000 + 3 * 2 * 500,
        4 * (100 + 50 + 10),  # the first layer's result is not kept, that of ReLU is
    ),
    "conv": (
        nn.Conv2d(3, 8, 3, padding=1),
        torch.ones(BATCH, 3, 16, 16),
        2 * 2 * 16 * 16 * 8 * 3 * 9,
        4 * 16 * 16 * (3 + 8),
    ),
    "embedding": (
        nn.Embedding(1000, 16),
        torch.ones(BATCH, 7, dtype=torch.int64),
        0,
        8 * 7 + 4 * 7 * 16,
    ),
    "double": (
        nn.Linear(100, 50, dtype=torch.float64),
        torch.ones(BATCH, 100, dtype=torch.float64),
        2 * 2 * 5000,
        8 * (100 + 50),
    ),
    "lstm": (nn.LSTM(8, 16, batch_first=True), torch.ones(BATCH, 5, 8), lstm(5, 8, 16), None),
    "transformer": (
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        torch.ones(BATCH, 6, 16, requires_grad=True),
        encoder(6, 16, 32),
        None,
    ),
    "attention": (
        Attention(),
        torch.ones(BATCH, 2, 6, 8, requires_grad=True),
        # Forward two products; backward five, one of them again.
        2 * 2 * 6 * 6 * 8 * (2 + 5),
        None,
    ),
}

OTHERS = {
    "conv net": (
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(), nn.Linear(8 * 49, 10), nn.LogSoftmax(1)),
        ),
        torch.ones(BATCH, 3, 16, 16),
    ),
    "gru": (nn.GRU(8, 16, 2, batch_first=True, dropout=0.1), torch.ones(BATCH, 5, 8)),
    "weight norm": (
        nn.utils.parametrizations.weight_norm(nn.Linear(9, 9)),
        torch.ones(BATCH, 9),
    ),
    "spectral norm": (
        nn.utils.parametrizations.spectral_norm(nn.Linear(9, 9)),
        torch.ones(BATCH, 9),
    ),
}


def real(model, x):
    """Features of an iteration that takes place."""
    meter = IterationMeter(x)
    with meter:
        outputs = tensors_in(model(x))
        with torch.no_grad():
            ones = [torch.ones_like(o) for o in outputs]
        torch.autograd.backward(outputs, ones)
    return meter.flops / BATCH, meter.activation_bytes / BATCH


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms(name):
    model, x, flops, kept = CLOSED_FORMS[name]
    found = model_features(model, x)
    assert found.flops_per_sample == flops
    assert found.activation_bytes == (kept or found.activation_bytes) > 0
    assert found.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", {**CLOSED_FORMS, **OTHERS})
def test_what_is_played_through_is_what_a_real_iteration_does(name):
    model, x, *_ = {**CLOSED_FORMS, **OTHERS}[name]
    found = model_features(model, x)
    flops, kept = real(model, x)
    assert found.flops_per_sample == flops
    if name == "lstm":  # oneDNN's workspace has no size before it runs
        assert 0 < found.activation_bytes < kept
    else:
        assert found.activation_bytes == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("name", {**CLOSED_FORMS, **OTHERS})
def test_measuring_changes_no_bit_of_an_iteration(name):
    original, x, *_ = {**CLOSED_FORMS, **OTHERS}[name]

    def iterate(measured):
        model = copy.deepcopy(original)
        x.grad = None
        torch.manual_seed(0)
        with IterationMeter(x) if measured else contextlib.nullcontext():
            sum(o.square().sum() for o in tensors_in(model(x))).backward()
        state = [*model.state_dict().values(), torch.rand(3)]
        return state + [p.grad for p in [*model.parameters(), x] if p.grad is not None]

    for a, b in zip(iterate(False), iterate(True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("within", [torch.no_grad, torch.inference_mode])
def test_it_is_training_that_is_measured(within):
    model, x, flops, kept = CLOSED_FORMS["two linear"]
    with within():
        found = model_features(model, x)
    assert (found.flops_per_sample, found.activation_bytes) == (flops, kept)


def test_the_model_can_be_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(200_000, 200_000), nn.ReLU(), nn.Linear(200_000, 10))
    size = 200_000 * 200_000 + 200_000 + 200_000 * 10 + 10
    expected = ModelFeatures(
        parameters=size,
        gradient_bytes=4 * size,
        flops_per_sample=2 * 2 * 200_000**2 + 3 * 2 * 200_000 * 10,
        activation_bytes=4 * (2 * 200_000 + 10),
    )
    assert model_features(model, torch.empty(BATCH, 200_000, device="meta")) == expected
    assert model_features(model, torch.empty(BATCH, 200_000)) == expected
    assert all(p.is_meta for p in model.parameters())


class Tied(nn.Module):
    """Tied and frozen parameters, buffers of two kinds, a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 5), nn.Linear(5, 7)
        self.out.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(5)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.scale = torch.ones(5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.scale.mul_(2)
        return self.out(self.norm(self.embed(x)) * self.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_bytes_are_those_of_the_vector_that_is_synchronised(dtype):
    model = Tied().to(dtype)
    model.scale = model.scale.to(dtype)
    x = torch.ones(BATCH, dtype=torch.int64)
    found = model_features(model, x)
    objects = TorchObjects()
    objects.add((model,))
    objects.on_backward(lambda: None, every_gradient=True)
    sizes = []
    objects.on_backward(
        lambda: sizes.append(objects.gradients().vector.nbytes), every_gradient=True
    )
    model(x).sum().backward()
    assert sizes == [found.gradient_bytes]
    assert found.parameters == 7 * 5 + 7 + 5 + 5
    assert objects.trained() == (found.parameters, found.gradient_bytes)


class Depends(nn.Module):
    """Control flow that depends on values; everything that could change, does."""

    def __init__(self):
        super().__init__()
        self.tied = Tied()
        self.noise = nn.Dropout()

    def forward(self, x):
        random.random()
        np.random.rand()  # noqa: NPY002
        return self.noise(self.tied(x)) if x.sum() > 0 else self.tied(x)


@pytest.mark.parametrize("kind", [Tied, Depends])
def test_nothing_changes(kind):
    def state():
        generators = random.getstate()[1], np.random.get_state()[1].tolist()  # noqa: NPY002
        return [*generators, torch.get_rng_state().tolist()]

    model = kind()
    tied = model if kind is Tied else model.tied
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generators = state()
    model_features(model, torch.ones(BATCH, dtype=torch.int64))
    assert state() == generators
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert (tied.calls, tied.scale.tolist()) == (0, [1.0] * 5)


def test_a_model_that_depends_on_values_is_run_on_two_samples():
    model, seen = Depends(), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    found = model_features(model, torch.ones(BATCH, dtype=torch.int64))
    assert found.flops_per_sample == 3 * 2 * 5 * 7
    assert seen == [2]


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


OUTPUTS = {
    "tuple": lambda a, b: (a, (b,)),
    "dict": lambda a, b: {"a": a, "b": [b], "n": 3, "ids": torch.ones(2, dtype=torch.int64)},
    "mapping": lambda a, b: OrderedDict(a=a, b=b),
    "dataclass": lambda a, b: Output(a, b),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_several_inputs_and_outputs_of_any_structure(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(4, 3)

        def forward(self, x, more, flag):
            assert flag
            return OUTPUTS[name](self.a(x), self.b(more["y"]))

    found = model_features(Model(), torch.ones(BATCH, 6), {"y": torch.ones(BATCH, 4)}, True)
    assert found.flops_per_sample == 2 * 2 * (6 * 5 + 4 * 3)
    assert found.activation_bytes == 4 * (6 + 5 + 4 + 3)


MISTAKES = {
    "no module": ((3, torch.ones(2)), InvalidInput, r"^model_features\(\) needs a .*got a int$"),
    "lazy": ((nn.LazyLinear(3), torch.ones(2, 3)), InvalidInput, "run it once"),
    "no inputs": ((nn.Linear(3, 3),), InvalidInput, "first tensor has the batch"),
    "no samples": ((nn.Linear(3, 3), torch.ones(0, 3)), InvalidInput, "at least one sample"),
    "meta and values": (
        (Depends().to("meta"), torch.ones(2, dtype=torch.int64)),
        UsageError,
        "^the forward pass of Depends cannot be played through",
    ),
    "user's own": ((nn.Linear(3, 3), torch.ones(2, 4)), RuntimeError, "shapes cannot be mult"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name):
    arguments, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message):
        model_features(*arguments)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(InvalidInput) as caught:
        model_features(None)
    assert len(caught.value.mistakes) == 2


def test_a_model_that_cannot_be_copied_is_told():
    model = nn.Linear(3, 3)
    model.lock = __import__("threading").Lock()
    with pytest.raises(InvalidInput, match="cannot make one: cannot pickle"):
        model_features(model, torch.ones(2, 3))


class TestMeter:
    def test_functional_gradients_work_while_it_measures(self):
        meter = IterationMeter()
        with meter:
            gradient = torch.func.grad(lambda w: (w @ w).sum())(torch.eye(3))
        assert gradient.tolist() == [[2.0] * 3] * 3 or gradient.shape == (3, 3)
        assert meter.flops == 3 * 2 * 27

    def test_checkpointed_activations_are_not_kept(self):
        x = torch.ones(8, 100)
        block = nn.Sequential(nn.Linear(100, 1000), nn.ReLU(), nn.Linear(1000, 10))
        kept = []
        for use in (False, True):
            meter = IterationMeter(x)
            with meter:
                y = (
                    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
                    if use
                    else block(x)
                )
                y.backward(torch.ones_like(y))
            kept.append(meter.activation_bytes)
        assert kept[1] < kept[0] / 4

    @pytest.mark.parametrize("kind", [torch.optim.Muon, torch.optim.SGD, torch.optim.LBFGS])
    def test_what_an_optimizer_does_is_no_part_of_a_sample(self, kind):
        model, x = nn.Linear(20, 10, bias=False), torch.ones(BATCH, 20)
        optimizer, passes = kind(model.parameters(), lr=1e-9), []

        def closure():
            passes.append(1)
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            return loss

        meter = IterationMeter(x)
        with meter:
            if kind is torch.optim.LBFGS:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        assert passes
        assert meter.flops == len(passes) * 2 * 2 * BATCH * 20 * 10  # no gradient of x
        before = meter.flops
        optimizer.step(closure)  # nothing is noted any more
        assert meter.flops == before

    def test_an_optimizer_of_another_thread_hides_nothing(self):
        optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
        begun, go_on = threading.Event(), threading.Event()

        def steps():
            def closure():
                begun.set()
                go_on.wait(30)
                return 0.0

            optimizer.step(closure)

        meter = IterationMeter()
        with meter:
            other = threading.Thread(target=steps)
            other.start()
            assert begun.wait(30)
            with torch.no_grad():
                torch.eye(3) @ torch.eye(3)
            go_on.set()
            other.join(30)
        assert meter.flops == 2 * 27

    @pytest.mark.parametrize("batch", [torch.eye(3).to_sparse(), {"x": [torch.eye(3).to_sparse()]}])
    def test_a_batch_of_an_unknown_kind_does_not_disturb(self, batch):
        meter = IterationMeter(batch)
        with meter:
            assert torch.ones(3).sum() == 3
        assert meter.failed

    def test_tensors_are_found_in_cycles_and_long_lists(self):
        value = Output(torch.ones(2), [0.5] * 100_000)
        value.loss.append(value)
        value.loss.append(torch.ones(3))
        assert [len(t) for t in tensors_in((value, value.logits))] == [2, 3]

    def test_an_operator_of_an_unknown_kind_does_not_disturb(self):
        meter = IterationMeter()
        with meter:
            x = torch.eye(3).to_sparse()
            y = torch.sparse.mm(x, torch.ones(3, 2))
        assert y.tolist() == [[1.0, 1.0]] * 3
        assert meter.failed
