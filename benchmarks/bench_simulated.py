"""What a sweep of successive halving takes in virtual time: 16,384 trials, 14 stages of 2 epochs.

Every trial of every stage is a job that begins at the checkpoint of the stage before. A platform
runs 1,000 functions at once; a stage gets as many per trial as there are, up to 50, and goes in
waves as long as there are more trials than functions. The scheduler, the ledger and the journal are
the real ones. Nothing of what is simulated depends on the machine; what the simulation takes does.
"""

import random
import time

import common

from smlt_tune.backend.platforms.simulated import (
    SimulatedPlatform,
    SimulatedTraining,
    SimulationOptions,
)
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from smlt_tune.backend.simulated_fleet import SimulatedFleet

TRIALS = (64, 256) if common.QUICK else (256, 1024, 4096, 16384)
CONCURRENCY = 1000
MOST_WORKERS = 50
EPOCHS = 2
BUDGET_USD = 1000.0


def describe(config):
    """100 iterations of an epoch, 0.3 s each on one function."""
    return SimulatedTraining(
        epochs=config["epochs"],
        iterations=100,
        iteration_s=lambda workers, memory_mb: 0.3 / workers + 0.002 * (workers > 1),
        metrics=lambda epoch: {"loss": config["rate"] + 1.0 / (epoch + 1)},
    )


class Halving:
    """A driver of successive halving with eta = 2.

    Args:
        trials: How many at the beginning.
    """

    def __init__(self, trials):
        options = SimulationOptions(concurrency=CONCURRENCY, pace_spread=0.1, progress_s=60.0)
        chance = random.Random(1)
        self.rates = [chance.random() for _ in range(trials)]
        self.fleet = SimulatedFleet(
            SimulatedPlatform(options),
            budget_usd=BUDGET_USD,
            policy=PinnedOrDefault(),
            hang_timeout_s=600.0,
            tick_s=5.0,
            on_end=self.next,
        )
        self.waiting, self.submitted = [], []

    def next(self, ended=None):
        """Submits one more trial of the stage."""
        if self.waiting:
            self.submitted.append(self.fleet.submit(describe, **self.waiting.pop()))

    def run(self):
        """All stages; what each took."""
        alive, stages = [(trial, None) for trial in range(len(self.rates))], []
        while len(alive) > 1:
            stage = len(stages)
            workers = max(1, min(MOST_WORKERS, CONCURRENCY // len(alive)))
            wall, cpu, begun_s = time.perf_counter(), time.process_time(), self.fleet.now_s
            self.submitted = []
            self.waiting = [
                {
                    "config": {"epochs": EPOCHS * (stage + 1), "rate": self.rates[trial]},
                    "name": f"stage{stage}-{trial}",
                    "workers": workers,
                    "memory_mb": 1769,
                    "start_from": checkpoint,
                }
                for trial, checkpoint in reversed(alive)
            ]
            for _ in range(min(len(alive), CONCURRENCY // workers)):
                self.next()
            self.fleet.run_until_idle()
            outcomes = [job.result() for job in self.submitted]
            stages.append(
                {
                    "trials": len(alive),
                    "workers": workers,
                    "virtual_s": round(self.fleet.now_s - begun_s, 3),
                    "wall_s": round(time.perf_counter() - wall, 3),
                    "cpu_s": round(time.process_time() - cpu, 3),
                }
            )
            best = sorted(outcomes, key=lambda outcome: outcome.metrics["loss"])
            alive = [
                (int(outcome.job_id.partition("-")[2]), outcome.checkpoint)
                for outcome in best[: len(alive) // 2]
            ]
        return stages


def measure(trials):
    """One sweep."""
    sweep = Halving(trials)
    wall, cpu = time.perf_counter(), time.process_time()
    stages = sweep.run()
    case = {
        "trials": trials,
        "jobs": sum(stage["trials"] for stage in stages),
        "invocations": sweep.fleet.platform.bill().requests,
        "journal_events": len(sweep.fleet.history.read()),
        "virtual_s": round(sweep.fleet.now_s, 3),
        "cost_usd": sweep.fleet.ledger.settled_usd,
        "wall_s": round(time.perf_counter() - wall, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
        "stages": stages,
    }
    sweep.fleet.close()
    return case


def draw(cases):
    """Time by sweep, and by stage of the largest."""
    fig, (left, right) = common.figure(1, 2, figsize=(9, 3.6))
    left.loglog(
        [c["trials"] for c in cases], [c["cpu_s"] for c in cases], "o-", color=common.COLOURS[0]
    )
    for case in cases:
        place = (case["trials"], case["cpu_s"])
        left.annotate(f"{case['cpu_s']:.3g} s", place, xytext=(4, -12), textcoords="offset points")
    left.set_xlabel("trials at the beginning")
    left.set_ylabel("CPU time of the simulation, s")
    stages = cases[-1]["stages"]
    right.bar(
        range(len(stages)),
        [1e3 * s["cpu_s"] / (s["trials"] * s["workers"]) for s in stages],
        color=common.COLOURS[1],
    )
    right.set_xlabel(f"stage, {cases[-1]['trials']:,} trials")
    right.set_ylabel("CPU time per function, ms")
    fig.savefig(common.RESULTS / "simulated.png", dpi=120)


def main():
    facts = common.machine()
    cases = [measure(trials) for trials in TRIALS]
    print(f"{'trials':>8} {'jobs':>8} {'functions':>10} {'virtual h':>10} {'USD':>9} {'CPU s':>8}")
    for case in cases:
        print(
            f"{case['trials']:>8,} {case['jobs']:>8,} {case['invocations']:>10,} "
            f"{case['virtual_s'] / 3600:>10.2f} {case['cost_usd']:>9.2f} {case['cpu_s']:>8.1f}"
        )
    common.save("simulated", facts, {"concurrency": CONCURRENCY, "cases": cases})
    draw(cases)


if __name__ == "__main__":
    main()
