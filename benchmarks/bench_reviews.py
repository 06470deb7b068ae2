"""What a fleet of many running jobs pays for looking at their allocations again.

A scheduler driven by hand (no functions run, time passes when the script says so) has some hundred
or a thousand jobs of two workers, each of which tells its pace every half second. The policy is the
resource manager with 1,000 profiles of siblings. Its decisions are made, and not carried out, so
that all jobs go on. CPU time of this process per second of the fleet's time, as a share of a core:
what the policy takes, and all that the scheduler does.
"""

import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from smlt_tune.backend.platforms.base import PlatformLimits
from smlt_tune.backend.resource_manager.manager import ResourceManager
from smlt_tune.backend.resource_manager.observations import Allocation, Profile, Workload
from smlt_tune.backend.resource_manager.tables import PlatformTable, StoreTable
from smlt_tune.runtime.features import ModelFeatures
from tests.backend.scheduler_world import PRICES, World

COUNTS = (20,) if common.QUICK else (100, 1000)
SECONDS = 3 if common.QUICK else 60
SIBLINGS = 100 if common.QUICK else 1000
TELLS_S, TICK_S = 0.5, 0.1
SIZES = (128, 1769, 3538, 7076, 10240)
TABLE = PlatformTable("b", SIZES, tuple(m / 1769 for m in SIZES), 2e10, 8e7, 1e-9, 2.0, 0.1)


class Watched(ResourceManager):
    """Notes the CPU time of everything that it is asked; jobs stay where they are."""

    cpu_s = 0.0
    reviews = 0

    def observe(self, profile):
        self._timed(super().observe, profile)

    def first(self, facts):
        return self._timed(super().first, facts)

    def review(self, facts):
        self.reviews += 1
        self._timed(super().review, facts)

    def _timed(self, verb, argument):
        begun = time.process_time()
        result = verb(argument)
        self.cpu_s += time.process_time() - begun
        return result


def workload(rng):
    """Of some network."""
    parameters = int(np.exp(rng.uniform(np.log(1e5), np.log(2e7))))
    features = ModelFeatures(parameters, 4 * parameters, 100.0 * parameters, 2.0 * parameters)
    return Workload(features, 256, 2000, "f")


def siblings(rng):
    """Two profiles of each job of the past."""
    for number in range(SIBLINGS // 2):
        work = workload(rng)
        for _ in range(2):
            where = Allocation(int(rng.integers(1, 9)), int(rng.integers(800, 8000)))
            speed = where.workers * where.memory_mb / 1769
            time_s = 256 * work.features.flops_per_sample / 2e10 / speed * rng.lognormal(0, 0.2)
            yield Profile(f"s{number}", work, where, 20, time_s, peak_mb=500.0, start_s=2.0)


def fleet(count, folder):
    """CPU seconds, policy and all, and reviews, of some time of a fleet."""
    rng = np.random.default_rng(count)
    policy = Watched(TABLE, {"default": StoreTable(1e-3, 1e9)}, PRICES, siblings(rng))
    limits = PlatformLimits(128, 10240, 900.0, concurrency=2 * count, max_workers=2)
    world = World(Path(folder), limits=limits, policy=policy)
    names = [f"j{number}" for number in range(count)]
    policy.cpu_s = 0.0
    for name in names:
        world.submit(name, None, None, workload=workload(rng), min_workers=2)
    starts_s, policy.cpu_s = policy.cpu_s, 0.0
    for name in names:
        world.train(name, workers=2)
    pace = dict(zip(names, rng.lognormal(-1, 0.5, count), strict=True))
    begun, tells = time.process_time(), 0
    for tick in range(round(SECONDS / TICK_S)):
        for number, name in enumerate(names):
            if (tick + number) % round(TELLS_S / TICK_S) == 0:
                at = 2 + tick
                told = {"chunk": 5, "iteration_s": pace[name] * rng.lognormal(0, 0.1)}
                world.progress(name, ranks=(0, 1), at=at, left=2000 - at, **told)
                tells += 2
        world.after(TICK_S)
    return {
        "jobs": count,
        "seconds": SECONDS,
        "reviews_per_s": policy.reviews / SECONDS,
        "review_ms": 1e3 * policy.cpu_s / max(1, policy.reviews),
        "first_ms": 1e3 * starts_s / count,
        "policy_share": policy.cpu_s / SECONDS,
        "scheduler_share": (time.process_time() - begun) / SECONDS,
    }


def draw(cases, facts):
    """Shares of a core."""
    fig, axis = common.figure(1, 1, figsize=(5, 3.6))
    for key, label, colour in (
        ("scheduler_share", "all that the scheduler does", common.COLOURS[1]),
        ("policy_share", "resource manager", common.COLOURS[0]),
    ):
        heights = [100 * case[key] for case in cases]
        axis.bar([str(case["jobs"]) for case in cases], heights, 0.5, color=colour, label=label)
    axis.axhline(5, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xlabel("running jobs")
    axis.set_ylabel("share of a core, %")
    axis.legend(fontsize=8)
    common.save_figure(fig, "reviews", facts)


def main():
    facts, cases = common.machine(), []
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            cases.append(fleet(count, folder))
    common.save("reviews", facts, {"siblings": SIBLINGS, "cases": cases})
    draw(cases, facts)
    common.table(
        ("jobs", "reviews / s", "CPU ms each", "first, CPU ms", "policy, % of a core", "all, %"),
        [
            (
                case["jobs"],
                f"{case['reviews_per_s']:.1f}",
                f"{case['review_ms']:.1f}",
                f"{case['first_ms']:.1f}",
                f"{100 * case['policy_share']:.1f}",
                f"{100 * case['scheduler_share']:.1f}",
            )
            for case in cases
        ],
    )


if __name__ == "__main__":
    main()
