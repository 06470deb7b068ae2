"""ASHA and Hyperband under one budget: equal treatment, and by chance of promotion.

243 trials, eta = 3, rungs after 1, 3, 9 and 27 epochs, on the model of AWS Lambda of
``bench_simulated.py`` with 200 functions, in virtual time. A trial goes on from a rung if it is
among the best third of those that were there before it (ASHA as Optuna's pruner does it),
otherwise it is stopped; its place goes to a new one. Of Hyperband's brackets the boldest has these
rungs, each of the others one fewer; trials are spread over them as Optuna does it. *Equal* gives
every trial the one allocation that is fastest among those that the budget is expected to pay for;
*by chance* gives each what ``sweeps/promotion.py`` chooses at every rung. Both see the same trials.
The budget is enforced by the ledger, and is a multiple of what the cheapest allocation is expected
to need.

    python benchmarks/bench_async.py
    SMLT_BENCH_QUICK=1 python benchmarks/bench_async.py
"""

import os
import random
import statistics
from bisect import insort
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product

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
from smlt_tune.integrations.optuna.pruners import bracket_of  # noqa: E402

TRIALS, ETA, RUNGS, FUNCTIONS = (27, 3, 3, 50) if common.QUICK else (243, 3, 4, 200)
SEEDS = 2 if common.QUICK else 10
MULTIPLES = (1.25,) if common.QUICK else (1.1, 1.25, 1.5, 2.0)
EPOCHS = ETA ** (RUNGS - 1)
METHODS = ("equal", "by chance")


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


class Pruner:
    """Where trials are judged: in brackets, each with fewer rungs than the one before."""

    def __init__(self, brackets):
        self.brackets = [
            Schedule("loss", maximize=False, rungs=geometric(ETA**b, ETA, RUNGS - b), factor=ETA)
            for b in range(brackets)
        ]
        self.bracket_of = partial(bracket_of, "study", brackets, ETA)
        numbers = Counter(self.bracket_of(trial) for trial in range(TRIALS))
        # Of each segment: how many trials are expected to train it, and on what.
        self.segments = [
            (numbers[b] / ETA**k, options(schedule.share(k)))
            for b, schedule in enumerate(self.brackets)
            for k in range(len(schedule.rungs))
        ]

    def expected_usd(self, chosen):
        """What a search is expected to cost with an option of each segment."""
        return sum(number * chosen(options).cost_usd for number, options in self.segments)


PRUNERS = {"ASHA": Pruner(1), "Hyperband": Pruner(RUNGS)}


class Equal:
    """The fastest allocation for all that the budget is expected to pay for."""

    def __init__(self, pruner, budget_usd):
        every = options(1.0)
        able = [
            j
            for j in range(len(every))
            if pruner.expected_usd(lambda options, j=j: options[j]) <= budget_usd
        ]
        self._place = every[min(able, key=lambda j: every[j].time_s)].allocation

    def begins(self, trial):
        return self._place

    def goes_on(self, trial, rung, value, cost_usd):
        return self._place

    def ends(self, trial, rung, value, cost_usd):
        pass


class Search:
    """One search.

    Args:
        pruner: Where trials are judged.
        curves: Of the trials.
        seconds: Of an iteration, by workers and memory.
        method: Chooses allocations.
        budget_usd: Of the fleet.
    """

    def __init__(self, pruner, curves, seconds, method, budget_usd):
        self.pruner, self.curves, self.method = pruner, curves, method
        self.seconds = seconds
        self.fleet = SimulatedFleet(
            SimulatedPlatform(replace(PLATFORM, concurrency=FUNCTIONS)),
            budget_usd=budget_usd,
            policy=PinnedOrDefault(),
            hang_timeout_s=600.0,
            tick_s=1.0,
        )
        self.results = [[[] for _ in schedule.rungs] for schedule in pruner.brackets]
        self.begun, self.running, self.finished = 0, {}, []

    def describe(self, trial):
        return SimulatedTraining(
            epochs=EPOCHS,
            iterations=ITERATIONS,
            iteration_s=lambda workers, memory_mb, batch: self.seconds[workers, memory_mb],
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
            job.acknowledge(self.pruner.brackets[self.pruner.bracket_of(trial)].rungs[0] - 1)
            self.running[trial] = place.workers

    def reported(self, trial, job, report):
        count, bracket = report.index + 1, self.pruner.bracket_of(trial)
        rungs = self.pruner.brackets[bracket].rungs
        if count not in rungs:
            return
        rung, loss = rungs.index(count), report.metrics["loss"]
        results = self.results[bracket][rung]
        insort(results, loss)
        if count == rungs[-1]:
            self.finished.append((loss, self.fleet.now_s))
            self.method.goes_on(trial, rung, loss, report.cost_usd)
            job.acknowledge(count)
        elif loss <= results[max(1, len(results) // ETA) - 1]:
            place = self.method.goes_on(trial, rung, loss, report.cost_usd)
            if (place.workers, place.memory_mb) != (report.workers, report.memory_mb):
                job.resize(**vars(place))
            self.running[trial] = place.workers
            job.acknowledge(rungs[rung + 1] - 1)
        else:
            self.method.ends(trial, rung, loss, report.cost_usd)
            job.stop("not among the best")


def measure(name, multiple, seed, seconds):
    """Both methods on the same trials, with the same budget."""
    pruner = PRUNERS[name]
    budget_usd = multiple * pruner.expected_usd(lambda options: best_option(options, 0.0))
    by_chance = Promotions(
        pruner.brackets, TRIALS, options, budget_usd, bracket_of=pruner.bracket_of
    )
    methods = dict(zip(METHODS, (Equal(pruner, budget_usd), by_chance), strict=True))
    found = {
        method: Search(pruner, Curves(seed), seconds, chooses, budget_usd).run()
        for method, chooses in methods.items()
    }
    about = {"pruner": name, "multiple": multiple, "seed": seed, "budget_usd": budget_usd}
    return about | {"methods": found}


def summary(rows):
    """Of each pruner and budget: medians over the seeds."""
    found = []
    for name, multiple in product(PRUNERS, MULTIPLES):
        those = [r for r in rows if (r["pruner"], r["multiple"]) == (name, multiple)]
        here = [row["methods"] for row in those]

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
                "pruner": name,
                "multiple": multiple,
                "time": ratio("time_s"),
                "best_at": ratio("best_at_s"),
                "cost": ratio("cost_usd"),
                "loss_difference": {"median": statistics.median(better), "n": len(better)},
                "used": {
                    method: statistics.median(
                        row["methods"][method]["cost_usd"] / row["budget_usd"] for row in those
                    )
                    for method in METHODS
                },
                "finished": {
                    method: statistics.median(each[method]["finished"] for each in here)
                    for method in METHODS
                },
            }
        )
    return found


def draw(rows, facts):
    """Time to the end and to the best trial, each search by itself."""
    fig, axes = common.figure(1, 4, figsize=(14, 3.6), sharey=True)
    ends = {"time_s": "end of the search", "best_at_s": "end of its best trial"}
    for ax, (pruner, what) in zip(axes, product(PRUNERS, ends), strict=True):
        for colour, method in zip(common.COLOURS, METHODS, strict=False):
            points = [
                (row["multiple"], row["methods"][method][what] / 3600)
                for row in rows
                if row["pruner"] == pruner and row["methods"][method][what]
            ]
            ax.plot(*zip(*points, strict=True), "o", color=colour, label=method, alpha=0.5)
        ax.set_title(f"{pruner}: {ends[what]}", loc="left")
        ax.set_xlabel("budget / that of the cheapest allocation")
        ax.set_yscale("log")
    axes[0].set_ylabel("hours")
    axes[0].legend()
    common.save_figure(fig, "async", facts)


def main():
    facts = common.machine()
    places = [one.allocation for one in options(1.0)]
    epochs_s = workloads.epochs_s(MODEL, places, STORES).tolist()
    seconds = {
        (place.workers, place.memory_mb): s / ITERATIONS
        for place, s in zip(places, epochs_s, strict=True)
    }
    todo = product(PRUNERS, MULTIPLES, range(SEEDS))
    rows = [measure(*each, seconds) for each in todo]
    found = summary(rows)
    common.table(
        ("pruner", "budget", "time", "best at", "cost", "loss difference", "used", "finished"),
        [
            (
                each["pruner"],
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
