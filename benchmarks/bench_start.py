"""How long a worker takes to start: cold, warm, and a fresh interpreter beside them.

For every isolation that this machine offers: from ``invoke`` to the function's code, and to the end
of the first iteration that it trained, in a new instance (cold) and in one that has worked before
(warm). Beside it a fresh interpreter that imports torch and trains the same iteration. Then the
whole way: from ``Fleet.submit`` to the first iteration of a job. All are taken in turn.
"""

import queue
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import common

import smlt_tune as smlt
from smlt_tune.backend.platforms.base import Invocation
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.errors import PlatformError

KINDS = ("cgroup1", "cgroup2", "watchdog")
ROUNDS = 2 if common.QUICK else 20
PEER_ROUNDS = 1 if common.QUICK else 5
MEMORY_MB = 1769


def one_iteration():
    """Builds a small network and trains it once; imports torch if nobody has."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(800, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters())
    loss = nn.functional.cross_entropy(
        model(torch.randn(32, 1, 12, 12)), torch.randint(0, 10, (32,))
    )
    loss.backward()
    optimizer.step()


def function(payload):
    """What the platform runs: trains once, and writes down when it began and when it was done."""
    began = time.monotonic()
    one_iteration()
    Path(payload.decode()).write_text(f"{began} {time.monotonic()}")


def train(config):
    """The same as a job."""
    import time

    import torch
    from torch import nn

    session = smlt.session()
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(800, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters())
    model, optimizer = session.prepare(model, optimizer)
    data = torch.randn(32, 1, 12, 12), torch.randint(0, 10, (32,))
    for _ in session.epochs(1):
        for x, y in session.batches(data, 32):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            trained = time.monotonic()
    return trained


def start_once(platform, folder, number):
    """One invocation: milliseconds to the function's code and to the first iteration."""
    note, done = folder / f"{platform.isolation}-{number}", queue.SimpleQueue()
    called = time.monotonic()
    platform.invoke(Invocation(str(number), MEMORY_MB, 60.0, str(note).encode()), done.put)
    result = done.get()
    assert result.ending == "returned", result
    began, trained = map(float, note.read_text().split())
    return {
        "cold": result.cold,
        "code_ms": (began - called) * 1e3,
        "trained_ms": (trained - called) * 1e3,
    }


def interpreter_once():
    """A fresh interpreter: milliseconds until torch is there and until it has trained."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import torch; there = time.monotonic();"
        "import bench_start; again = time.monotonic(); bench_start.one_iteration();"
        "print(there, time.monotonic() - again)"
    )
    called = time.monotonic()
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    there, training_s = map(float, said.split())
    return {"code_ms": (there - called) * 1e3, "trained_ms": (there - called + training_s) * 1e3}


def job_once(fleet):
    """From ``submit`` to the first iteration, milliseconds."""
    called = time.monotonic()
    job = fleet.submit(train, workers=1, memory_mb=MEMORY_MB)
    return (job.result(timeout_s=60).value - called) * 1e3


def open_platforms(stack, keep_alive_s):
    """A platform for every isolation that works here, and why the others do not."""
    platforms, missing = {}, {}
    for kind in KINDS:
        try:
            platforms[kind] = stack.enter_context(
                LocalPlatform(
                    concurrency=1,
                    cores_per_vcpu=1.0,
                    keep_alive_s=keep_alive_s,
                    isolation=kind,
                    entry="bench_start:function",
                )
            )
        except PlatformError as error:
            missing[kind] = str(error).splitlines()[0]
    return platforms, missing


def measure():
    """All samples, in milliseconds, by what was started."""
    samples = {}

    def add(name, sample):
        for key in ("code_ms", "trained_ms"):
            samples.setdefault(name, {}).setdefault(key, []).append(sample[key])

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        warm, missing = open_platforms(stack, 60.0)
        cold, _ = open_platforms(stack, 0.0)
        local = stack.enter_context(
            LocalPlatform(concurrency=2, cores_per_vcpu=0.8, keep_alive_s=60.0)
        )
        fresh = stack.enter_context(
            LocalPlatform(concurrency=2, cores_per_vcpu=0.8, keep_alive_s=0.0)
        )
        fleets = {
            "job, warm": stack.enter_context(smlt.Fleet(platform=local)),
            "job, cold": stack.enter_context(smlt.Fleet(platform=fresh)),
        }
        for platform in (*warm.values(), *cold.values()):  # the helpers are still preloading
            start_once(platform, folder, "first")
        for fleet in fleets.values():
            job_once(fleet)
        for number in range(ROUNDS):
            for kind, platform in warm.items():
                sample = start_once(platform, folder, f"warm-{number}")
                add(f"{kind}, {'cold' if sample['cold'] else 'warm'}", sample)
            for kind, platform in cold.items():
                sample = start_once(platform, folder, f"cold-{number}")
                add(f"{kind}, {'cold' if sample['cold'] else 'warm'}", sample)
            for name, fleet in fleets.items():
                samples.setdefault(name, {}).setdefault("trained_ms", []).append(job_once(fleet))
            if number < PEER_ROUNDS:
                add("fresh interpreter", interpreter_once())
        samples["new platform"] = {"code_ms": [], "trained_ms": []}
    for number in range(min(2, PEER_ROUNDS)):
        with tempfile.TemporaryDirectory() as folder:
            called = time.monotonic()
            with LocalPlatform(
                concurrency=1, cores_per_vcpu=1.0, entry="bench_start:function"
            ) as platform:
                made_ms = (time.monotonic() - called) * 1e3
                sample = start_once(platform, Path(folder), number)
            add("new platform", {key: sample[key] + made_ms for key in ("code_ms", "trained_ms")})
    return samples, missing


def draw(starts, facts):
    """Bars on a logarithmic axis."""
    groups = ("warm", "cold", "job, warm", "job, cold", "new platform", "fresh interpreter")
    names = sorted(
        starts, key=lambda n: groups.index(n if n in groups else n.partition(", ")[2]), reverse=True
    )
    fig, axis = common.figure(figsize=(8, 0.45 * len(names) + 1.6))
    for offset, key, label, colour in (
        (0.19, "code_ms", "to the function's code (torch is loaded)", common.COLOURS[0]),
        (-0.19, "trained_ms", "to the end of the first trained iteration", common.COLOURS[1]),
    ):
        places = [i + offset for i, n in enumerate(names) if key in starts[n]]
        values = [starts[n][key]["median"] for n in names if key in starts[n]]
        bars = axis.barh(places, values, 0.36, label=label, color=colour)
        axis.bar_label(bars, [f" {v:,.0f}" if v >= 10 else f" {v:.1f}" for v in values], fontsize=8)
    axis.set_yticks(range(len(names)), [_words(n) for n in names])
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.grid(visible=False, axis="y")
    axis.margins(x=0.12)
    axis.set_xlabel("milliseconds from the call (median)")
    axis.set_title("Start of one worker", loc="left")
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.45, 1.06), ncols=2)
    common.save_figure(fig, "start", facts)


def _words(name):
    return {
        "new platform": "first function of a new platform",
        "fresh interpreter": "fresh interpreter, import torch",
        "job, warm": "job from submit(), warm",
        "job, cold": "job from submit(), cold",
    }.get(name, name)


def main():
    facts = common.machine()
    samples, missing = measure()
    starts = {
        name: {key: common.summary(values) for key, values in kinds.items()}
        for name, kinds in samples.items()
    }
    common.save("start", facts, {"starts": starts, "not_available": missing})
    draw(starts, facts)
    common.table(
        ("start of", "n", "function's code, ms", "first iteration, ms"),
        [
            (
                _words(name),
                len(kinds["trained_ms"]["samples"]),
                f"{kinds['code_ms']['median']:.1f}" if "code_ms" in kinds else "",
                f"{kinds['trained_ms']['median']:.1f}",
            )
            for name, kinds in starts.items()
        ],
    )
    for kind, why in missing.items():
        print(f"not on this machine: {kind} ({why})")


if __name__ == "__main__":
    main()
