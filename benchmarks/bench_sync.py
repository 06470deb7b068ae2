"""One synchronisation of gradients: ours beside five other ways, on one machine.

All workers are processes on loopback, the store is the embedded Valkey over TCP, and all ways but
gloo go through the same client with the same way of waiting (announcements on a stream), so that
only the pattern differs:

- hierarchical: this package's aggregator, as training functions use it.
- LambdaML ScatterReduce: n shards, each worker folds one; the same bytes, in one round per value.
- LambdaML AllReduce: everybody uploads all, one worker folds, everybody downloads the sum.
- Siren: everybody uploads all and downloads everybody else's all.
- gloo: all-reduce of torch.distributed over loopback, which functions cannot use (they cannot
  listen), as the mark to compare with.

The ways take turns within each round. The time is that of the slowest worker. The bytes are what
the server says it has received and sent (``total_net_input_bytes``, ``total_net_output_bytes``).
"""

import os
import tempfile
import time

os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")

import multiprocessing

import common
import numpy as np
import redis

from smlt_tune.backend.embedded_store import EmbeddedStore
from smlt_tune.runtime.aggregator import HierarchicalAggregator
from smlt_tune.runtime.keys import FleetKeys
from smlt_tune.runtime.stores.redis_store import RedisStore

SIZES_MB = (1,) if common.QUICK else (1, 4, 44)
WORKERS = (2,) if common.QUICK else (2, 4, 8)
TTL_S = 600.0
WAYS = {
    "hierarchical": "hierarchical (ours)",
    "scatter": "LambdaML ScatterReduce",
    "master": "LambdaML AllReduce",
    "siren": "Siren, all to all",
    "gloo": "gloo, loopback",
}


def rounds(size_mb, workers):
    """How often, so that all sizes together stay under two minutes."""
    if common.QUICK:
        return 2
    return {1: 15, 4: 8, 44: {2: 7, 4: 4, 8: 2}[workers]}[size_mb]


class Meeting:
    """Verbs that the simple patterns are made of: put for others, wait for values of others."""

    def __init__(self, store, rank, workers):
        self.store, self.rank, self.workers = store, rank, workers
        self.cursor = "0"
        self.others = [r for r in range(workers) if r != rank]

    def put(self, values, readers):
        self.store.put_once(values, ttl_s=TTL_S, announce=[f"to{r}" for r in readers])

    def get(self, keys):
        """Each value as soon as it is there, one by one as the originals read them."""
        missing = list(keys)
        while missing:
            for key in list(missing):
                (value,) = self.store.get([key])
                if value is not None:
                    missing.remove(key)
                    yield key, value
            if missing:
                self.cursor = self.store.wait(f"to{self.rank}", self.cursor, timeout_s=1.0)


def siren(meeting, number, vector):
    """Everybody reads everybody."""
    meeting.put({f"{number}:{meeting.rank}": memoryview(vector)}, meeting.others)
    total = vector.copy()
    for _, value in meeting.get([f"{number}:{r}" for r in meeting.others]):
        total += np.frombuffer(value, vector.dtype)
    total /= meeting.workers
    return total


def master(meeting, number, vector):
    """Rank 0 reads everybody and writes the mean; it keeps its own part and the mean."""
    if meeting.rank:
        meeting.put({f"{number}:{meeting.rank}": memoryview(vector)}, [0])
        ((_, value),) = meeting.get([f"{number}:sum"])
        return np.frombuffer(value, vector.dtype)
    total = vector.copy()
    for _, value in meeting.get([f"{number}:{r}" for r in meeting.others]):
        total += np.frombuffer(value, vector.dtype)
    total /= meeting.workers
    meeting.put({f"{number}:sum": memoryview(total)}, meeting.others)
    return total


def scatter(meeting, number, vector):
    """Each worker adds up one of n shards."""
    n, rank = meeting.workers, meeting.rank
    cuts = [vector.size * i // n for i in range(n + 1)]
    mine = {
        f"{number}:{shard}:{rank}": memoryview(vector[cuts[shard] : cuts[shard + 1]])
        for shard in meeting.others
    }
    meeting.put(mine, meeting.others)
    own = vector[cuts[rank] : cuts[rank + 1]].copy()
    for _, value in meeting.get([f"{number}:{rank}:{r}" for r in meeting.others]):
        own += np.frombuffer(value, vector.dtype)
    own /= n
    meeting.put({f"{number}:{rank}": memoryview(own)}, meeting.others)
    total = np.empty_like(vector)
    total[cuts[rank] : cuts[rank + 1]] = own
    for key, value in meeting.get([f"{number}:{r}" for r in meeting.others]):
        shard = int(key.rpartition(":")[2])
        total[cuts[shard] : cuts[shard + 1]] = np.frombuffer(value, vector.dtype)
    return total


class Hierarchical:
    """The package's aggregator, kept from one synchronisation to the next as in a session."""

    def __init__(self, store, rank, workers):
        keys = FleetKeys("bench").generation("sync", 0)
        self.workers, self.number = workers, 0
        self.aggregator = HierarchicalAggregator(store, keys, rank=rank, workers=workers)

    def __call__(self, vector):
        weight = 1.0 / self.workers
        total, _ = self.aggregator.reduce(self.number, vector, weight=weight, check=1, leave=False)
        self.number += 1
        return total


class Gloo:
    """torch.distributed over loopback."""

    def __init__(self, folder, rank, workers):
        import torch
        import torch.distributed as distributed

        torch.set_num_threads(1)
        self.torch, self.distributed, self.workers = torch, distributed, workers
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/gloo", rank=rank, world_size=workers
        )

    def __call__(self, vector):
        tensor = self.torch.from_numpy(vector.copy())
        self.distributed.all_reduce(tensor)
        tensor /= self.workers
        return tensor.numpy()


def worker(url, folder, rank, workers, sizes, barrier, results):
    """One process: all sizes, all rounds, all ways in turn."""
    store = RedisStore(url)
    meeting, gloo = Meeting(store, rank, workers), Gloo(folder, rank, workers)
    ours = Hierarchical(store, rank, workers)
    ways = {
        "hierarchical": lambda number, vector: ours(vector),
        "scatter": lambda number, vector: scatter(meeting, number, vector),
        "master": lambda number, vector: master(meeting, number, vector),
        "siren": lambda number, vector: siren(meeting, number, vector),
        "gloo": lambda number, vector: gloo(vector),
    }
    server, samples, number = redis.Redis.from_url(url), [], 0
    for size_mb in sizes:
        vector = np.random.default_rng(rank).random(size_mb * 10**6 // 4, np.float32)
        mean = sum(
            np.random.default_rng(r).random(vector.size, np.float32) for r in range(workers)
        ) / np.float32(workers)
        for turn in range(rounds(size_mb, workers) + 1):
            for name, way in ways.items():
                number += 1
                before = net(server) if rank == 0 else None
                barrier.wait()
                begun, used = time.perf_counter(), time.process_time()
                total = way(number, vector)
                taken, used = time.perf_counter() - begun, time.process_time() - used
                assert np.allclose(total, mean, atol=1e-5), name
                barrier.wait()
                moved = None
                if rank == 0:
                    moved = [b - a for a, b in zip(before, net(server), strict=True)]
                if rank == 0 and name not in ("hierarchical", "gloo"):
                    store.delete_prefix(f"{number}:")
                if turn:  # the first one opens connections
                    samples.append((size_mb, name, turn, taken, used, moved))
    results.put((rank, samples))
    barrier.wait()
    gloo.distributed.destroy_process_group()
    server.close()
    store.close()


def net(server):
    """Bytes the server has received and sent so far."""
    info = server.info("stats")
    return info["total_net_input_bytes"], info["total_net_output_bytes"]


def formula(name, workers):
    """Bytes that a worker uploads and downloads on average, in gradients."""
    n = workers
    return {
        "hierarchical": (1.0, 2 * (1 - 1 / n)),
        "scatter": (1.0, 2 * (1 - 1 / n)),
        "master": (1.0, 2 * (1 - 1 / n)),
        "siren": (1.0, n - 1.0),
        "gloo": (0.0, 0.0),
    }[name]


def measure(workers):
    """All samples of one number of workers."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(workers), context.SimpleQueue()
    with EmbeddedStore() as server, tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=worker,
                args=(server.url, folder, rank, workers, SIZES_MB, barrier, results),
            )
            for rank in range(workers)
        ]
        for process in processes:
            process.start()
        try:
            found = dict(_next(results, processes) for _ in processes)
            for process in processes:
                process.join()
        finally:
            for process in processes:
                process.kill()
    cases = {}
    for rank in range(workers):
        for size_mb, name, turn, taken, used, moved in found[rank]:
            case = cases.setdefault((size_mb, name), {"s": {}, "cpu": {}, "moved": []})
            case["s"][turn] = max(case["s"].get(turn, 0.0), taken)
            case["cpu"][turn] = case["cpu"].get(turn, 0.0) + used
            if moved:
                case["moved"].append(moved)
    return [_case(workers, *key, case) for key, case in cases.items()]


def _next(results, processes):
    while results.empty():
        if any(p.exitcode not in (None, 0) for p in processes):
            raise RuntimeError("a worker died: see its traceback above")
        time.sleep(0.05)
    return results.get()


def _case(workers, size_mb, name, case):
    result = {"way": name, "workers": workers, "size_mb": size_mb}
    result["ms"] = common.summary([s * 1e3 for s in case["s"].values()])
    result["cpu_ms_per_worker"] = common.summary([s / workers * 1e3 for s in case["cpu"].values()])
    if name != "gloo":
        gradient = size_mb * 10**6 * workers
        for place, key in enumerate(("uploaded", "downloaded")):
            moved = common.summary([m[place] / gradient for m in case["moved"]])
            result[f"{key}_gradients"] = moved["median"]
            result[f"{key}_gradients_expected"] = round(formula(name, workers)[place], 5)
    return result


def draw(cases, facts):
    """Time by way: one panel per size; and bytes for the largest number of workers."""
    from matplotlib.ticker import LogLocator

    fig, axes = common.figure(1, len(SIZES_MB) + 1, figsize=(3.6 * (len(SIZES_MB) + 1), 4.4))
    for axis, size_mb in zip(axes, SIZES_MB, strict=False):
        for k, name in enumerate(WAYS):
            points = [c for c in cases if c["way"] == name and c["size_mb"] == size_mb]
            axis.plot(
                [c["workers"] for c in points],
                [c["ms"]["median"] for c in points],
                marker="o",
                color=common.COLOURS[k],
                label=WAYS[name],
                linewidth=2.4 if name == "hierarchical" else 1.4,
                linestyle="--" if name == "gloo" else "-",
            )
        axis.set_yscale("log")
        axis.set_xscale("log", base=2)
        axis.set_xticks(WORKERS, WORKERS)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.yaxis.set_minor_formatter("")
        axis.xaxis.set_minor_formatter("")
        axis.set_xlabel("workers")
        axis.set_title(f"{size_mb} MB", loc="left")
    axes[0].set_ylabel("one synchronisation, ms (median)")
    axes[0].legend(fontsize=8, loc="upper left")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low, high * 4)
    last, n = axes[-1], max(WORKERS)
    for k, name in enumerate(w for w in WAYS if w != "gloo"):
        points = [c for c in cases if c["way"] == name and c["size_mb"] == max(SIZES_MB)]
        moved = [c["uploaded_gradients"] + c["downloaded_gradients"] for c in points]
        size = (11, 8, 5, 8)[k]  # three coincide
        last.plot(
            [c["workers"] for c in points], moved, "o", color=common.COLOURS[k], markersize=size
        )
        counts = np.linspace(2, n, 50)
        expected = [sum(formula(name, c)) for c in counts]
        last.plot(counts, expected, color=common.COLOURS[k], linewidth=(4, 2.5, 1, 1.5)[k])
    last.set_xticks(WORKERS)
    last.set_ylim(0)
    last.set_xlabel("workers")
    last.set_ylabel("bytes up and down per worker, in gradients")
    last.set_title("Bytes: measured (dots), expected", loc="left")
    common.save_figure(fig, "sync", facts)


def main():
    facts = common.machine()
    import torch  # loaded once, before the workers are forked
    import torch.distributed  # noqa: F401

    cases = [case for workers in WORKERS for case in measure(workers)]
    common.save("sync", facts, {"cases": cases})
    draw(cases, facts)
    head = ("size, workers", *WAYS.values(), "ours: up, down", "formula")
    rows = []
    for size_mb in SIZES_MB:
        for workers in WORKERS:
            here = {
                c["way"]: c for c in cases if (c["size_mb"], c["workers"]) == (size_mb, workers)
            }
            ours = here["hierarchical"]
            rows.append(
                (
                    f"{size_mb} MB, {workers}",
                    *(f"{here[name]['ms']['median']:.1f}" for name in WAYS),
                    f"{ours['uploaded_gradients']:.3f} {ours['downloaded_gradients']:.3f}",
                    "{:.3f} {:.3f}".format(*formula("hierarchical", workers)),
                )
            )
    print("ms, slowest worker, median")
    common.table(head, rows)


if __name__ == "__main__":
    main()
