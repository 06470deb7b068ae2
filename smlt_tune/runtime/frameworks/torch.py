"""PyTorch: gradients from hooks, state as safetensors.

Rule for buffers (batch norm's running statistics, say): floating-point buffers are averaged over
the workers, weighted by samples, together with the gradients. Others (``num_batches_tracked``) are
expected to change alike everywhere and are not exchanged; checkpoints hold all of them.

Gradients are part of the state only while they accumulate over several iterations, that is, if no
prepared optimizer has stepped since the last backward pass.
"""

import copy
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from smlt_tune.errors import InvalidInput, UsageError
from smlt_tune.runtime.frameworks.base import Gradients

#: Marks a tensor's place in the structure of a state dict.
_TENSOR = "__tensor__"
_PAIRS = "__pairs__"
_TUPLE = "__tuple__"


class TorchObjects:
    """Modules, optimizers, and whatever else has ``state_dict`` and ``load_state_dict``."""

    def __init__(self) -> None:
        self._objects: list[Any] = []
        self._parameters: list[torch.nn.Parameter] = []
        self._numbers: dict[int, int] = {}
        self._buffers: list[torch.Tensor] = []
        self._callback: Callable[[], None] | None = None
        self._every_gradient = False
        self._touched: set[int] = set()
        self._sources: list[torch.Tensor] = []
        self._accumulating = False
        self._light: list[Any] | None = None
        self._all: list[Any] | None = None
        self._kept_gradients: dict[int, torch.Tensor] = {}

    def add(self, objects: tuple[Any, ...]) -> None:  # noqa: D102
        mistakes = [
            f"prepare() cannot keep the state of a {type(o).__name__}: it has no state_dict() and "
            "load_state_dict()"
            for o in objects
            if not (hasattr(o, "state_dict") and hasattr(o, "load_state_dict"))
        ]
        if mistakes:
            raise InvalidInput(mistakes)
        self._objects += objects
        for thing in objects:
            if isinstance(thing, torch.nn.Module):
                self._buffers += [b for b in thing.buffers() if b.is_floating_point()]
                self._adopt(thing.parameters())
            elif isinstance(thing, torch.optim.Optimizer):
                self._adopt(p for group in thing.param_groups for p in group["params"])
                self._watch_steps(thing)

    def on_backward(self, callback: Callable[[], None], *, every_gradient: bool) -> None:  # noqa: D102
        self._callback = callback
        self._every_gradient = every_gradient
        if every_gradient:
            for parameter in self._parameters:
                self._watch_gradient(parameter)

    def gradients(self) -> Gradients:  # noqa: D102
        numbers = sorted(self._touched)
        self._touched.clear()
        self._accumulating = True
        gradients = [self._parameters[i].grad for i in numbers]
        if any(g is not None and g.is_sparse for g in gradients):
            raise UsageError("sparse gradients cannot be synchronised: use sparse=False")
        self._sources = [g for g in gradients if g is not None]
        self._sources += self._buffers
        double = any(source.dtype == torch.float64 for source in self._sources)
        dtype = torch.float64 if double else torch.float32
        with torch.no_grad():
            flat = torch.cat([source.detach().reshape(-1).to(dtype) for source in self._sources])
        made_of = json.dumps([numbers, len(self._buffers), str(dtype)]).encode()
        return Gradients(flat.numpy(), zlib.crc32(made_of))

    def replace_gradients(self, vector: NDArray[np.floating[Any]]) -> None:  # noqa: D102
        flat = torch.from_numpy(vector)
        sizes = [source.numel() for source in self._sources]
        with torch.no_grad():
            for source, values in zip(self._sources, torch.split(flat, sizes), strict=True):
                source.copy_(values.view_as(source))
        self._sources = []

    def keep_light(self) -> None:  # noqa: D102
        self._light = [_light(thing) for thing in self._objects]
        self._all = None
        self._kept_gradients = {n: g.clone() for n, g in self._gradients_to_keep().items()}

    def keep_all(self) -> None:  # noqa: D102
        self._all = [_clone(state) for state in self._states(kept=True)]

    def save(self, meta: Mapping[str, str], *, kept: bool) -> bytes:  # noqa: D102
        tensors: dict[str, torch.Tensor] = {}
        states = self._states(kept=kept)
        shape = [_flatten(state, str(i), tensors) for i, state in enumerate(states)]
        gradients = self._kept_gradients if kept else self._gradients_to_keep()
        extra = {
            "objects": json.dumps(shape),
            "gradients": json.dumps(_flatten(gradients, "gradient", tensors)),
        }
        return save_tensors(_unshared(tensors), {**meta, **extra})

    def load(self, content: bytes, first: int) -> None:  # noqa: D102
        from smlt_tune.runtime.frameworks.base import read_meta

        tensors = load_tensors(content)
        meta = read_meta(content)
        shape = json.loads(meta["objects"])
        if len(shape) < len(self._objects):
            raise UsageError(
                f"the checkpoint holds {len(shape)} objects, but prepare() was given "
                f"{len(self._objects)}: a training function must prepare the same each time"
            )
        for thing, state in list(zip(self._objects, shape, strict=False))[first:]:
            thing.load_state_dict(_unflatten(state, tensors))
        for number, gradient in _unflatten(json.loads(meta["gradients"]), tensors).items():
            if number < len(self._parameters):
                self._parameters[number].grad = gradient
                self._accumulating = True

    def as_native(self, arrays: Any) -> Any:  # noqa: D102
        return torch.from_numpy(arrays) if isinstance(arrays, np.ndarray) else arrays

    def _adopt(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.requires_grad and id(parameter) not in self._numbers:
                self._numbers[id(parameter)] = len(self._parameters)
                self._parameters.append(parameter)
                if self._callback and self._every_gradient:
                    self._watch_gradient(parameter)

    def _watch_gradient(self, parameter: torch.nn.Parameter) -> None:
        number = self._numbers[id(parameter)]

        def accumulated(_: torch.Tensor) -> None:
            if not self._touched:  # the first gradient of this backward pass
                engine = torch.autograd.Variable._execution_engine
                engine.queue_callback(self._backward_ended)
            self._touched.add(number)

        parameter.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]

    def _backward_ended(self) -> None:
        if self._callback is not None:
            self._callback()

    def _watch_steps(self, optimizer: torch.optim.Optimizer) -> None:
        def stepped(*_: Any) -> None:
            self._accumulating = False
            if self._callback and not self._every_gradient:
                self._callback()

        optimizer.register_step_post_hook(stepped)

    def _gradients_to_keep(self) -> dict[int, torch.Tensor]:
        if not (self._accumulating and self._has_optimizer()):
            return {}
        pairs = enumerate(self._parameters)
        return {number: p.grad.detach() for number, p in pairs if p.grad is not None}

    def _has_optimizer(self) -> bool:
        return any(isinstance(o, torch.optim.Optimizer) for o in self._objects)

    def _states(self, *, kept: bool) -> list[Any]:
        if kept and self._all is not None:
            return self._all
        states = [thing.state_dict() for thing in self._objects]
        if kept and self._light is not None:
            for i, light in enumerate(self._light):
                states[i] = _merge(self._objects[i], states[i], light)
        return states


def _light(thing: Any) -> Any:
    if isinstance(thing, torch.nn.Module):
        return {name: buffer.clone() for name, buffer in thing.named_buffers()}
    if isinstance(thing, torch.optim.Optimizer):
        return [
            {k: copy.copy(v) for k, v in g.items() if k != "params"} for g in thing.param_groups
        ]
    return copy.deepcopy(thing.state_dict())


def _merge(thing: Any, state: Any, light: Any) -> Any:
    """The present state with what was remembered put over it."""
    if isinstance(thing, torch.nn.Module):
        return {name: light.get(name, value) for name, value in state.items()}
    if isinstance(thing, torch.optim.Optimizer):
        groups = [{**group, **old} for group, old in zip(state["param_groups"], light, strict=True)]
        return {**state, "param_groups": groups}
    return light


def _clone(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: _clone(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_clone(value) for value in state)
    return copy.deepcopy(state)


def _flatten(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Structure of a state dict as JSON; its tensors go to ``tensors``."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        pairs = [(k, _flatten(v, f"{name}.{k}", tensors)) for k, v in value.items()]
        return {_PAIRS: [[k, v] for k, v in pairs]}
    if isinstance(value, list | tuple):
        items = [_flatten(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UsageError(
        f"state of a prepared object, {name}: a {type(value).__name__} cannot be kept in a "
        "checkpoint; state_dict() must be made of tensors, numbers, strings, lists and dicts"
    )


def _unflatten(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unflatten(v, tensors) for v in value]
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _TUPLE in value:
            return tuple(_unflatten(v, tensors) for v in value[_TUPLE])
        return {k: _unflatten(v, tensors) for k, v in value[_PAIRS]}
    return value


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them (tied weights)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        shared = pointer in seen
        seen.add(pointer)
        result[name] = tensor.clone() if shared else tensor.contiguous()
    return result
