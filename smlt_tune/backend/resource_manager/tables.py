"""What is measured once of a platform and its stores, and used for every job.

| symbol | field | meaning | unit |
|---|---|---|---|
| s(m) | ``memory_mb``, ``speed`` | speed of a function of m MB over that of one of 1,769 MB | 1 |
| R | ``flops`` | what a training loop gets out of 1,769 MB | FLOP/s |
| w | ``bandwidth`` | of one function's link | byte/s |
| h | ``handling_s`` | CPU time to handle a synchronised byte, at 1,769 MB | s/byte |
| t0 | ``start_s`` | from a cold invocation until the function's code runs | s |
| l | ``StoreTable.latency_s`` | round trip of a small request | s |
| W | ``StoreTable.bandwidth`` | what a store moves for all clients together | byte/s |

Between two sizes speed is interpolated in ln m; the table holds the sizes at which it bends.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StoreTable:
    """One parameter store, seen from a function.

    Attributes:
        latency_s: Round trip of a small request, seconds.
        bandwidth: Bytes per second, for all clients together.
        usd_per_hour: What it costs while it stands; 0 for one's own.
        usd_per_request: What a request costs.
    """

    latency_s: float
    bandwidth: float
    usd_per_hour: float = 0.0
    usd_per_request: float = 0.0


@dataclass(frozen=True)
class PlatformTable:
    """One platform.

    Attributes:
        fingerprint: Of the platform it was measured on; profiles of another do not compare.
        memory_mb: Sizes of functions, ascending, MB.
        speed: Speed of a training loop at each, relative to 1,769 MB.
        flops: Floating-point operations per second that such a loop reaches at 1,769 MB.
        bandwidth: Of one function's link, bytes per second.
        handling_s: CPU seconds per byte that a function sends or receives, at 1,769 MB.
        start_s: From a cold invocation until the function's code runs, seconds.
        warm_start_s: The same where a warm instance waits, seconds.
        stores: By the kind of store (the scheme of its URL), as far as they were measured.
        measured: Date on which it was measured; empty for a table that comes with the package.
    """

    fingerprint: str
    memory_mb: tuple[int, ...]
    speed: tuple[float, ...]
    flops: float
    bandwidth: float
    handling_s: float
    start_s: float
    warm_start_s: float
    stores: Mapping[str, StoreTable] = field(default_factory=dict)
    measured: str = ""

    def speed_at(self, memory_mb: Any) -> NDArray[np.float64]:
        """Speed of functions of some sizes; shape of the argument."""
        sizes, speeds = np.log(self.memory_mb), np.log(self.speed)
        return np.asarray(np.exp(np.interp(np.log(memory_mb), sizes, speeds)))
