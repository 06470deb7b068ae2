"""Population-based training: learning rates that change while the trials train.

Every few epochs a trial that does badly becomes a copy of one that does well: it forks from that
trial's checkpoint, with the weights and the optimizer's momentum of the other and a learning rate
of its own.

    python examples/ray_tune/population.py --trials 4 --epochs 12
"""

import argparse
import sys
from pathlib import Path

import ray
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from smlt_tune.integrations.ray import SmltResources, register_smlt, unregister_smlt

sys.path.insert(0, str(Path(__file__).parents[1]))
import fashion


def search(options):
    """Trains the population; gives Tune's results."""
    register_smlt(platform="local", budget_usd=options.budget)
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=options.interval,
        quantile_fraction=0.5,
        hyperparam_mutations={"lr": tune.loguniform(1e-4, 3e-2)},
    )
    tuner = tune.Tuner(
        tune.with_resources(fashion.train, SmltResources(workers=1)),
        param_space={
            "depth": 2, "width": 8, "kernel": 3, "batch_size": 64, "epochs": options.epochs,
            "lr": tune.loguniform(1e-4, 3e-2),
            "train_samples": options.samples, "test_samples": options.samples // 2,
        },
        tune_config=tune.TuneConfig(
            metric="accuracy", mode="max", num_samples=options.trials, scheduler=scheduler
        ),
        run_config=tune.RunConfig(name="population", storage_path=options.folder, verbose=1),
    )  # fmt: skip
    try:
        return tuner.fit()
    finally:
        unregister_smlt()


def main():
    """Trains, and prints how each member has ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--interval", type=int, default=3, help="epochs between perturbations")
    parser.add_argument("--samples", type=int, default=1000, help="images to train on")
    parser.add_argument("--budget", type=float, default=0.05, help="USD for the whole population")
    parser.add_argument("--folder", help="where Tune keeps results (default: ~/ray_results)")
    options = parser.parse_args()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    results = search(options)
    for result in results:
        metrics = result.metrics
        print(
            f"accuracy {metrics['accuracy']:.3f} after {metrics['training_iteration']} epochs, "
            f"lr {result.config['lr']:.5f}, {metrics['smlt/cost_usd']:.5f} USD"
        )
    ray.shutdown()


if __name__ == "__main__":
    main()
