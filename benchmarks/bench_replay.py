"""Many whole jobs in virtual time, on the times that real allocations took.

``bench_siblings.py`` trains twelve jobs for real, once: too few to tell how often a limit is
broken. Here the same jobs run again and again on a simulated platform with the real scheduler and
resource manager. The time per iteration of an allocation is what the grid of that benchmark has
measured of it, its irregularities included; between the sizes of the grid it is interpolated in the
logarithms. In each tenth of a job its pace differs by chance.

*Shared* knows the profiles of the jobs before, *alone* does not. The ratio is what the goal
minimises over what it is on the best allocation of the grid that keeps the limit, at the usual
pace: nobody knows it beforehand, and it pays for no move. The error is that of the time and the
cost of the rest which were expected after ten iterations on the last allocation.

    python benchmarks/bench_replay.py     # about a minute
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # before numpy: every process has one core

import bench_siblings  # noqa: E402
import common  # noqa: E402
import numpy as np  # noqa: E402
import real_jobs  # noqa: E402

from smlt_tune.backend.goals import Cheapest, Fastest  # noqa: E402
from smlt_tune.backend.platforms.simulated import (  # noqa: E402
    SimulatedPlatform,
    SimulatedTraining,
    SimulationOptions,
)
from smlt_tune.backend.prices import load_prices  # noqa: E402
from smlt_tune.backend.resource_manager.manager import ResourceManager  # noqa: E402
from smlt_tune.backend.resource_manager.observations import (  # noqa: E402
    DEFAULT_STORE,
    Workload,
)
from smlt_tune.backend.simulated_fleet import SimulatedFleet  # noqa: E402

SIBLINGS = Path(__file__).parent / "results" / "siblings.json"
#: Standard deviations of the logarithm of the pace of a tenth of a job.
SPREADS = (0.03, 0.07)
REPETITIONS = 2 if common.QUICK else 8
TENTHS = 10
METHODS = ("shared", "alone")
#: A limit counts as broken beyond this share of it.
BROKEN = 0.02
#: Of the local platform: seconds until functions train, peak memory, MB.
COLD_S, WARM_S, LOAD_S, SAVE_S, PEAK_MB = 0.9, 0.3, 0.25, 0.05, 380.0


class Remembered(ResourceManager):
    """Keeps the newest profile of each allocation of each job."""

    def __init__(self, *args):
        super().__init__(*args)
        self.newest = {}

    def observe(self, profile):
        """As the manager does."""
        self.newest[profile.job_id, profile.allocation] = profile
        super().observe(profile)


def paces(grid):
    """Time per iteration by (workers, memory), interpolated between the sizes of a grid."""
    measured = {(c["workers"], c["memory_mb"]): c["iteration_s"] for c in grid}
    counts, sizes = (sorted({key[axis] for key in measured}) for axis in (0, 1))
    table = np.log([[measured[n, m] for n in counts] for m in sizes])

    def iteration_s(workers, memory_mb):
        ln_s = [np.interp(np.log(workers), np.log(counts), row) for row in table]
        slower = max(0.0, np.log(sizes[0] / memory_mb))  # below the grid: as its CPU share
        return float(np.exp(np.interp(np.log(memory_mb), np.log(sizes), ln_s) + slower))

    return iteration_s


def simulated(table, known, name, spread, seed, **options):
    """A fleet like the local platform, in virtual time, and its resource manager."""
    options = SimulationOptions(
        seed=seed,
        min_memory_mb=real_jobs.SMALLEST_MB,
        max_memory_mb=real_jobs.LARGEST_MB,
        concurrency=real_jobs.CONCURRENCY,
        cold_start_s=COLD_S,
        warm_start_s=WARM_S,
        pace_spread=spread,
        **options,
    )
    stores = {DEFAULT_STORE: table.stores["redis"]}
    manager = Remembered(table, stores, load_prices(), known)
    watched = real_jobs.Watched(manager)
    fleet = SimulatedFleet(SimulatedPlatform(options), policy=watched, name=name)
    return fleet, manager, watched


def whole_job(given, job, known, spread, seed):
    """One job; its row, and the profiles that it leaves."""
    table, (features, batch, iterations, function) = given
    each = round(iterations / TENTHS)
    work = Workload(features, batch, TENTHS * each, function)
    cheapest, limit = job["goal"] == "Cheapest", job["limit"]
    goal = Cheapest(deadline_s=limit) if cheapest else Fastest(budget_usd=limit)
    iteration_s = paces(job["grid"])
    training = SimulatedTraining(
        epochs=TENTHS,
        iterations=each,
        iteration_s=lambda n, memory_mb, batch: iteration_s(n, memory_mb),
        batch=batch,
        features=features,
        memory_mb=PEAK_MB,
        load_s=LOAD_S,
        save_s=SAVE_S,
    )
    name = f"sibling-{job['number']}"
    fleet, manager, watched = simulated(table, known, name, spread, seed)
    with fleet:
        outcome = fleet.submit(lambda config: training, {}, goal=goal, workload=work).result()
    minimised, limited = ("usd", "seconds") if cheapest else ("seconds", "usd")
    took = {"usd": outcome.cost_usd, "seconds": outcome.duration_s}
    best = min(cell[minimised] for cell in job["grid"] if cell[limited] <= limit)
    row = {
        "number": job["number"],
        "ratio": took[minimised] / best,
        "overshoot": max(0.0, took[limited] / limit - 1.0),
        "moves": len(outcome.allocations) - 1,
        **errors(watched.reviews, work.iterations, took),
    }
    return row, list(manager.newest.values())


def errors(reviews, iterations, took):
    """Of what was expected after ten iterations on the last allocation; empty if nobody asked."""
    run = SimpleNamespace(reviews=reviews, **took)
    said = bench_siblings.judged(SimpleNamespace(length=iterations), run)
    if said is None:
        return {}
    return {
        f"error_{what}": abs(said[f"expected_{what}"][1] / said[f"then_{what}"] - 1.0)
        for what in ("s", "usd")
    }


def project(given, method, spread, repetition):
    """All jobs, one after the other."""
    jobs, table, works = given
    rows, known = [], []
    for number, (job, work) in enumerate(zip(jobs, works, strict=True)):
        seed = 100 * repetition + number
        siblings = known if method == "shared" else []
        row, profiles = whole_job((table, work), job, siblings, spread, seed)
        known = known + profiles
        rows.append({"method": method, "spread": spread, "repetition": repetition, **row})
    return rows


def summary(rows, method, spread):
    """Of all jobs of a method at a spread."""
    here = [r for r in rows if (r["method"], r["spread"]) == (method, spread)]
    ratios, over = [r["ratio"] for r in here], np.array([r["overshoot"] for r in here])
    late = [r["ratio"] for r in here if r["number"] >= bench_siblings.JUDGED_SIBLING]
    return {
        "method": method,
        "spread": spread,
        "jobs": len(here),
        "ratio": round(float(np.median(ratios)), 3),
        "ratio_mean": round(float(np.mean(ratios)), 3),
        "ratio_p90": round(float(np.quantile(ratios, 0.9)), 3),
        "ratio_late": round(float(np.median(late)), 3),
        "broken": round(float(np.mean(over > BROKEN)), 4),
        "worst": round(float(over.max()), 4),
        "moves": round(float(np.mean([r["moves"] for r in here])), 2),
        "error_s": round(float(np.median([r["error_s"] for r in here if "error_s" in r])), 4),
        "error_usd": round(float(np.median([r["error_usd"] for r in here if "error_s" in r])), 4),
    }


def claims(summaries):
    """In words, with what was found; of the jobs that know their siblings."""
    found = []
    for one in summaries:
        if one["method"] == "shared":
            where = f"pace differs by {one['spread']:.0%}: "
            said = f"{where}limits broken by more than 2 % in at most 2 % of the jobs: "
            found.append(real_jobs.claim(f"{said}{one['broken']:.1%}", one["broken"] <= 0.02))
            off = max(one["error_s"], one["error_usd"])
            said = f"{where}time and cost expected after ten iterations off by less than 5 %: "
            found.append(real_jobs.claim(f"{said}{off:.1%}", off < 0.05))
    return found


def draw(rows, facts):
    """Ratios, sorted, by method and spread."""
    fig, axes = common.figure(1, len(SPREADS), figsize=(10, 4), sharey=True)
    for axis, spread in zip(axes, SPREADS, strict=True):
        for colour, method in zip(common.COLOURS, METHODS, strict=False):
            here = [r["ratio"] for r in rows if (r["method"], r["spread"]) == (method, spread)]
            share = 100 * (np.arange(len(here)) + 1) / len(here)
            axis.plot(share, sorted(here), color=colour, label=method)
        axis.axhline(1.1, color="#888888", lw=0.8, ls="--")
        axis.set_title(f"pace of a tenth of a job differs by {spread:.0%}", loc="left")
        axis.set(xlabel="jobs, %", ylim=(0.8, 2.0))
    axes[0].set_ylabel("over the best allocation of the grid")
    axes[0].legend()
    common.save_figure(fig, "replay", facts)


def recorded():
    """The jobs of the other benchmark, the platform's table, and what they compute."""
    jobs = json.loads(SIBLINGS.read_text(encoding="utf-8"))["siblings"]
    with real_jobs.Cloud() as cloud:
        table = cloud.table
    trainings = [bench_siblings.training_of(job["number"] - 1, quick=False) for job in jobs]
    works = [real_jobs.workload_of(training) for training in trainings]
    return jobs, table, [(w.features, w.batch, w.iterations, w.function) for w in works]


def main():
    facts = common.machine()
    given, rows = recorded(), []
    todo = product(METHODS, SPREADS, range(REPETITIONS))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for done in [pool.submit(project, given, *each) for each in todo]:
            rows += done.result()
    summaries = [summary(rows, *each) for each in product(METHODS, SPREADS)]
    common.table(tuple(summaries[0]), [tuple(line.values()) for line in summaries])
    result = {"summary": summaries, "claims": claims(summaries), "jobs": rows}
    common.save("replay", facts, result)
    draw(rows, facts)


if __name__ == "__main__":
    main()
