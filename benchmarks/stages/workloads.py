"""What one trial takes in one stage, for the models of the CE-scaling paper. Nothing ran on AWS.

Times come from the resource manager's own analytic model (``resource_manager/physics.py``) at the
prior medians of its constants, with the shipped table of AWS Lambda; prices from the shipped list.

| symbol | meaning | unit |
|---|---|---|
| n, m | workers, memory of each | 1, MB |
| S, D | samples and bytes of the data set | 1, byte |
| b | batch of each worker, as in the paper: an iteration takes n b samples | 1 |
| P, F | parameters; FLOPs per sample, forward and backward | 1, FLOP |
| w, t0 | bandwidth of a function's link; start of a function | byte/s, s |

    iterations = epochs ceil(S / (n b))
    before     = t0 + (D / n + 12 P) / w      start, then the data and the state of the last stage
    memory    >= 400 MB + 16 P + b A          runtime, parameters with Adam's state, activations A

Two stores: S3 (latency and requests of the price list, no limit of bandwidth) and, for each trial
that uses one, a cache.r5.4xlarge with 10 Gbit/s that is billed while the trial trains. One worker
needs none. FLOPs are counts of the published networks at these inputs, not measurements.
"""

from dataclasses import dataclass

import numpy as np

from smlt_tune.backend.platform_tables import load_core
from smlt_tune.backend.prices import load_prices
from smlt_tune.backend.resource_manager.observations import Allocation, Option
from smlt_tune.backend.resource_manager.physics import (
    THETA_MEAN,
    IterationTime,
    JobTerms,
    Points,
)
from smlt_tune.backend.resource_manager.tables import PlatformTable, StoreTable

MB = 2**20
TIME_LIMIT_S = 900.0
#: For how long training stands still when it moves to new functions at the time limit, seconds.
HOLD_UP_S = 0.4
#: Save, compare and hand over after a stage, seconds.
BETWEEN_S = 1.0
WORKERS = sorted({*range(1, 10), *(round(10 * 1.25**k) for k in range(14)), 200})
SIZES_MB = (256, 410, 512, 640, 832, 1024, 1280, 1769, 2240, 3009, 4000, 5308, 7077, 8846, 10_240)


@dataclass(frozen=True)
class Model:
    """One model of the paper with its data set (its table IV); the symbols are the module's."""

    name: str
    parameters: int
    flops: float
    samples: int
    data_bytes: float
    batch: int
    activation_bytes: float

    @property
    def least_mb(self):
        """Memory that it needs, MB."""
        state = 16 * self.parameters + self.batch * self.activation_bytes
        return 400 + state / MB


MODELS = (
    # 28 features and a bias.
    Model("LR, Higgs", 29, 6 * 29, 11_000_000, 11_000_000 * 28 * 4, 10_000, 28 * 8),
    # 12 M and 84 M multiply-adds at 32 x 32 with the strides of ImageNet.
    Model("MobileNet, Cifar10", 12 * MB // 4, 6 * 12e6, 50_000, 50_000 * 3072, 128, 3 * MB),
    Model("ResNet-50, Cifar10", 89 * MB // 4, 6 * 84e6, 50_000, 50_000 * 3072, 32, 5 * MB),
    # 86 M parameters of the encoder see 128 tokens.
    Model("BERT-base, IMDb", 340 * MB // 4, 6 * 86e6 * 128, 25_000, 25_000 * 1024, 32, 40 * MB),
)


def platform_table():
    """The shipped table of AWS Lambda, for one core behind 1,769 MB."""
    core = load_core("aws-lambda")
    return PlatformTable(
        fingerprint="aws-lambda",
        memory_mb=tuple(core.speed),
        speed=tuple(core.speed.values()),
        flops=core.flops,
        bandwidth=core.bandwidth,
        handling_s=core.handling_s,
        start_s=core.start_s,
        warm_start_s=core.warm_start_s,
        stores=core.stores,
    )


TABLE, PRICES = platform_table(), load_prices()
STORES = {
    # A worker writes n + 1 and reads 2 n objects per synchronisation; medians of 1 KB.
    "s3": StoreTable(
        latency_s=(0.040 + 2 * 0.027) / 3,
        bandwidth=1e15,
        usd_per_request=float(PRICES.put_usd + 2 * PRICES.get_usd) / 3,
    ),
    "redis": StoreTable(
        latency_s=TABLE.stores["redis"].latency_s,
        bandwidth=TABLE.stores["redis"].bandwidth,
        usd_per_hour=float(PRICES.parameter_stores["cache.r5.4xlarge"].hour_usd),
    ),
}


def options_of(model, epochs, stores=STORES):
    """Every allocation that the model fits into, for a stage of some epochs.

    Args:
        model: What is trained.
        epochs: How many.
        stores: To choose from, by name; one worker takes the first, as it needs none.
    """
    places = [
        Allocation(n, m, store)
        for n in WORKERS
        for m in SIZES_MB
        for store in stores
        if m >= model.least_mb and (n > 1 or store == next(iter(stores)))
    ]
    terms = _terms(model, epochs, places, stores)
    iteration_s = _iteration_s(model, places, stores)
    times, costs = terms.time_s(iteration_s), terms.cost_usd(iteration_s)
    return [
        Option(place, float(t), float(c)) for place, t, c in zip(places, times, costs, strict=True)
    ]


def epochs_s(model, places, stores=STORES):
    """Time of training one epoch with each of some allocations, seconds."""
    n = np.array([float(one.workers) for one in places])
    return np.ceil(model.samples / (n * model.batch)) * _iteration_s(model, places, stores)


def load_s(model, workers):
    """Until data and state are there, seconds."""
    return (model.data_bytes / workers + 12 * model.parameters) / TABLE.bandwidth


def _iteration_s(model, places, stores):
    """Time of an iteration, seconds; one batch for each worker."""
    n = np.array([float(one.workers) for one in places])
    same = np.ones(len(places))
    at = [stores[one.store] for one in places]
    points = Points(
        workers=n,
        memory_mb=np.array([float(one.memory_mb) for one in places]),
        parameters=model.parameters * same,
        sync_bytes=4.0 * model.parameters * same,
        flops=model.flops * same,
        batch=model.batch * n,
        latency_s=np.array([one.latency_s for one in at]),
        store_bandwidth=np.array([one.bandwidth for one in at]),
    )
    return np.exp(IterationTime(TABLE)(points, THETA_MEAN).ln_s)


def _terms(model, epochs, places, stores):
    n = np.array([float(one.workers) for one in places])
    m = np.array([float(one.memory_mb) for one in places])
    at = [stores[one.store] for one in places]
    gb_second = float(PRICES.gb_second_usd)
    return JobTerms(
        iterations=epochs * np.ceil(model.samples / (n * model.batch)),
        other_share=0.0,
        start_s=TABLE.start_s,
        hold_up_s=HOLD_UP_S,
        end_s=0.0,
        before_s=TABLE.start_s + load_s(model, n),
        before_usd=n * m / 1024 * gb_second * load_s(model, n),
        starts=np.ones(len(places)),
        time_limit_s=TIME_LIMIT_S,
        workers=n,
        memory_mb=m,
        gb_second_usd=gb_second,
        request_usd=float(PRICES.request_usd),
        store_usd_per_s=np.array([one.usd_per_hour / 3600 for one in at]),
        store_usd_per_request=np.array([one.usd_per_request for one in at]),
    )


def front(options):
    """Those that no other beats in time and cost, fastest first."""
    found = []
    for one in sorted(options, key=lambda o: (o.time_s, o.cost_usd)):
        if not found or one.cost_usd < found[-1].cost_usd:
            found.append(one)
    return found
