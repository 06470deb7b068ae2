"""What PyTorch computes in a training iteration: operations and activations.

A dispatch mode sees every operator below autograd, and calls it unchanged. So the same meter
measures an iteration of a job while it trains, and one that is only played through with fake
tensors. Saved tensors are not asked for by ``saved_tensors_hooks``: these make ``torch.func`` raise
in the user's code. What is alive when the backward pass begins is the same, plus what the user
holds.
"""

import contextlib
import copy
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch  # noqa: TID253 - imported only once torch is in use
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: TID253
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: TID253
from torch.optim.optimizer import (  # noqa: TID253
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.overrides import TorchFunctionMode  # noqa: TID253
from torch.utils import _python_dispatch as dispatch  # noqa: TID253
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: TID253
from torch.utils.flop_counter import flop_registry  # noqa: TID253

from smlt_tune.errors import InvalidInput, UsageError
from smlt_tune.runtime.features import ModelFeatures

#: Samples of the inputs of a module that must be run with real tensors. Two, because batch norm
#: refuses to train on one.
REAL_SAMPLES = 2

aten = torch.ops.aten


def _rnn_flops(x: Any, w_input: Any, w_hidden: Any, *_: Any, **__: Any) -> int:
    """One layer, one direction; x: (time, batch, inputs), weights: (gates x hidden, ...)."""
    steps = x.numel() // x.shape[-1]
    return int(2 * steps * (w_input.numel() + w_hidden.numel()))


def _rnn_backward_flops(*args: Any, **kwargs: Any) -> int:
    return 2 * _rnn_flops(*args, **kwargs)


#: What PyTorch's registry lacks: operators that only CPUs have.
_CPU_FORMULAS: dict[Any, Callable[..., int]] = {
    aten.mkldnn_rnn_layer: _rnn_flops,
    aten.mkldnn_rnn_layer_backward: _rnn_backward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class IterationMeter(dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Measures what happens in its context, on this thread.

    Calls every operator as it is. A mistake of its own never reaches the caller.

    Attributes:
        flops: Of all passes. What optimizers do besides (matrix products of Muon, say) is the same
            for any number of samples, and does not count.
        activation_bytes: What was alive when a backward pass began, the largest of all passes;
            bytes.
        backward: Whether there was a backward pass.
        failed: Something could not be measured: the numbers mean nothing.
    """

    supports_higher_order_operators = True

    def __init__(self, batch: Any = None) -> None:
        """Starts with a batch, whose tensors are counted among the activations."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.activation_bytes = 0
        self.backward = self.failed = False
        self._within_backward = False
        self._batch_bytes = 0
        self._steps = 0  # optimizers that are stepping
        self._handles: list[Any] = []
        self._made: dict[int, tuple[Any, int]] = {}
        try:
            self._batch_bytes = _bytes(tensors_in(batch))
        except Exception:  # noqa: BLE001 - tensors without storage, objects of the user
            self.failed = True

    def __enter__(self) -> Any:
        thread = threading.get_ident()

        def begins(*_: Any) -> None:
            self._steps += threading.get_ident() == thread

        def ends(*_: Any) -> None:
            self._steps -= threading.get_ident() == thread

        self._handles = [
            register_optimizer_step_pre_hook(begins),
            register_optimizer_step_post_hook(ends),
        ]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.failed:
            try:
                self._note(func, args, kwargs, result)
            except Exception:  # noqa: BLE001 - an operator or tensor of an unknown kind
                self.failed = True
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        within = torch._C._current_graph_task_id() != -1
        if within and not self._within_backward:
            alive = [size for storage, size in self._made.values() if not storage.expired()]
            self.activation_bytes = max(self.activation_bytes, sum(alive) + self._batch_bytes)
            self._made = {}
            self.backward = True
        self._within_backward = within
        operator = getattr(func, "overloadpacket", func)
        formula = flop_registry.get(operator) or _CPU_FORMULAS.get(operator)
        # An optimizer may be given a closure with the passes; what is its own needs no gradients.
        if formula is not None and (not self._steps or within or torch.is_grad_enabled()):
            self.flops += int(formula(*args, **kwargs, out_val=result))
        if not within and torch.is_grad_enabled():
            self._note_storages(args, kwargs, result)

    def _note_storages(self, args: Any, kwargs: Any, result: Any) -> None:
        known = {t.untyped_storage()._cdata for t in _leaves((args, kwargs))}
        for tensor in _leaves(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:  # neither a view nor changed in place
                self._made[storage._cdata] = (_weak(storage), storage.nbytes())


class JobMeter(IterationMeter):  # type: ignore[no-untyped-call]
    """Measures an iteration whose results count: whatever was compiled stays compiled.

    What compiled code does cannot be seen, so that nothing is known of a program that has any.

    Args:
        batch: See above.
        compiled: What :func:`compiled_frames` gave when the program began.
    """

    def __init__(self, batch: Any, compiled: int) -> None:
        super().__init__(batch)
        self._compiled = compiled

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Otherwise nothing compiled would run while this is active."""
        return True

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.failed = self.failed or compiled_frames() != self._compiled


def compiled_frames() -> int:
    """How many functions ``torch.compile`` has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["frames"]["ok"]) if dynamo else 0


def job_meter(batch: Any, compiled: int) -> JobMeter | None:
    """A meter for an iteration of a job; None where measuring could change its results."""
    if not hasattr(dispatch.TorchDispatchMode, "ignore_compile_internals"):
        return None  # an older PyTorch runs nothing compiled under a mode
    if dispatch._get_current_dispatch_mode() is not None:
        return None  # the user measures something
    return JobMeter(batch, compiled)


def features_of(model: Any, inputs: tuple[Any, ...]) -> ModelFeatures:
    """See :func:`smlt_tune.runtime.dry_run.model_features`."""
    samples = _check(model, inputs)
    parameters, gradient_bytes = trained(model.parameters(), floating_buffers(model.modules()))
    # Inside of inference_mode() or no_grad(), too, it is training that is asked about.
    with _same_random_numbers(), torch.inference_mode(mode=False), torch.enable_grad():
        try:
            meter = _play_through(model, inputs)
        except InvalidInput:
            raise
        except Exception as error:  # of any kind, in the user's code
            if any(t.is_meta for t in (*model.parameters(), *tensors_in(inputs))):
                raise UsageError(
                    f"the forward pass of {type(model).__name__} cannot be played through without "
                    f"values, and there are none on the meta device: {error}"
                ) from error
            meter = _run(model, inputs, samples)
            samples = min(samples, REAL_SAMPLES)
    return ModelFeatures(
        parameters, gradient_bytes, meter.flops / samples, meter.activation_bytes / samples
    )


def floating_buffers(modules: Iterable[torch.nn.Module]) -> list[torch.Tensor]:
    """The buffers of the modules themselves that are synchronised, each once."""
    found = {id(b): b for m in modules for b in m._buffers.values()}
    return [b for b in found.values() if b is not None and b.is_floating_point()]


def trained(parameters: Iterable[torch.Tensor], buffers: Iterable[torch.Tensor]) -> tuple[int, int]:
    """How much is trained and synchronised, if every trainable parameter gets a gradient.

    Args:
        parameters: Each once.
        buffers: What :func:`floating_buffers` gave.

    Returns:
        (numbers that are trained, bytes of the vector of ``TorchObjects.gradients``).
    """
    trainable, buffers = [p for p in parameters if p.requires_grad], list(buffers)
    sources = [real(t.detach()) for t in [*trainable, *buffers]]
    numbers = sum(source.numel() for source in sources) + len(buffers)
    return sum(p.numel() for p in trainable), numbers * common_dtype(sources).itemsize


def common_dtype(sources: Iterable[torch.Tensor]) -> torch.dtype:
    """In which they are synchronised."""
    double = any(source.dtype == torch.float64 for source in sources)
    return torch.float64 if double else torch.float32


def real(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as real numbers."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in a structure of containers and of objects with attributes, each once.

    In their order in the structure.
    """
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, torch.Tensor):
            found[id(each)] = each
        elif id(each) not in seen and not isinstance(each, type | torch.nn.Module):
            seen.add(id(each))
            left += reversed(list(_parts(each)))
    return list(found.values())


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, list | tuple | set):
        return value
    return getattr(value, "__dict__", {}).values()  # a dataclass, say


def _leaves(values: Any) -> list[torch.Tensor]:
    """The same for arguments of operators: nested at most in lists; many times faster."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _weak(storage: Any) -> Any:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({s._cdata: s.nbytes() for t in tensors for s in [t.untyped_storage()]}.values())


def _check(model: Any, inputs: tuple[Any, ...]) -> int:
    """The number of samples in the inputs."""
    mistakes = []
    if not isinstance(model, torch.nn.Module):
        mistakes.append(f"model_features() needs a torch.nn.Module, got a {type(model).__name__}")
    elif any(map(torch.nn.parameter.is_lazy, (*model.parameters(), *model.buffers()))):
        mistakes.append(
            "the model has uninitialised parameters: run it once before model_features()"
        )
    samples = next((len(t) for t in tensors_in(inputs) if t.dim()), 0)
    if samples < 1:
        mistakes.append(
            "model_features() needs the model's inputs, of which the first tensor has the batch "
            "as its first dimension, of at least one sample: model_features(model, torch.empty(8, "
            "3, 32, 32, device='meta'))"
        )
    if mistakes:
        raise InvalidInput(mistakes)
    return samples


def _play_through(model: torch.nn.Module, inputs: Any) -> IterationMeter:
    """An iteration of tensors without content, all of which claim to be on the CPU."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
            )

    model = _like(model, fake, fake)
    inputs = tree_map_only(torch.Tensor, lambda t: fake(t).requires_grad_(t.requires_grad), inputs)
    with mode:
        return _iterate(model, inputs)


def _run(model: torch.nn.Module, inputs: Any, samples: int) -> IterationMeter:
    """An iteration of the parameters themselves with few samples, and copies of all else."""

    def first(tensor: torch.Tensor) -> torch.Tensor:
        batch = tensor.dim() and len(tensor) == samples
        chosen = tensor.detach()[:REAL_SAMPLES] if batch else tensor.detach()
        return chosen.clone().requires_grad_(tensor.requires_grad)

    inputs = tree_map_only(torch.Tensor, first, inputs)
    return _iterate(_like(model, lambda p: p.detach(), lambda t: t.detach().clone()), inputs)


def _iterate(model: torch.nn.Module, inputs: Any) -> IterationMeter:
    meter = IterationMeter(inputs)
    with meter:
        outputs = [t for t in tensors_in(model(*inputs)) if t.requires_grad]
        with torch.no_grad():
            ones = [torch.ones_like(t) for t in outputs]  # the gradient of their sum
        torch.autograd.backward(outputs, ones)
    if meter.failed:
        raise UsageError(f"{type(model).__name__} uses operators that cannot be measured")
    return meter


class _CopyOthers(TorchFunctionMode):
    """Copies of tensors that are neither parameters nor buffers: attributes, say."""

    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._make = make

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), self._make(tensor))
        return func(*args, **(kwargs or {}))


def _like(
    model: torch.nn.Module,
    parameter: Callable[[torch.Tensor], torch.Tensor],
    other: Callable[[torch.Tensor], torch.Tensor],
) -> torch.nn.Module:
    """A copy of a module with other tensors, so that the module itself stays as it is."""
    memo: dict[int, Any] = {
        id(p): torch.nn.Parameter(parameter(p), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    memo |= {id(buffer): other(buffer) for buffer in model.buffers()}
    try:
        with _CopyOthers(other):
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise InvalidInput(
            f"model_features() needs a copy of the {type(model).__name__} without its values, and "
            f"copy.deepcopy() cannot make one: {error}"
        ) from error


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])  # noqa: NPY002 - what user code uses
        torch.set_rng_state(state[2])
