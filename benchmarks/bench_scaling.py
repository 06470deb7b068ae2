"""Time and cost of 1 to 6 workers at two memory sizes: the front that an allocation is chosen from.

Every allocation trains the same network on the same iterations, in a job of its own on the local
platform; 1 virtual CPU (1,769 MB) is a fixed part of a core, chosen so that all workers of the
largest job fit into the machine at once. The cost is what the price list makes of it, by wall time
and by CPU time (CPU seconds divided by the function's share of a core), which equals wall time
while a function computes and knows nothing of other load on the machine.
"""

import os
import statistics
import threading

import common

import smlt_tune as smlt
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.backend.prices import load_prices

WORKERS = (1, 2) if common.QUICK else (1, 2, 3, 4, 5, 6)
MEMORY_MB = (1769,) if common.QUICK else (512, 1769)
#: Iterations, by memory: a small function is slow.
ITERATIONS = {512: 5, 1769: 3 if common.QUICK else 12}
RESERVED_CORES = 0.3
BATCH = 192


def train(config):
    """A network of 106,000 parameters on digits; returns the seconds of each iteration."""
    import time

    import torch
    from torch import nn

    session = smlt.session()
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model, optimizer = session.prepare(model, optimizer)
    seconds = []
    for _ in session.epochs(1):
        begun = time.monotonic()
        for number, (x, y) in enumerate(session.batches("digits", config["batch"])):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds.append(time.monotonic() - begun)
            begun = time.monotonic()
            if number + 1 == config["iterations"]:
                break
    return {"seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}


def digits(samples):
    """scikit-learn's digits, 8 x 8, repeated to 28 x 28 pixels and as often as needed."""
    import numpy as np
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = images.reshape(-1, 8, 8).astype(np.float32) / 16
    large = np.kron(small, np.ones((1, 4, 4), np.float32))[:, 2:30, 2:30]
    chosen = np.arange(samples) % len(large)
    return large[chosen][:, None], labels[chosen].astype(np.int64)


class Recorder:
    """Passes everything on to a platform and keeps the results of all invocations."""

    def __init__(self, platform):
        self._platform = platform
        self._lock = threading.Lock()
        self._results = []

    def __getattr__(self, name):
        return getattr(self._platform, name)

    def invoke(self, invocation, on_done):
        """As the platform does."""

        def done(result):
            with self._lock:
                self._results.append(result)
            on_done(result)

        self._platform.invoke(invocation, done)

    def take(self):
        """The results since the last call."""
        with self._lock:
            results, self._results = self._results, []
        return results


def run(fleet, recorder, prices, workers, memory_mb):
    """One job."""
    config = {"batch": BATCH, "iterations": ITERATIONS[memory_mb]}
    outcome = fleet.submit(train, config, workers=workers, memory_mb=memory_mb).result(120)
    calls = recorder.take()
    assert len(calls) == workers, calls  # nothing was lost and repeated
    cores = recorder.cores(memory_mb)
    billed = {"wall": [c.billed_s for c in calls], "cpu": [c.cpu_s / cores for c in calls]}
    case = {
        "workers": workers,
        "memory_mb": memory_mb,
        "iterations": ITERATIONS[memory_mb],
        "job_s": outcome.duration_s,
        "first_iteration_s": outcome.value["seconds"][0],
        "iteration_s": common.summary(outcome.value["seconds"][1:]),
        "start_s": statistics.median(c.start_s for c in calls),
        "peak_mb": max(c.peak_mb for c in calls),
        "parameters": outcome.value["parameters"],
    }
    for how, seconds in billed.items():
        case[f"gb_s_{how}"] = round(sum(seconds) * memory_mb / 1024, 4)
        usd = sum(prices.invocation_usd(memory_mb, round(s, 3)) for s in seconds)
        case[f"usd_{how}"] = round(usd, 9)
    # What one iteration costs once the job runs: all workers for its median time.
    case["gb_s_iteration"] = round(case["iteration_s"]["median"] * workers * memory_mb / 1024, 5)
    return case


def merged(cases):
    """The rounds of one allocation as one case, by medians."""
    first = {key: cases[0][key] for key in ("workers", "memory_mb", "iterations", "parameters")}
    samples = [s for case in cases for s in case["iteration_s"]["samples"]]
    rest = {
        key: common.summary([case[key] for case in cases])
        for key in cases[0]
        if key not in (*first, "iteration_s")
    }
    return {**first, "iteration_s": common.summary(samples), **rest}


def draw(cases, facts, cores_per_vcpu):
    """Speed-up, and the front of time and cost."""
    fig, (left, right) = common.figure(1, 2, figsize=(10.5, 4.4))
    for k, memory_mb in enumerate(MEMORY_MB):
        here = [c for c in cases if c["memory_mb"] == memory_mb]
        base = here[0]["iteration_s"]["median"]
        count = [c["workers"] for c in here]
        times = [c["iteration_s"]["median"] for c in here]
        colour = common.COLOURS[k]
        left.plot(count, [base / t for t in times], "o-", color=colour, label=f"{memory_mb:,} MB")
        costs = [c["gb_s_iteration"]["median"] for c in here]
        right.plot(times, costs, "o-", color=colour, label=f"{memory_mb:,} MB")
        for c, time_s, cost in zip(here, times, costs, strict=True):
            right.annotate(
                c["workers"], (time_s, cost), (5, 4), textcoords="offset points", fontsize=9
            )
    left.plot(WORKERS, WORKERS, color="#999999", linestyle=":", label="ideal")
    left.set_xlabel("workers")
    left.set_ylabel("speed-up of an iteration")
    left.set_title("Speed-up", loc="left")
    left.legend()
    right.set_xscale("log")
    right.xaxis.set_major_locator(_locator())
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter("")
    right.set_ylim(0, right.get_ylim()[1] * 1.06)
    right.set_xlabel("one iteration, s (median)")
    right.set_ylabel("cost of one iteration, GB-s")
    right.set_title(
        f"Time against cost, by workers (1 vCPU = {cores_per_vcpu:.2f} core)", loc="left"
    )
    right.legend(loc="lower left")
    common.save_figure(fig, "scaling", facts)


def _locator():
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 2, 3, 5, 7))


def main():
    facts = common.machine()
    cores = len(os.sched_getaffinity(0))
    cores_per_vcpu = min(1.0, (cores - RESERVED_CORES) / (max(WORKERS) + 2))
    prices = load_prices()
    rounds = {}
    turns = [(n, memory_mb) for n in WORKERS for memory_mb in MEMORY_MB]
    if not common.QUICK:  # the fast ones twice, so that other load meets them evenly
        turns += [(n, memory_mb) for n, memory_mb in turns[::-1] if (n, memory_mb) != (1, 512)]
    with LocalPlatform(
        concurrency=max(WORKERS), cores_per_vcpu=cores_per_vcpu, billing="wall", keep_alive_s=60.0
    ) as platform:
        recorder = Recorder(platform)
        with smlt.Fleet(platform=recorder) as fleet:
            fleet.upload("digits", digits(BATCH * max(ITERATIONS.values())))
            for workers, memory_mb in turns:
                case = run(fleet, recorder, prices, workers, memory_mb)
                rounds.setdefault((memory_mb, workers), []).append(case)
    cases = [merged(rounds[key]) for key in sorted(rounds)]
    result = {"batch": BATCH, "cores_per_vcpu": round(cores_per_vcpu, 4), "cases": cases}
    common.save("scaling", facts, result)
    draw(cases, facts, cores_per_vcpu)
    base = {c["memory_mb"]: c["iteration_s"]["median"] for c in cases if c["workers"] == 1}
    common.table(
        (
            *("memory, workers", "iteration s", "speed-up", "GB-s / iteration"),
            *("job GB-s wall", "GB-s CPU", "USD wall", "USD CPU"),
        ),
        [
            (
                f"{c['memory_mb']} MB, {c['workers']}",
                f"{c['iteration_s']['median']:.3f}",
                f"{base[c['memory_mb']] / c['iteration_s']['median']:.2f}",
                f"{c['gb_s_iteration']['median']:.3f}",
                *(f"{c[f'gb_s_{how}']['median']:.2f}" for how in ("wall", "cpu")),
                *(f"{c[f'usd_{how}']['median']:.6f}" for how in ("wall", "cpu")),
            )
            for c in cases
        ],
    )


if __name__ == "__main__":
    main()
