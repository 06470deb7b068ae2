import copy
import re
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from smlt_tune.errors import InvalidInput, UsageError
from smlt_tune.runtime.frameworks.base import read_meta
from smlt_tune.runtime.frameworks.torch import TorchObjects


@pytest.fixture(autouse=True)
def one_thread():
    """For the speed of tests: threads of tiny sums wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Tied(nn.Module):
    """Tied weights, batch norm, a frozen parameter, one that gets no gradient, a buffer."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(7, 5, dtype=dtype)
        self.norm = nn.BatchNorm1d(5, dtype=dtype)
        self.out = nn.Linear(5, 7, dtype=dtype)
        self.out.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
        self.unused = nn.Parameter(torch.zeros(2, dtype=dtype))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x):
        self.steps += 1
        return self.out(self.norm(self.embed(x)))


def step(model, optimizer, schedule=(), seed=0):
    """One iteration; the state after it depends on the state before and the seed alone."""
    x = torch.randint(7, (6,), generator=torch.Generator().manual_seed(seed))

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).float(), x)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    for scheduler in schedule:
        plateau = isinstance(scheduler, schedulers.ReduceLROnPlateau)
        scheduler.step(loss.item()) if plateau else scheduler.step()


def flat(state):
    """A state as nested lists that compare to the bit, whatever the kinds of mapping."""
    if isinstance(state, torch.Tensor):
        raw = state.detach().reshape(-1).contiguous().view(torch.uint8)
        return (str(state.dtype), tuple(state.shape), bytes(raw.numpy()))
    if isinstance(state, dict):
        return [(k, flat(v)) for k, v in state.items()]
    if isinstance(state, list | tuple):
        return [type(state), *map(flat, state)]
    return repr(state)


def state(*objects):
    return [flat(o.state_dict()) for o in objects]


def seam(*objects, callback=None, every_gradient=True):
    seam = TorchObjects()
    seam.add(objects)
    if callback:
        seam.on_backward(callback, every_gradient=every_gradient)
    return seam


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "tensor lr": lambda p: torch.optim.Adam(p, torch.tensor(0.01), capturable=False, foreach=False),
}
SCHEDULERS = {
    "none": lambda o: [],
    "step": lambda o: [schedulers.StepLR(o, 2)],
    "lambda": lambda o: [schedulers.LambdaLR(o, lambda e: 0.9**e)],
    "one cycle": lambda o: [schedulers.OneCycleLR(o, 0.1, total_steps=50)],
    "multi step": lambda o: [schedulers.MultiStepLR(o, [2, 4, 4, 6])],
    "plateau": lambda o: [schedulers.ReduceLROnPlateau(o, patience=0, threshold=0.5)],
    "cosine": lambda o: [schedulers.CosineAnnealingLR(o, 9)],
    "restarts": lambda o: [schedulers.CosineAnnealingWarmRestarts(o, 3)],
    "cyclic": lambda o: [schedulers.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False)],
    "several": lambda o: [schedulers.LinearLR(o, 0.1), schedulers.ExponentialLR(o, 0.9)],
    "sequence": lambda o: [
        schedulers.SequentialLR(
            o, [schedulers.ConstantLR(o, 0.1, 2), schedulers.MultiStepLR(o, [1, 2])], [3]
        )
    ],
    "chained": lambda o: [
        schedulers.ChainedScheduler([schedulers.LinearLR(o, 0.1), schedulers.StepLR(o, 2)])
    ],
}
PAIRS = [(o, "none") for o in OPTIMIZERS] + [("momentum", s) for s in SCHEDULERS]


def everything(optimizer="momentum", scheduler="none", dtype=torch.float32):
    torch.manual_seed(1)
    model = Tied(dtype)
    chosen = OPTIMIZERS[optimizer](p for p in model.parameters() if p.requires_grad)
    return model, chosen, *SCHEDULERS[scheduler](chosen)


@pytest.mark.parametrize(("optimizer", "scheduler"), PAIRS)
def test_state_comes_back_to_the_bit_and_goes_on_alike(optimizer, scheduler):
    model, chosen, *schedule = everything(optimizer, scheduler)
    for i in range(3):
        step(model, chosen, schedule, i)
    content = seam(model, chosen, *schedule).save({"a": "b"}, kept=False)
    assert read_meta(content)["a"] == "b"
    other, again, *more = everything(optimizer, scheduler)
    seam(other, again, *more).load(content, 0, whole=True)
    assert state(other, again, *more) == state(model, chosen, *schedule)
    assert other.out.weight is other.embed.weight
    for i in range(4):
        step(model, chosen, schedule, 10 + i)
        step(other, again, more, 10 + i)
    assert state(other, again, *more) == state(model, chosen, *schedule)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_other_precisions(dtype):
    model, chosen = everything("adam", dtype=dtype)
    for i in range(2):
        step(model, chosen, seed=i)
    content = seam(model, chosen).save({}, kept=False)
    other, again = everything("adam", dtype=dtype)
    seam(other, again).load(content, 0, whole=True)
    assert state(other, again) == state(model, chosen)


def test_lbfgs():
    model, _ = everything()
    model.eval()
    chosen = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], max_iter=3)
    for i in range(2):
        step(model, chosen, seed=i)
    content = seam(model, chosen).save({}, kept=False)
    other, _ = everything()
    other.eval()
    again = torch.optim.LBFGS([p for p in other.parameters() if p.requires_grad], max_iter=3)
    seam(other, again).load(content, 0, whole=True)
    step(model, chosen, seed=9)
    step(other, again, seed=9)
    assert flat(other.state_dict()) == flat(model.state_dict())


def test_equal_states_make_equal_checkpoints():
    model, chosen, scheduler = everything("adam", "one cycle")
    step(model, chosen, [scheduler])
    meta = {"position": "e", "trained": "[]", "syncs": "3", "reports": "[]"}
    objects = seam(model, chosen, scheduler)
    assert len({objects.save(meta, kept=False) for _ in range(8)}) == 1


def test_a_counter_stays_one():
    _, chosen, scheduler = everything("sgd", "multi step")
    content = seam(chosen, scheduler).save({}, kept=False)
    _, again, other = everything("sgd", "multi step")
    seam(again, other).load(content, 0, whole=True)
    assert isinstance(other.milestones, Counter)
    assert other.milestones == Counter({2: 1, 4: 2, 6: 1})


# --- what can be kept -----------------------------------------------------------------------------


class Stateful:
    def __init__(self, **values):
        self.values = values

    def state_dict(self):
        return self.values

    def load_state_dict(self, values):
        self.values = values


def test_anything_with_a_state_can_be_kept():
    values = {
        "n": None,
        "b": True,
        "i": 2**70,
        "f": 0.1,
        "nan": float("inf"),
        "s": "ü",
        "list": [1, (2, [3])],
        "ints": {1: "a", -2: "b"},
        "np": np.float32(0.1),
        "tensor": torch.arange(3, dtype=torch.int16),
        "view": torch.arange(6).reshape(2, 3).t(),
        "empty": torch.zeros(0),
        "scalar": torch.tensor(True),
        "": {"": torch.ones(1)},
        "x.y": torch.tensor(1.0),
        "x": {"y": torch.tensor(2.0)},
    }
    content = seam(Stateful(**values)).save({}, kept=False)
    other = Stateful()
    seam(other).load(content, 0, whole=True)
    assert flat(other.values) == flat({**values, "np": np.float32(0.1).item()})


def test_what_has_no_state_is_refused_all_at_once():
    with pytest.raises(InvalidInput) as caught:
        seam(nn.Linear(1, 1), 3, "x")
    assert caught.value.mistakes == tuple(
        f"prepare() cannot keep the state of a {kind}: it has no state_dict() and load_state_dict()"
        for kind in ("int", "str")
    )


@pytest.mark.parametrize("value", [{1, 2}, object(), {(1, 2): 3}, np.zeros(3)])
def test_what_cannot_be_kept_is_named(value):
    kind = type(value).__name__
    with pytest.raises(UsageError) as caught:
        seam(nn.Linear(1, 1), Stateful(a=[0, value])).save({}, kept=False)
    assert str(caught.value) == (
        f"state of a prepared object, 1.a.1: a {kind} cannot be kept in a checkpoint; "
        "state_dict() must be made of tensors, numbers, strings, lists and dicts"
    )


def test_a_checkpoint_of_other_objects_is_refused():
    one = seam(nn.Linear(1, 1)).save({}, kept=False)
    two = seam(nn.Linear(1, 1), Stateful()).save({}, kept=False)
    message = re.escape("but prepare() was given")
    with pytest.raises(UsageError, match=f"holds 1 objects, {message} 2"):
        seam(nn.Linear(1, 1), Stateful()).load(one, 0, whole=False)
    with pytest.raises(UsageError, match=f"holds 2 objects, {message} 1"):
        seam(nn.Linear(1, 1)).load(two, 0, whole=True)
    seam(nn.Linear(1, 1)).load(two, 0, whole=False)  # more may be prepared later


def test_objects_can_be_restored_as_they_are_prepared():
    model, chosen = everything()
    step(model, chosen)
    content = seam(model, chosen).save({}, kept=False)
    other, again = everything()
    objects = seam(other)
    objects.load(content, 0, whole=False)
    step(other, again, seed=5)
    restored = state(other)
    objects.add((again,))
    objects.load(content, 1, whole=False)
    assert state(other) == restored  # only what is new
    assert state(again) == state(chosen)


# --- gradients ------------------------------------------------------------------------------------


def test_a_backward_pass_calls_back_once_when_all_gradients_are_there():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    seen = []

    def callback():
        seen.append([p.grad is not None for p in model.parameters()])
        objects.gradients()

    objects = seam(model, callback=callback)
    model(torch.ones(1, 2)).sum().backward()
    assert seen == [[True] * 4]
    (model(torch.ones(1, 2)).sum() + model(torch.ones(1, 2)).sum()).backward()
    assert len(seen) == 2


def test_gradients_and_buffers_become_one_vector_and_come_back():
    model, _ = everything()
    taken = []

    def callback():
        taken.append(objects.gradients())
        objects.replace_gradients(taken[-1].vector * 2)

    objects = seam(model, callback=callback)
    before = [b.clone() for b in (model.norm.running_mean, model.norm.running_var)]
    x = torch.arange(6)
    model(x).float().logsumexp(1).sum().backward()
    [taken] = taken
    sizes = [p.numel() for p in (model.embed.weight, *model.norm.parameters(), model.out.bias)]
    assert taken.vector.dtype == np.float32
    assert len(taken.vector) > sum(sizes) + 10
    assert model.unused.grad is None
    assert model.frozen.grad is None
    parts = taken.vector[: sum(sizes)] * 2
    grads = [model.embed.weight, *model.norm.parameters(), model.out.bias]
    assert np.array_equal(np.sort(parts), np.sort(torch.cat([p.grad.flatten() for p in grads])))
    assert not any(
        torch.equal(a, b)
        for a, b in zip(before, (model.norm.running_mean, model.norm.running_var), strict=True)
    )


def test_double_precision_is_not_lost():
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1, dtype=torch.float64)])
    objects = seam(model, callback=lambda: None)
    (model[0](torch.ones(1, 1)).double() + model[1](torch.ones(1, 1).double())).sum().backward()
    objects._touched.update(range(4))
    assert objects.gradients().vector.dtype == np.float64


def test_half_precision_and_complex_gradients_survive():
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    wave = nn.Parameter(torch.tensor([1 + 2j]))
    model = nn.ParameterList([weight, wave])

    def callback():
        mine = objects.gradients()
        assert mine.vector.dtype == np.float32
        objects.replace_gradients(mine.vector * 2)

    objects = seam(model, callback=callback)
    ((weight * 3).float().sum() + (wave * (1 - 2j)).sum().abs() ** 2 / 5).backward()
    assert weight.grad.tolist() == [6, 6]
    alone = nn.Parameter(torch.tensor([1 + 2j]))
    ((alone * (1 - 2j)).sum().abs() ** 2 / 5).backward()
    assert wave.grad.tolist() == (2 * alone.grad).tolist()


def test_the_checksum_tells_which_parameters_have_gradients():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    checks = []
    objects = seam(model, callback=lambda: checks.append(objects.gradients().check))
    for layer in (model[0], model[1], model[0]):
        layer(torch.ones(1, 2)).sum().backward()
    assert checks[0] == checks[2] != checks[1]


def test_sparse_gradients_are_refused():
    model = nn.Embedding(5, 2, sparse=True)
    objects = seam(model, callback=lambda: objects.gradients())
    with pytest.raises(UsageError) as caught:
        model(torch.tensor([1])).sum().backward()
    assert str(caught.value) == "sparse gradients cannot be synchronised: use sparse=False"


class Bye(BaseException):
    pass


def test_what_the_callback_raises_comes_out_of_backward_as_itself():
    def leave():
        raise Bye("now")

    model = nn.Linear(2, 1)
    seam(model, callback=leave)
    with pytest.raises(Bye, match="now"):
        model(torch.ones(1, 2)).sum().backward()


class Explosive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("boom")


def test_a_backward_pass_that_raises_does_not_silence_the_next():
    """It has reached the second layer, so gradients wait that nobody has called back for."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    calls = []

    def callback():
        objects.gradients()
        calls.append(1)

    objects = seam(model, callback=callback)
    with pytest.raises(ValueError, match="boom"):
        model[1](Explosive.apply(model[0](torch.ones(1, 2)))).sum().backward()
    assert calls == []
    model(torch.ones(1, 2)).sum().backward()
    assert calls == [1]


def test_backward_passes_inside_one_another_add_up():
    """Checkpointed activations run a backward pass within the backward pass."""
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    alone = copy.deepcopy(model)

    def callback():  # as two workers with equal gradients
        mine = objects.gradients()
        objects.replace_gradients(mine.vector * np.float32(0.5) + mine.vector * np.float32(0.5))
        calls.append(1)

    def run(layers):
        x = checkpoint(layers[0], torch.ones(1, 2, requires_grad=True), use_reentrant=True)
        x = checkpoint(layers[1], x, use_reentrant=True)
        layers[2](x).sum().backward()

    calls = []
    objects = seam(model, callback=callback)
    run(model)
    run(alone)
    assert calls
    assert [p.grad.tolist() for p in model.parameters()] == [
        p.grad.tolist() for p in alone.parameters()
    ]
    assert not objects._touched


def test_a_parameter_that_is_unfrozen_later_takes_part():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    sizes = []
    objects = seam(model, callback=lambda: sizes.append(len(objects.gradients().vector)))
    model(torch.ones(1, 2)).sum().backward()
    model[0].requires_grad_(True)
    model(torch.ones(1, 2)).sum().backward()
    model(torch.ones(1, 2)).sum().backward()
    model[1].requires_grad_(False)
    model(torch.ones(1, 2)).sum().backward()
    assert sizes == [3, 9, 9, 6]


def test_a_swap_of_what_is_frozen_is_noticed_between_iterations():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    sizes = []
    objects = seam(model, callback=lambda: sizes.append(len(objects.gradients().vector)))
    model[0].requires_grad_(True)
    model[1].requires_grad_(False)
    objects.watch()
    model(torch.ones(1, 2)).sum().backward()
    assert sizes == [6]


def test_with_one_worker_a_step_is_enough():
    model, chosen = everything()
    calls = []
    seam(model, chosen, callback=lambda: calls.append(1), every_gradient=False)
    step(model, chosen)
    assert calls == [1]


def test_with_one_worker_and_no_optimizer_a_backward_pass_is_one():
    model = nn.Linear(2, 1)
    calls = []
    seam(model, callback=lambda: calls.append(1), every_gradient=False)
    model(torch.ones(1, 2)).sum().backward()
    assert calls == [1]


# --- buffers --------------------------------------------------------------------------------------


class Constants(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("mask", torch.tensor([float("-inf"), 0.1]))
        self.register_buffer("mean", torch.tensor([0.7]))

    def forward(self, x):
        return (self.weight * x).sum()


def exchange(objects, weights, others):
    """Replaces the gradients by the weighted sum over this worker's and the others' vectors."""
    mine = objects.gradients()
    total = mine.vector * np.float32(weights[0])
    for weight, other in zip(weights[1:], others, strict=True):
        total = total + other(mine.vector) * np.float32(weight)
    objects.replace_gradients(total)


def test_constant_buffers_keep_their_bits():
    model = Constants()
    thirds = [1 / 3, 1 / 3, 1 / 3]
    same = [lambda v: v, lambda v: v]
    objects = seam(model, callback=lambda: exchange(objects, thirds, same))
    objects.keep_light()
    before = flat(model.state_dict())[1:]
    for _ in range(50):
        model(torch.ones(2)).backward()
    assert flat(model.state_dict())[1:] == before


def test_a_buffer_that_another_worker_has_changed_is_averaged():
    model = Constants()

    def changed(vector):  # weight's gradient, mask, mean; whether mask, mean have changed
        return np.array([vector[0], -np.inf, 0.1, 1.7, 0, 1], np.float32)

    objects = seam(model, callback=lambda: exchange(objects, [0.5, 0.5], [changed]))
    objects.keep_light()
    model(torch.ones(2)).backward()
    assert model.mean.tolist() == pytest.approx([1.2])
    assert model.mask[0] == float("-inf")


def test_a_buffer_may_be_put_in_place_anew():
    model = Constants()
    sums = []

    def callback():
        mine = objects.gradients()
        sums.append(mine.vector.copy())
        objects.replace_gradients(mine.vector)

    objects = seam(model, callback=callback)
    objects.keep_light()
    model.mean = model.mean * 2
    model(torch.ones(2)).backward()
    assert sums[0][3:] == pytest.approx([1.4, 0, 1])


# --- gradients as part of the state ---------------------------------------------------------------


def kept_gradients(objects, count):
    """Which parameters come back with a gradient."""
    content = objects.save({}, kept=False)
    models = [nn.Linear(1, 1) for _ in range(count)]
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in models]
    if len(objects._objects) > count:
        seam(*models, *optimizers).load(content, 0, whole=True)
    else:
        seam(*models).load(content, 0, whole=True)
    return [[None if p.grad is None else p.grad.tolist() for p in m.parameters()] for m in models]


def backward(*models):
    sum(m(torch.ones(1, 1)) for m in models).sum().backward()


@pytest.mark.parametrize("every_gradient", [True, False])
def test_gradients_are_kept_until_their_optimizer_has_stepped(every_gradient):
    model = nn.Linear(1, 1)
    chosen = torch.optim.SGD(model.parameters(), 0.1)
    objects = seam(model, chosen, callback=lambda: None, every_gradient=every_gradient)
    backward(model)
    assert kept_gradients(objects, 1) == [[[[1.0]], [1.0]]]
    backward(model)
    assert kept_gradients(objects, 1) == [[[[2.0]], [2.0]]]
    chosen.step()
    assert kept_gradients(objects, 1) == [[None, None]]
    backward(model)  # accumulates on, after the step
    assert kept_gradients(objects, 1) == [[[[3.0]], [3.0]]]
    chosen.step()
    chosen.zero_grad()
    assert kept_gradients(objects, 1) == [[None, None]]


@pytest.mark.parametrize("every_gradient", [True, False])
def test_each_optimizer_has_gradients_of_its_own(every_gradient):
    """One accumulates while the other steps in every iteration."""
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    chosen = [torch.optim.SGD(m.parameters(), 0.1) for m in (one, two)]
    objects = seam(one, two, *chosen, callback=lambda: None, every_gradient=every_gradient)
    backward(one, two)
    chosen[0].step()
    assert kept_gradients(objects, 2) == [[None, None], [[[1.0]], [1.0]]]
    chosen[0].zero_grad()
    backward(one, two)
    chosen[0].step()
    chosen[1].step()
    assert kept_gradients(objects, 2) == [[None, None], [None, None]]


def test_without_an_optimizer_gradients_are_always_kept():
    model = nn.Linear(1, 1)
    backward(model)
    assert kept_gradients(seam(model), 1) == [[[[1.0]], [1.0]]]


def test_restoring_clears_gradients_that_were_not_there():
    model = nn.Linear(1, 1)
    content = seam(model).save({}, kept=False)
    backward(model)
    seam(model).load(content, 0, whole=True)
    assert model.weight.grad is None


# --- what is remembered ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw", "sgd"])
@pytest.mark.parametrize("scheduler", ["multi step", "one cycle", "sequence"])
def test_everything_can_be_remembered_before_a_step(name, scheduler):
    model, chosen, *schedule = everything(name, scheduler)
    step(model, chosen, schedule)
    objects = seam(model, chosen, *schedule, callback=lambda: None)
    boundary = objects.save({}, kept=False)
    objects.keep_light()
    assert objects.save({}, kept=True) == boundary
    model(torch.arange(4))  # changes buffers
    objects.keep_all()
    assert objects.save({}, kept=True) == boundary
    step(model, chosen, schedule, 1)
    assert objects.save({}, kept=True) == boundary
    assert objects.save({}, kept=False) != boundary
    objects.keep_light()
    assert objects.save({}, kept=True) == objects.save({}, kept=False)


def test_what_is_cheap_is_always_remembered():
    """Buffers, hyper-parameters, schedulers and gradients change between boundary and step."""
    model, chosen, scheduler = everything("tensor lr", "step")
    step(model, chosen, [scheduler])
    objects = seam(model, chosen, scheduler, callback=lambda: None)
    model(torch.arange(4)).float().sum().backward()  # accumulates over the boundary
    boundary = objects.save({}, kept=False)
    objects.keep_light()
    model(torch.arange(5)).float().sum().backward()
    scheduler.step()
    chosen.param_groups[0]["lr"].mul_(3)
    chosen.param_groups[0]["betas"] = (0.1, 0.2)
    assert objects.unchanged()
    assert objects.save({}, kept=True) == boundary
    assert objects.save({}, kept=False) != boundary


def test_it_is_noticed_when_that_is_not_enough():
    model, chosen = everything()
    objects = seam(model, chosen, callback=lambda: None)
    objects.keep_light()
    assert objects.unchanged()
    with torch.no_grad():
        model.out.bias.add_(1)
    assert not objects.unchanged()
    objects.keep_light()
    assert objects.unchanged()
    step(model, chosen)
    assert not objects.unchanged()


def test_a_step_is_announced():
    model, chosen = everything()
    objects = seam(model, chosen)
    seen = []
    objects.on_step(lambda: seen.append(flat(model.state_dict())))
    model.eval()
    nn.functional.cross_entropy(model(torch.tensor([1])), torch.tensor([1])).backward()
    before = flat(model.state_dict())
    chosen.step()
    assert len(seen) == 1
    assert seen[0] == before != flat(model.state_dict())


# --- training or not ------------------------------------------------------------------------------


def test_whether_it_looks_like_training():
    model = nn.Linear(1, 1)
    objects = seam(model)
    assert objects.training(assume=True)
    assert objects.training(assume=False)
    model.eval()
    assert objects.training(assume=True)
    assert not objects.training(assume=False)
    model.train()
    with torch.no_grad():
        assert not objects.training(assume=True)


def test_arrays_become_tensors():
    assert seam(nn.Linear(1, 1)).as_native(np.ones(2)).tolist() == [1, 1]
    assert seam(nn.Linear(1, 1)).as_native("x") == "x"
