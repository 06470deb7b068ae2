"""PyTorch: gradients from hooks, state as safetensors.

Rule for buffers (batch norm's running statistics, say): floating-point buffers are averaged over
the workers, weighted by samples, together with the gradients. One that no worker has changed since
the last synchronisation keeps its value to the bit. Others (``num_batches_tracked``) are expected
to change alike everywhere and are not exchanged; checkpoints hold all of them.

A gradient is part of the state unless it is what a prepared optimizer has last stepped with: it may
be accumulated over several iterations.
"""

import copy
import json
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from smlt_tune.errors import InvalidInput, UsageError
from smlt_tune.runtime.frameworks.base import META, Gradients, Meter, read_meta
from smlt_tune.runtime.frameworks.torch_features import (
    IterationMeter,
    common_dtype,
    compiled_frames,
    floating_buffers,
    job_meter,
    real,
    trained,
)
from smlt_tune.runtime.frameworks.torch_fork import follow_schedules, load_fork

#: Marks a tensor's place in the structure of a state dict.
_TENSOR = "__tensor__"
_PAIRS = "__pairs__"
_TUPLE = "__tuple__"
_COUNTER = "__counter__"


class TorchObjects:
    """Modules, optimizers, and whatever else has ``state_dict`` and ``load_state_dict``."""

    def __init__(self) -> None:
        self._objects: list[Any] = []
        self._parameters: list[torch.nn.Parameter] = []
        self._numbers: dict[int, int] = {}
        self._modules: dict[int, torch.nn.Module] = {}
        self._callback: Callable[[], None] | None = None
        self._before_step: Callable[[], None] | None = None
        self._every_gradient = False
        self._watched: set[int] = set()
        # The backward pass that is under way: passes can be nested (checkpointed activations).
        self._passes: set[int] = set()
        self._touched: set[int] = set()
        self._sources: list[torch.Tensor] = []
        self._buffers: list[torch.Tensor] = []
        self._synced_buffers: list[torch.Tensor] = []
        # By parameter, the gradient that an optimizer has stepped with, and its version then.
        self._used: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        # What was remembered.
        self._light: list[Any] | None = None
        self._all: list[Any] | None = None
        self._kept_gradients: dict[int, torch.Tensor] = {}
        self._versions: list[int] = []
        self._compiled = compiled_frames()

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
                self._modules.update((id(module), module) for module in thing.modules())
                self._adopt(thing.parameters())
            elif isinstance(thing, torch.optim.Optimizer):
                self._adopt(p for group in thing.param_groups for p in group["params"])
                self._watch_steps(thing)
        self.watch()

    def on_backward(self, callback: Callable[[], None], *, every_gradient: bool) -> None:  # noqa: D102
        self._callback = callback
        self._every_gradient = every_gradient
        self.watch()

    def on_step(self, callback: Callable[[], None]) -> None:  # noqa: D102
        self._before_step = callback

    def has_optimizer(self) -> bool:  # noqa: D102
        return any(isinstance(o, torch.optim.Optimizer) for o in self._objects)

    def watch(self) -> None:  # noqa: D102
        if self._callback is None or (not self._every_gradient and self.has_optimizer()):
            return
        for number, parameter in enumerate(self._parameters):
            if parameter.requires_grad and number not in self._watched:
                self._watch_gradient(number)

    def training(self, *, assume: bool) -> bool:  # noqa: D102
        modules = [thing for thing in self._objects if isinstance(thing, torch.nn.Module)]
        return torch.is_grad_enabled() and (assume or any(m.training for m in modules))

    def trained(self) -> tuple[int, int]:  # noqa: D102
        return trained(self._parameters, self._floating_buffers())

    def measure(self, batch: Any, *, in_job: bool) -> Meter | None:  # noqa: D102
        return job_meter(batch, self._compiled) if in_job else IterationMeter(batch)

    def gradients(self) -> Gradients:  # noqa: D102
        touched = [n for n in sorted(self._touched) if self._parameters[n].grad is not None]
        self._touched.clear()
        gradients = [g for n in touched if (g := self._parameters[n].grad) is not None]
        if any(g.is_sparse for g in gradients):
            raise UsageError("sparse gradients cannot be synchronised: use sparse=False")
        self._buffers = self._floating_buffers()
        self._sources = [real(source) for source in [*gradients, *self._buffers]]
        dtype = common_dtype(self._sources)
        changed = torch.tensor(self._changed_buffers(), dtype=dtype)
        with torch.no_grad():
            flat = torch.cat([*(s.detach().reshape(-1).to(dtype) for s in self._sources), changed])
        made_of = json.dumps([touched, len(self._buffers), str(dtype)]).encode()
        return Gradients(flat.numpy(), zlib.crc32(made_of))

    def replace_gradients(self, vector: NDArray[np.floating[Any]]) -> None:  # noqa: D102
        sizes = [source.numel() for source in self._sources]
        *parts, changed = torch.split(torch.from_numpy(vector), [*sizes, len(self._buffers)])
        first = len(self._sources) - len(self._buffers)
        with torch.no_grad():
            for i, (source, values) in enumerate(zip(self._sources, parts, strict=True)):
                if i >= first and not changed[i - first]:
                    source.copy_(self._synced_buffers[i - first])
                else:
                    source.copy_(values.view_as(source))
            self._synced_buffers = [buffer.clone() for buffer in self._buffers]
        self._sources, self._buffers = [], []

    def take_gradients(self) -> list[Any]:  # noqa: D102
        gradients = [parameter.grad for parameter in self._parameters]
        self.put_gradients([None] * len(gradients))
        return gradients

    def put_gradients(self, gradients: list[Any]) -> None:  # noqa: D102
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def keep_light(self) -> None:  # noqa: D102
        self._light = [_light(thing) for thing in self._objects]
        self._all = None
        self._kept_gradients = {n: g.clone() for n, g in self._gradients_to_keep().items()}
        self._versions = self._present_versions()
        if not self._synced_buffers:
            self._synced_buffers = [buffer.clone() for buffer in self._floating_buffers()]

    def unchanged(self) -> bool:  # noqa: D102
        return self._versions == self._present_versions()

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
        return save_tensors(_unshared(tensors), {META: json.dumps({**meta, **extra})})

    def load(  # noqa: D102
        self, content: bytes, first: int, *, whole: bool, fork: bool = False
    ) -> None:
        tensors = load_tensors(content)
        meta = read_meta(content)
        shape = json.loads(meta["objects"])
        if len(shape) < len(self._objects) or (whole and len(shape) > len(self._objects)):
            raise UsageError(
                f"the checkpoint holds {len(shape)} objects, but prepare() was given "
                f"{len(self._objects)}: a training function must prepare the same each time"
            )
        for number, (thing, state) in enumerate(zip(self._objects, shape, strict=False)):
            if number < first:
                continue
            try:
                load = load_fork if fork else type(thing).load_state_dict
                load(thing, _unflatten(state, tensors))
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(
                    f"the checkpoint does not fit object {number} of prepare(), a "
                    f"{type(thing).__name__}: {type(error).__name__}: {error}"
                ) from error
            if isinstance(thing, torch.optim.Optimizer):
                # It has stepped, in another process: schedulers need not warn.
                thing._opt_called = True  # type: ignore[attr-defined]
        gradients = _unflatten(json.loads(meta["gradients"]), tensors)
        if fork:
            follow_schedules(self._objects)
        for number, parameter in enumerate(self._parameters):
            parameter.grad = gradients.get(number)
        self._used.clear()
        self._synced_buffers = []

    def as_native(self, arrays: Any) -> Any:  # noqa: D102
        return torch.from_numpy(arrays) if isinstance(arrays, np.ndarray) else arrays

    def _adopt(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            if id(parameter) not in self._numbers:
                self._numbers[id(parameter)] = len(self._parameters)
                self._parameters.append(parameter)

    def _watch_gradient(self, number: int) -> None:
        def accumulated(_: torch.Tensor) -> None:
            # A pass that raised has never called back; so its name, and not whether there are
            # gradients that wait, tells if this is the first one of a pass.
            name = torch._C._current_graph_task_id()
            if name not in self._passes:
                self._passes.add(name)
                engine = torch.autograd.Variable._execution_engine
                engine.queue_callback(partial(self._backward_ended, name))
            self._touched.add(number)

        self._watched.add(number)
        parameter = self._parameters[number]
        parameter.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]

    def _backward_ended(self, name: int) -> None:
        self._passes.discard(name)
        known = set(self._watched)
        self.watch()
        fresh = self._watched - known  # unfrozen just before this pass
        self._touched |= {n for n in fresh if self._parameters[n].grad is not None}
        if self._callback is not None and self._touched:
            self._callback()
            self._touched.clear()

    def _watch_steps(self, optimizer: torch.optim.Optimizer) -> None:
        def steps(*_: Any) -> None:
            if self._before_step:
                self._before_step()

        def stepped(*_: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    gradient, number = parameter.grad, self._numbers.get(id(parameter))
                    if number is not None and gradient is not None:
                        self._used[number] = (weakref.ref(gradient), gradient._version)
            if self._callback and not self._every_gradient:
                self._callback()

        optimizer.register_step_pre_hook(steps)
        optimizer.register_step_post_hook(stepped)

    def _gradients_to_keep(self) -> dict[int, torch.Tensor]:
        found = {}
        for number, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            used, version = self._used.get(number, (None, 0))
            if used is None or used() is not gradient or gradient._version != version:
                found[number] = gradient.detach()
        return found

    def _floating_buffers(self) -> list[torch.Tensor]:
        """Looked up anew, because a module may put another tensor in their place."""
        return floating_buffers(self._modules.values())

    def _changed_buffers(self) -> list[bool]:
        known = [*self._synced_buffers, *[None] * len(self._buffers)]
        pairs = zip(self._buffers, known, strict=False)
        return [old is None or not torch.equal(old, new) for new, old in pairs]

    def _present_versions(self) -> list[int]:
        return [parameter._version for parameter in self._parameters]

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
        return {n: b.clone() for n, b in thing.named_buffers(remove_duplicate=False)}
    if isinstance(thing, torch.optim.Optimizer):
        return [{k: _clone(v) for k, v in g.items() if k != "params"} for g in thing.param_groups]
    return _clone(thing.state_dict())


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
    if isinstance(state, Counter):
        return state.copy()
    if isinstance(state, Mapping):
        return {key: _clone(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_clone(value) for value in state)
    return copy.deepcopy(state)


def _flatten(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Structure of a state dict as JSON; its tensors go to ``tensors``."""
    if isinstance(value, torch.Tensor):
        while name in tensors:  # {"a.b": ..., "a": {"b": ...}}
            name += "'"
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, Mapping) and all(isinstance(k, str | int | float) for k in value):
        pairs = [[k, _flatten(v, f"{name}.{k}", tensors)] for k, v in value.items()]
        return {_COUNTER if isinstance(value, Counter) else _PAIRS: pairs}
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
        pairs = value[_COUNTER] if _COUNTER in value else value[_PAIRS]
        found = {k: _unflatten(v, tensors) for k, v in pairs}
        return Counter(found) if _COUNTER in value else found
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
