"""Jobs that end when they have reached a target, in virtual time, on curves of real trainings.

Nobody knows beforehand how many epochs such a job will take. Its allocation is chosen for those
that are left: the fewer they are, the fewer functions keep a deadline, and the more a budget
affords.

The jobs are the searches of ``curves/searches.json`` (``curves/record.py``): a dozen trainings of
one function, one after the other. They report the training loss that was recorded, and the target
is the value at which half of them end. The time per iteration of an allocation is one of those that
``bench_siblings.py`` has measured, by turns. Goals: the cheapest by the time that all epochs take
on three workers; the fastest for what all epochs cost where they cost least; 10 % more of either.
Scheduler, resource manager and ledger are the real ones. They learn from job to job; only what is
said of the epochs that are left differs:

* *all epochs*: nothing; the job just ends when it is there;
* *siblings' median*: that of the trainings before, once and for all, on one allocation (as LambdaML
  does with an estimate made beforehand);
* *CE-scaling's curve*: 1 / (a e + b) + c through the epochs so far;
* *ours*: the product, with the curves of the trainings before;
* *the truth*: from the beginning.

    python benchmarks/bench_targets.py            # some minutes of all cores
    SMLT_BENCH_QUICK=1 python benchmarks/bench_targets.py
"""

import math
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from unittest import mock

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # before numpy: every process has one core

import bench_loss_curves as curves  # noqa: E402
import common  # noqa: E402
import numpy as np  # noqa: E402
import real_jobs  # noqa: E402
from bench_replay import BROKEN, PEAK_MB, paces, recorded, simulated  # noqa: E402

from smlt_tune.backend import adaptation  # noqa: E402
from smlt_tune.backend.goals import Cheapest, Fastest, Target  # noqa: E402
from smlt_tune.backend.loss_curves import FEWEST, Forecast, forecast  # noqa: E402
from smlt_tune.backend.platforms.simulated import SimulatedTraining  # noqa: E402
from smlt_tune.backend.prices import load_prices  # noqa: E402
from smlt_tune.backend.resource_manager.observations import Interval, Workload  # noqa: E402
from smlt_tune.backend.resource_manager.policy import JobFacts  # noqa: E402

GOALS = ("Cheapest", "Fastest")
METHODS = {
    "all": "all epochs",
    "median": "siblings' median",
    "ce": "CE-scaling's curve",
    "ours": "ours",
    "truth": "the truth",
}
METRIC, MORE = "loss", 1.1
#: Trainings of a search.
TRIALS = 12
#: Of an epoch on three of the largest functions, seconds; where a worker says how it goes.
EPOCH_S, PROGRESS_S, USUAL = 20.0, 5.0, 3
#: Of the pace of an epoch.
SPREAD = 0.05


def there(values, target):
    """Epochs to the target; infinite if it is not reached."""
    return next((e for e, value in enumerate(values, 1) if value <= target), math.inf)


def foretold(epochs):
    """A forecast without doubt."""
    return Forecast(Interval(epochs, epochs, epochs), float(math.isfinite(epochs)))


def by_curve(values, target, **_):
    """What CE-scaling's curve says."""
    if len(values) < FEWEST:
        return None
    return foretold(curves.PEERS["ce"](np.array(values), target, 0.0))


def predictor(method, values, target):
    """What stands for the product's forecast, for one job."""
    if method == "truth":
        return lambda *_, **__: foretold(there(values, target))
    return {"ce": by_curve, "ours": forecast}.get(method, lambda *_, **__: None)


class Search:
    """One search by one method: its jobs, one after the other."""

    def __init__(self, given, number, goal, method):
        jobs, table, works = given
        self.number, self.goal_name, self.method = number, goal, method
        trainings = curves.by_search(curves.SEARCHES)[number][:TRIALS]
        self.values = [run["curves"][METRIC] for run in trainings]
        ends = [np.median(v[-curves.SMOOTHED :]) for v in self.values]
        self.target = float(np.median(ends))
        place = number % len(jobs)
        self.grid, self.table = jobs[place]["grid"], table
        self.features, self.batch, _, self.function = works[place]
        self.iteration_s = paces(self.grid)
        self.each = max(1, round(EPOCH_S / self.iteration_s(USUAL, real_jobs.LARGEST_MB)))

    def goal(self, epochs):
        """Of a job of at most so many epochs."""
        iterations = epochs * self.each
        if self.goal_name == "Cheapest":
            usual_s = self.iteration_s(USUAL, real_jobs.LARGEST_MB)
            return Cheapest(deadline_s=MORE * iterations * usual_s)
        second = float(load_prices().gb_second_usd)
        gb_s = min(c["workers"] * c["memory_mb"] / 1024 * c["iteration_s"] for c in self.grid)
        return Fastest(budget_usd=MORE * iterations * gb_s * second)

    def run(self):
        """A row for each job."""
        rows, took = [], []
        name = f"search-{self.number}"
        fleet, manager, _ = simulated(self.table, [], name, SPREAD, 0, progress_s=PROGRESS_S)
        with fleet:
            for trial, values in enumerate(self.values):
                if not values:
                    continue
                epochs = there(values, self.target)
                rows.append({"trial": trial, **self.job(fleet, manager, values, took)})
                rows[-1] |= {"epochs": min(epochs, len(values)), "most": len(values)}
                took.append(min(epochs, len(values)))
        about = {"search": self.number, "goal": self.goal_name, "method": self.method}
        return [about | row for row in rows]

    def job(self, fleet, manager, values, took):
        """One of them."""
        workload = Workload(self.features, self.batch, len(values) * self.each, self.function)
        training = SimulatedTraining(
            epochs=len(values),
            iterations=self.each,
            iteration_s=lambda n, memory_mb, batch: self.iteration_s(n, memory_mb),
            metrics=lambda epoch: {METRIC: values[epoch]},
            batch=self.batch,
            features=self.features,
            memory_mb=PEAK_MB,
        )
        goal, pinned = self.goal(len(values)), {}
        if self.method == "median" and took:
            left = round(np.median(took)) * self.each
            limits = fleet.platform.limits
            facts = JobFacts("next", limits, goal=goal, workload=workload, iterations_left=left)
            where = manager.plan(facts).chosen.allocation
            pinned = {"workers": where.workers, "memory_mb": where.memory_mb}
        said = predictor(self.method, values, self.target)
        with mock.patch.object(adaptation, "forecast", said):
            job = fleet.submit(
                lambda config: training,
                {},
                goal=goal,
                workload=workload,
                target=Target(METRIC, self.target, mode="min", best=0.0),
                **pinned,
            )
            outcome = job.result()
        cheapest = self.goal_name == "Cheapest"
        limit = next(iter(vars(goal).values()))
        used = outcome.duration_s if cheapest else outcome.cost_usd
        return {
            "seconds": outcome.duration_s,
            "usd": outcome.cost_usd,
            "minimised": outcome.cost_usd if cheapest else outcome.duration_s,
            "overshoot": max(0.0, used / limit - 1.0),
            "moves": len(outcome.allocations) - 1,
        }


def search(*given):
    """The rows of one search by one method."""
    return Search(*given).run()


def summary(rows, goal, method):
    """Of all jobs of a method with a goal; beside the truth, job by job."""
    best = {
        (r["search"], r["trial"]): r for r in rows if (r["goal"], r["method"]) == (goal, "truth")
    }
    here = [r for r in rows if (r["goal"], r["method"]) == (goal, method)]
    total, least = (sum(r["minimised"] for r in part) for part in (here, best.values()))
    ratios = [r["minimised"] / best[r["search"], r["trial"]]["minimised"] for r in here]
    return {
        "goal": goal,
        "method": method,
        "jobs": len(here),
        "total": round(total, 6),
        "over_truth": round(total / least, 3),
        "median_over_truth": round(float(np.median(ratios)), 3),
        "p90_over_truth": round(float(np.quantile(ratios, 0.9)), 3),
        "broken": round(float(np.mean([r["overshoot"] > BROKEN for r in here])), 4),
        "moves": round(float(np.mean([r["moves"] for r in here])), 2),
    }


def draw(found, facts):
    """Totals over those of the truth."""
    fig, axes = common.figure(1, 2, figsize=(10, 3.6), sharey=True)
    titles = ("cost of the cheapest in time", "time of the fastest in budget")
    for axis, goal, title in zip(axes, GOALS, titles, strict=True):
        here = [one for one in found if one["goal"] == goal]
        for k, one in enumerate(here):
            label = f"{one['over_truth']:.2f}  (limits broken: {100 * one['broken']:.0f} %)"
            axis.barh(METHODS[one["method"]], one["over_truth"], color=common.COLOURS[k])
            axis.text(0.05, k, label, va="center", color="white", fontsize=8)
        axis.axvline(1.0, color="#888888", lw=0.8, ls="--")
        axis.set_title(title, loc="left")
        axis.set_xlabel("over what knowing the epochs would take")
    axes[0].invert_yaxis()
    common.save_figure(fig, "targets", facts)


def main():
    facts = common.machine()
    numbers = range(2 if common.QUICK else len(curves.by_search(curves.SEARCHES)))
    given, rows = recorded(), []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        todo = product(numbers, GOALS, METHODS)
        for done in [pool.submit(search, given, *each) for each in todo]:
            rows += done.result()
    found = [summary(rows, *each) for each in product(GOALS, METHODS)]
    common.table(tuple(found[0]), [tuple(line.values()) for line in found])
    common.save("targets", facts, {"methods": METHODS, "summary": found, "jobs": rows})
    draw(found, facts)


if __name__ == "__main__":
    main()
