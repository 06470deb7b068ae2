"""What the session needs to know about a machine-learning framework.

Arrays in, arrays out: gradients cross this seam as one flat numpy vector, state as bytes in
safetensors form. A framework is recognised by the objects that are handed to ``session.prepare``.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

#: The one entry of a checkpoint's metadata. Several would be written in an order that differs each
#: time, and equal states must make equal checkpoints.
META = "smlt_tune"


@dataclass(frozen=True)
class Gradients:
    """What a backward pass has produced.

    Attributes:
        vector: Gradients, then floating-point buffers, flat; shape (p,), float32 or float64.
        check: Checksum of which parameters and buffers the vector is made of.
    """

    vector: NDArray[Any]
    check: int


class Meter(Protocol):
    """Measures the iteration that takes place in its context. Changes nothing of it.

    Attributes:
        flops: Floating-point operations.
        activation_bytes: What was kept for the backward pass, bytes.
        backward: Whether there was a backward pass.
        failed: Something could not be measured: the numbers mean nothing.
    """

    flops: int
    activation_bytes: int
    backward: bool
    failed: bool

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> Any: ...


class Framework(Protocol):
    """The prepared objects of one training function."""

    def add(self, objects: tuple[Any, ...]) -> None:
        """Takes objects in. Raises InvalidInput that lists those that have no state to keep."""

    def on_backward(self, callback: Callable[[], None], *, every_gradient: bool) -> None:
        """Calls back at the end of every backward pass that reached a prepared parameter.

        Args:
            callback: May replace the gradients.
            every_gradient: Otherwise a call once per optimizer step is enough, if there is one.
        """

    def on_step(self, callback: Callable[[], None]) -> None:
        """Calls back before every step of a prepared optimizer."""

    def has_optimizer(self) -> bool:
        """Whether there are steps to notice: an optimizer was prepared."""

    def watch(self) -> None:
        """Notices parameters that need a gradient only now."""

    def training(self, *, assume: bool) -> bool:
        """Whether what runs now may be training.

        Args:
            assume: It is, if it can be. Otherwise only if the prepared objects look like it.
        """

    def trained(self) -> tuple[int, int]:
        """How many numbers are trained, and the bytes of the vector of :meth:`gradients`."""

    def measure(self, batch: Any, *, in_job: bool) -> Meter | None:
        """A meter for an iteration.

        Args:
            batch: What it works on.
            in_job: Its results count: None where measuring could change them.
        """

    def gradients(self) -> Gradients:
        """Of the backward pass that has just ended."""

    def replace_gradients(self, vector: NDArray[np.floating[Any]]) -> None:
        """Puts back what :meth:`gradients` gave, summed up over the workers."""

    def take_gradients(self) -> list[Any]:
        """Removes all gradients and returns them."""

    def put_gradients(self, gradients: list[Any]) -> None:
        """Puts back what :meth:`take_gradients` gave."""

    def keep_light(self) -> None:
        """Remembers what may change before the next optimizer step: buffers, hyper-parameters."""

    def unchanged(self) -> bool:
        """Whether what :meth:`keep_light` has left out is still as it was then."""

    def keep_all(self) -> None:
        """Remembers everything, because the optimizer is about to step."""

    def save(self, meta: Mapping[str, str], *, kept: bool) -> bytes:
        """A checkpoint of all objects.

        Args:
            meta: Goes into the header.
            kept: Of the remembered state instead of the present one.
        """

    def load(self, content: bytes, first: int, *, whole: bool, fork: bool = False) -> None:
        """Restores objects from a checkpoint.

        Args:
            content: What :meth:`save` gave.
            first: Number of the first object to restore.
            whole: Nothing else will be added: the checkpoint must hold exactly these objects.
            fork: It is that of a job with another configuration: hyper-parameters stay as they are.

        Raises:
            UsageError: It does not fit the objects.
        """

    def as_native(self, arrays: Any) -> Any:
        """Numpy arrays as the framework's tensors."""


def read_meta(content: bytes) -> dict[str, str]:
    """The header that :meth:`Framework.save` put into a checkpoint."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    meta: dict[str, str] = json.loads(header["__metadata__"][META])
    return meta
