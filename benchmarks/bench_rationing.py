"""A sweep whose budget does not pay for all of its trials: what becomes of the money.

Trials follow recorded accuracies of real trainings on Fashion-MNIST, in random order, on a
simulated platform with the real scheduler and ledger. All start at once (*at once*), or so many
wait for functions that a quarter runs at a time (*in turn*). The fleet is given no metric: all go
on for as long as the money lasts; or a metric: it decides who goes on.

Figures: trials that finished; and the regret, by how much the best accuracy of a finished trial is
below that of the best of all trials, in points; a sweep that finished none has got nothing, and
counts as 100. The best that was reported on the way, which a user can have too from a checkpoint,
is given beside it.

    python benchmarks/bench_rationing.py
"""

import json
import random
from pathlib import Path

import common

from smlt_tune.backend.platforms.simulated import (
    SimulatedPlatform,
    SimulatedTraining,
    SimulationOptions,
)
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from smlt_tune.backend.simulated_fleet import SimulatedFleet
from smlt_tune.runtime.features import ModelFeatures

CURVES = Path(__file__).parent / "curves" / "curves.json"
SWEEPS = 2 if common.QUICK else 9
SHARES = (0.2, 0.4, 0.6)
WORKERS, MEMORY_MB = 2, 1769
ITERATIONS, ITERATION_S = 20, 1.0
FEATURES = ModelFeatures(10_000, 40_000, 6e4, 1e3)


def trials():
    """Accuracies by epoch of comparable trainings."""
    runs = json.loads(CURVES.read_text(encoding="utf-8"))
    return [run["curves"]["accuracy"] for run in runs if run["data"] == "fashion"]


def describe(curve):
    """A training that reports this curve."""
    return SimulatedTraining(
        epochs=len(curve),
        iterations=ITERATIONS,
        iteration_s=lambda workers, memory_mb, batch: ITERATION_S / workers,
        metrics=lambda epoch: {"accuracy": curve[epoch]},
        features=FEATURES,
        batch=32,
    )


def sweep(curves, *, parallel, budget_usd=None, metric=None):
    """One sweep; its outcomes and what it cost."""
    options = SimulationOptions(concurrency=WORKERS * parallel, progress_s=2.0)
    with SimulatedFleet(
        SimulatedPlatform(options),
        budget_usd=budget_usd,
        policy=PinnedOrDefault(),
        metric=metric,
        tick_s=0.5,
    ) as fleet:
        jobs = [
            fleet.submit(describe, curve, workers=WORKERS, memory_mb=MEMORY_MB) for curve in curves
        ]
        fleet.run_until_idle()
        return [job.result() for job in jobs], fleet.ledger.settled_usd


def judged(outcomes, spent_usd, budget_usd, best):
    """The figures of a sweep."""
    last = [o.metrics["accuracy"] for o in outcomes if o.status == "finished"]
    seen = [max(r.metrics["accuracy"] for r in o.reports) for o in outcomes if o.reports]
    return {
        "finished": len(last),
        "regret": 100 * (best - max(last, default=best - 1.0)),
        "regret_seen": 100 * (best - max(seen)),
        "spent": spent_usd / budget_usd,
    }


def measure(curves, total_usd, best, *, share, parallel, metric):
    """Medians over several orders of the trials."""
    cases = []
    for seed in range(SWEEPS):
        order = random.Random(seed).sample(curves, len(curves))
        budget_usd = share * total_usd
        ended = sweep(order, parallel=parallel, budget_usd=budget_usd, metric=metric)
        cases.append(judged(*ended, budget_usd, best))
    return {name: common.summary([case[name] for case in cases]) for name in cases[0]}


def main():
    """Everything."""
    facts = common.machine()
    curves = trials()
    best = max(curve[-1] for curve in curves)
    _, total_usd = sweep(curves, parallel=len(curves))
    found, rows = [], []
    for how, parallel in (("at once", len(curves)), ("in turn", len(curves) // 4)):
        for share in SHARES:
            for metric in (None, "accuracy"):
                case = measure(
                    curves, total_usd, best, share=share, parallel=parallel, metric=metric
                )
                found.append({"how": how, "share": share, "metric": metric, **case})
                finished, regret, seen, spent = case.values()
                row = [f"{finished['median']:g}", f"{regret['median']:.1f}"]
                row += [f"{seen['median']:.1f}", f"{spent['low']:.1%}"]
                rows.append([how, f"{share:.0%}", metric or "-", *row])
    head = ["start", "budget", "metric", "finished", "regret", "best seen", "spent at least"]
    common.table(head, rows)
    result = {"trials": len(curves), "sweeps": SWEEPS, "total_usd": total_usd, "cases": found}
    common.save("rationing", facts, result)
    draw(found, facts)


def draw(found, facts):
    """Regret over the budget."""
    fig, axes = common.figure(1, 2, figsize=(9, 3.4), sharey=True)
    for ax, how in zip(axes, ("at once", "in turn"), strict=True):
        for number, metric in enumerate((None, "accuracy")):
            cases = [c for c in found if c["how"] == how and c["metric"] == metric]
            shares = [100 * c["share"] for c in cases]
            label = "fleet with a metric" if metric else "fleet without"
            regret = [c["regret"]["median"] for c in cases]
            ax.plot(shares, regret, "o-", color=common.COLOURS[number], label=label)
        ax.set(title=f"trials start {how}", xlabel="budget, % of what all trials cost")
        ax.set_yscale("symlog", linthresh=1)
    axes[0].set_ylabel("below the best trial, points of accuracy")
    axes[0].legend()
    common.save_figure(fig, "rationing", facts)


if __name__ == "__main__":
    main()
