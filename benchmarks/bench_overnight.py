"""A night in two minutes: one search whose budget cannot pay for all of it, by Optuna and by us.

The training is examples/fashion.py (real data, networks of 3 to 70 thousand parameters), the
platform eight functions that share this machine as in real_jobs.py, billed by wall time. All three
searches draw from the same space (with learning rates from 1e-5 to 1e-1, as by somebody who knows
nothing of the task yet; where all configurations are good, no search is better than another) with
Optuna's TPE and the same seed, may begin 48 trials of nine epochs, and get the same budget, which
pays for a part of that:

* *Optuna*: jobs of two workers of 1,769 MB, four at once, as many whole trials as the budget pays;
* *Optuna, ASHA*: the same with Optuna's successive halving pruner;
* *smlt sweep*: what users get from a sweep file with ``pruner: {name: asha}`` and a budget: the
  fleet chooses workers and memory, and again whenever a trial has survived a rung.

Compared is the best accuracy that any trial has reported, on images that nobody trains on; the test
accuracy is that of the best trial that got to its last epoch, on images that nothing was chosen by.

    python benchmarks/bench_overnight.py            # 3 seeds, about 9 minutes
    python benchmarks/bench_overnight.py --quick    # one seed, tiny: does it work?
"""

import argparse
import json
import math
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import common
import optuna
import real_jobs
from real_jobs import LARGEST_MB, Cloud

from examples import fashion
from smlt_tune import Fleet
from smlt_tune.backend.sweeps.board import Board
from smlt_tune.backend.sweeps.report import write
from smlt_tune.backend.sweeps.sweep import load
from smlt_tune.errors import JobError
from smlt_tune.integrations import optuna as smlt_optuna
from smlt_tune.integrations.optuna.samplers import suggest
from smlt_tune.integrations.optuna.sweeps import run_sweep

ARMS = ("Optuna", "Optuna, ASHA", "smlt sweep")
WORKERS = 2
FACTOR = 3


@dataclass(frozen=True)
class Sizes:
    """Of the searches."""

    seeds: int
    trials: int
    epochs: int
    budget_usd: float
    train_samples: int
    test_samples: int

    @property
    def data(self):
        """What trainings are told of the data."""
        return {"train_samples": self.train_samples, "test_samples": self.test_samples}


FULL = Sizes(3, 48, 9, 0.009, 3000, 1000)
TINY = Sizes(1, 4, 3, 0.01, 300, 200)


class Course:
    """The best accuracy so far. May be told from several threads."""

    def __init__(self):
        self.began_s, self.best, self.points = time.monotonic(), 0.0, []
        self.reports, self.tested = 0, []
        self._lock = threading.Lock()

    def heard(self, _, report):
        """A job was submitted or has reported."""
        if report is None:
            return
        with self._lock:
            self.reports += 1
            accuracy = report.metrics["accuracy"]
            if "test_accuracy" in report.metrics:
                self.tested.append((accuracy, report.metrics["test_accuracy"]))
            if accuracy > self.best:
                self.best = accuracy
                self.points.append((time.monotonic() - self.began_s, accuracy))


def sweep_of(sizes, seed, folder):
    """The sweep file; all searches have their space from it."""
    document = {
        "name": "night",
        "train": f"{Path(fashion.__file__)}:train",
        "metric": "accuracy",
        "trials": sizes.trials,
        "parallel": real_jobs.CONCURRENCY,
        "space": {
            "depth": {"int": [1, 3]},
            "width": {"categorical": [4, 8, 16]},
            "kernel": {"categorical": [3, 5]},
            "lr": {"float": [1e-5, 1e-1], "log": True},
            "batch_size": {"categorical": [32, 64, 128]},
        },
        "config": {"epochs": sizes.epochs, **sizes.data},
        "pruner": {"name": "asha", "factor": FACTOR, "max_reports": sizes.epochs},
        "seed": seed,
        "budget_usd": sizes.budget_usd,
        "show": ["parameters", "test_accuracy"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "night.yaml"
    path.write_text(json.dumps(document), encoding="utf-8")  # JSON is YAML
    return load(path)


def by_optuna(sweep, fleet, course, pruner):
    """Fixed allocations."""

    def objective(trial):
        config = sweep.config_of(suggest(trial, sweep.space))
        outcome = smlt_optuna.run(
            trial, sweep.train, config, fleet=fleet, metric=sweep.metric,
            workers=WORKERS, memory_mb=LARGEST_MB, seed=sweep.seed, lockstep=True, first_step=1,
            watch=course.heard,
        )  # fmt: skip
        return outcome.metrics[sweep.metric]

    sampler = optuna.samplers.TPESampler(seed=sweep.seed)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    smlt_optuna.optimize(
        study, objective, n_trials=sweep.trials, fleet=fleet,
        max_parallel=real_jobs.CONCURRENCY // WORKERS, catch=(JobError,),
    )  # fmt: skip


def by_sweep(sweep, fleet, course):
    """What the command ``smlt sweep`` does with its file; writes its report."""
    board = Board(sweep, fleet)
    heard = board.watch

    def watch(trial, job, report):
        course.heard(job, report)
        heard(trial, job, report)

    board.watch = watch
    run_sweep(sweep, fleet, board)
    board.close("the sweep ended")
    write(board, fleet, sweep.path.parent / "report")


def search(cloud, arm, sizes, seed):
    """One search to its end; what it found and took."""
    sweep = sweep_of(sizes, seed, real_jobs.HERE / "results" / "tmp" / "overnight" / str(seed))
    ours = arm == ARMS[2]
    told = {"metric": "accuracy", "mode": "max"} if ours else {}
    with Fleet(platform=cloud.platform, budget_usd=sizes.budget_usd, **told) as fleet:
        course = Course()
        if ours:
            by_sweep(sweep, fleet, course)
        else:
            halving = optuna.pruners.SuccessiveHalvingPruner(reduction_factor=FACTOR)
            pruner = halving if arm == ARMS[1] else optuna.pruners.NopPruner()
            by_optuna(sweep, fleet, course, pruner)
        wall_s = time.monotonic() - course.began_s
        jobs = fleet.jobs()
        outcomes = [job.result(0.0) for job in jobs if job.status in ("finished", "stopped")]
    reported = [one for one in outcomes if one.reports]
    return {
        "arm": arm, "seed": seed, "best_accuracy": course.best,
        "test_accuracy": max(course.tested)[1] if course.tested else None,
        "cost_usd": fleet.settled_usd, "wall_s": wall_s, "begun": len(reported),
        "whole": len(course.tested), "epochs": course.reports,
        "sizes": len({one.reports[-1].metrics["parameters"] for one in reported}),
        "workers": sorted({a.workers for one in reported for a in one.allocations}),
        "moves": sum(len(one.allocations) - 1 for one in reported), "course": course.points,
    }  # fmt: skip


def draw(runs, sizes, facts):
    """Best accuracy so far over time, and where each search ended."""
    fig, axes = common.figure(1, 2, figsize=(10, 3.6), width_ratios=[2, 1])
    for place, (arm, colour) in enumerate(zip(ARMS, common.COLOURS, strict=False)):
        of_arm = [run for run in runs if run["arm"] == arm]
        for number, run in enumerate(of_arm):
            times, found = zip(*run["course"], (run["wall_s"], run["best_accuracy"]), strict=True)
            axes[0].step(times, found, where="post", color=colour, label=None if number else arm)
        best = [run["best_accuracy"] for run in of_arm]
        axes[1].scatter([place] * len(best), best, color=colour)
        axes[1].hlines(statistics.median(best), place - 0.25, place + 0.25, color=colour)
    top = max(run["best_accuracy"] for run in runs)
    axes[0].set(xlabel="time, s", ylabel="best accuracy so far", ylim=(top - 0.12, top + 0.01))
    axes[0].legend(loc="lower right")
    axes[1].set(ylabel=f"best accuracy for {sizes.budget_usd:g} USD", xlim=(-0.5, 2.5))
    axes[1].set_xticks(range(len(ARMS)), ARMS, fontsize=8)
    common.save_figure(fig, "overnight", facts)


def main(sizes):
    """Measures, prints, saves, draws."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    facts, runs = common.machine(), []
    with Cloud() as cloud:
        real_jobs.warm_up(cloud)
        for seed in range(sizes.seeds):
            turn = seed % len(ARMS)
            for arm in (*ARMS[turn:], *ARMS[:turn]):
                runs.append(run := search(cloud, arm, sizes, seed))
                print(json.dumps({key: run[key] for key in run if key != "course"}), flush=True)
        facts |= {"cloud": cloud.facts()}
    medians = {
        arm: {
            key: statistics.median(
                math.nan if run[key] is None else run[key] for run in runs if run["arm"] == arm
            )
            for key in ("best_accuracy", "test_accuracy", "cost_usd", "wall_s", "epochs", "whole")
        }
        for arm in ARMS
    }
    head = ("median of", "best accuracy", "test accuracy", "USD", "wall s", "epochs", "whole")
    common.table(
        head,
        [
            (
                arm, f"{of['best_accuracy']:.4f}", f"{of['test_accuracy']:.4f}",
                f"{of['cost_usd']:.5f}", f"{of['wall_s']:.0f}", f"{of['epochs']:.0f}",
                f"{of['whole']:.0f}",
            )
            for arm, of in medians.items()
        ],
    )  # fmt: skip
    best = {arm: of["best_accuracy"] for arm, of in medians.items()}
    claims = [
        real_jobs.claim(
            f"best accuracy at equal budget: {best[ARMS[2]]:.4f}, Optuna {best[ARMS[0]]:.4f}",
            best[ARMS[2]] > best[ARMS[0]],
        ),
        real_jobs.claim(
            "no search has spent more than its budget",
            all(run["cost_usd"] <= sizes.budget_usd for run in runs),
        ),
        real_jobs.claim(
            "the budget pays for no search's trials all to their end, and sizes differ",
            all(run["whole"] < sizes.trials and run["sizes"] >= 3 for run in runs),
        ),
    ]
    common.save(
        "overnight",
        facts,
        {**asdict(sizes), "medians": medians, "claims": claims, "runs": runs},
    )
    draw(runs, sizes, facts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny, says nothing")
    if parser.parse_args().quick:
        real_jobs.quickly()
        main(TINY)
    else:
        main(FULL)
