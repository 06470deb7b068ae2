"""A search over the architecture of a small CNN: Ray Tune, ASHA, and functions that train.

The network and its training are those of examples/fashion.py. What makes its trials run on SMLT is
`register_smlt` and `SmltResources`; everything else is plain Ray Tune.

    python examples/ray_tune/architecture_search.py --trials 16 --epochs 8 --budget 0.05
"""

import argparse
import sys
from pathlib import Path

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from smlt_tune.integrations.ray import SmltResources, register_smlt, unregister_smlt

sys.path.insert(0, str(Path(__file__).parents[1]))
import fashion

SPACE = {
    "depth": tune.choice([1, 2, 3]),
    "width": tune.choice([4, 8, 16]),
    "kernel": tune.choice([3, 5]),
    "lr": tune.loguniform(5e-4, 2e-2),
    "batch_size": 64,
}


def search(options):
    """Runs the search; gives Tune's results."""
    register_smlt(platform="local", budget_usd=options.budget)
    tuner = tune.Tuner(
        tune.with_resources(fashion.train, SmltResources(max_workers=options.workers)),
        param_space={
            **SPACE,
            "epochs": options.epochs,
            "train_samples": options.samples,
            "test_samples": options.samples // 2,
        },
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            num_samples=options.trials,
            scheduler=ASHAScheduler(max_t=options.epochs, grace_period=1, reduction_factor=2),
        ),
        run_config=tune.RunConfig(name="architectures", storage_path=options.folder, verbose=1),
    )
    try:
        return tuner.fit()
    finally:
        unregister_smlt()


def main():
    """Searches, and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--samples", type=int, default=1000, help="images to train on")
    parser.add_argument("--workers", type=int, default=2, help="most functions of one trial")
    parser.add_argument("--budget", type=float, default=0.05, help="USD for the whole search")
    parser.add_argument("--folder", help="where Tune keeps results (default: ~/ray_results)")
    options = parser.parse_args()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    results = search(options)
    best = results.get_best_result()
    frame = results.get_dataframe()
    print(f"trained epochs: {frame.training_iteration.sum()} of {options.trials * options.epochs}")
    print(f"cost: {frame['smlt/cost_usd'].sum():.5f} of {options.budget} USD")
    print(f"best accuracy: {best.metrics['accuracy']:.3f} with {best.config}")
    print(f"its weights: {best.metrics['smlt/checkpoint']}")
    ray.shutdown()


if __name__ == "__main__":
    main()
