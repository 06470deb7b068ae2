"""Following batch size and model size: real training jobs on the local platform.

*Dynamic batching.* The batch size of a job doubles after an epoch, and nobody knew. *Fixed* is what
a static system does: the cheapest allocation of a grid, measured on the first configuration, that
would keep the deadline if nothing changed (deadline: 1.02 x the fastest of the grid). Which one
that is has much to do with luck, so all of it is done three times, grids included. *Ours* is the
resource manager; it is given the same measurements as profiles of its project, and nothing else.
The network is trained by Muon, whose work for a step does not depend on the batch. Where nothing
but gradients is added to what each sample takes, doubling brings less on this machine: all workers
synchronise through a store that shares two cores with them, and few are best from the start.
*Hindsight* is the best fixed allocation for what really happened, by a grid of both configurations;
no system could have known it.

*Candidates.* Eight candidates of a search, whose number of parameters jumps by a factor of 10 or
more between neighbours, all trained alike, each with the same deadline (1.25 x what the fastest of
the grid needs for the first). *Fixed* is the best allocation of a grid for the first one: it
computes much (convolutions) and needs many workers. The others have tables of crossed features,
small ones and ones of 2 million parameters: little to compute and much to synchronise, which many
workers only make expensive. *Ours* gets the profiles of that grid, the features of each candidate,
and learns from one to the next. How much is saved depends on the mixture: a candidate like the
first one costs the same on both.

Jobs to be compared run one after the other, so that other load on the machine meets all alike. See
real_jobs.py for the machine and its bills.

    python benchmarks/bench_adaptation.py             # about 20 minutes; the machine must be quiet
    python benchmarks/bench_adaptation.py --quick     # about a minute: does it work?
"""

import argparse
import math
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import common
import real_jobs
from real_jobs import LARGEST_MB, Cloud, Model, Training, Watched

import smlt_tune as smlt

#: Half of an iteration on many workers does not depend on the batch: the optimizer's work.
GROWING = Model((24, 8), 256, deep=4)
SMALL_BATCH, SMALL_EPOCHS, EPOCHS = 96, 1, 16
#: By what factor the batch size grows, and how often all of that is measured.
GROWTH, ROUNDS, QUICK_ROUNDS = 2, 3, 1
METHODS = ("fixed", "ours", "hindsight")
#: 0.1, 2 and 0.2 million parameters; the first is the one that computes much.
HEAVY, LARGE, LIGHT = Model((24, 48), 40), Model((), 288, 24), Model((), 28, 24)
CANDIDATES = (HEAVY, LARGE, LIGHT, LARGE, LIGHT, LARGE, LIGHT, LARGE)
CANDIDATE_BATCH, CANDIDATE_EPOCHS = 384, 8
WORKERS, MEMORY_MB = (1, 2, 3, 4, 6, 8), (1280, LARGEST_MB)
QUICK_WORKERS, QUICK_MEMORY_MB, QUICK_EPOCHS = (2, 4), (LARGEST_MB,), 5
#: Iterations of a cell of the grid.
CELL_ITERATIONS, LATER_ITERATIONS = 20, 5
TIGHT, TIGHT_STREAM = 1.02, 1.25
#: How often rank 0 says how far it is, seconds (``WorkerSpec.progress_s``).
PROGRESS_S = 0.5


@dataclass(frozen=True)
class Cell:
    """An allocation that was tried: one iteration, and what comes on top of all iterations."""

    workers: int
    memory_mb: int
    iteration_s: float
    other_s: float
    other_usd: float

    def whole(self, cloud, iterations_s):
        """Time and cost of a job whose iterations take so long in all."""
        usd = self.other_usd + cloud.usd(self.workers, self.memory_mb, iterations_s)
        return self.other_s + iterations_s, usd


def tried(cloud, fleet, training, sizes, iterations):
    """Cells by (workers, memory); a short job on each."""
    found = {}
    short = replace(training, iterations=iterations)
    for workers in sizes[0]:
        for memory_mb in sizes[1]:
            run = cloud.pinned(fleet, short, workers, memory_mb)
            inside_s = iterations * run.iteration_s
            other_usd = run.usd - cloud.usd(workers, memory_mb, inside_s)
            found[workers, memory_mb] = Cell(
                workers, memory_mb, run.iteration_s, run.seconds - inside_s, other_usd
            )
    return found


def cheapest(wholes, deadline_s):
    """The allocation with the least cost in time; wholes: (time, cost) by allocation."""
    in_time = {where: usd for where, (seconds, usd) in wholes.items() if seconds <= deadline_s}
    if not in_time:
        return min(wholes, key=lambda where: wholes[where][0])
    return min(in_time, key=in_time.get)


def job_json(run, goal):
    """A job, with its deadline."""
    over = real_jobs.overshoot(run, goal)
    return {**run.to_json(), "overshoot": over}


# --- dynamic batching -----------------------------------------------------------------------------


def batching(cloud, folder, quick, number):
    """The allocation that is best for the first configuration, and what comes of the growth."""
    sizes = (QUICK_WORKERS, QUICK_MEMORY_MB) if quick else (WORKERS, MEMORY_MB)
    before = Training(GROWING, (SMALL_BATCH,) * (QUICK_EPOCHS if quick else EPOCHS))
    with cloud.fleet(project=folder) as fleet:
        cells = tried(cloud, fleet, before, sizes, CELL_ITERATIONS)
    believed = {w: c.whole(cloud, before.length * c.iteration_s) for w, c in cells.items()}
    goal = smlt.Cheapest(deadline_s=TIGHT * min(seconds for seconds, _ in believed.values()))
    fixed = cheapest(believed, goal.deadline_s)
    print(f"batch sizes that grow, deadline {goal.deadline_s:.1f} s; fixed {fixed}", flush=True)
    return {
        "parameters": real_jobs.workload_of(before).features.parameters,
        "batch": SMALL_BATCH,
        "deadline_s": goal.deadline_s,
        "fixed": fixed,
        "grid": [vars(cell) for cell in cells.values()],
        **grown(cloud, folder, before, cells, goal, fixed, METHODS[number:] + METHODS[:number]),
    }


def grown(cloud, folder, before, cells, goal, fixed, methods):
    """What comes of the growth: a job of each method, in this order."""
    rest = (GROWTH * SMALL_BATCH,) * (len(before.batches) - SMALL_EPOCHS)
    after, really = Training(GROWING, rest), Training(GROWING, before.batches[:SMALL_EPOCHS] + rest)
    sizes = tuple(sorted({where[axis] for where in cells}) for axis in (0, 1))
    with cloud.fleet() as fleet:
        later = tried(cloud, fleet, after, sizes, LATER_ITERATIONS)
    first = really.length - after.length
    real = {
        where: cell.whole(cloud, first * cell.iteration_s + after.length * later[where].iteration_s)
        for where, cell in cells.items()
    }
    hindsight = cheapest(real, goal.deadline_s)
    print(f"x {GROWTH} after {first} of {really.length} iterations; hindsight {hindsight}")
    row = {}
    for method in methods:
        if method == "ours":
            run = cloud.steered(really, goal, folder, told=before)  # knows the first grid alone
            row[method] = {**job_json(run, goal), **reaction(run)}
        else:
            with cloud.fleet() as fleet:
                run = cloud.pinned(fleet, really, *(fixed if method == "fixed" else hindsight))
            row[method] = job_json(run, goal)
        say(method, row[method])
    return {
        "changes_after": first,
        "iterations": really.length,
        "hindsight": hindsight,
        "later": [vars(cell) for cell in later.values()],
        "jobs": row,
    }


def reaction(run):
    """From the change of the batch size to the first iteration of the next generation."""
    rows = run.rows
    batches = [row[1] for row in rows]
    at = next((i for i in range(1, len(rows)) if batches[i] != batches[i - 1]), None)
    if at is None:
        return {}
    begun_s = rows[at - 1][0]
    new = next((i for i in range(at, len(rows)) if rows[i][3] != rows[at][3]), None)
    decided = next((r for r in run.reviews if r["elapsed_s"] > begun_s), None)
    pace = [rows[i][0] - rows[i - 1][0] for i in range(at, new if new else len(rows))]
    iteration_s = statistics.median(pace)
    return {
        "changed_s": begun_s,
        "chunk": max(1.0, PROGRESS_S / iteration_s),
        "to_decision": decided and sum(1 for row in rows[at:] if row[0] <= decided["elapsed_s"]),
        "to_generation": None if new is None else new - at,
        "to_generation_s": None if new is None else rows[new - 1][0] - begun_s,
    }


# --- candidates -----------------------------------------------------------------------------------


def stream(cloud, folder, quick):
    """Every candidate on the fixed allocation and on ours, in turn."""
    models = CANDIDATES[:3] if quick else CANDIDATES
    epochs = 2 if quick else CANDIDATE_EPOCHS
    sizes = (QUICK_WORKERS, QUICK_MEMORY_MB) if quick else (WORKERS[1:], MEMORY_MB)
    jobs = [Training(model, (CANDIDATE_BATCH,) * epochs) for model in models]
    project = folder / "stream"
    with cloud.fleet(project=project) as fleet:
        cells = tried(cloud, fleet, jobs[0], sizes, CELL_ITERATIONS)
    wholes = {w: c.whole(cloud, jobs[0].length * c.iteration_s) for w, c in cells.items()}
    goal = smlt.Cheapest(deadline_s=TIGHT_STREAM * min(seconds for seconds, _ in wholes.values()))
    fixed = cheapest(wholes, goal.deadline_s)
    print(f"candidates, deadline {goal.deadline_s:.1f} s each; fixed {fixed}", flush=True)
    rows = []
    policy = Watched(cloud.manager(project))
    with cloud.fleet() as plain, cloud.fleet(project=project, policy=policy) as fleet:
        for number, job in enumerate(jobs):
            runs = {}
            for method in ("fixed", "ours")[:: 1 if number % 2 == 0 else -1]:
                if method == "fixed":
                    runs[method] = cloud.pinned(plain, job, *fixed)
                else:
                    runs[method] = cloud.submitted(fleet, policy, job, goal)
            features = real_jobs.workload_of(job).features
            rows.append(
                {
                    "kind": job.model.kind,
                    "parameters": features.parameters,
                    "flops_per_sample": features.flops_per_sample,
                    **{method: job_json(run, goal) for method, run in runs.items()},
                }
            )
            print(f"{number + 1} {job.model.kind}, {features.parameters / 1e6:.2f} M parameters")
            for method in ("fixed", "ours"):
                say(method, rows[-1][method])
    return {
        "deadline_s": goal.deadline_s,
        "batch": CANDIDATE_BATCH,
        "iterations": jobs[0].length,
        "fixed": fixed,
        "grid": [vars(cell) for cell in cells.values()],
        "candidates": rows,
        "usd": {m: sum(row[m]["usd"] for row in rows) for m in ("fixed", "ours")},
    }


# --- what comes out -------------------------------------------------------------------------------


def say(method, job):
    """One job, as soon as it is known."""
    places = " -> ".join(f"{n} x {m} at {s:.1f} s" for n, m, s in job["allocations"])
    print(
        f"     {method:9} {job['seconds']:6.1f} s {1e6 * job['usd']:8.1f} uUSD, over "
        f"{100 * job['overshoot']:5.1f} %, CPU share {job['cpu_share']:.2f}, {places} "
        f"{job['refused'] and '(refused at first)'}",
        flush=True,
    )


def claims(batches, candidates):
    """In words, with what was measured."""
    ours = [each["jobs"]["ours"] for each in batches]
    saved = [
        1.0 - job["usd"] / each["jobs"]["fixed"]["usd"]
        for job, each in zip(ours, batches, strict=True)
    ]
    each_saved = ", ".join(f"{100 * share:.0f} %" for share in saved)
    times = candidates["usd"]["fixed"] / candidates["usd"]["ours"]
    late = max(job["overshoot"] for job in ours)
    late_stream = max(row["ours"]["overshoot"] for row in candidates["candidates"])
    late_fixed = max(row["fixed"]["overshoot"] for row in candidates["candidates"])
    moved = [job for job in ours if job.get("to_generation") is not None]
    reacted = (
        "no move"
        if not moved
        else ", ".join(
            f"{job['to_generation']} ({job['to_generation_s']:.2f} s; "
            f"{job['to_decision']} to the decision)"
            for job in moved
        )
    )
    chunk = statistics.median(job["chunk"] for job in ours if "chunk" in job)
    return [
        real_jobs.claim(
            "dynamic batching: at least 30 % cheaper than fixed: "
            f"{100 * statistics.median(saved):.0f} % (median of {each_saved})",
            statistics.median(saved) >= 0.30,
        ),
        real_jobs.claim(
            f"dynamic batching: deadline kept within 2 %: over by {100 * late:.1f} %",
            late <= 0.02,
        ),
        real_jobs.claim(
            "dynamic batching: next generation within one chunk of iterations "
            f"({chunk:.1f}) of the change: {reacted}",
            len(moved) == len(ours)
            and all(j["to_generation"] <= math.ceil(j["chunk"]) for j in moved),
        ),
        real_jobs.claim(
            f"candidates: at least 3 x cheaper than fixed: {times:.1f} x", times >= 3.0
        ),
        real_jobs.claim(
            f"candidates: deadlines kept within 2 %: worst over by {100 * late_stream:.1f} % "
            f"(fixed: {100 * late_fixed:.1f} %)",
            late_stream <= 0.02,
        ),
    ]


def draw(batches, candidates, facts):
    """Allocations over time and over candidates, and what they cost."""
    options = {"figsize": (11.5, 7.6), "width_ratios": (3, 1)}
    fig, axes = common.figure(2, 2, **options)
    draw_batching(batches, *axes[0])
    draw_stream(candidates, *axes[1])
    common.save_figure(fig, "adaptation", facts)


def draw_batching(batches, left, right):
    """The last round; costs of all."""
    row = batches[-1]["jobs"]
    for k, method in enumerate(METHODS):
        job = row[method]
        x = [s for _, _, s in job["allocations"]] + [job["seconds"]]
        y = [n * m / LARGEST_MB for n, m, _ in job["allocations"]]
        left.step(x, [*y, y[-1]], where="post", color=common.COLOURS[k], label=method, lw=2)
        for (n, m, s), height in zip(job["allocations"], y, strict=True):
            # The first ones may be the same: one above the line, one below.
            left.annotate(
                f"{n} x {m:,} MB",
                (s, height),
                (3, 4 if k else -12),
                textcoords="offset points",
                fontsize=8,
                color=common.COLOURS[k],
            )
        shift = [number + 0.27 * (k - 1) for number in range(len(batches))]
        usd = [1e6 * each["jobs"][method]["usd"] for each in batches]
        right.bar(shift, usd, 0.27, color=common.COLOURS[k])
    right.set_xticks(range(len(batches)), [f"round {i + 1}" for i in range(len(batches))])
    changed = row["ours"].get("changed_s")
    if changed:
        left.axvline(changed, color="#999999", linestyle=":")
        text = f"batch {SMALL_BATCH} -> {GROWTH * SMALL_BATCH} (ours)"
        left.annotate(text, (changed, 0.3), (3, 0), textcoords="offset points", color="#666666")
    left.axvline(batches[-1]["deadline_s"], color="#b00020", linestyle="--", label="deadline")
    left.set_ylim(0, left.get_ylim()[1] * 1.15)
    left.set_xlabel("time since the submission, s")
    left.set_ylabel("virtual CPUs of all workers")
    left.set_title("A batch size that doubles", loc="left")
    left.legend(fontsize=8)
    right.set_ylabel("cost of the job, millionths of a USD")


def draw_stream(candidates, left, right):
    """Workers by candidate, and parameters."""
    rows = candidates["candidates"]
    numbers = range(1, len(rows) + 1)
    for k, method in enumerate(("fixed", "ours")):
        last = [row[method]["allocations"][-1] for row in rows]
        shift = [number + (k - 0.5) * 0.36 for number in numbers]
        left.bar(
            shift,
            [n * m / LARGEST_MB for n, m, _ in last],
            0.36,
            color=common.COLOURS[k],
            label=f"{method}, at the end",
        )
        right.bar(method, 1e6 * candidates["usd"][method], color=common.COLOURS[k])
    names = [f"{i}\n{r['kind']} {r['parameters'] / 1e6:.1f} M" for i, r in enumerate(rows, 1)]
    left.set_xticks(list(numbers), names, fontsize=8)
    left.set_xlabel("candidate, its parameters")
    left.set_ylabel("virtual CPUs of all workers")
    left.set_title(
        f"Candidates with a deadline of {candidates['deadline_s']:.1f} s each", loc="left"
    )
    left.legend(fontsize=8)
    right.set_ylabel("cost of all candidates, millionths of a USD")


def main():
    parser = argparse.ArgumentParser(description="Following batch size and model size.")
    parser.add_argument("--quick", action="store_true", default=common.QUICK)
    args = parser.parse_args()
    if args.quick:
        real_jobs.quickly()
    facts, begun = common.machine(), time.monotonic()
    folder = Path(real_jobs.HERE / "results" / "tmp" / "adaptation")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with Cloud() as cloud:
        real_jobs.warm_up(cloud)
        rounds = QUICK_ROUNDS if args.quick else ROUNDS
        batches = [batching(cloud, folder / f"batching_{i}", args.quick, i) for i in range(rounds)]
        candidates = stream(cloud, folder, args.quick)
        known = cloud.facts()
    print()
    ours = [each["jobs"]["ours"] for each in batches]
    ours += [row["ours"] for row in candidates["candidates"]]
    print(real_jobs.said_of_hold_ups(ours), "(median)")
    result = {
        **known,
        "claims": claims(batches, candidates),
        "wall_s": round(time.monotonic() - begun),
        "batching": batches,
        "stream": candidates,
    }
    common.save("adaptation", facts, result)
    draw(batches, candidates, facts)


if __name__ == "__main__":
    main()
