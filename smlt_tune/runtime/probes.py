"""Training functions that measure the machine they run on: what ``smlt calibrate`` submits."""

import resource
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from smlt_tune.runtime import keys
from smlt_tune.runtime.clock import SYSTEM_CLOCK, Clock
from smlt_tune.runtime.session import session

#: Samples of a step of :func:`train`. Work enough for several threads: with 32, two of them
#: that have a fifth of a core each were slower than one.
BATCH = 192
#: Floating-point operations of such a step as PyTorch counts them, for the network of _network:
#: every multiply-add is two; the first convolution has no gradient of its input.
STEP_FLOPS = BATCH * 2 * (2 * 16 * 16 * 16 * 9 + 3 * (32 * 8 * 8 * 16 * 9 + 64 * 2048 + 10 * 64))
#: Size of a value of :func:`transfer`, the size of a shard; bytes.
VALUE_BYTES = 1 << 20
#: Size of the gradient of :func:`synchronise`, bytes.
GRADIENT_BYTES = 4 << 20

_SMALL_BYTES = 1024
_SMALL_REQUESTS = 40
_WARM_UP_STEPS = 2
_LEAST_STEPS = 2
_TTL_S = 60.0


def train(config: Mapping[str, Any], clock: Clock = SYSTEM_CLOCK) -> dict[str, float]:
    """Steps of a small convolutional network on random data.

    Args:
        config: ``seconds``: how long.
        clock: Time.

    Returns:
        ``steps``, and the ``wall_s`` and ``cpu_s`` that they took.
    """
    step = training_step()
    for _ in range(_WARM_UP_STEPS):  # the first ones allocate and choose algorithms
        step()
    steps, begun_s, begun_cpu_s = 0, clock.monotonic(), _cpu_s()
    wall_s = 0.0
    while wall_s < config["seconds"] or steps < _LEAST_STEPS:
        step()
        steps += 1
        wall_s = clock.monotonic() - begun_s
    return {"steps": steps, "wall_s": wall_s, "cpu_s": _cpu_s() - begun_cpu_s}


def training_step() -> Callable[[], None]:
    """A step of :func:`train`: forward, backward, optimizer; ``STEP_FLOPS`` operations."""
    import torch
    from torch import nn

    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    images = torch.randn(BATCH, 1, 16, 16)
    labels = torch.randint(10, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        loss: Any = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()

    return step


def transfer(config: Mapping[str, Any], clock: Clock = SYSTEM_CLOCK) -> dict[str, float]:
    """Small requests, then large values to the parameter store and back, by all workers at once.

    Args:
        config: ``seconds``: how long to move large values.
        clock: Time.

    Returns:
        Of this worker ``latency_s``, the median round trip of a small request. Of all workers
        together ``bytes``, and the ``wall_s`` (of the slowest) and ``cpu_s`` that they took.
    """
    import torch

    here = session()
    here.prepare(torch.nn.Linear(1, 1))  # all workers begin together
    home = here._home
    assert home is not None
    store = home.gradient_store or home.parameter_store
    names = keys.FleetKeys(home.spec.fleet).generation(home.spec.job, home.spec.generation)
    key = names.mean("probe", here.rank)
    latencies = []
    for _ in range(_SMALL_REQUESTS):
        begun_s = clock.monotonic()
        store.put({key: b"x" * _SMALL_BYTES}, ttl_s=_TTL_S)
        latencies.append(clock.monotonic() - begun_s)
    value = bytes(VALUE_BYTES)
    moved, begun_s, begun_cpu_s = 0, clock.monotonic(), _cpu_s()
    wall_s = 0.0
    while wall_s < config["seconds"] or not moved:
        store.put({key: value}, ttl_s=_TTL_S)
        store.get([key])
        moved += 2 * VALUE_BYTES
        wall_s = clock.monotonic() - begun_s
    cpu_s = _cpu_s() - begun_cpu_s
    store.delete([key])
    mine = np.zeros(here.workers)
    mine[here.rank] = wall_s
    sums = here.workers * here.mean(np.array([moved, cpu_s]))
    return {
        "latency_s": statistics.median(latencies),
        "bytes": float(sums[0]),
        "cpu_s": float(sums[1]),
        "wall_s": float(here.workers * np.max(here.mean(mine))),
    }


def synchronise(config: Mapping[str, Any]) -> dict[str, float]:
    """Backward passes with and without a synchronisation of a gradient of ``GRADIENT_BYTES``.

    Args:
        config: ``iterations``: how many of each.

    Returns:
        Of this worker ``cpu_s`` of a synchronisation: the difference of the two, medians.
    """
    import torch

    def passes(parameter: Any, steps: Any) -> float:
        """Median CPU time of a backward pass and what it brings about, without the first one."""
        times = []
        for _ in steps:
            begun_s = _cpu_s()
            parameter.grad = None
            parameter.sum().backward()
            times.append(_cpu_s() - begun_s)
        return statistics.median(times[1:])

    here = session()
    iterations = config["iterations"] + 1
    alone = passes(_gradient(torch).weight, range(iterations))
    together = here.prepare(_gradient(torch))
    samples = np.zeros(iterations * here.workers, np.float32)
    steps = here.batches((samples,), batch_size=here.workers, shuffle=False)
    return {"cpu_s": max(0.0, passes(together.weight, steps) - alone)}


def _gradient(torch: Any) -> Any:
    return torch.nn.Linear(GRADIENT_BYTES // 4 // 64, 64, bias=False)


def _cpu_s() -> float:
    """CPU time of this process so far, seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
