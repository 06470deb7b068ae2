"""Where a training run is, and everything that follows from it alone.

The order of samples and all random numbers are functions of the position (and of seed, rank and
worker count), never of what happened before. That is why a run that was killed, moved or resized
continues exactly as if nothing had happened, and why no generator state has to be carried along.
"""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Self

import numpy as np
from numpy.typing import NDArray

#: Epoch number of what runs outside ``session.epochs``.
NO_EPOCH = -1


@dataclass(frozen=True, order=True)
class Position:
    """A point between two iterations. Positions sort in training order.

    Attributes:
        epoch: Number of the epoch; NO_EPOCH outside ``session.epochs``.
        loop: How many loops over batches were begun in that epoch, the current one included.
        iteration: The next iteration of that loop.
    """

    epoch: int = NO_EPOCH
    loop: int = 0
    iteration: int = 0

    def encode(self) -> str:
        """As a name that sorts like the position."""
        return f"e{self.epoch + 1:06d}-l{self.loop:05d}-i{self.iteration:010d}"

    @classmethod
    def decode(cls, name: str) -> Self:
        """The position that :meth:`encode` (or a name beginning with it) stands for."""
        epoch, loop, iteration = name.split("-")[:3]
        return cls(int(epoch[1:]) - 1, int(loop[1:]), int(iteration[1:]))


def entropy(*parts: int | str) -> int:
    """64 well mixed bits that depend on nothing but the parts."""
    digest = blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def sample_order(size: int, *, seed: int, epoch: int, loop: int) -> NDArray[np.int64]:
    """The order in which a shuffled loop visits a data set, equal on every worker.

    Returns:
        A permutation of ``range(size)``, shape (size,).
    """
    generator = np.random.Generator(np.random.PCG64(entropy("order", seed, epoch, loop)))
    return generator.permutation(size)


def part(start: int, stop: int, *, rank: int, workers: int) -> tuple[int, int]:
    """The slice of ``range(start, stop)`` that one of the workers gets.

    Slices are contiguous, differ by at most one in length, and rank 0's is the longest, so that it
    is never empty.
    """
    size = stop - start
    return start - (-rank * size // workers), start - (-(rank + 1) * size // workers)
