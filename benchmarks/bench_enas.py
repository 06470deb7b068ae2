"""ENAS on real data: does the controller help, and do shared weights?

Four ways to search the same space of small convolutional networks (6 layers of 6 operations, skip
connections, 4 widths; examples/enas/spaces.py) on Fashion-MNIST at half its resolution, every
candidate a job of one function on the local platform, four at once, which trains for 16 steps:

* *ENAS*: the controller, with shared weights;
* *random, shared*: the same with a controller that does not learn;
* *controller, from scratch*: the controller, and no candidate inherits anything;
* *random, from scratch*: neither.

They are compared at equal cost: what the cheapest of the four has spent with the same seed. Until
then, *found* is the mean accuracy, on 512 images, of the last quarter of the candidates, and *best*
the highest of all. *Best, from scratch* is the accuracy on 512 other images of that one, trained
anew for 4 epochs. Functions are billed by CPU time, so that other load on the machine matters
little. The controller's default learning rate was chosen on other seeds.

    python benchmarks/bench_enas.py            # 5 seeds, about 15 minutes
    python benchmarks/bench_enas.py --quick    # 1 seed, 8 candidates: does it work?
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import nni
    from nni.nas.evaluator import FunctionalEvaluator
    from nni.nas.experiment import NasExperimentConfig
    from nni.nas.space import SimplifiedModelSpace, model_context

import common
import real_jobs
import torch
from torch.nn.functional import avg_pool2d

import smlt_tune as smlt
from examples.enas.spaces import Macro
from examples.enas.training import accuracy, load_data, some_of, train_epoch
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.backend.platforms.local.options import PRELOAD
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from smlt_tune.integrations.nni import SmltNasExperiment
from smlt_tune.integrations.nni.enas import SharedWeights, SmltEnas

#: Way to search: rate at which the controller learns, whether weights are shared.
ARMS = {
    "ENAS": (None, True),
    "random, shared": (0.0, True),
    "controller, from scratch": (None, False),
    "random, from scratch": (0.0, False),
}
SEEDS, CANDIDATES = (range(1), 8) if common.QUICK else (range(5), 100)
STEPS, BATCH, EPOCHS = 16, 48, 1 if common.QUICK else 4
TRAIN, JUDGE = 4096, 512
MEMORY_MB = 1769
#: What functions need besides: loaded once.
NEEDED = ("nni.nas.nn.pytorch", "nni.nas.evaluator", "smlt_tune.integrations.nni.enas")


def data():
    """(images, labels) to train on, to search by, to test on; images of half their edge."""
    parts = load_data("macro", TRAIN, JUDGE)
    return [(avg_pool2d(images, 2), labels) for images, labels in parts]


def candidate(model, share, seed):
    """What the job of one candidate does."""
    session = smlt.session()
    train, judge, _ = data()
    key = f"{seed} {json.dumps(nni.get_current_parameter().sample, sort_keys=True)}"
    train = some_of(train, STEPS * BATCH, key)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    weights = SharedWeights(model) if share else None
    session.prepare(model, optimizer, *([weights] if weights else []))
    for _ in session.epochs(1):
        train_epoch(session, model, optimizer, train, BATCH)
        if weights:
            weights.push()
        session.report(accuracy=accuracy(session, model, judge))


def from_scratch(config):
    """The whole training of one architecture; reports its accuracy on the test images."""
    session = smlt.session()
    train, _, test = data()
    with model_context(config["sample"]):
        model = Macro()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    session.prepare(model, optimizer)
    for _ in session.epochs(config["epochs"]):
        train_epoch(session, model, optimizer, train, BATCH)
    session.report(accuracy=accuracy(session, model, test))


def train_anew(fleet, sample, epochs):
    """A job that trains an architecture from scratch."""
    config = {"sample": sample, "epochs": epochs}
    return fleet.submit(from_scratch, config, workers=1, memory_mb=MEMORY_MB, seed=1)


def warm_up(platform):
    """Functions that have loaded everything: the first search must not pay for it."""
    sample = SimplifiedModelSpace.from_model(Macro()).default().sample
    with smlt.Fleet(platform=platform, policy=PinnedOrDefault()) as fleet:
        for job in [train_anew(fleet, sample, 1) for _ in range(4)]:
            job.result()


def search(platform, arm, seed):
    """Cost and accuracy of every candidate, in order, and their samples."""
    rate, share = ARMS[arm]
    options = {} if rate is None else {"learning_rate": rate}
    with (
        tempfile.TemporaryDirectory() as folder,
        smlt.Fleet(platform=platform, policy=PinnedOrDefault()) as fleet,
    ):
        config = NasExperimentConfig(
            "smlt", "simplified", max_trial_number=CANDIDATES, trial_concurrency=4,
            experiment_working_directory=folder,
        )  # fmt: skip
        engine = config.execution_engine
        engine.metric, engine.workers, engine.memory_mb, engine.seed = (
            "accuracy", 1, MEMORY_MB, seed,
        )  # fmt: skip
        evaluator = FunctionalEvaluator(candidate, share=share, seed=seed)
        strategy = SmltEnas(seed=seed, **options)
        experiment = SmltNasExperiment(Macro(), evaluator, strategy, config, fleet=fleet)
        try:
            experiment.run()
        finally:
            experiment.stop()
        done = [c for c in experiment.candidates() if c.metric is not None]
        return [(c.cost_usd, c.metric, dict(c.sample)) for c in done]


def judge(platform, runs):
    """Compares the ways at equal cost, for one seed."""
    totals = {arm: list(accumulate(cost for cost, _, _ in run)) for arm, run in runs.items()}
    limit = min(total[-1] for total in totals.values())
    result = {}
    with smlt.Fleet(platform=platform, policy=PinnedOrDefault()) as fleet:
        for arm, run in runs.items():
            number = max(1, bisect_right(totals[arm], limit))
            paid = run[:number]
            late = [metric for _, metric, _ in paid[-max(1, number // 4) :]]
            best = max(paid, key=lambda each: each[1])
            job = train_anew(fleet, best[2], EPOCHS)
            result[arm] = {
                "candidates": number,
                "found": statistics.mean(late),
                "best": best[1],
                "best_from_scratch": job.result().metrics["accuracy"],
                "curve": [
                    [total, metric]
                    for total, (_, metric, _) in zip(totals[arm], paid, strict=False)
                ],
            }
    return {"cost_usd": limit, "arms": result}


def claims(arms):
    """In words, with what was measured: medians of the seeds."""

    def better(one, other, name):
        pair = arms[one][name]["median"], arms[other][name]["median"]
        text = f"{one} over {other} at equal cost, {name}: {pair[0]:.3f} over {pair[1]:.3f}"
        return real_jobs.claim(text, pair[0] > pair[1])

    return [
        better("ENAS", "random, shared", "found"),
        better("controller, from scratch", "random, from scratch", "found"),
        better("ENAS", "controller, from scratch", "found"),
        better("random, shared", "random, from scratch", "found"),
        better("ENAS", "random, from scratch", "best_from_scratch"),
    ]


def draw(results, facts):
    """Accuracy of the candidates over the money, median of the seeds."""
    fig, axis = common.figure(figsize=(7, 4))
    bins = 12
    for colour, arm in zip(common.COLOURS, ARMS, strict=False):
        means = []
        for part in range(bins):
            values = []
            for result in results:
                limit, curve = result["cost_usd"], result["arms"][arm]["curve"]
                span = limit * part / bins, limit * (part + 1) / bins
                inside = [metric for total, metric in curve if span[0] < total <= span[1]]
                if inside:
                    values.append(statistics.mean(inside))
            means.append(statistics.median(values) if values else float("nan"))
        axis.plot([(part + 0.5) / bins for part in range(bins)], means, color=colour, label=arm)
    axis.set(
        xlabel="share of the money that was spent", ylabel="accuracy of candidates", ylim=(0, 1)
    )
    axis.legend()
    common.save_figure(fig, "enas", facts)


def main():
    logging.getLogger("nni").setLevel(logging.WARNING)
    facts, began = common.machine(), time.monotonic()
    results = []
    cores = len(os.sched_getaffinity(0))
    with LocalPlatform(
        concurrency=4, cores_per_vcpu=cores / 4 - 0.05, billing="cpu", preload=(*PRELOAD, *NEEDED)
    ) as platform:
        warm_up(platform)
        for seed in SEEDS:
            runs = {arm: search(platform, arm, seed) for arm in ARMS}
            results.append(judge(platform, runs))
            print(f"seed {seed} after {time.monotonic() - began:.0f} s", flush=True)
    rows, arms = [], {}
    for arm in ARMS:
        of = {
            name: common.summary([result["arms"][arm][name] for result in results])
            for name in ("candidates", "found", "best", "best_from_scratch")
        }
        arms[arm] = of
        rows.append([arm, *(f"{of[name]['median']:.3f}" for name in list(of)[1:])])
    common.table(["", "found", "best", "best, from scratch"], rows)
    common.save("enas", facts, {"claims": claims(arms), "arms": arms, "seeds": results})
    draw(results, facts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="set by SMLT_BENCH_QUICK=1 as well")
    if parser.parse_args().quick and not common.QUICK:
        os.environ["SMLT_BENCH_QUICK"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
