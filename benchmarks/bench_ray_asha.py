"""One ASHA search under plain Ray Tune, and the same one on functions, at equal cores and prices.

The training code is examples/fashion.py in both, and so are the configurations and the scheduler.
*Plain Ray* runs every trial in an actor with one CPU of two. *On functions* trials are jobs of a
fleet on the local platform with two functions of at most one core each (1,769 MB), each as fast as
can be; the allocation is the resource manager's choice. The fleet gets as its budget what plain
Ray has cost with the same seed, and as its deadline the time that it took. Ray's cluster and the
platform are up, and Tune and the resource manager imported, before the clock starts.

Jobs save their state with every report. So do the trials of plain Ray here, as Ray's documentation
has it (``tune.report(metrics, checkpoint=...)``), or a trial could not go on after a crash.

Plain Ray costs what functions of 1,769 MB would, from the start of each trial to its end: the start
of its actor is not counted, nor a CPU that waits. *Driver* is the CPU time of the process that runs
Tune, per result: on functions it holds the fleet as well, which decides on allocations. *Control*
adds the processes that work for it: Ray's servers and agents (they run in both searches), the
fleet's parameter store and the platform's helper.

    python benchmarks/bench_ray_asha.py            # 3 seeds, about 10 minutes
    python benchmarks/bench_ray_asha.py --quick    # one seed, 4 trials: does it work?
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import common

from examples import fashion
from smlt_tune.backend.platforms.base import MB_PER_VCPU
from smlt_tune.backend.prices import load_prices
from smlt_tune.runtime.session import Session

SEEDS = range(1) if common.QUICK else range(3)
TRIALS, EPOCHS, CORES = (4, 2, 2) if common.QUICK else (24, 9, 2)
SAMPLES = {"train_samples": 500 if common.QUICK else 4000, "test_samples": 500}
ARMS = ("plain Ray", "on functions")
#: Budget and deadline over what plain Ray has taken: a very short search has to pay first leases.
SLACK = 10.0 if common.QUICK else 1.0


class Told(Session):
    """A training outside of any fleet whose reports and states go to Ray Tune."""

    def prepare(self, *objects, **options):
        self.state = objects
        return super().prepare(*objects, **options)

    def report(self, **metrics):
        import torch
        from ray import tune

        with tempfile.TemporaryDirectory() as folder:
            torch.save([each.state_dict() for each in self.state], Path(folder, "state.pt"))
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


def in_an_actor(config):
    """What a user of plain Ray runs: the same training, on the actor's one CPU."""
    import torch

    torch.set_num_threads(1)
    with Told():
        fashion.train(config)


def nothing(config):
    """Starts a function."""


def watcher():
    """A callback that notes when trials begin, report and end, in seconds."""
    from ray import tune

    class Watcher(tune.Callback):
        def __init__(self):
            self.began, self.reports, self.held_s = {}, [], 0.0

        def on_trial_start(self, iteration, trials, trial, **info):
            self.began[trial.trial_id] = time.monotonic()

        def on_trial_result(self, iteration, trials, trial, result, **info):
            self.reports.append((time.monotonic(), result["accuracy"]))

        def on_trial_complete(self, iteration, trials, trial, **info):
            self.held_s += time.monotonic() - self.began[trial.trial_id]

    return Watcher()


def control_s():
    """CPU time so far of this process and of all that work for it and train nothing."""
    import psutil

    me, agents = psutil.Process(), []
    for each in me.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a function that ends meanwhile
            agents += [each] if "Agent" in each.name() else []
    return sum(sum(each.cpu_times()[:2]) for each in (me, *me.children(), *agents))


def drive(arm, seed, budget_usd, deadline_s):
    """One search, in a process of its own; prints what was measured."""
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    from smlt_tune import Fastest, Fleet
    from smlt_tune.backend.platforms.local import LocalPlatform
    from smlt_tune.integrations.ray import SmltResources, register_smlt, unregister_smlt

    folder, notes, platform = tempfile.mkdtemp(prefix="smlt-bench-"), watcher(), None
    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    if arm == "plain Ray":
        trainable = tune.with_resources(in_an_actor, {"CPU": 1})
    else:
        platform = LocalPlatform(concurrency=CORES, cores_per_vcpu=1.0)
        with Fleet(platform=platform) as first:  # both sides import for seconds
            first.submit(nothing, max_memory_mb=MB_PER_VCPU).result()
        fleet = Fleet(platform=platform, budget_usd=budget_usd, deadline_s=deadline_s)
        register_smlt(fleet)
        resources = SmltResources(goal=Fastest(), max_memory_mb=MB_PER_VCPU)
        trainable = tune.with_resources(fashion.train, resources)
    begun_s, cpu_s, all_s = time.monotonic(), time.process_time(), control_s()
    results = tune.Tuner(
        trainable,
        param_space={
            "depth": tune.choice([1, 2, 3]),
            "width": tune.choice([4, 8, 16]),
            "kernel": tune.choice([3, 5]),
            "lr": tune.loguniform(3e-4, 3e-2),
            "batch_size": tune.choice([32, 64, 128]),
            "epochs": EPOCHS,
            **SAMPLES,
        },
        tune_config=tune.TuneConfig(
            metric="accuracy", mode="max", num_samples=TRIALS,
            search_alg=BasicVariantGenerator(random_state=seed),
            scheduler=ASHAScheduler(max_t=EPOCHS, grace_period=1, reduction_factor=3),
        ),
        run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[notes]),
    ).fit()  # fmt: skip
    wall_s, cpu_s = time.monotonic() - begun_s, time.process_time() - cpu_s
    all_s = control_s() - all_s
    assert len(results.errors) < TRIALS, results.errors[0]
    if platform is None:
        cost_usd = notes.held_s * load_prices().invocation_usd(MB_PER_VCPU, 1.0)
    else:
        unregister_smlt()
        fleet.close()
        cost_usd = fleet.settled_usd
        platform.close()
    ray.shutdown()
    shutil.rmtree(folder)
    best, course = 0.0, []
    for at_s, accuracy in notes.reports:
        if accuracy > best:
            best = accuracy
            course.append((at_s - begun_s, best))
    figures = {
        "arm": arm, "seed": seed, "wall_s": wall_s, "cost_usd": cost_usd, "best_accuracy": best,
        "epochs": len(notes.reports), "trials": len(notes.began), "errors": len(results.errors),
        "driver_ms_per_result": 1e3 * cpu_s / len(notes.reports),
        "control_ms_per_result": 1e3 * all_s / len(notes.reports), "course": course,
        "budget_usd": budget_usd, "deadline_s": deadline_s,
    }  # fmt: skip
    print("MEASURED " + json.dumps(figures))


def measure(arm, seed, budget_usd=None, deadline_s=None):
    """Runs one search in a fresh process, without Tune's loggers."""
    environment = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    said = subprocess.run(
        [
            sys.executable, "-W", "ignore", __file__,
            "--drive", json.dumps([arm, seed, budget_usd, deadline_s]),
        ],
        check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment,
    ).stdout  # fmt: skip
    return next(json.loads(line[9:]) for line in said.splitlines() if line.startswith("MEASURED "))


def draw(runs, facts):
    """Best accuracy so far over time, and what each search took."""
    fig, axes = common.figure(1, 3, figsize=(11, 3.4), width_ratios=[2, 1, 1])
    for arm, colour in zip(ARMS, common.COLOURS, strict=False):
        of_arm = [run for run in runs if run["arm"] == arm]
        for number, run in enumerate(of_arm):
            times, found = zip(*run["course"], (run["wall_s"], run["best_accuracy"]), strict=True)
            axes[0].step(times, found, where="post", color=colour, label=None if number else arm)
        for axis, key, scale in ((axes[1], "wall_s", 1), (axes[2], "cost_usd", 1e3)):
            axis.scatter(
                [run["seed"] + 1 for run in of_arm],
                [scale * run[key] for run in of_arm],
                color=colour,
            )
    best = max(run["best_accuracy"] for run in runs)
    axes[0].set(xlabel="time, s", ylabel="best accuracy so far", ylim=(best - 0.12, best + 0.01))
    axes[0].legend()
    axes[1].set(xlabel="seed", ylabel="whole search, s", ylim=(0, None))
    axes[2].set(xlabel="seed", ylabel="cost, thousandths of a USD", ylim=(0, None))
    for axis in axes[1:]:
        axis.set_xticks([seed + 1 for seed in SEEDS])
    common.save_figure(fig, "ray_asha", facts)


def main():
    """Measures, prints, saves, draws."""
    facts, runs = common.machine(), []
    head = (
        "seed, search",
        "best accuracy",
        "wall s",
        "cost USD",
        "epochs",
        "driver ms/result",
        "control",
    )
    rows = []
    for seed in SEEDS:
        plain = measure(ARMS[0], seed)
        ours = measure(ARMS[1], seed, SLACK * plain["cost_usd"], SLACK * plain["wall_s"])
        runs += [plain, ours]
        rows += [
            (
                f"{seed} {run['arm']}", f"{run['best_accuracy']:.3f}", f"{run['wall_s']:.1f}",
                f"{run['cost_usd']:.5f}", run["epochs"], f"{run['driver_ms_per_result']:.1f}",
                f"{run['control_ms_per_result']:.1f}",
            )
            for run in (plain, ours)
        ]  # fmt: skip
    common.table(head, rows)
    medians = {
        arm: {
            key: statistics.median(run[key] for run in runs if run["arm"] == arm)
            for key in (
                "best_accuracy",
                "wall_s",
                "cost_usd",
                "driver_ms_per_result",
                "control_ms_per_result",
            )
        }
        for arm in ARMS
    }
    sizes = {"trials": TRIALS, "epochs": EPOCHS, "cores": CORES, **SAMPLES}
    common.save("ray_asha", facts, {**sizes, "medians": medians, "runs": runs})
    draw(runs, facts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="set by SMLT_BENCH_QUICK=1 as well")
    parser.add_argument("--drive", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.drive:
        drive(*given.drive)
    elif given.quick and not common.QUICK:
        os.execve(
            sys.executable,
            [sys.executable, *sys.argv],
            {**os.environ, "SMLT_BENCH_QUICK": "1"},
        )
    else:
        main()
