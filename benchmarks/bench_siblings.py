"""Learning from siblings: twelve real training jobs, one after the other, on the local platform.

The jobs of one project train networks of 0.05 to 1.9 million parameters, convolutional and dense
ones, so that the shares of computation and synchronisation differ. Goals alternate:
Cheapest(deadline 1.3 x the fastest of the grid) and Fastest(budget 1.3 x the cheapest of the grid).

Per job, one after the other, so that other load on the machine meets all alike:

* the *grid*: pinned allocations in random order, each for about 1.2 s of iterations, but at least
  4. Time and cost of the whole job are those of the short one, plus the missing iterations at the
  mean;
* then in turn, beginning with another one each time: the *best of the grid* that keeps the limit,
  as a whole job (or the next best, if this breaks the limit by more than 2 % when it is really
  run: the grid's cells are short, and one of them is always lucky); the resource manager with the
  profiles of the siblings (*shared*); without them (*alone*); and the recipe of the *SMLT* paper:
  Gaussian process with expected improvement over raw workers and memory, 10 profiling runs of 5
  iterations after a first one, then the best that was seen, all paid for. Its first profile is in
  the middle of the grid;
* with ``--quick``, for the last, the manager with the profiles but without being told features.

To save time *SMLT* runs only for siblings 1, 4 and 8, *alone* for these and the later ones. A job
that *SMLT* has put where it takes more than five minutes is left out.

The resource manager chooses anything from 1 to 8 workers of 512 to 1,769 MB, not only what is in
the grid: it may be better than the best of the grid. How far this machine can be foretold at all is
told by the grid: its best cell against the whole job on the very same allocation, minutes later.
See real_jobs.py for the machine and its bills.

    python benchmarks/bench_siblings.py             # about 40 minutes; the machine must be quiet
    python benchmarks/bench_siblings.py --resume    # goes on after the last whole sibling
    python benchmarks/bench_siblings.py --quick     # three siblings, about a minute: does it work?
"""

import argparse
import json
import math
import shutil
import statistics
import time
from dataclasses import dataclass, replace

import common
import numpy as np
import real_jobs
from real_jobs import LARGEST_MB, Cloud, Model, Training

import smlt_tune as smlt
from smlt_tune.backend.resource_manager.observations import Allocation, Profile
from smlt_tune.backend.resource_manager.policy import JobFacts
from smlt_tune.errors import OutOfMemory, SmltError

#: Model, batch size, epochs; growing. The epochs make a job of some 20 s at its fastest allocation.
SIBLINGS = (
    (Model((8, 16), 64), 192, 42),
    (Model((), 80), 768, 168),
    (Model((), 110), 768, 140),
    (Model((12, 24), 120), 192, 31),
    (Model((16, 32), 140), 192, 25),
    (Model((), 280), 768, 91),
    (Model((), 380), 768, 70),
    (Model((24, 48), 240), 192, 14),
    (Model((24, 48), 320), 192, 14),
    (Model((), 600), 768, 45),
    (Model((), 800), 768, 31),
    (Model((32, 64), 600), 192, 11),
)
QUICK_SIBLINGS = (0, 1, 2)
WORKERS, MEMORY_MB = (1, 2, 3, 4, 6, 8), (1024, LARGEST_MB)
QUICK_WORKERS, QUICK_MEMORY_MB = (1, 4), (1024, LARGEST_MB)
#: Iterations of a cell of the grid: so many seconds of them, but not fewer than these.
CELL_S, CELL_ITERATIONS = 1.2, 4
#: Of the fastest or the cheapest of the grid.
SLACK = 1.3
#: The limit counts as kept up to this; so many allocations are tried as the best of the grid.
KEPT, MOST_TRIES = 0.02, 3
#: Profiling runs of the SMLT recipe, and their iterations after a first one.
RECIPE_RUNS, RECIPE_ITERATIONS = 10, 5
QUICK_RECIPE_RUNS = 2
#: A prediction is judged at the first review after so many iterations after which the job has not
#: moved any more: what was expected is then what was done.
JUDGED_AFTER = 10
#: From which sibling on the claims hold; at which (from 0 on) all methods are compared.
JUDGED_SIBLING, COMPARED = 8, (0, 3, 7)
METHODS = ("best", "shared", "alone", "smlt")
NAMES = {
    "best": "best of the grid",
    "shared": "resource manager, siblings' profiles",
    "alone": "resource manager, no siblings",
    "smlt": "SMLT recipe, profiling included",
    "untold": "resource manager, siblings' profiles, features not given",
}


@dataclass(frozen=True)
class Cell:
    """An allocation of the grid; time and cost of the whole job on it."""

    workers: int
    memory_mb: int
    iteration_s: float
    seconds: float
    usd: float


def training_of(number, quick):
    """Of a sibling."""
    model, batch, epochs = SIBLINGS[number]
    return Training(model, (batch,) * max(2, epochs // 6 if quick else epochs))


def shortened(cloud, fleet, training, workers, memory_mb, iterations):
    """A job of some iterations; None if memory was not enough."""
    short = replace(training, iterations=min(iterations, training.length))
    try:
        return cloud.pinned(fleet, short, workers, memory_mb)
    except OutOfMemory:
        return None


def grid(cloud, fleet, training, rng, quick):
    """All cells on which memory is enough."""
    sizes = (QUICK_WORKERS, QUICK_MEMORY_MB) if quick else (WORKERS, MEMORY_MB)
    todo = [(n, m) for n in sizes[0] for m in sizes[1]]
    rng.shuffle(todo)
    probe = shortened(cloud, fleet, training, 1, LARGEST_MB, CELL_ITERATIONS)
    assert probe is not None, "the largest function is too small for this model"
    found = []
    for workers, memory_mb in todo:
        # Were there no synchronisation; with it there are fewer iterations in more time.
        guess_s = probe.iteration_s / workers * LARGEST_MB / memory_mb
        count = max(CELL_ITERATIONS, math.ceil(CELL_S / guess_s))
        count = min(count, max(CELL_ITERATIONS, training.length // 3))
        run = shortened(cloud, fleet, training, workers, memory_mb, count)
        if run is not None:
            rest_s = (training.length - count) * run.iteration_s
            cost = run.usd + cloud.usd(workers, memory_mb, rest_s)
            found.append(Cell(workers, memory_mb, run.iteration_s, run.seconds + rest_s, cost))
    return found


def goal_of(number, cells):
    """Reachable, by the grid."""
    if number % 2 == 0:
        return smlt.Cheapest(deadline_s=SLACK * min(cell.seconds for cell in cells))
    return smlt.Fastest(budget_usd=SLACK * min(cell.usd for cell in cells))


def best_first(cells, goal):
    """The cells that keep the limit, the best first; the one that defines the limit does."""
    keep = [cell for cell in cells if real_jobs.overshoot(cell, goal) == 0.0]
    return sorted(keep, key=lambda cell: real_jobs.target(cell, goal))


def best_run(cloud, fleet, training, goal, cells):
    """The best cell that keeps the limit when run, and the run; the last one tried if none."""
    for cell in cells[:MOST_TRIES]:
        run = cloud.pinned(fleet, training, cell.workers, cell.memory_mb)
        if real_jobs.overshoot(run, goal) <= KEPT:
            break
    return cell, run


def recipe(cloud, fleet, training, goal, seed, profiles):
    """The SMLT recipe; returns the final run, and time and cost of all runs."""
    from allocation.peers import Problem, SmltRecipe

    workload = real_jobs.workload_of(training)
    facts = JobFacts(
        "smlt",
        cloud.platform.limits,
        goal=goal,
        workload=workload,
        iterations_left=training.length,
    )
    middle = Allocation(4, 1024)
    problem = Problem(facts, cloud.table, {}, cloud.prices, middle)
    peer = SmltRecipe(problem, np.random.default_rng(seed))
    seconds = usd = 0.0
    for _ in range(profiles):
        where = peer.suggest()
        before = cloud.spent_usd(fleet), time.monotonic()
        run = shortened(
            cloud, fleet, training, where.workers, where.memory_mb, RECIPE_ITERATIONS + 1
        )
        usd += cloud.spent_usd(fleet) - before[0]
        seconds += time.monotonic() - before[1]
        peer.observe(
            Profile(
                "smlt",
                workload,
                where,
                iterations=RECIPE_ITERATIONS if run else 0,
                iteration_s=run.iteration_s if run else 0.0,
                peak_mb=run.peak_mb if run else float(where.memory_mb),
                out_of_memory=run is None,
            )
        )
    where = peer.recommend()
    run = cloud.pinned(fleet, training, where.workers, where.memory_mb)
    return run, seconds + run.seconds, usd + run.usd


def judged(training, run):
    """What was expected after ten iterations, and what then was billed; None if nobody asked."""
    moves = [i for i, review in enumerate(run.reviews) if review["from"] != review["to"]]
    for review in run.reviews[moves[-1] if moves else 0 :]:
        if training.length - review["left"] >= JUDGED_AFTER:
            return {
                "after_iterations": training.length - review["left"],
                "expected_s": review["time_s"],
                "expected_usd": review["cost_usd"],
                "then_s": run.seconds - review["elapsed_s"],
                "then_usd": run.usd - review["spent_usd"],
            }
    return None


def promised(cell, run):
    """The same of a cell: a part of the job on the very allocation, measured minutes before."""
    return {
        "expected_s": [cell.seconds] * 3,
        "expected_usd": [cell.usd] * 3,
        "then_s": run.seconds,
        "then_usd": run.usd,
    }


def outcome(training, goal, run, best, *, seconds=None, usd=None):
    """One method on one job, as JSON."""
    whole = replace(run, seconds=seconds or run.seconds, usd=usd or run.usd)
    return {
        **run.to_json(),
        "seconds": whole.seconds,
        "usd": whole.usd,
        "ratio": real_jobs.target(whole, goal) / real_jobs.target(best, goal),
        "overshoot": real_jobs.overshoot(whole, goal),
        "ratio_of_the_final_run": real_jobs.target(run, goal) / real_jobs.target(best, goal),
        "judged": judged(training, run),
    }


def sibling(cloud, number, project, quick):
    """All methods on one job."""
    training = training_of(number, quick)
    with cloud.fleet() as fleet:
        cells = grid(cloud, fleet, training, np.random.default_rng([1, number]), quick)
        goal = goal_of(number, cells)
        best = best_first(cells, goal)
        before = project.with_name("before")
        shutil.rmtree(before, ignore_errors=True)
        shutil.copytree(project, before)
        totals, runs = {}, {}
        last = quick and number == QUICK_SIBLINGS[-1]
        late = number >= JUDGED_SIBLING - 1
        methods = METHODS if last or number in COMPARED else METHODS[: 3 if late else 2]
        turn = methods[number % len(methods) :] + methods[: number % len(methods)]
        for method in (*turn, "untold") if last else turn:
            if method == "best":
                chosen, run = best_run(cloud, fleet, training, goal, best)
            elif method == "shared":
                run = cloud.steered(training, goal, project)
            elif method == "alone":
                run = cloud.steered(training, goal)
            elif method == "untold":
                run = cloud.steered(training, goal, before, give=False)
            else:
                profiles = QUICK_RECIPE_RUNS if quick else RECIPE_RUNS
                try:
                    run, seconds, usd = recipe(cloud, fleet, training, goal, number, profiles)
                except TimeoutError as error:  # what it has chosen is far too slow
                    print(f"{number + 1:2} {NAMES[method]}: {error}")
                    continue
                totals = {"seconds": seconds, "usd": usd}
            runs[method] = run
    features = real_jobs.workload_of(training).features
    outcomes = {
        name: outcome(training, goal, run, runs["best"], **(totals if name == "smlt" else {}))
        for name, run in runs.items()
    }
    outcomes["best"]["judged"] = promised(chosen, runs["best"])
    return {
        "number": number + 1,
        "kind": training.model.kind,
        "parameters": features.parameters,
        "flops_per_sample": features.flops_per_sample,
        "batch": training.batches[0],
        "iterations": training.length,
        "goal": type(goal).__name__,
        "limit": next(iter(vars(goal).values())),
        "grid": [vars(cell) for cell in cells],
        "best": vars(chosen),
        "runs": outcomes,
    }


def say(row):
    """One job, as soon as it is known."""
    unit = "s" if row["goal"] == "Cheapest" else "USD"
    best = row["best"]
    print(
        f"{row['number']:2} {row['kind']}, {row['parameters'] / 1e6:.2f} M parameters, "
        f"{row['goal']}({row['limit']:.4g} {unit}), "
        f"best of the grid {best['workers']} x {best['memory_mb']} MB"
    )
    for name, run in row["runs"].items():
        places = " -> ".join(f"{n} x {m}" for n, m, _ in run["allocations"])
        print(
            f"     {name:7} {run['seconds']:6.1f} s {1e6 * run['usd']:8.1f} uUSD, ratio "
            f"{run['ratio']:5.2f}, over {100 * run['overshoot']:5.1f} %, CPU share "
            f"{run['cpu_share']:.2f}, {places} {run['refused'] and '(refused at first)'}",
            flush=True,
        )


def errors(rows, method, what):
    """Of predictions: |expected / then - 1|, by job."""
    found = []
    for row in rows:
        said = row["runs"].get(method, {}).get("judged")
        if said:
            found.append(
                (row["number"], abs(said[f"expected_{what}"][1] / said[f"then_{what}"] - 1))
            )
    return found


def summaries(rows):
    """Medians of each method over all jobs and over the last ones."""
    found = {}
    for method in NAMES:
        of = [(row["number"], row["runs"][method]) for row in rows if method in row["runs"]]
        late = [run for number, run in of if number >= JUDGED_SIBLING] or [
            run for _, run in of[-1:]
        ]
        if of:
            found[method] = {
                "jobs": len(of),
                "ratio": statistics.median(run["ratio"] for _, run in of),
                "ratio_late": statistics.median(run["ratio"] for run in late),
                "ratio_of_the_final_run": statistics.median(
                    run["ratio_of_the_final_run"] for _, run in of
                ),
                "overshoot": max(run["overshoot"] for _, run in of),
                "moves": statistics.mean(run["moves"] for _, run in of),
            }
            for what in ("s", "usd"):
                off = [error for _, error in errors(rows, method, what)]
                found[method][f"error_{what}"] = statistics.median(off) if off else None
    return found


def claims(found):
    """In words, with what was measured."""
    shared, best = found["shared"], found["best"]
    return [
        real_jobs.claim(
            f"siblings 8-12 within 10 % of the best of the grid: median {shared['ratio_late']:.3f}",
            shared["ratio_late"] <= 1.10,
        ),
        real_jobs.claim(
            f"limits never broken by more than 2 %: worst {percent(shared['overshoot'])} "
            f"(the best of the grid: {percent(best['overshoot'])})",
            shared["overshoot"] <= 0.02,
        ),
        *(
            real_jobs.claim(
                f"{name} expected after ten iterations off by less than 5 %: median {percent(off)} "
                f"(the best cells of the grid: {percent(best[f'error_{what}'])})",
                off is not None and off < 0.05,
            )
            for what, name in (("s", "time"), ("usd", "cost"))
            for off in [shared[f"error_{what}"]]
        ),
    ]


def percent(share):
    """For people."""
    return "unknown" if share is None else f"{100 * share:.1f} %"


def draw(rows, facts):
    """Ratios and errors, by job."""
    fig, (left, right) = common.figure(1, 2, figsize=(11.5, 5.2))
    numbers = [row["number"] for row in rows]
    for k, method in enumerate(("shared", "alone", "smlt", "untold")):
        of = [(r["number"], r["runs"][method]["ratio"]) for r in rows if method in r["runs"]]
        if not of:
            continue
        style = "x" if method == "untold" else "o-"
        left.plot(*zip(*of, strict=True), style, color=common.COLOURS[k], label=NAMES[method])
    left.axhline(1.0, color="#999999", linestyle=":", label=NAMES["best"])
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    left.set_xticks(numbers, [f"{r['number']}\n{r['goal'][0]}" for r in rows])
    left.set_xlabel("sibling; C cheapest with a deadline, F fastest with a budget")
    left.set_ylabel("cost (C) or time (F) over the best of the grid")
    left.set_title("What was reached", loc="left")
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    for k, (what, name) in enumerate((("s", "time"), ("usd", "cost"))):
        off = errors(rows, "shared", what)
        if off:
            x, y = zip(*off, strict=True)
            right.plot(x, [100 * e for e in y], "o-", color=common.COLOURS[k], label=name)
    right.axhline(5.0, color="#999999", linestyle=":", label="5 %")
    right.set_xticks(numbers)
    right.set_ylim(0)
    right.set_xlabel("sibling")
    right.set_ylabel("error of what was expected of the rest, %")
    right.set_title(f"After {JUDGED_AFTER} iterations, with siblings' profiles", loc="left")
    right.legend(fontsize=8)
    common.save_figure(fig, "siblings", facts)


def measured(args, rows, project, keep):
    """One row per sibling that went well."""
    done = {row["number"] for row in rows}
    todo = QUICK_SIBLINGS if args.quick else range(len(SIBLINGS))
    with Cloud() as cloud:
        real_jobs.warm_up(cloud)
        for number in todo:
            if number + 1 in done:
                continue
            begun = time.monotonic()
            try:
                rows.append(sibling(cloud, number, project, args.quick))
            except (SmltError, TimeoutError) as error:  # the others can still be compared
                print(f"{number + 1:2} failed: {type(error).__name__}: {error}", flush=True)
                continue
            say(rows[-1])
            print(f"     all of it took {time.monotonic() - begun:.0f} s", flush=True)
            keep.write_text(json.dumps(rows), encoding="utf-8")
        return cloud.facts()


def main():
    parser = argparse.ArgumentParser(description="Learning from siblings, with real training.")
    parser.add_argument("--quick", action="store_true", default=common.QUICK)
    parser.add_argument("--resume", action="store_true", help="go on after the last whole sibling")
    args = parser.parse_args()
    if args.quick:
        real_jobs.quickly()
    facts, begun = common.machine(), time.monotonic()
    folder = real_jobs.HERE / "results" / "tmp" / ("siblings_quick" if args.quick else "siblings")
    project, keep = folder / "project", folder / "rows.json"
    if not args.resume:
        shutil.rmtree(folder, ignore_errors=True)
    project.mkdir(parents=True, exist_ok=True)
    rows = json.loads(keep.read_text()) if keep.exists() else []
    cloud = measured(args, rows, project, keep)
    found = summaries(rows)
    print()
    common.table(
        ("method", "jobs", "ratio", "8-12", "final run", "worst over", "moves", "time", "cost"),
        [
            (
                NAMES[method],
                each["jobs"],
                *(f"{each[key]:.3f}" for key in ("ratio", "ratio_late", "ratio_of_the_final_run")),
                f"{100 * each['overshoot']:.1f} %",
                f"{each['moves']:.1f}",
                *(
                    "-" if each[key] is None else f"{100 * each[key]:.1f} %"
                    for key in ("error_s", "error_usd")
                ),
            )
            for method, each in found.items()
        ],
    )
    steered = [r["runs"][m] for r in rows for m in ("shared", "alone", "untold") if m in r["runs"]]
    print(real_jobs.said_of_hold_ups(steered), "(median)")
    result = {
        **cloud,
        "slack": SLACK,
        "summaries": found,
        "claims": claims(found),
        "wall_s": round(time.monotonic() - begun),
        "siblings": rows,
    }
    common.save("siblings", facts, result)
    draw(rows, facts)


if __name__ == "__main__":
    main()
