"""Allocation follows the size of candidates: an architecture search on the local platform.

The space is the macro search of the example (6 layers of 6 operations, skip connections, 4 widths)
with two hidden layers of 16 to 1,024 units before the classifier. So candidates differ in what they
compute (convolutions) and, independently, in what they synchronise (parameters). The search begins
with the architecture of the space that computes most, as a search that begins with a network known
to be good; then follow random ones, the same for all. Each trains alike on Fashion-MNIST, with the
same deadline: 1.25 x what the fastest allocation of a grid needs for the first. Its goal is to be
as cheap as that allows.

*Fixed* is what a static system does: all candidates on the allocation of the grid that is best for
the first one, measured in this run. (It is also the one that a static system must take to keep the
deadline of every candidate.) *Ours* is the NNI engine with the resource manager, which is given the
same measurements as profiles of its project, and the size of each candidate. How much is saved
depends on the mixture: a candidate like the first costs the same on both, and without a deadline
one function would be cheapest for all. Candidates train one after the other, because each may use
the whole machine; see real_jobs.py for that and its bills.

    python benchmarks/bench_enas_sizes.py             # about 8 minutes; the machine must be quiet
    python benchmarks/bench_enas_sizes.py --quick     # about a minute: does it work?
"""

import argparse
import logging
import math
import shutil
import statistics
import sys
import time
import warnings
from itertools import accumulate
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import nni
    from nni.nas.evaluator import FunctionalEvaluator
    from nni.nas.experiment import NasExperimentConfig
    from nni.nas.nn.pytorch import MutableLinear
    from nni.nas.space import SimplifiedModelSpace
    from nni.nas.strategy.base import Strategy

import common
import numpy as np
import real_jobs
from torch import nn
from torch.nn import functional
from torch.optim import SGD

import smlt_tune as smlt
from examples.enas.spaces import WIDTHS, Macro
from examples.enas.training import accuracy
from examples.fashion import load_images
from smlt_tune.backend.platforms.local.options import PRELOAD
from smlt_tune.integrations.nni import SmltNasExperiment

HIDDEN = [16, 64, 256, 1024]
SAMPLES, JUDGES, BATCH, EPOCHS = 3072, 512, 64, 1
CANDIDATES, SEED = 16, 0
#: Workers and memory of the grid, and how many samples are trained on in a cell of it.
WORKERS, MEMORY_MB, CELL_SAMPLES = (2, 3, 4, 6, 8), (1280, real_jobs.LARGEST_MB), 640
QUICK_WORKERS, QUICK_MEMORY_MB, QUICK_CANDIDATES = (2, 4), (real_jobs.LARGEST_MB,), 3
#: The deadline over the time of the fastest allocation of the grid.
TIGHT = 1.25
#: What functions need besides: loaded once.
NEEDED = ("nni.nas.nn.pytorch", "nni.nas.evaluator", "smlt_tune.integrations.nni.candidate")


class Headed(Macro):
    """The macro search space with two hidden layers."""

    def __init__(self):
        super().__init__()
        width, hidden = nni.choice("width", WIDTHS), nni.choice("hidden", HIDDEN)
        self.classifier = nn.Sequential(
            MutableLinear(width, hidden),
            nn.ReLU(),
            MutableLinear(hidden, hidden),
            nn.ReLU(),
            MutableLinear(hidden, 10),
        )


def train_candidate(model, epochs, images):
    """What the job of one candidate does; also tells the median time of its iterations."""
    session = smlt.session()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    session.prepare(model, optimizer)
    ends = []
    for _ in session.epochs(epochs):
        for x, y in session.batches(images, BATCH):
            loss = functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ends.append(time.monotonic())
    pace = statistics.median(np.diff(ends)) if len(ends) > 1 else 0.0
    session.report(accuracy=accuracy(session, model, "judges"), iteration_s=float(pace))


class Given(Strategy):
    """Submits architectures in their order."""

    def __init__(self, samples):
        super().__init__()
        self._samples = samples

    def state_dict(self):
        return {}  # nothing to resume

    def _run(self):
        for sample in self._samples:
            if not self.wait_for_resource():
                break
            self.engine.submit_models(self.model_space.freeze(sample))
        self.engine.wait_models()


def architectures(number):
    """The one that computes most, and random ones."""
    space = SimplifiedModelSpace.from_model(Headed())
    random = np.random.RandomState(SEED)
    drawn = [dict(space.random(random_state=random).sample) for _ in range(number - 1)]
    first = dict(drawn[0] if drawn else space.default().sample)
    for label in first:
        if label.startswith("layer"):
            first[label] = "conv5"
    return [{**first, "width": WIDTHS[-1], "hidden": HIDDEN[1]}, *drawn]


def search(fleet, folder, samples, *, epochs, images="images", **engine):
    """Runs a search through NNI; returns its candidates."""
    config = NasExperimentConfig(
        "smlt", "simplified", max_trial_number=len(samples), trial_concurrency=1,
        experiment_working_directory=str(folder),
    )  # fmt: skip
    trained = CELL_SAMPLES if images == "few images" else SAMPLES
    settings = {
        "metric": "accuracy",
        "dummy_input": [BATCH, 1, 28, 28],
        "iterations": epochs * math.ceil(trained / BATCH),
        **engine,
    }
    for name, value in settings.items():
        setattr(config.execution_engine, name, value)
    evaluator = FunctionalEvaluator(train_candidate, epochs=epochs, images=images)
    experiment = SmltNasExperiment(Headed(), evaluator, Given(samples), config, fleet=fleet)
    try:
        experiment.run()
    finally:
        experiment.stop()
    candidates = experiment.candidates()
    failed = [f"{c}: {c.error}" for c in candidates if c.metric is None]
    if failed:
        raise SystemExit("\n".join(failed))
    return candidates


def upload(fleet):
    """The data, once per fleet."""
    train, judge, _ = load_images(SAMPLES, JUDGES)
    fleet.upload("images", train)
    fleet.upload("few images", tuple(part[:CELL_SAMPLES] for part in train))
    fleet.upload("judges", judge)


def grid(cloud, folder, first, epochs, sizes):
    """What the whole training of the first candidate takes by allocation: seconds, USD."""
    found, iterations = {}, epochs * math.ceil(SAMPLES / BATCH)
    with cloud.fleet(project=folder / "project") as fleet:
        upload(fleet)
        for workers in sizes[0]:
            for memory_mb in sizes[1]:
                options = {"workers": workers, "memory_mb": memory_mb, "images": "few images"}
                [short] = search(fleet, folder, [first], epochs=1, **options)
                outcome = short.job.result()
                pace, done = outcome.metrics["iteration_s"], math.ceil(CELL_SAMPLES / BATCH)
                rest_s = (iterations - done) * pace
                found[workers, memory_mb] = (
                    outcome.duration_s + rest_s,
                    outcome.cost_usd + cloud.usd(workers, memory_mb, rest_s),
                )
                print(
                    f"{workers} x {memory_mb} MB: {found[workers, memory_mb][0]:.1f} s", flush=True
                )
    return found


def row(candidate, deadline_s):
    """What is kept of a candidate."""
    outcome, features = candidate.job.result(), candidate.workload.features
    return {
        "parameters": features.parameters,
        "flops_per_sample": features.flops_per_sample,
        "allocations": [[a.workers, a.memory_mb, a.time_s] for a in candidate.allocations],
        "why": candidate.decisions[0].reason if candidate.decisions else "pinned",
        "seconds": outcome.duration_s,
        "overshoot": max(0.0, outcome.duration_s / deadline_s - 1.0),
        "usd": candidate.cost_usd,
        "samples_per_s": BATCH / outcome.metrics["iteration_s"],
        "accuracy": candidate.metric,
        "sample": dict(candidate.sample),
    }


def say(name, rows):
    """A line per candidate."""
    print(name)
    for number, each in enumerate(rows):
        places = " -> ".join(f"{n} x {m}" for n, m, _ in each["allocations"])
        print(
            f"{number:3} {each['parameters'] / 1e3:8.1f} k parameters, "
            f"{each['flops_per_sample'] / 1e6:6.2f} MFLOP, {each['seconds']:5.1f} s, "
            f"{1e6 * each['usd']:7.1f} uUSD, {each['samples_per_s']:7.1f} samples/s, "
            f"over {100 * each['overshoot']:4.1f} %, {places}",
            flush=True,
        )


def run(cloud, folder, quick):
    """The grid, and the two searches."""
    sizes = (QUICK_WORKERS, QUICK_MEMORY_MB) if quick else (WORKERS, MEMORY_MB)
    epochs = 1 if quick else EPOCHS
    samples = architectures(QUICK_CANDIDATES if quick else CANDIDATES)
    wholes = grid(cloud, folder, samples[0], epochs, sizes)
    deadline_s = TIGHT * min(seconds for seconds, _ in wholes.values())
    in_time = {where: usd for where, (seconds, usd) in wholes.items() if seconds <= deadline_s}
    fixed = min(in_time, key=in_time.get)
    print(f"deadline {deadline_s:.1f} s; fixed {fixed}", flush=True)
    methods, cpu_share = {}, {}
    for method in ("fixed", "ours"):
        if method == "fixed":
            engine = {"workers": fixed[0], "memory_mb": fixed[1]}
            place = cloud.fleet()
        else:
            engine = {"goal": "cheapest", "trial_deadline_s": deadline_s}
            project = folder / "project"
            place = cloud.fleet(project=project, policy=cloud.manager(project))
        with place as fleet:
            upload(fleet)
            cloud.platform.take()
            candidates = search(fleet, folder, samples, epochs=epochs, **engine)
            cpu_share[method], _ = cloud.platform.take()
        methods[method] = [row(candidate, deadline_s) for candidate in candidates]
        say(method, methods[method])
    return {
        "deadline_s": deadline_s,
        "batch": BATCH,
        "iterations": epochs * math.ceil(SAMPLES / BATCH),
        "fixed": fixed,
        "grid": [[*where, *whole] for where, whole in wholes.items()],
        "cpu_share": cpu_share,
        "candidates": methods,
    }


def virtual_cpus(each):
    """Of the allocation that a candidate ended on."""
    workers, memory_mb, _ = each["allocations"][-1]
    return workers * memory_mb / real_jobs.LARGEST_MB


def claims(result):
    """In words, with what was measured."""
    fixed, ours = (result["candidates"][method] for method in ("fixed", "ours"))
    spread = {
        name: max(each[name] for each in ours) / min(each[name] for each in ours)
        for name in ("parameters", "flops_per_sample")
    }
    flops = [each["flops_per_sample"] for each in ours]
    cpus = [virtual_cpus(each) for each in ours]
    follows = float(np.corrcoef(ranks(flops), ranks(cpus))[0, 1])
    cheaper = sum(each["usd"] for each in fixed) / sum(each["usd"] for each in ours)
    late, late_fixed = (max(each["overshoot"] for each in rows) for rows in (ours, fixed))
    return [
        real_jobs.claim(
            f"sizes of candidates differ at least tenfold: parameters {spread['parameters']:.0f} x,"
            f" operations {spread['flops_per_sample']:.0f} x",
            min(spread.values()) >= 10,
        ),
        real_jobs.claim(
            f"allocations follow: virtual CPUs from {min(cpus):.2f} to {max(cpus):.2f}, rank "
            f"correlation with operations {follows:.2f}",
            follows >= 0.5,
        ),
        real_jobs.claim(f"at least 3 x cheaper than fixed: {cheaper:.1f} x", cheaper >= 3.0),
        real_jobs.claim(
            f"deadlines kept within 2 %: worst over by {100 * late:.1f} % (fixed: "
            f"{100 * late_fixed:.1f} %)",
            late <= 0.02,
        ),
    ]


def ranks(values):
    """Of each value among all, ties sharing their mean."""
    return [
        statistics.mean(i for i, other in enumerate(sorted(values)) if other == value)
        for value in values
    ]


def draw(result, facts):
    """Sizes, allocations, throughput and cost over the candidates, after the paper's Fig. 13."""
    fig, axes = common.figure(4, 1, figsize=(8, 9), sharex=True)
    methods = result["candidates"]
    numbers = range(1, len(methods["ours"]) + 1)
    size = {"parameters": ("o", 5), "flops_per_sample": ("s", 6)}
    for name, (marker, colour) in size.items():
        values = [each[name] for each in methods["ours"]]
        label = "parameters" if name == "parameters" else "operations per sample"
        axes[0].plot(numbers, values, marker, color=common.COLOURS[colour], label=label)
    axes[0].set(yscale="log", ylabel="size of the model")
    for k, (method, rows) in enumerate(methods.items()):
        colour = common.COLOURS[k]
        shift = [number + (k - 0.5) * 0.36 for number in numbers]
        axes[1].bar(shift, [virtual_cpus(e) for e in rows], 0.36, color=colour, label=method)
        speeds = [each["samples_per_s"] for each in rows]
        axes[2].plot(numbers, speeds, "o", color=colour, label=method)
        spent = [1e6 * usd for usd in accumulate(each["usd"] for each in rows)]
        axes[3].step(numbers, spent, where="post", color=colour, label=method)
    axes[1].set_ylabel("virtual CPUs of all workers")
    axes[2].set(yscale="log", ylabel="samples per second")
    axes[3].set(ylabel="spent so far, millionths of a USD", xlabel="candidate")
    for axis in axes:
        axis.legend(fontsize=8)
    axes[0].set_title(
        f"Candidates with a deadline of {result['deadline_s']:.1f} s each", loc="left"
    )
    common.save_figure(fig, "enas_sizes", facts)


def main():
    parser = argparse.ArgumentParser(description="Allocation follows the size of candidates.")
    parser.add_argument("--quick", action="store_true", default=common.QUICK)
    if parser.parse_args().quick:
        real_jobs.quickly()
    logging.getLogger("nni").setLevel(logging.WARNING)
    facts, begun = common.machine(), time.monotonic()
    folder = real_jobs.HERE / "results" / "tmp" / "enas_sizes"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with real_jobs.Cloud(preload=(*PRELOAD, *NEEDED)) as cloud:
        real_jobs.warm_up(cloud)
        result = {**cloud.facts(), **run(cloud, folder, common.QUICK)}
    result = {"claims": claims(result), "wall_s": round(time.monotonic() - begun), **result}
    common.save("enas_sizes", facts, result)
    draw(result, facts)


if __name__ == "__main__":
    main()
