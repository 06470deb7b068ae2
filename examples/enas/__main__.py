"""An architecture search in which every candidate is a job of its own size.

python -m examples.enas                        # the macro search, some minutes on two cores
python -m examples.enas --space micro --budget 2 --platform local --out enas-micro
python -m examples.enas --small                # does it work? less than a minute
"""

import argparse
import csv
import json
import logging
import warnings
from contextlib import ExitStack
from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what NNI 3.0 imports is older than Python's newest warnings
    from nni.nas.evaluator import FunctionalEvaluator
    from nni.nas.experiment import NasExperimentConfig

import smlt_tune as smlt
from examples.enas.picture import draw
from examples.enas.spaces import SPACES
from examples.enas.training import load_data, search_candidate, train_from_scratch
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.backend.platforms.local.options import PRELOAD
from smlt_tune.integrations.nni import SmltNasExperiment
from smlt_tune.integrations.nni.enas import SmltEnas

#: Of the search: training samples of one candidate, all that there are, samples that judge.
SIZES = {
    "macro": {"samples": 1536, "of_samples": 40_000, "test_samples": 1000},
    "micro": {"samples": 1536, "of_samples": 40_000, "test_samples": 1000},
    "recurrent": {"samples": 1536, "of_samples": 12_000, "test_samples": 1000},
}
SMALL = {"samples": 256, "of_samples": 600, "test_samples": 100}
BATCH_SIZE = 64


def arguments():
    parser = argparse.ArgumentParser("examples.enas", description=__doc__.splitlines()[0])
    parser.add_argument("--space", choices=SPACES, default="macro")
    parser.add_argument("--budget", type=float, default=2.0, help="for everything, USD")
    parser.add_argument("--platform", default="local", help="where functions run")
    parser.add_argument("--candidates", type=int, default=80)
    parser.add_argument("--concurrency", type=int, default=4, help="candidates at once")
    parser.add_argument("--max-workers", type=int, default=4, help="of one candidate")
    parser.add_argument("--seconds", type=float, default=30.0, help="for one candidate")
    parser.add_argument("--epochs", type=int, default=4, help="of the best one in the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("enas-search"))
    parser.add_argument("--small", action="store_true", help="few candidates, few samples")
    options = parser.parse_args()
    if options.small:
        options.candidates, options.epochs, options.seconds = min(options.candidates, 6), 1, None
    return options


def search(options, fleet, sizes):
    """Runs the search; returns its candidates."""
    first = load_data(options.space, sizes["of_samples"], sizes["test_samples"])[0][0]
    config = NasExperimentConfig(
        "smlt",
        "simplified",
        max_trial_number=options.candidates,
        trial_concurrency=options.concurrency,
        experiment_working_directory=str(options.out / "nni"),
    )
    engine = config.execution_engine
    engine.metric = "accuracy"
    engine.goal, engine.trial_deadline_s = "cheapest", options.seconds
    engine.max_workers = options.max_workers
    # What is known of a candidate before it starts: the size of its model, and how long it trains.
    engine.dummy_input = [BATCH_SIZE, *first.shape[1:]]
    engine.dummy_dtype = str(first.dtype).removeprefix("torch.")
    engine.iterations = -(-min(sizes["samples"], len(first)) // BATCH_SIZE)
    evaluator = FunctionalEvaluator(
        search_candidate, kind=options.space, batch_size=BATCH_SIZE, **sizes
    )
    strategy = SmltEnas(seed=options.seed)
    experiment = SmltNasExperiment(
        SPACES[options.space](), evaluator, strategy, config, fleet=fleet
    )
    try:
        experiment.run()
    finally:
        experiment.stop()
    return experiment.candidates()


def platform(options, stack):
    """The platform by its name; the local one loads NNI once and not in every function."""
    if options.platform != "local":
        return options.platform
    needed = ("nni.nas.nn.pytorch", "nni.nas.evaluator", "smlt_tune.integrations.nni.enas")
    functions = max(options.concurrency, options.max_workers)
    return stack.enter_context(LocalPlatform(concurrency=functions, preload=(*PRELOAD, *needed)))


def row(candidate):
    """What the table and the picture show of a candidate that was trained."""
    outcome, last = candidate.job.result(), candidate.allocations[-1]
    features = candidate.workload.features
    return {
        "number": candidate.number,
        "parameters": features.parameters,
        "mflops_per_sample": features.flops_per_sample / 1e6,
        "workers": last.workers,
        "memory_mb": last.memory_mb,
        "seconds": outcome.duration_s,
        "samples_per_s": outcome.metrics["samples_per_s"],
        "cost_usd": candidate.cost_usd,
        "accuracy": candidate.metric,
        "sample": json.dumps(candidate.sample),
    }


def save(rows, folder):
    """The table, as a file."""
    with (folder / "candidates.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, folder / "candidates.png")


def main():
    options = arguments()
    logging.getLogger("nni").setLevel(logging.WARNING)
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = SMALL if options.small else SIZES[options.space]
    with ExitStack() as stack:
        where = platform(options, stack)
        fleet = smlt.Fleet(platform=where, budget_usd=options.budget, project=options.out)
        stack.enter_context(fleet)
        candidates = search(options, fleet, sizes)
        trained = [c for c in candidates if c.metric is not None]
        if not trained:
            raise SystemExit("no candidate was trained: " + "; ".join(c.error for c in candidates))
        rows = [row(c) for c in trained]
        save(rows, options.out)
        best = max(trained, key=lambda candidate: candidate.metric)
        print(
            f"{len(trained)} of {len(candidates)} candidates trained, {fleet.settled_usd:.6f} USD"
        )
        print(f"best: candidate {best.number}, accuracy {best.metric:.4f}: {best.sample}")
        final = fleet.submit(
            train_from_scratch,
            {
                "kind": options.space,
                "sample": dict(best.sample),
                "epochs": options.epochs,
                "batch_size": BATCH_SIZE,
                **sizes,
            },
            max_workers=options.max_workers,
        )
        for report in final.reports():
            print("from scratch, on the test set:", report.metrics)
        print(f"{fleet.settled_usd:.6f} USD in all; see {options.out}")


if __name__ == "__main__":
    main()
