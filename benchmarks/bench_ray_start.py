"""How long a worker takes to start on a Ray cluster, and what Ray's own tasks and actors take.

A cluster of one node on this machine. For functions of the platform ``ray``: from ``invoke`` to the
function's code and to the end of the first iteration that it trained, in a new actor (cold), in an
actor that has worked before (warm), and in an actor whose last function was killed (forked again).
Beside them plain Ray running the same iteration, called by the same program and without limits: a
new actor, one that has worked before, and a task. All are taken in turn.
"""

import os
import queue
import shutil
import tempfile
import time
from pathlib import Path

import common
from bench_start import MEMORY_MB, one_iteration

from smlt_tune.backend.platforms.base import Invocation
from smlt_tune.backend.platforms.ray_cluster import RayPlatform

ROUNDS = 1 if common.QUICK else 5


def function(payload):
    """What the platform runs: trains once, and writes down when it began and when it was done."""
    began = time.monotonic()
    note = payload.decode()
    if not note:
        os._exit(1)
    one_iteration()
    Path(note).write_text(f"{began} {time.monotonic()}")


def trained():
    """The same for plain Ray; times of one machine can be compared."""
    began = time.monotonic()
    one_iteration()
    return began, time.monotonic()


class Trainer:
    """An actor of plain Ray."""

    def train(self):
        return trained()


def start_once(platform, folder):
    """One invocation: milliseconds to the function's code and to the first iteration."""
    note, done = folder / f"{time.monotonic_ns()}", queue.SimpleQueue()
    called = time.monotonic()
    platform.invoke(Invocation(note.name, MEMORY_MB, 60.0, str(note).encode()), done.put)
    result = done.get()
    assert result.ending == "returned", result
    began, ended = map(float, note.read_text().split())
    return (began - called) * 1e3, (ended - called) * 1e3


def kill_once(platform):
    """Its function dies; the actor stays."""
    done = queue.SimpleQueue()
    platform.invoke(Invocation("dies", MEMORY_MB, 60.0, b""), done.put)
    assert done.get().ending == "crashed"


def plain_once(ray, call):
    """One call of plain Ray, in the same way."""
    called = time.monotonic()
    began, ended = ray.get(call())
    return (began - called) * 1e3, (ended - called) * 1e3


def measure(ray):
    """All samples, in milliseconds, by what was started."""
    samples = {}

    def add(name, times):
        for key, value in zip(("code_ms", "trained_ms"), times, strict=True):
            samples.setdefault(name, {}).setdefault(key, []).append(value)

    options = {"concurrency": 1, "entry": "bench_ray_start:function"}
    actors, tasks = ray.remote(num_cpus=1)(Trainer), ray.remote(num_cpus=1)(trained)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(ROUNDS):
            with RayPlatform(**options) as platform:
                add("function, cold", start_once(platform, folder))
                add("function, warm", start_once(platform, folder))
                kill_once(platform)
                add("function, forked again", start_once(platform, folder))
            actor = actors.remote()
            add("plain actor, cold", plain_once(ray, actor.train.remote))
            add("plain actor, warm", plain_once(ray, actor.train.remote))
            ray.kill(actor)
            add("plain task", plain_once(ray, tasks.remote))
    return samples


def main():
    import ray

    facts = common.machine()
    folder = tempfile.mkdtemp(prefix="smlt-ray-")
    os.environ.update(RAY_TMPDIR=folder, RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    ray.init(
        address="local", num_cpus=2, _memory=8 << 30, include_dashboard=False, log_to_driver=False
    )
    try:
        samples = measure(ray)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    starts = {
        name: {key: common.summary(values) for key, values in kinds.items()}
        for name, kinds in samples.items()
    }
    common.save("ray_start", facts | {"ray": ray.__version__}, {"starts": starts})
    common.table(
        ("start of", "n", "its code, ms", "first iteration, ms"),
        [
            (
                name,
                len(kinds["code_ms"]["samples"]),
                f"{kinds['code_ms']['median']:.1f}",
                f"{kinds['trained_ms']['median']:.1f}",
            )
            for name, kinds in starts.items()
        ],
    )


if __name__ == "__main__":
    main()
