"""Following a batch size that doubles, in virtual time, on a synthetic truth.

``bench_adaptation.py`` does this with real training on the local platform, where all workers and
the store share two cores, and where a noisy grid decides which fixed allocation there is to beat.
Here the times are those of ``allocation/truth.py``, which documents where its structure differs
from the resource manager's model: nothing was measured on AWS. Scheduler, hand-overs, ledger and
resource manager are the real ones, on the simulated platform.

A job of sixteen epochs begins with a batch of 128 and doubles it after the first one, and nobody
knew. Its goal is to be the cheapest within a deadline, of so many times what the fastest allocation
would take if nothing changed. *Fixed* is what a static system can do at best: the cheapest
allocation that would keep the deadline if nothing changed, by the truth itself. *Ours* is the
resource manager, which is given profiles of some allocations of the first configuration, with the
noise of measurements. *Hindsight* is the best fixed allocation for what really happens, by the
truth.

How much there is to be saved depends on two things. The nearer the deadline is to what is possible
at all, the more functions are needed to keep it, and the less each of them is used. And on the
parameter store: where its bandwidth is what limits, synchronisation takes longer the more workers
there are. With computation C / n and synchronisation b n, the fastest is n = sqrt(C / b), and with
half the iterations 0.59 times as many workers keep the same deadline: 22 % cheaper, no more. Where
something takes its time whatever n is (links, latency, the optimizer) there is more. So all is done
with a store of one node and with one of ten.

    python benchmarks/bench_batching.py       # a minute of all cores
    SMLT_BENCH_QUICK=1 python benchmarks/bench_batching.py
"""

import copy
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # before numpy: every process has one core

import common  # noqa: E402
import numpy as np  # noqa: E402
import real_jobs  # noqa: E402
from allocation import truth  # noqa: E402

from smlt_tune.backend.goals import Cheapest  # noqa: E402
from smlt_tune.backend.platforms.simulated import (  # noqa: E402
    SimulatedPlatform,
    SimulatedTraining,
    SimulationOptions,
)
from smlt_tune.backend.resource_manager.manager import ResourceManager  # noqa: E402
from smlt_tune.backend.resource_manager.observations import Allocation, Workload  # noqa: E402
from smlt_tune.backend.simulated_fleet import SimulatedFleet  # noqa: E402

METHODS = ("fixed", "ours", "hindsight")
FAMILIES = 3 if common.QUICK else 24
#: Deadlines over the least time that is possible; the first is that of ``bench_adaptation.py``.
SLACKS = (1.02, 1.1, 1.25, 1.5)
#: Sizes of the parameter store; and where something is claimed.
NODES, CLAIMED = (1, 10), (10, 1.02)
#: A limit counts as broken beyond this share of it.
BROKEN = 0.02
EPOCHS, SMALL_EPOCHS, GROWTH = 16, 1, 2
#: Batch size at the beginning, and what the fastest allocation would need for all of it, seconds.
BATCH, FASTEST_S = 128, 900.0
#: Profiles of the first configuration: iterations of each, and where.
PROFILED, WORKERS, MEMORY_MB = 20, (1, 2, 4, 8, 16, 32, 64), (1769, 3538, 7076, 10240)
#: Standard deviation of the logarithm of the pace of an epoch, and how often workers say how it
#: goes, seconds.
SPREAD, PROGRESS_S = 0.03, 5.0


class Growing:
    """A job of the truth whose batch size doubles.

    Args:
        seed: Of the family.
        nodes: Times the bandwidth of its parameter store.
    """

    def __init__(self, seed, nodes):
        self.family = truth.Family(seed)
        for stores in (self.family.real_stores, self.family.stores):
            for name, store in stores.items():
                stores[name] = replace(store, bandwidth=nodes * store.bandwidth)
        self.before, self.after = (copy.copy(self.family.candidate(0)) for _ in range(2))
        self.before.batch, self.after.batch = BATCH, GROWTH * BATCH
        self._lay_out()
        # As many iterations as the fastest allocation does in the time, the same in every epoch.
        fastest_s = np.where(self.fits, self.iteration_s[0], np.inf).min()
        each = GROWTH * max(1, round(FASTEST_S / fastest_s / EPOCHS / GROWTH))
        later = EPOCHS - SMALL_EPOCHS
        self.batches = [BATCH] * SMALL_EPOCHS + [self.after.batch] * later
        self.iterations = [each] * SMALL_EPOCHS + [each // GROWTH] * later
        self.features = self.before.workload.features
        self.expected = Workload(self.features, BATCH, EPOCHS * each, "train")

    def _lay_out(self):
        """Everything on which it could run, and how fast."""
        sizes = [np.unique([*np.geomspace(truth.MIN_MB, truth.MAX_MB, 40).round(), 1769])]
        numbers = np.unique(np.geomspace(1, truth.MAX_WORKERS, 60).round())
        self.workers, self.memory_mb = np.meshgrid(numbers, *sizes, indexing="ij")
        self.fits = self.after.fits(self.workers, self.memory_mb)
        self.iteration_s = [
            candidate.iteration_s(self.workers, self.memory_mb)
            for candidate in (self.before, self.after)
        ]

    def whole(self, small, large):
        """Time and cost of so many iterations of either batch size, on every allocation."""
        training = small * self.iteration_s[0] + large * self.iteration_s[1]
        seconds = np.where(self.fits, self.family.start_s + training, np.inf)
        return seconds, self.before.usd(self.workers, self.memory_mb, seconds)

    def cheapest(self, seconds, usd, deadline_s):
        """The best allocation in time."""
        at = np.unravel_index(np.argmin(np.where(seconds <= deadline_s, usd, np.inf)), usd.shape)
        return Allocation(int(self.workers[at]), int(self.memory_mb[at]))

    def profiles(self):
        """What a project knows of the first configuration."""
        rng = np.random.default_rng([self.family.seed, 4])
        places = [Allocation(n, m) for n, m in product(WORKERS, MEMORY_MB)]
        found = [self.before.measure(where, rng, PROFILED) for where in places]
        # The candidate was drawn with another batch size.
        return [replace(one, workload=self.expected) for one in found if not one.out_of_memory]

    def training(self):
        """As the simulated platform runs it."""
        of = {candidate.batch: candidate for candidate in (self.before, self.after)}
        return SimulatedTraining(
            epochs=EPOCHS,
            iterations=self.iterations,
            iteration_s=lambda n, m, batch: float(of[batch].iteration_s(n, m)),
            batch=self.batches,
            features=self.features,
            memory_mb=300.0,  # that memory may not be enough is another benchmark's
            save_s=self.before.pause_s / 2,
            load_s=self.before.pause_s / 2,
        )

    def run(self, goal, where=None):
        """The job, on an allocation or as the resource manager wants it."""
        options = SimulationOptions(
            seed=self.family.seed,
            cold_start_s=self.family.start_s,
            warm_start_s=self.family.start_s / 4,
            pace_spread=SPREAD,
            progress_s=PROGRESS_S,
        )
        manager = ResourceManager(
            self.family.table, self.family.stores, truth.PRICES, self.profiles()
        )
        pinned = {} if where is None else {"workers": where.workers, "memory_mb": where.memory_mb}
        with SimulatedFleet(SimulatedPlatform(options), policy=manager) as fleet:
            job = fleet.submit(
                lambda config: self.training(), {}, goal=goal, workload=self.expected, **pinned
            )
            return job.result(), job


def grown(seed, nodes, slack):
    """What comes of the growth, by each method."""
    job = Growing(seed, nodes)
    believed = job.whole(job.expected.iterations, 0)
    small, large = sum(job.iterations[:SMALL_EPOCHS]), sum(job.iterations[SMALL_EPOCHS:])
    really = job.whole(small, large)
    goal = Cheapest(deadline_s=slack * float(believed[0].min()))
    limit = goal.deadline_s
    places = {"fixed": job.cheapest(*believed, limit), "hindsight": job.cheapest(*really, limit)}
    row = {"family": seed, "kind": job.family.kind, "nodes": nodes, "slack": slack}
    row |= {"parameters": job.features.parameters, "batch": job.before.batch}
    for method in METHODS:
        outcome, handle = job.run(goal, places.get(method))
        row[method] = {
            "usd": float(outcome.cost_usd),
            "seconds": float(outcome.duration_s),
            "overshoot": max(0.0, float(outcome.duration_s) / limit - 1.0),
            "allocations": [[a.workers, a.memory_mb] for a in outcome.allocations],
        }
        if method == "ours":
            row[method]["decisions"] = [
                [
                    d.occasion,
                    d.allocation.workers,
                    d.allocation.memory_mb,
                    float(d.time_s),
                    d.reason,
                ]
                for d in handle.decisions
            ]
    return row


def summary(rows, nodes, slack):
    """Of all families with one store and one deadline."""
    here = [row for row in rows if (row["nodes"], row["slack"]) == (nodes, slack)]
    saved = {
        method: [1.0 - row[method]["usd"] / row["fixed"]["usd"] for row in here]
        for method in METHODS[1:]
    }
    over = [row["ours"]["overshoot"] for row in here]
    return {
        "nodes": nodes,
        "slack": slack,
        "jobs": len(here),
        **{method: round(float(np.median(each)), 3) for method, each in saved.items()},
        "ours_p10": round(float(np.quantile(saved["ours"], 0.1)), 3),
        "ours_p90": round(float(np.quantile(saved["ours"], 0.9)), 3),
        "broken": round(float(np.mean([each > BROKEN for each in over])), 4),
        "worst": round(max(over), 4),
        "moves": round(float(np.mean([len(row["ours"]["allocations"]) - 1 for row in here])), 2),
    }


def claims(found):
    """In words, with what was found."""
    tight = next(one for one in found if (one["nodes"], one["slack"]) == CLAIMED)
    where = f"store of {CLAIMED[0]} nodes, deadline {CLAIMED[1]:g} x the least: "
    said = f"{where}at least 30 % cheaper than fixed: {tight['ours']:.0%} (median)"
    late = max(one["broken"] for one in found)
    kept = f"deadlines broken by more than 2 % in at most 2 % of the jobs, everywhere: {late:.1%}"
    return [real_jobs.claim(said, tight["ours"] >= 0.30), real_jobs.claim(kept, late <= 0.02)]


def draw(found, facts):
    """What is saved, by deadline and store."""
    fig, axes = common.figure(1, len(NODES), figsize=(10, 3.8), sharey=True)
    for axis, nodes in zip(axes, NODES, strict=True):
        here = [one for one in found if one["nodes"] == nodes]
        x = np.arange(len(here))
        for k, method in enumerate(METHODS[1:]):
            height = [100 * one[method] for one in here]
            axis.bar(x + 0.38 * (k - 0.5), height, 0.36, color=common.COLOURS[k], label=method)
        ends = [[100 * abs(one["ours"] - one[f"ours_p{q}0"]) for one in here] for q in (1, 9)]
        middle = [100 * one["ours"] for one in here]
        axis.errorbar(x - 0.19, middle, ends, fmt="none", color="#333333", lw=1)
        axis.axhline(0.0, color="#888888", lw=0.8)
        axis.set_xticks(x, [f"{one['slack']:g} x" for one in here])
        size = "one node" if nodes == 1 else f"{nodes} nodes"
        axis.set_title(f"parameter store of {size}", loc="left")
        axis.set_xlabel("deadline over the least time that was possible")
    axes[0].set_ylabel("cheaper than fixed, % (median; p10, p90)")
    axes[0].legend()
    common.save_figure(fig, "batching", facts)


def main():
    facts = common.machine()
    todo = list(product(range(FAMILIES), NODES, SLACKS))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        rows = list(pool.map(grown, *zip(*todo, strict=True)))
    found = [summary(rows, *each) for each in product(NODES, SLACKS)]
    common.table(tuple(found[0]), [tuple(line.values()) for line in found])
    common.save("batching", facts, {"summary": found, "claims": claims(found), "jobs": rows})
    draw(found, facts)


if __name__ == "__main__":
    main()
