"""Stages of successive halving: our planner beside its peers, on a model of AWS Lambda.

Nothing here ran on AWS. 16,384 trials, eta = 2, 14 stages of 2 epochs, for the models of the
CE-scaling paper; ``stages/workloads.py`` documents what a trial takes, ``stages/baselines.py`` the
peers. All methods choose from the same options and are judged by the same time and cost, waves
included. Budgets are multiples of what the cheapest static allocation costs, deadlines multiples of
what the fastest one takes.

    python benchmarks/bench_stages.py
    SMLT_BENCH_QUICK=1 python benchmarks/bench_stages.py
"""

import os
import statistics
import time

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # before numpy: tables this small gain nothing from more

import common  # noqa: E402
import numpy as np  # noqa: E402
from stages import baselines, workloads  # noqa: E402

from smlt_tune.backend.goals import Cheapest, Fastest  # noqa: E402
from smlt_tune.backend.resource_manager.observations import Option  # noqa: E402
from smlt_tune.backend.sweeps.stage_planner import (  # noqa: E402
    Stage,
    StageResult,
    plan_stages,
    replan,
)

TRIALS, ETA, EPOCHS = (64, 2, 2) if common.QUICK else (16_384, 2, 2)
MODELS = workloads.MODELS[1:2] if common.QUICK else workloads.MODELS
#: Functions that may run at once: as if there were no limit (eq. 7 of the paper), its limit, the
#: default of an account.
FUNCTIONS = {"no limit": 10**9, "3,000": 3000, "1,000": 1000}
#: Budget over that of the cheapest static plan, deadline over that of the fastest.
MULTIPLES = (1.02, 1.05, 1.1, 1.15, 1.25, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
#: The one whose plans are kept, and that predictions are wrong for.
SHOWN = 1.25
NAMES = {
    "static": "best static (LambdaML)",
    "fixed": "fixed shares (Ray, a cluster)",
    "rubberband": "elastic shrinking (RubberBand)",
    "printed": "greedy as printed (CE-scaling)",
    "repaired": "greedy repaired",
    "front": "ours, from the front of one trial",
    "ours": "ours",
}
GOALS = {"budget": "time under a budget", "deadline": "cost under a deadline"}
#: How wrong predictions are: once for a whole sweep, and for each stage; standard deviations of ln.
COMMON_ERROR, STAGE_ERROR = 0.15, 0.05
#: A limit counts as exceeded beyond this share of it.
TOLERATED = 0.01
SEEDS = 3 if common.QUICK else 50
#: What the paper reports at best, for each goal.
PAPER = {"budget": 0.63, "deadline": 0.41}


def trials_of_stages():
    """16,384, 8,192, ... as many stages as halvings."""
    found = [TRIALS]
    while found[-1] // ETA > 1:
        found.append(found[-1] // ETA)
    return found


def stages_of(options):
    return [Stage(trials, tuple(options)) for trials in trials_of_stages()]


def goal_of(kind, limit):
    return Fastest(limit) if kind == "budget" else Cheapest(limit)


def judged(kind, limit, totals):
    """What was minimised, and by how much the limit is exceeded; None without a plan."""
    if totals is None:
        return None
    value, used = totals if kind == "budget" else totals[::-1]
    return {"value": value, "over": max(0.0, used / limit - 1.0)}


def best_of(kind, limit, cloud):
    """The best of many plans that keeps the limit, or None."""
    value, used = cloud if kind == "budget" else cloud[::-1]
    if used.min() > limit:
        return None
    best = int(np.argmin(np.where(used <= limit, value, np.inf)))
    return cloud[0][best], cloud[1][best]


def planned(options, kind, limit, functions):
    """Our plan, and how long it took to make, seconds."""
    begun = time.perf_counter()
    plan = plan_stages(
        stages_of(options),
        goal_of(kind, limit),
        functions=functions,
        between_s=workloads.BETWEEN_S,
    )
    return plan, time.perf_counter() - begun


def compared(model, functions):
    """All methods on one model: one row for each goal and multiple."""
    options = workloads.options_of(model, EPOCHS)
    front = workloads.front(options)
    trials = np.array(trials_of_stages())
    sweep = baselines.Sweep(trials, options, functions, workloads.BETWEEN_S)
    on_front = baselines.Sweep(trials, front, functions, workloads.BETWEEN_S)
    clouds = {
        "fixed": baselines.fixed_shares(sweep),
        "rubberband": baselines.shrinking(sweep),
    }
    least = {"budget": sweep.cost_usd.sum(axis=0).min(), "deadline": sweep.time_s.sum(axis=0).min()}
    for kind in GOALS:
        for multiple in MULTIPLES:
            limit = float(multiple * least[kind])
            ours, ours_s = planned(options, kind, limit, functions)
            from_front, _ = planned(front, kind, limit, functions)
            static = baselines.static(sweep, kind, limit)
            begun = time.perf_counter()
            greedy = baselines.repaired(on_front, kind, limit)
            greedy_s = time.perf_counter() - begun
            literal = baselines.printed(on_front, kind, limit)
            totals = {
                "static": sweep.totals(static),
                **{name: best_of(kind, limit, cloud) for name, cloud in clouds.items()},
                "printed": literal and on_front.totals(literal),
                "repaired": greedy and on_front.totals(greedy),
                "front": (from_front.time_s, from_front.cost_usd) if from_front.feasible else None,
                "ours": (ours.time_s, ours.cost_usd),
            }
            value = ours.time_s if kind == "budget" else ours.cost_usd
            optimum = baselines.integer_program(sweep, kind, limit)
            yield {
                "model": model.name,
                "functions": functions,
                "goal": kind,
                "multiple": multiple,
                "limit": limit,
                "options": len(options),
                "front": len(front),
                "span_s": front[-1].time_s / front[0].time_s,
                "span_usd": front[0].cost_usd / front[-1].cost_usd,
                "methods": {name: judged(kind, limit, both) for name, both in totals.items()},
                "gap_told": ours.gap,
                "gap": None if optimum is None else value / optimum - 1.0,
                "plan_s": ours_s,
                "greedy_s": greedy_s,
                "full": full_share(sweep, static),
                "plan": told(ours) if multiple == SHOWN else None,
            }


def full_share(sweep, plan):
    """Part of a plan's time in stages whose trials cannot all run at once."""
    stages = np.arange(len(plan))
    full = sweep.trials * sweep.workers[plan] > sweep.functions
    times = sweep.time_s[stages, plan]
    return float(times[full].sum() / times.sum())


def told(plan):
    """A plan as JSON."""
    return [
        {
            "trials": one.trials,
            **vars(one.option.allocation),
            "waves": one.waves,
            "time_s": one.time_s,
            "cost_usd": one.cost_usd,
        }
        for one in plan.stages
    ]


# --- predictions that are wrong ---------------------------------------------------------------


def disturbed(model, kind, seed):
    """A sweep whose stages take and cost more or less than predicted, planned once and replanned.

    Both choose from the front, with 1,000 functions; the limit is a multiple of what the best plan
    of all would need at least.
    """
    options = tuple(workloads.front(workloads.options_of(model, EPOCHS)))
    stages = stages_of(options)
    rng = np.random.default_rng(seed)
    factors = np.exp(rng.normal(0, COMMON_ERROR) + rng.normal(0, STAGE_ERROR, len(stages))).tolist()
    given = {"functions": 1000, "between_s": workloads.BETWEEN_S}
    least = plan_stages(stages, Cheapest() if kind == "budget" else Fastest(), **given)
    limit = SHOWN * (least.cost_usd if kind == "budget" else least.time_s)
    goal = goal_of(kind, limit)
    first = plan_stages(stages, goal, **given)
    outcome = {
        "once": judged(
            kind,
            limit,
            tuple(
                sum(f * getattr(one, what) for f, one in zip(factors, first.stages, strict=True))
                for what in ("time_s", "cost_usd")
            ),
        )
    }
    over, plan = [], first
    for i, factor in enumerate(factors):
        one = plan.stages[0]
        took = factor / one.slower * one.time_s, factor / one.dearer * one.cost_usd
        over.append(StageResult(one, *took))
        if stages[i + 1 :]:
            plan = replan(stages[i + 1 :], goal, over, **given)
    totals = sum(one.time_s for one in over), sum(one.cost_usd for one in over)
    outcome["replanned"] = judged(kind, limit, totals)
    known = plan_stages(
        [
            Stage(
                stage.trials,
                tuple(
                    Option(o.allocation, factor * o.time_s, factor * o.cost_usd) for o in options
                ),
            )
            for stage, factor in zip(stages, factors, strict=True)
        ],
        goal,
        **given,
    )
    outcome["known"] = judged(kind, limit, (known.time_s, known.cost_usd))
    return {"model": model.name, "goal": kind, "seed": seed, "methods": outcome}


def replanning(rows):
    """How often and by how much limits are exceeded, and what was reached where both keep them."""
    found = {}
    for kind in GOALS:
        here = [row["methods"] for row in rows if row["goal"] == kind]
        possible = [each for each in here if each["known"]["over"] == 0.0]
        found[kind] = {"runs": len(here), "possible": len(possible)}
        for name in ("once", "replanned"):
            excess = [each[name]["over"] for each in possible]
            kept = [
                each[name]["value"] / each["known"]["value"]
                for each in possible
                if each[name]["over"] <= TOLERATED
            ]
            found[kind][name] = {
                "exceeded": sum(e > TOLERATED for e in excess) / max(1, len(possible)),
                "worst": max(excess, default=0.0),
                "value_over_known": statistics.median(kept) if kept else None,
            }
    return found


# --- results ----------------------------------------------------------------------------------


def relative(row, name):
    """To the best static plan; None if there is no plan, or it exceeds the limit."""
    one = row["methods"][name]
    if one is None or one["over"] > 1e-9:
        return None
    return one["value"] / row["methods"]["static"]["value"]


def summaries(rows):
    """Of each model, number of functions and goal: each method over all multiples."""
    found = []
    for model in MODELS:
        for functions in FUNCTIONS.values():
            for kind in GOALS:
                here = [
                    row
                    for row in rows
                    if (row["model"], row["functions"], row["goal"])
                    == (model.name, functions, kind)
                ]
                methods = {}
                for name in NAMES:
                    ratios = [relative(row, name) for row in here]
                    kept = [ratio for ratio in ratios if ratio is not None]
                    methods[name] = {
                        "median": statistics.median(kept) if kept else None,
                        "best": min(kept, default=None),
                        "kept": len(kept) / len(here),
                        "worst_over": max(
                            (row["methods"][name] or {"over": 0.0})["over"] for row in here
                        ),
                    }
                found.append(
                    {
                        "model": model.name,
                        "functions": functions,
                        "goal": kind,
                        "full": statistics.median(row["full"] for row in here),
                        "methods": methods,
                    }
                )
    return found


def claims(rows, found, replanned):
    """In words, with what was calculated."""
    said = []
    for kind, aim in PAPER.items():
        for label, functions in FUNCTIONS.items():
            here = [s for s in found if s["goal"] == kind and s["functions"] == functions]
            best = {s["model"]: 1 - s["methods"]["ours"]["best"] for s in here}
            reached = sum(saved >= aim for saved in best.values())
            values = ", ".join(f"{name} {100 * saved:.0f} %" for name, saved in best.items())
            full = statistics.median(s["full"] for s in here)
            said.append(
                f"{GOALS[kind]}, functions: {label}: at best {values} less than the best static "
                f"plan; the paper's {100 * aim:.0f} % is reached for {reached} of {len(here)}. "
                f"Stages in waves take {100 * full:.0f} % of the static plans' time (median)"
            )
    spans = {row["model"]: row["span_usd"] for row in rows}
    said.append(
        "there is little to save where speed costs little: from the cheapest allocation to the "
        "fastest, the cost of a trial rises by "
        + ", ".join(f"{name} {span:.3g} x" for name, span in spans.items())
    )
    worse = sum(relative(row, "ours") > 1 + 1e-12 for row in rows)
    gaps = [row["gap"] for row in rows if row["gap"] is not None]
    said += [
        f"never worse than the best static plan: {worse} of {len(rows)} are worse",
        f"within 0.5 % of the optimum: at most {100 * max(gaps):.3f} % above that of the integer "
        f"program ({len(gaps)} of {len(rows)} solved)",
        f"planned in less than 1 s, from {min(row['options'] for row in rows)} to "
        f"{max(row['options'] for row in rows)} options: median "
        f"{statistics.median(row['plan_s'] for row in rows):.2f} s, at most "
        f"{max(row['plan_s'] for row in rows):.2f} s",
    ]
    for kind, each in replanned.items():
        once, again = each["once"], each["replanned"]
        said.append(
            f"{GOALS[kind]}, wrong predictions: the limit is exceeded by more than 1 % in "
            f"{100 * once['exceeded']:.0f} % of the sweeps planned once and "
            f"{100 * again['exceeded']:.0f} % of those replanned; worst "
            f"{100 * once['worst']:.0f} % and {100 * again['worst']:.0f} %"
        )
    return said


def draw(rows, facts):
    """Each method relative to the best static plan, over the limit."""
    fig, axes = common.figure(
        len(GOALS), len(MODELS), figsize=(3.6 * len(MODELS) + 1, 7.4), squeeze=False, sharey=True
    )
    shown = ("fixed", "rubberband", "repaired", "ours")
    for line, kind in zip(axes, GOALS, strict=True):
        for ax, model in zip(line, MODELS, strict=True):
            for colour, name in zip(common.COLOURS, shown, strict=False):
                for style, label in (("-", "no limit"), (":", "1,000")):
                    points = [
                        (row["multiple"], relative(row, name))
                        for row in rows
                        if (row["model"], row["goal"]) == (model.name, kind)
                        and row["functions"] == FUNCTIONS[label]
                        and relative(row, name) is not None
                    ]
                    text = f"{NAMES[name]}, {'no limit' if style == '-' else '1,000 functions'}"
                    if points:
                        ax.plot(*zip(*points, strict=True), style, color=colour, label=text)
            ax.axhline(1.0, color="#999999", linewidth=0.8)
            ax.axhline(1 - PAPER[kind], color="#999999", linewidth=0.8, linestyle="--")
            ax.text(8, 1 - PAPER[kind], "paper", fontsize=7, color="#777777", ha="right")
            ax.set_xscale("log")
            ax.set_xticks((1, 1.5, 2, 3, 5, 8), ("1", "1.5", "2", "3", "5", "8"), minor=False)
            ax.minorticks_off()
            ax.set_ylim(0, 1.6)
            ax.set_title(model.name, loc="left")
            least = "budget / cheapest static" if kind == "budget" else "deadline / fastest static"
            ax.set_xlabel(least)
        line[0].set_ylabel(f"{GOALS[kind]}\nover the best static plan's")
    handles, labels = axes[0, -1].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    common.save_figure(fig, "stages", facts)


def rounded(value):
    """Six digits of every number in it."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def main():
    facts, begun = common.machine(), time.monotonic()
    rows = []
    for model in MODELS:
        for label, functions in FUNCTIONS.items():
            rows += compared(model, functions)
            print(f"{model.name}, functions: {label}", flush=True)
    wrong = [
        disturbed(model, kind, seed) for model in MODELS for kind in GOALS for seed in range(SEEDS)
    ]
    found, replanned = summaries(rows), replanning(wrong)
    labels = {functions: label for label, functions in FUNCTIONS.items()}
    print()
    common.table(
        ("median / best of the best static plan's", "functions", *NAMES.values()),
        [
            (
                f"{each['model']}: {GOALS[each['goal']]}",
                labels[each["functions"]],
                *(
                    "-" if m["median"] is None else f"{m['median']:.2f} / {m['best']:.2f}"
                    for m in each["methods"].values()
                ),
            )
            for each in found
        ],
    )
    said = claims(rows, found, replanned)
    print(*said, sep="\n")
    common.save(
        "stages",
        facts,
        rounded(
            {
                "trials": trials_of_stages(),
                "epochs": EPOCHS,
                "claims": said,
                "summaries": found,
                "replanning": replanned,
                "wall_s": round(time.monotonic() - begun),
                "rows": rows,
            }
        ),
    )
    draw(rows, facts)


if __name__ == "__main__":
    main()
