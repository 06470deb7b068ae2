"""Allocation follows the size of candidates: an architecture search on the local platform.

The space is the macro search of the example (6 layers of 6 operations, skip connections, widths
from 2 to 64) with two hidden layers of 16 to 1,024 units before the classifier. So candidates
differ in what they compute (convolutions) and, independently, in what they synchronise
(parameters). The search begins with the widest network of the largest convolutions, like one for a
small network that is as good as a large one that is known; then follow random ones of at most half
its width. Each trains for 96 iterations of 32 images of Fashion-MNIST, with the same deadline:
1.15 x what the fastest allocation of a grid needs for the first. The goal is to be as cheap as that
allows.

*Fixed* is what a static system does: all candidates on the allocation of the grid that is best for
the first one, measured in this run. *Ours* is the NNI engine with the resource manager, which is
given the same measurements as profiles of its project, and the size of each candidate. Both get the
same candidates in the same order: the first alone, then up to 6 at once, as far as there are
functions; see real_jobs.py for the machine and its bills. So what small candidates leave free on
ours goes to others, and the search ends sooner; a fixed allocation of more than four functions
leaves no room for a second. A candidate of ours has to end within its deadline from its submission;
of fixed ones, the time that they wait for functions is not counted.

How much is saved depends on the mixture. A candidate like the first costs the same on both; one
that computes little wastes most of eight functions, the more so the smaller its batch: what is
bound by what it computes takes the same work wherever it is done. Without a deadline one function
would be cheapest for all.

    python benchmarks/bench_enas_sizes.py             # about 12 minutes; the machine must be quiet
    python benchmarks/bench_enas_sizes.py --quick     # about a minute: does it work?
"""

import argparse
import logging
import shutil
import statistics
import sys
import time
import warnings
from itertools import accumulate, product
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
from examples.enas.spaces import Macro
from examples.enas.training import accuracy
from examples.fashion import load_images
from smlt_tune.backend.platforms.local.options import PRELOAD
from smlt_tune.integrations.nni import SmltNasExperiment

WIDTHS, HIDDEN = [2, 4, 8, 16, 32, 64], [16, 64, 256, 1024]
IMAGES, JUDGES, BATCH = 3072, 512, 32
CANDIDATES, AT_ONCE, SEED = 40, 6, 0
#: Workers and memory of the grid, and how many images are trained on in a cell of it.
WORKERS, MEMORY_MB, CELL_IMAGES = (2, 3, 4, 6, 8), (1280, real_jobs.LARGEST_MB), 512
QUICK_WORKERS, QUICK_MEMORY_MB = (2, 4), (real_jobs.LARGEST_MB,)
QUICK_CANDIDATES, QUICK_IMAGES = 3, 1024
#: The deadline over the time of the fastest allocation of the grid.
TIGHT = 1.15
#: What functions need besides: loaded once.
NEEDED = ("nni.nas.nn.pytorch", "nni.nas.evaluator", "smlt_tune.integrations.nni.candidate")


class Headed(Macro):
    """The macro search space with two hidden layers."""

    def __init__(self):
        super().__init__(widths=WIDTHS)
        width, hidden = nni.choice("width", WIDTHS), nni.choice("hidden", HIDDEN)
        self.classifier = nn.Sequential(
            MutableLinear(width, hidden),
            nn.ReLU(),
            MutableLinear(hidden, hidden),
            nn.ReLU(),
            MutableLinear(hidden, 10),
        )


def train_candidate(model, images):
    """What the job of one candidate does; also tells the mean time of its iterations."""
    session = smlt.session()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    session.prepare(model, optimizer)
    born_s, ends = time.monotonic(), []
    for _ in session.epochs(1):
        for x, y in session.batches(data_set(images), BATCH):
            loss = functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ends.append(time.monotonic())
    if len(ends) < 2:  # the functions have changed at the very end: nothing else is known
        ends = [born_s, time.monotonic()]
    pace = np.diff(ends).mean()
    judged = accuracy(session, model, "judges")
    session.report(accuracy=judged, iteration_s=float(pace), ended=time.time())


class Given(Strategy):
    """Submits architectures in their order, and the second when the first has ended."""

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
            if sample is self._samples[0]:
                self.engine.wait_models()
        self.engine.wait_models()


def architectures(number):
    """The one that computes most, and random ones of at most half its width."""
    space = SimplifiedModelSpace.from_model(Headed())
    random = np.random.RandomState(SEED)
    drawn = [dict(space.random(random_state=random).sample) for _ in range(number - 1)]
    for sample in drawn:
        sample["width"] = int(random.choice(WIDTHS[:-1]))
    first = {**drawn[0], "width": WIDTHS[-1], "hidden": HIDDEN[1]}
    first.update({label: "conv5" for label in first if label.startswith("layer")})
    return [first, *drawn]


def data_set(images):
    """Name of the uploaded data set of so many images."""
    return f"{images} images"


def search(fleet, folder, samples, images, **engine):
    """Runs a search through NNI; returns its candidates, and when it began.

    Args:
        fleet: Where.
        folder: For NNI.
        samples: What to train, in this order.
        images: How many each trains on.
        **engine: Options of the engine.
    """
    config = NasExperimentConfig(
        "smlt", "simplified", max_trial_number=len(samples), trial_concurrency=AT_ONCE,
        experiment_working_directory=str(folder),
    )  # fmt: skip
    settings = {
        "metric": "accuracy",
        "dummy_input": [BATCH, 1, 28, 28],
        "iterations": images // BATCH,
        **engine,
    }
    for name, value in settings.items():
        setattr(config.execution_engine, name, value)
    evaluator = FunctionalEvaluator(train_candidate, images=images)
    experiment = SmltNasExperiment(Headed(), evaluator, Given(samples), config, fleet=fleet)
    begun = time.time()
    try:
        experiment.run()
    finally:
        experiment.stop()
    return experiment.candidates(), begun


def upload(fleet):
    """The data, once per fleet."""
    train, judge, _ = load_images(IMAGES, JUDGES)
    for number in (IMAGES, QUICK_IMAGES, CELL_IMAGES):
        fleet.upload(data_set(number), tuple(part[:number] for part in train))
    fleet.upload("judges", judge)


def grid(cloud, folder, first, images, sizes):
    """What the whole training of the first candidate takes by allocation: seconds, USD.

    Means of two passes, one in either direction: of single ones the luckiest would be the fastest.
    """
    found = {}
    with cloud.fleet(project=folder / "project") as fleet:
        upload(fleet)
        order = list(product(*sizes))
        for where in [*order, *reversed(order)]:
            options = dict(zip(("workers", "memory_mb"), where, strict=True))
            [short], _ = search(fleet, folder, [first], CELL_IMAGES, **options)
            outcome = short.job.result()
            rest_s = (images - CELL_IMAGES) // BATCH * outcome.metrics["iteration_s"]
            seconds = outcome.duration_s + rest_s
            cost_usd = outcome.cost_usd + cloud.usd(*where, rest_s)
            found.setdefault(where, []).append((seconds, cost_usd))
            print(f"{where[0]} x {where[1]} MB: {seconds:.1f} s", flush=True)
    return {where: tuple(np.mean(each, axis=0).tolist()) for where, each in found.items()}


def row(candidate, deadline_s, begun):
    """What is kept of a candidate; of one that was not trained, its size, and why.

    Args:
        candidate: Of a search that has ended.
        deadline_s: From its submission.
        begun: When the search began, as ``time.time`` says.
    """
    features = candidate.workload.features
    size = {"parameters": features.parameters, "flops_per_sample": features.flops_per_sample}
    if candidate.metric is None:
        return {**size, "error": candidate.error}
    outcome = candidate.job.result()
    ended_s = outcome.metrics["ended"] - begun
    # Decisions are dated from the first function, their evidence from the submission.
    last = candidate.decisions[-1]
    waited_s = max(0.0, last.evidence.get("elapsed_s", 0.0) - last.time_s)
    return {
        **size,
        "begun_s": ended_s - outcome.duration_s,
        "ended_s": ended_s,
        "waited_s": waited_s,
        "allocations": [[a.workers, a.memory_mb, a.time_s] for a in candidate.allocations],
        "decisions": [told(decision) for decision in candidate.decisions],
        "seconds": outcome.duration_s,
        "overshoot": max(0.0, (waited_s + outcome.duration_s) / deadline_s - 1.0),
        "usd": candidate.cost_usd,
        "samples_per_s": BATCH / outcome.metrics["iteration_s"],
        "accuracy": candidate.metric,
        "sample": dict(candidate.sample),
    }


def told(decision):
    """When, why, what was chosen, and what an iteration was expected to take there, seconds."""
    at, said = decision.allocation, decision.evidence.get("prediction", {})
    return [
        round(decision.time_s, 2),
        decision.occasion,
        decision.reason,
        at.workers,
        at.memory_mb,
        [round(seconds, 4) for seconds in said.get("iteration_s", ())],
    ]


def say(name, rows):
    """A line per candidate."""
    print(name)
    for number, each in enumerate(rows):
        if "error" in each:
            print(f"{number:3} {each['error']}")
            continue
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
    images = QUICK_IMAGES if quick else IMAGES
    there = len(load_images(images, JUDGES)[0][0])
    if there < images:
        raise SystemExit(f"only {there} of {images} images: apt-get install dataset-fashion-mnist")
    samples = architectures(QUICK_CANDIDATES if quick else CANDIDATES)
    wholes = grid(cloud, folder, samples[0], images, sizes)
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
            candidates, begun = search(fleet, folder, samples, images, **engine)
            cpu_share[method], _ = cloud.platform.take()
        methods[method] = [row(candidate, deadline_s, begun) for candidate in candidates]
        say(method, methods[method])
    return {
        "deadline_s": deadline_s,
        "batch": BATCH,
        "iterations": images // BATCH,
        "at_once": AT_ONCE,
        "fixed": fixed,
        "grid": [[*where, *whole] for where, whole in wholes.items()],
        "cpu_share": cpu_share,
        "candidates": methods,
    }


def virtual_cpus(each):
    """Of the allocation that a candidate ended on."""
    workers, memory_mb, _ = each["allocations"][-1]
    return workers * memory_mb / real_jobs.LARGEST_MB


def trained(result):
    """Rows of the candidates that both have trained: fixed, ours."""
    pairs = zip(result["candidates"]["fixed"], result["candidates"]["ours"], strict=True)
    both = [pair for pair in pairs if not any("error" in each for each in pair)]
    return tuple(zip(*both, strict=True))


def claims(result):
    """In words, with what was measured."""
    fixed, ours = trained(result)
    spread = {
        name: max(each[name] for each in ours) / min(each[name] for each in ours)
        for name in ("parameters", "flops_per_sample")
    }
    flops = [each["flops_per_sample"] for each in ours]
    cpus = [virtual_cpus(each) for each in ours]
    follows = float(np.corrcoef(ranks(flops), ranks(cpus))[0, 1])
    cheaper = sum(each["usd"] for each in fixed) / sum(each["usd"] for each in ours)
    sooner = searched_s(fixed) / searched_s(ours)
    late, late_fixed = ([each["overshoot"] for each in rows] for rows in (ours, fixed))
    in_time, in_time_fixed = (sum(o <= 0.02 for o in over) for over in (late, late_fixed))
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
        real_jobs.claim(
            "at least 3 x cheaper than fixed, or twice its throughput for no more money: "
            f"{cheaper:.1f} x cheaper, {sooner:.1f} x the throughput "
            f"({searched_s(fixed):.0f} s and {searched_s(ours):.0f} s)",
            cheaper >= 3.0 or (cheaper >= 1.0 and sooner >= 2.0),
        ),
        real_jobs.claim(
            f"deadlines kept within 2 %: by {in_time} of {len(late)}, worst over by "
            f"{100 * max(late):.1f} % (fixed: {in_time_fixed}, {100 * max(late_fixed):.1f} %)",
            in_time >= in_time_fixed,
        ),
        real_jobs.claim(
            f"no candidate is refused: {len(result['candidates']['ours']) - len(ours)} are",
            len(ours) == len(result["candidates"]["ours"]),
        ),
    ]


def searched_s(rows):
    """From the start of the first candidate to the end of the last one."""
    return max(each["ended_s"] for each in rows) - min(each["begun_s"] for each in rows)


def ranks(values):
    """Of each value among all, ties sharing their mean."""
    return [
        statistics.mean(i for i, other in enumerate(sorted(values)) if other == value)
        for value in values
    ]


def draw(result, facts):
    """Sizes and allocations of candidates; throughput and cost of the search, as in Fig. 13."""
    fig, axes = common.figure(4, 1, figsize=(8, 9.5))
    methods = dict(zip(("fixed", "ours"), trained(result), strict=True))
    numbers = range(1, len(methods["ours"]) + 1)
    size = {"parameters": ("o", 5), "flops_per_sample": ("s", 6)}
    for name, (marker, colour) in size.items():
        values = [each[name] for each in methods["ours"]]
        label = "parameters" if name == "parameters" else "operations per sample"
        axes[0].plot(numbers, values, marker, ms=4, color=common.COLOURS[colour], label=label)
    axes[0].set(yscale="log", ylabel="size of the model")
    samples = result["batch"] * result["iterations"] / 1e3
    for k, (method, rows) in enumerate(methods.items()):
        colour = common.COLOURS[k]
        shift = [number + (k - 0.5) * 0.4 for number in numbers]
        axes[1].bar(shift, [virtual_cpus(e) for e in rows], 0.4, color=colour, label=method)
        begun_s = min(each["begun_s"] for each in rows)
        ended = sorted((each["ended_s"] - begun_s, each["usd"]) for each in rows)
        at = [0.0, *(seconds for seconds, _ in ended)]
        usd = [0.0, *accumulate(usd for _, usd in ended)]
        done = [samples * number for number in range(len(at))]
        axes[2].step(at, done, where="post", color=colour, label=method)
        axes[3].step(at, [1e3 * u for u in usd], where="post", color=colour, label=method)
    axes[0].sharex(axes[1])
    axes[1].set(ylabel="virtual CPUs of all workers", xlabel="candidate")
    axes[2].sharex(axes[3])
    axes[2].set_ylabel("thousand samples trained")
    axes[3].set(ylabel="spent, thousandths of a USD", xlabel="seconds since the search began")
    for axis in axes:
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
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
