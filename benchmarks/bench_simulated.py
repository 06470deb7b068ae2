"""Sweeps of successive halving in virtual time: what they take, and what it takes to simulate them.

16,384 trials, 14 stages of 2 epochs, on a model of AWS Lambda that runs 1,000 functions at once.
``run_halving`` runs on the real scheduler, ledger and journal; every trial is one job, which is
paused between stages. Stages are planned and replanned by the planner (*ours*), or all have the
allocation that is best for all of them alike (*static*, LambdaML). Models, options and prices are
those of ``bench_stages.py``, with one parameter store that costs nothing. What was planned first
stands beside what came of it: functions start cold or warm, epochs vary, hand-overs at time limits
and between stages are simulated, and planned only roughly.

Nothing of what is simulated depends on the machine; what the simulation takes does.

    python benchmarks/bench_simulated.py
    SMLT_BENCH_QUICK=1 python benchmarks/bench_simulated.py
"""

import os
import random
import time

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # before numpy: tables this small gain nothing from more

import common  # noqa: E402
import numpy as np  # noqa: E402
from stages import baselines, workloads  # noqa: E402

from smlt_tune.backend.goals import Cheapest, Fastest  # noqa: E402
from smlt_tune.backend.platforms.simulated import (  # noqa: E402
    SimulatedPlatform,
    SimulatedTraining,
    SimulationOptions,
)
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault  # noqa: E402
from smlt_tune.backend.resource_manager.tables import StoreTable  # noqa: E402
from smlt_tune.backend.simulated_fleet import SimulatedFleet, without_collections  # noqa: E402
from smlt_tune.backend.sweeps.halving import run_halving  # noqa: E402
from smlt_tune.backend.sweeps.halving_rules import Schedule  # noqa: E402
from smlt_tune.backend.sweeps.stage_allocations import (  # noqa: E402
    BETWEEN_S,
    StageAllocations,
)

SIZES = (64, 256) if common.QUICK else (256, 1024, 4096, 16_384)
ETA, EPOCHS, FUNCTIONS = 2, 2, 1000
MODEL = workloads.MODELS[1]
GOALS = {"budget": Fastest, "deadline": Cheapest}
#: Limits over what the best allocation for all stages alike needs at least.
MULTIPLE = 1.25
REDIS = workloads.STORES["redis"]
STORES = {"default": StoreTable(REDIS.latency_s, REDIS.bandwidth)}
#: An epoch of the simulation has so many iterations; only their sum counts.
ITERATIONS = 100
PLATFORM = SimulationOptions(
    concurrency=FUNCTIONS,
    cold_start_s=workloads.TABLE.start_s,
    warm_start_s=workloads.TABLE.warm_start_s,
    pace_spread=0.1,
    progress_s=60.0,
)


def stages(trials):
    """How many trials each stage has."""
    found = [trials]
    while found[-1] // ETA > 1:
        found.append(found[-1] // ETA)
    return found


def describer(options, epochs):
    """What a trial does: all the same, and each with its own loss."""
    places = [one.allocation for one in options]
    epochs_s = workloads.epochs_s(MODEL, places, STORES).tolist()
    seconds = {
        (place.workers, place.memory_mb): epoch_s / ITERATIONS
        for place, epoch_s in zip(places, epochs_s, strict=True)
    }

    def describe(rate):
        return SimulatedTraining(
            epochs=epochs,
            iterations=ITERATIONS,
            iteration_s=lambda workers, memory_mb, batch: seconds[workers, memory_mb],
            metrics=lambda epoch: {"loss": rate + 1.0 / (epoch + 1)},
            load_s=workloads.load_s(MODEL, 1),
        )

    return describe


def best_static(options, trials, kind):
    """The limit that this benchmark sets, and the best allocation for all stages that keeps it."""
    counts = np.array(stages(trials))
    sweep = baselines.Sweep(counts, options, FUNCTIONS, BETWEEN_S)
    used = sweep.cost_usd if kind == "budget" else sweep.time_s
    limit = float(MULTIPLE * used.sum(axis=0).min())
    return limit, options[baselines.static(sweep, kind, limit)[0]]


def run(trials, kind, method):
    """One sweep: what was planned, what came of it, what it took to simulate."""
    options = workloads.options_of(MODEL, EPOCHS, STORES)
    limit, static = best_static(options, trials, kind)
    chosen = options if method == "ours" else [static]
    count = len(stages(trials))
    schedule = Schedule("loss", False, tuple(range(EPOCHS, EPOCHS * count + 1, EPOCHS)), ETA)
    allocations = StageAllocations(lambda share: chosen, GOALS[kind](limit), between_s=BETWEEN_S)
    chance = random.Random(1)
    rates = [chance.random() for _ in range(trials)]
    plans, begun = [], time.perf_counter()
    allocations.plan(schedule, trials, FUNCTIONS)
    plan_s, wall, cpu = time.perf_counter() - begun, time.perf_counter(), time.process_time()
    fleet = SimulatedFleet(
        SimulatedPlatform(PLATFORM),
        budget_usd=limit if kind == "budget" else None,
        policy=PinnedOrDefault(),
        hang_timeout_s=600.0,
        tick_s=10.0,
    )
    with without_collections():
        result = run_halving(
            fleet,
            describer(options, EPOCHS * count),
            rates,
            schedule=schedule,
            allocations=allocations,
            on_stage=lambda stage: plans.append(stage.plan),
        )
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    case = {
        "trials": trials,
        "goal": kind,
        "limit": limit,
        "method": method,
        "planned": {"time_s": plans[0].time_s, "cost_usd": plans[0].cost_usd},
        "executed": {"time_s": fleet.now_s, "cost_usd": fleet.ledger.settled_usd},
        "complete": result.complete,
        "best_found": result.best == min(range(trials), key=rates.__getitem__),
        "notes": result.notes,
        "invocations": fleet.platform.bill().requests,
        "journal_events": len(fleet.history.read()),
        "plan_s": plan_s,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "stages": [
            {
                "trials": len(stage.trials),
                **vars(stage.allocation),
                "time_s": stage.time_s,
                "cost_usd": stage.cost_usd,
                "planned_s": plan.stages[0].time_s,
                "planned_usd": plan.stages[0].cost_usd,
            }
            for stage, plan in zip(result.stages, plans, strict=True)
        ],
    }
    fleet.close()
    return case


def claims(cases):
    """In words, with what was measured."""
    said = []
    for kind in GOALS:
        ours, static = (
            next(c for c in cases if (c["goal"], c["method"]) == (kind, method))
            for method in ("ours", "static")
        )
        what = "time_s" if kind == "budget" else "cost_usd"
        saved = {of: 1 - ours[of][what] / static[of][what] for of in ("planned", "executed")}
        used = "cost_usd" if kind == "budget" else "time_s"
        said.append(
            f"{kind} {ours['limit']:.6g}: {100 * saved['executed']:.0f} % less {what[:4]} than the "
            f"best static allocation (planned: {100 * saved['planned']:.0f} %), with "
            f"{100 * ours['executed'][used] / ours['limit']:.1f} % of the limit used"
        )
        said += [
            f"{kind}, {c['method']}: executed over planned: time "
            f"{c['executed']['time_s'] / c['planned']['time_s']:.2f}, cost "
            f"{c['executed']['cost_usd'] / c['planned']['cost_usd']:.2f}"
            for c in (ours, static)
        ]
    return said


def draw(cases, facts):
    """CPU time by size; stages of the largest sweep as planned and as executed."""
    fig, (left, right) = common.figure(1, 2, figsize=(9, 3.6))
    sizes = [c for c in cases if (c["goal"], c["method"]) == ("budget", "ours")]
    points = [(c["trials"], c["cpu_s"]) for c in sizes]
    left.loglog(*zip(*points, strict=True), "o-", color=common.COLOURS[0])
    for place in points:
        left.annotate(f"{place[1]:.3g} s", place, xytext=(4, -12), textcoords="offset points")
    left.set_xlabel("trials at the beginning")
    left.set_ylabel("CPU time of the simulation, s")
    for colour, case in zip(common.COLOURS, cases[-4:], strict=False):
        label = f"{case['method']}, {case['goal']}"
        numbers = range(1, len(case["stages"]) + 1)
        right.semilogy(
            numbers,
            [s["time_s"] for s in case["stages"]],
            "o-",
            color=colour,
            label=label,
            markersize=3,
        )
        right.semilogy(numbers, [s["planned_s"] for s in case["stages"]], ":", color=colour)
    right.set_xlabel(f"stage, {cases[-1]['trials']:,} trials (dotted: planned)")
    right.set_ylabel("time of the stage, s")
    right.legend(fontsize=8)
    common.save_figure(fig, "simulated", facts)


def main():
    facts = common.machine()
    cases = [run(trials, "budget", "ours") for trials in SIZES[:-1]]
    cases += [run(SIZES[-1], kind, method) for kind in GOALS for method in ("static", "ours")]
    common.table(
        (
            "trials",
            "goal",
            "method",
            "plan h",
            "run h",
            "plan USD",
            "run USD",
            "functions",
            "CPU s",
        ),
        [
            (
                f"{c['trials']:,}",
                f"{c['goal']} {c['limit']:.4g}",
                c["method"],
                f"{c['planned']['time_s'] / 3600:.2f}",
                f"{c['executed']['time_s'] / 3600:.2f}",
                f"{c['planned']['cost_usd']:.2f}",
                f"{c['executed']['cost_usd']:.2f}",
                f"{c['invocations']:,}",
                f"{c['cpu_s']:.1f}",
            )
            for c in cases
        ],
    )
    said = claims(cases[-4:])
    print(*said, sep="\n")
    common.save("simulated", facts, {"model": MODEL.name, "claims": said, "cases": cases})
    draw(cases, facts)


if __name__ == "__main__":
    main()
