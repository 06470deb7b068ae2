"""Asynchronous successive halving under one budget: equal treatment, and by chance of promotion.

243 trials, eta = 3, rungs after 1, 3, 9 and 27 epochs, on the model of AWS Lambda of
``bench_simulated.py`` with 200 functions, in virtual time. A trial goes on from a rung if it is
among the best third of those that were there before it (ASHA as Optuna's pruner does it), otherwise
it is stopped; its place goes to a new one. *Equal* gives every trial the one allocation that is
fastest among those that the budget is expected to pay for; *by chance* gives each what
``sweeps/promotion.py`` chooses at every rung. Both see the same trials. The budget is enforced by
the ledger, and is a multiple of what the cheapest allocation is expected to need.

    python benchmarks/bench_async.py
    SMLT_BENCH_QUICK=1 python benchmarks/bench_async.py
"""

import os
import random
import statistics
from bisect import insort
from dataclasses import replace

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import common  # noqa: E402
from bench_simulated import ITERATIONS, MODEL, PLATFORM, STORES  # noqa: E402
from stages import workloads  # noqa: E402

from smlt_tune.backend.platforms.simulated import (  # noqa: E402
    SimulatedPlatform,
    SimulatedTraining,
)
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault  # noqa: E402
from smlt_tune.backend.simulated_fleet import SimulatedFleet  # noqa: E402
from smlt_tune.backend.sweeps.halving_rules import Schedule, geometric  # noqa: E402
from smlt_tune.backend.sweeps.promotion import Promotions, best_option  # noqa: E402

TRIALS, ETA, RUNGS, FUNCTIONS = (27, 3, 3, 50) if common.QUICK else (243, 3, 4, 200)
SEEDS = 2 if common.QUICK else 10
MULTIPLES = (1.25,) if common.QUICK else (1.1, 1.25, 1.5, 2.0)
SCHEDULE = Schedule("loss", maximize=False, rungs=geometric(1, ETA, RUNGS), factor=ETA)
EPOCHS = SCHEDULE.rungs[-1]


class Curves:
    """Losses that fall to different ends at different speeds, with noise."""

    def __init__(self, seed):
        chance = random.Random(seed)
        self._shapes = [
            (chance.gauss(0.5, 0.1), chance.uniform(0.3, 1.0), chance.uniform(0.4, 1.2))
            for _ in range(TRIALS)
        ]
        self._seed = seed

    def loss(self, trial, epoch):
        end, height, speed = self._shapes[trial]
        noise = random.Random(f"{self._seed}/{trial}/{epoch}").gauss(0.0, 0.01)
        return end + height * (epoch + 1) ** -speed + noise


def options(share):
    """Of a trial, for a share of its training."""
    return workloads.options_of(MODEL, round(share * EPOCHS), STORES)


def expected_usd(option_of):
    """What a search is expected to cost if one in ETA goes on at each rung."""
    return sum(TRIALS / ETA**k * option_of(k).cost_usd for k in range(RUNGS))


class Equal:
    """The fastest allocation for all that the budget is expected to pay for."""

    def __init__(self, tables, budget_usd):
        places = [one.allocation for one in tables[0]]
        able = [
            j for j in range(len(places)) if expected_usd(lambda k, j=j: tables[k][j]) <= budget_usd
        ]
        best = min(able, key=lambda j: sum(table[j].time_s for table in tables))
        self._place = places[best]

    def begins(self, trial):
        return self._place

    def goes_on(self, trial, rung, value, cost_usd):
        return self._place

    def ends(self, trial, rung, value, cost_usd):
        pass


class Asha:
    """One search.

    Args:
        curves: Of the trials.
        seconds: Of an iteration, by workers and memory.
        method: Chooses allocations.
        budget_usd: Of the fleet.
    """

    def __init__(self, curves, seconds, method, budget_usd):
        self.curves, self.method = curves, method
        self.seconds = seconds
        self.fleet = SimulatedFleet(
            SimulatedPlatform(replace(PLATFORM, concurrency=FUNCTIONS)),
            budget_usd=budget_usd,
            policy=PinnedOrDefault(),
            hang_timeout_s=600.0,
            tick_s=1.0,
        )
        self.results = [[] for _ in range(RUNGS)]
        self.begun, self.running, self.finished = 0, {}, []

    def describe(self, trial):
        return SimulatedTraining(
            epochs=EPOCHS,
            iterations=ITERATIONS,
            iteration_s=lambda workers, memory_mb: self.seconds[workers, memory_mb],
            metrics=lambda epoch: {"loss": self.curves.loss(trial, epoch)},
            load_s=workloads.load_s(MODEL, 1),
        )

    def run(self):
        with self.fleet.changes() as changes:
            self.begin()
            while self.running:
                change = changes.next()
                trial = int(change.job.job_id)
                if change.report is not None:
                    self.reported(trial, change.job, change.report)
                elif change.status in ("finished", "stopped", "failed"):
                    self.running.pop(trial, None)
                    self.begin()
        usd, seconds = self.fleet.ledger.settled_usd, self.fleet.now_s
        self.fleet.close()
        best = min(self.finished, default=None)
        return {
            "time_s": seconds,
            "cost_usd": usd,
            "finished": len(self.finished),
            "begun": self.begun,
            "loss": best and best[0],
            "best_at_s": best and best[1],
        }

    def begin(self):
        """New trials as long as there are functions."""
        while self.begun < TRIALS and sum(self.running.values()) < FUNCTIONS:
            trial, self.begun = self.begun, self.begun + 1
            place = self.method.begins(trial)
            job = self.fleet.submit(
                self.describe, trial, name=str(trial), lockstep=True, **vars(place)
            )
            job.acknowledge(SCHEDULE.rungs[0] - 1)
            self.running[trial] = place.workers

    def reported(self, trial, job, report):
        count = report.index + 1
        if count not in SCHEDULE.rungs:
            return
        rung, loss = SCHEDULE.rungs.index(count), report.metrics["loss"]
        results = self.results[rung]
        insort(results, loss)
        if rung == RUNGS - 1:
            self.finished.append((loss, self.fleet.now_s))
            self.method.goes_on(trial, rung, loss, report.cost_usd)
            job.acknowledge(count)
        elif loss <= results[max(1, len(results) // ETA) - 1]:
            place = self.method.goes_on(trial, rung, loss, report.cost_usd)
            if (place.workers, place.memory_mb) != (report.workers, report.memory_mb):
                job.resize(**vars(place))
            self.running[trial] = place.workers
            job.acknowledge(SCHEDULE.rungs[rung + 1] - 1)
        else:
            self.method.ends(trial, rung, loss, report.cost_usd)
            job.stop("not among the best")


def measure(multiple, seed, tables, seconds, least_usd):
    """Both methods on the same trials, with the same budget."""
    budget_usd = multiple * least_usd
    methods = {
        "equal": Equal(tables, budget_usd),
        "by chance": Promotions(SCHEDULE, TRIALS, options, budget_usd),
    }
    found = {
        name: Asha(Curves(seed), seconds, method, budget_usd).run()
        for name, method in methods.items()
    }
    return {"multiple": multiple, "seed": seed, "budget_usd": budget_usd, "methods": found}


def summary(rows):
    """Of each budget: medians over the seeds."""
    found = []
    for multiple in MULTIPLES:
        here = [row["methods"] for row in rows if row["multiple"] == multiple]

        def ratio(what, here=here):
            values = [
                each["by chance"][what] / each["equal"][what]
                for each in here
                if each["equal"][what] and each["by chance"][what]
            ]
            return {"median": statistics.median(values), "worst": max(values), "n": len(values)}

        better = [
            each["by chance"]["loss"] - each["equal"]["loss"]
            for each in here
            if each["equal"]["finished"] and each["by chance"]["finished"]
        ]
        found.append(
            {
                "multiple": multiple,
                "time": ratio("time_s"),
                "best_at": ratio("best_at_s"),
                "cost": ratio("cost_usd"),
                "loss_difference": {"median": statistics.median(better), "n": len(better)},
                "used": {
                    name: statistics.median(
                        row["methods"][name]["cost_usd"] / row["budget_usd"]
                        for row in rows
                        if row["multiple"] == multiple
                    )
                    for name in ("equal", "by chance")
                },
                "finished": {
                    name: statistics.median(each[name]["finished"] for each in here)
                    for name in ("equal", "by chance")
                },
            }
        )
    return found


def draw(rows, facts):
    """Time to the end and to the best trial, each search by itself."""
    fig, axes = common.figure(1, 2, figsize=(9, 3.6), sharey=True)
    for ax, (what, label) in zip(
        axes,
        {"time_s": "end of the search", "best_at_s": "end of its best trial"}.items(),
        strict=True,
    ):
        for colour, name in zip(common.COLOURS, ("equal", "by chance"), strict=False):
            points = [
                (row["multiple"], row["methods"][name][what] / 3600)
                for row in rows
                if row["methods"][name][what]
            ]
            ax.plot(*zip(*points, strict=True), "o", color=colour, label=name, alpha=0.5)
        ax.set_title(label, loc="left")
        ax.set_xlabel("budget / that of the cheapest allocation")
        ax.set_yscale("log")
    axes[0].set_ylabel("hours")
    axes[0].legend()
    common.save_figure(fig, "async", facts)


def main():
    facts = common.machine()
    tables = [options(SCHEDULE.share(k)) for k in range(RUNGS)]
    places = [one.allocation for one in tables[0]]
    epochs_s = workloads.epochs_s(MODEL, places, STORES).tolist()
    seconds = {
        (place.workers, place.memory_mb): s / ITERATIONS
        for place, s in zip(places, epochs_s, strict=True)
    }
    least_usd = expected_usd(lambda k: best_option(tables[k], 0.0))
    rows = [
        measure(multiple, seed, tables, seconds, least_usd)
        for multiple in MULTIPLES
        for seed in range(SEEDS)
    ]
    found = summary(rows)
    common.table(
        ("budget", "time", "best at", "cost", "loss difference", "used", "finished"),
        [
            (
                f"{each['multiple']} x",
                f"{each['time']['median']:.2f} (worst {each['time']['worst']:.2f})",
                f"{each['best_at']['median']:.2f} (worst {each['best_at']['worst']:.2f})",
                f"{each['cost']['median']:.2f}",
                f"{each['loss_difference']['median']:+.4f} (n = {each['loss_difference']['n']})",
                " / ".join(f"{used:.2f}" for used in each["used"].values()),
                " / ".join(f"{count:g}" for count in each["finished"].values()),
            )
            for each in found
        ],
    )
    print("by chance over equal treatment, medians; used and finished: equal / by chance")
    common.save("async", facts, {"model": MODEL.name, "summary": found, "rows": rows})
    draw(rows, facts)


if __name__ == "__main__":
    main()
