"""Predicted epochs to a target on curves of real trainings, beside simpler ways to predict.

``curves/record.py`` recorded them. A part of each curve is shown, from its beginning; targets are
where the curve, smoothed, is at 50, 75 and 100 % of its epochs, if it is not there yet; the truth
is the first epoch whose value, noise included, is at the target. Error: |predicted - true| / true,
infinite if the target is given up. Constants of the model were chosen on the even trainings; the
figures of the odd ones are those to believe, and the ones that are drawn. (Of each pair of
trainings, the odd one has the larger batch or rate, or the rate that decays.) A target better than
all of a curve, by a tenth of its range, tells how often a prediction promises within the recorded
epochs what does not come.

Besides, there are searches, of 48 random configurations of one training function each. A trial of
one is predicted from the beginning of its curve alone, and with the whole curves of the trials
before it. Of the first 16 searches, the even ones were for choosing; but which siblings count, and
how many, was decided with all of these 16 in view. So what is claimed is asked of the last eight,
which were recorded when nothing was chosen any more. A trial's own targets are as above; the target
of a search is the value at which half of its trainings end, and then siblings end when they reach
it.

A job ends with its last epoch, whether the target is reached or not, and nobody plans beyond that:
``capped`` are the errors of predictions that are cut there, as the scheduler does.

What chance leaves to find is told by repetitions: the first dozen trials of the first 16 searches
were trained once more, with other seeds. ``again`` is what that took to the target, ``repeat`` our
prediction with the whole curve of the repetition as the only sibling. No other sibling knows as
much; several might.

    python benchmarks/bench_loss_curves.py
    SMLT_BENCH_QUICK=1 python benchmarks/bench_loss_curves.py
"""

import json
import math
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from itertools import zip_longest
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # before numpy: every process has one core

import common  # noqa: E402
import numpy as np  # noqa: E402
import real_jobs  # noqa: E402
from scipy.optimize import OptimizeWarning, curve_fit  # noqa: E402

from smlt_tune.backend.loss_curves import HORIZON, forecast  # noqa: E402

CURVES = Path(__file__).parent / "curves" / "curves.json"
SEARCHES, REPEATS = CURVES.with_name("searches.json"), CURVES.with_name("repeats.json")
SEEN = (0.3,) if common.QUICK else (0.2, 0.3, 0.4, 0.5, 0.7)
#: The part whose cases are kept and drawn.
SHOWN = 0.3
#: Where targets are taken, as a share of the epochs, from the median of so many epochs.
TARGETS, SMOOTHED = (0.5, 0.75, 1.0), 5
METRICS = {"loss": "training loss", "held_out_loss": "held-out loss", "accuracy": "accuracy"}
METHODS = {
    "ours": "ours",
    "ce": "1 / (a e + b) + c (CE-scaling)",
    "power": "power law with offset",
    "slope": "straight on",
}
WITH_SIBLINGS = {"siblings": "ours, with siblings", "ours": "ours, alone"} | {
    name: label for name, label in METHODS.items() if name != "ours"
}
#: What needs another training of the same configuration.
REPEATED = {"repeat": "ours, from a repetition", "again": "the repetition itself"}
#: Numbers of siblings that are told apart: least, most.
SIBLINGS = {
    "none": (0, 0),
    "1 to 3": (1, 3),
    "4 to 11": (4, 11),
    "12 or more": (12, 99),
    "all": (0, 99),
}
#: Searches before this one were recorded when something was still to be chosen, and repeated.
LATER = 16
#: The most that the median error may be over all trials of the later ones; and where that is asked:
#: (group, what it is, whether predictions are cut at the last epoch).
CLAIMED = 0.1
CLAIMS = (
    ("loss, constant", "training loss, rate constant", False),
    ("constant", "all metrics, rate constant", False),
    ("target of the search", "one target of a search, all metrics and schedules", False),
    ("loss", "training loss, all schedules, cut at the last epoch", True),
    ("loss", "training loss, all schedules", False),
    ("all", "all metrics and schedules, cut at the last epoch", True),
    ("all", "all metrics and schedules", False),
)


def cases(seen):
    """Every (training, metric, target) whose target is not reached in the part that is shown."""
    runs = json.loads(CURVES.read_text(encoding="utf-8"))
    for number, run in enumerate(runs[:8] if common.QUICK else runs):
        for metric in run["curves"]:
            y = turned(run, metric)
            for share, target in own_targets(y):
                yield from case(number, run, metric, seen, share, target)


def cases_of_searches():
    """The same of every search; with the curves of the trials before, in ``siblings``.

    In ``repeat`` is the curve of the same training with another seed, None if there is none.
    """
    searches, repeats = (by_search(file) for file in (SEARCHES, REPEATS))
    for number, search in enumerate(searches[:2] if common.QUICK else searches):
        for metric in search[0]["curves"]:
            curves = [turned(run, metric) for run in search]
            again = [turned(run, metric) for run in repeats[number]] if number < LATER else []
            common_target = float(np.median([np.median(y[-SMOOTHED:]) for y in curves]))
            for place, (run, y, repeat) in enumerate(zip_longest(search, curves, again)):
                before = [one for one in curves[:place] if len(one)]
                targets = [(share, target, before) for share, target in own_targets(y)]
                until = [up_to(one, common_target) for one in before]
                for share, target, siblings in (*targets, ("search", common_target, until)):
                    for one in case(number, run, metric, SHOWN, share, target):
                        yield one | {"siblings": siblings, "repeat": repeat}


def by_search(file):
    """Trainings of a file, search by search."""
    runs = json.loads(file.read_text(encoding="utf-8"))
    return [[r for r in runs if r["search"] == n] for n in {r["search"]: None for r in runs}]


def turned(run, metric):
    """The values of a metric, so that less is better."""
    sign = -1.0 if metric == "accuracy" else 1.0
    return sign * np.array([math.nan if v is None else v for v in run["curves"][metric]])


def up_to(y, target):
    """A curve whose training stops at a target."""
    reached = np.flatnonzero(y <= target)
    return y[: reached[0] + 1] if len(reached) else y


def own_targets(y):
    """(share of the epochs, where the curve is then)."""
    for share in TARGETS:
        place = int(share * len(y))
        if place >= SMOOTHED:
            yield share, float(np.median(y[place - SMOOTHED : place]))


def case(number, run, metric, seen, share, target):
    """One, if the target is reached, and not in the part that is shown."""
    y = turned(run, metric)
    shown = math.ceil(seen * len(y))
    reached = np.flatnonzero(y <= target)
    if len(reached) and reached[0] + 1 > shown:
        yield {
            "training": number,
            "data": run["data"],
            "schedule": run["schedule"],
            "metric": metric,
            "at": share,
            "sign": -1.0 if metric == "accuracy" else 1.0,
            "shown": y[:shown],
            "target": target,
            "true": int(reached[0] + 1),
            "most": run["epochs"],
        }


# --- ways to predict: from values that fall, epochs to a target -------------------------------


def straight_on(y, target, floor):
    """The line through the last five epochs."""
    last = y[-5:]
    slope, level = np.polyfit(np.arange(len(last)) - len(last) + 1, last, 1)
    return len(y) + max(1.0, (target - level) / slope) if slope < 0.0 else math.inf


def fitted(curve, start, bounds):
    """One family by least squares; its asymptote keeps the floor, as ours."""

    def predict(y, target, floor):
        epochs = np.arange(1.0, len(y) + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)
            try:
                lower, upper = bounds
                lower = [*lower, floor - 1e-6]
                best, _ = curve_fit(
                    curve, epochs, y, start(y), bounds=(lower, upper), max_nfev=2000
                )
            except RuntimeError:  # no convergence
                return math.inf
        ahead = np.arange(len(y) + 1.0, HORIZON * len(y))
        there = np.flatnonzero(curve(ahead, *best) <= target)
        return float(ahead[there[0]]) if len(there) else math.inf

    return predict


PEERS = {
    "slope": straight_on,
    "ce": fitted(
        lambda e, a, b, c: 1.0 / (a * e + b) + c,
        lambda y: (0.1, 1.0, y.min()),
        ([1e-9, 1e-9], np.inf),
    ),
    "power": fitted(
        lambda e, a, p, c: a * e**-p + c,
        lambda y: (max(1e-3, float(np.ptp(y))), 0.5, y.min()),
        ([0.0, 1e-3], [np.inf, 5.0, np.inf]),
    ),
}


def promised(seen):
    """Share of the targets beyond a curve that are promised within its epochs; how many there are.

    Once for the middle of the prediction, once for the upper end of its interval.
    """
    middle, end = [], []
    for run in json.loads(CURVES.read_text(encoding="utf-8"))[1::2]:
        for metric, values in run["curves"].items():
            falling, best = (False, 1.0) if metric == "accuracy" else (True, 0.0)
            y = np.array([math.nan if v is None else v for v in values])
            top, margin = (np.nanmin if falling else np.nanmax)(y), 0.1 * np.ptp(y)
            target = float(top - margin if falling else top + margin)
            if (target <= best) if falling else (target >= best):
                continue
            shown = y[: math.ceil(seen * len(y))]
            found = forecast(shown, target, falling=falling, best=best)
            middle.append(found.epochs.mid <= len(y))
            end.append(found.epochs.high <= len(y))
    return {"targets": len(middle), "middle": number(np.mean(middle)), "end": number(np.mean(end))}


def judged(case):
    """What every method predicts; the interval is that of the best of ours."""
    y, sign, target = case.pop("shown"), case.pop("sign"), case.pop("target")
    siblings, repeat = case.pop("siblings", None), case.pop("repeat", None)
    best = 0.0 if sign > 0 else 1.0
    case["epochs"] = {name: peer(y, target, sign * best) for name, peer in PEERS.items()}
    given = {"falling": sign > 0, "best": best}
    begun = time.process_time()
    found = forecast(sign * y, sign * target, **given)
    case["epochs"]["ours"] = found.epochs.mid
    if repeat is not None:
        whole = forecast(sign * y, sign * target, **given, siblings=[sign * repeat])
        case["epochs"]["repeat"] = whole.epochs.mid
        there = np.flatnonzero(repeat[len(y) :] <= target)
        case["epochs"]["again"] = len(y) + int(there[0]) + 1 if len(there) else math.inf
    if siblings is not None:
        begun, case["siblings"] = time.process_time(), len(siblings)
        curves = [sign * one for one in siblings]
        found = forecast(sign * y, sign * target, **given, siblings=curves)
        case["epochs"]["siblings"] = found.epochs.mid
    case["cpu_ms"] = 1e3 * (time.process_time() - begun)
    case["low"], case["high"], case["chance"] = found.epochs.low, found.epochs.high, found.chance
    return case


def error(row, method, *, capped=False):
    epochs = row["epochs"][method]
    return abs((min(epochs, row["most"]) if capped else epochs) / row["true"] - 1.0)


def covered(row):
    return row["low"] <= row["true"] <= row["high"]


def groups(rows):
    """(label, those of it)."""
    for metric in METRICS:
        yield metric, [row for row in rows if row["metric"] == metric]
    for at in TARGETS:
        yield f"at {at:.0%}", [row for row in rows if row["at"] == at]
    for data in dict.fromkeys(row["data"] for row in rows):
        yield data, [row for row in rows if row["data"] == data]
    yield "all", rows


def halves(rows):
    """(name, those of it)."""
    for half, parity in (("chosen on", 0), ("to believe", 1)):
        yield half, [row for row in rows if row["training"] % 2 == parity]


def parts_of_searches(rows):
    """(name, those of it)."""
    yield from halves([row for row in rows if row["training"] < LATER])
    yield "recorded later", [row for row in rows if row["training"] >= LATER]


def summaries(rows):
    """For each half, share seen and group: errors of each method, coverage of our interval."""
    for half, those in halves(rows):
        for seen in SEEN:
            for group, here in groups([row for row in those if row["seen"] == seen]):
                if here:
                    yield {"half": half, "seen": seen, "group": group} | summary(here, METHODS)


def summaries_of_searches(rows):
    """The same for each part, number of siblings and group; targets of searches are a group."""
    for half, those in parts_of_searches(rows):
        for siblings, (least, most) in SIBLINGS.items():
            those_with = [row for row in those if least <= row["siblings"] <= most]
            own = [row for row in those_with if row["at"] != "search"]
            schedules = dict.fromkeys(row["schedule"] for row in own)
            split = [(s, [r for r in own if r["schedule"] == s]) for s in schedules]
            split += [
                (f"{metric}, {schedule}", [row for row in of if row["metric"] == metric])
                for schedule, of in split
                for metric in METRICS
            ]
            one_target = [row for row in those_with if row["at"] == "search"]
            for group, here in (*groups(own), *split, ("target of the search", one_target)):
                if here:
                    about = {"half": half, "siblings": siblings, "group": group}
                    yield about | summary(here, WITH_SIBLINGS | REPEATED)


def summary(rows, methods):
    """Of rows of one group."""
    known = {name: [row for row in rows if name in row["epochs"]] for name in methods}
    errors = {n: [error(row, n) for row in of] for n, of in known.items() if of}
    capped = {n: [error(row, n, capped=True) for row in of] for n, of in known.items() if of}
    return {
        "cases": len(rows),
        "median": {name: number(np.median(e)) for name, e in errors.items()},
        "capped": {name: number(np.median(e)) for name, e in capped.items()},
        "p75": {name: number(np.quantile(np.minimum(e, 1e9), 0.75)) for name, e in errors.items()},
        "given_up": {name: number(np.mean(np.isinf(e))) for name, e in errors.items()},
        "covered": number(np.mean([covered(row) for row in rows])),
        "cpu_ms": number(np.median([row["cpu_ms"] for row in rows])),
    }


def claims(in_searches):
    """What is claimed, and whether it holds; all targets, all trials, with or without siblings."""
    found = []
    for group, label, capped in CLAIMS:
        about = {"half": "recorded later", "siblings": "all", "group": group}
        line = next(one for one in in_searches if about.items() <= one.items())
        median = line["capped" if capped else "median"]["siblings"]
        said = f"{label}: median error {100 * median:.1f} % of {line['cases']} at {SHOWN:.0%} seen"
        found.append(real_jobs.claim(said, median < CLAIMED))
    return found


def number(value):
    """For JSON: four digits, null for what was given up."""
    return float(f"{value:.4g}") if value < 1e8 else None


def told(row):
    epochs = {name: number(value) for name, value in row["epochs"].items()}
    ends = {name: number(row[name]) for name in ("low", "high", "chance", "cpu_ms")}
    return row | ends | {"epochs": epochs}


def draw(rows, found, in_searches, facts):
    fig, axes = common.figure(1, 4, figsize=(17, 4.2), width_ratios=(1.1, 1, 1, 1.1))
    ours = dict(zip(METHODS, common.COLOURS, strict=False))
    ours |= {"siblings": common.COLOURS[6]}
    believed = [one for one in found if one["half"] == "to believe"]
    for name, label in METHODS.items():
        line = [one["median"][name] for one in believed if one["group"] == "all"]
        line = [math.nan if value is None else 100 * value for value in line]
        axes[0].semilogy([100 * s for s in SEEN], line, "o-", color=ours[name], label=label)
    axes[0].axhline(10, color="#888888", lw=0.8, ls="--")
    axes[0].set(xlabel="epochs seen, %", ylabel="median error, %", ylim=(1, 1000))
    axes[0].set_title("all metrics and targets")
    axes[0].legend(fontsize=8)
    shown = [r for r in rows if r["seen"] == SHOWN and r["training"] % 2]
    for (metric, label), colour in zip(METRICS.items(), common.COLOURS[3:], strict=False):
        here = [r for r in shown if r["metric"] == metric and math.isfinite(r["epochs"]["ours"])]
        true, mid = [r["true"] for r in here], [r["epochs"]["ours"] for r in here]
        axes[1].loglog(true, mid, "o", ms=4, color=colour, label=label)
        high = [min(r["high"], 400) for r in here]
        axes[1].vlines(true, [r["low"] for r in here], high, color=colour, lw=0.6, alpha=0.5)
    axes[1].plot([8, 110], [8, 110], color="#888888", lw=0.8)
    axes[1].set(xlabel="true epochs", ylabel="predicted, 90 % interval", ylim=(8, 400))
    axes[1].set_title(f"{SHOWN:.0%} of the epochs seen")
    axes[1].legend(fontsize=8)
    here = [one for one in believed if one["seen"] == SHOWN and one["group"].startswith("at ")]
    labels = [f"{one['group']}\n{100 * one['covered']:.0f} % in interval" for one in here]
    bars(axes[2], here, METHODS, ours, labels)
    axes[2].set_title(f"{SHOWN:.0%} seen, by where the target is")
    here = [r for r in in_searches if r["half"] == "recorded later" and r["group"] == "all"]
    labels = [f"{one['siblings']}\n{100 * one['covered']:.0f} %" for one in here]
    bars(axes[3], here, WITH_SIBLINGS, ours, labels)
    axes[3].set_title("trials of later searches, by siblings before")
    axes[3].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    common.save_figure(fig, "loss_curves", facts)


def bars(axis, groups, methods, colours, labels):
    """Median errors of methods in some groups."""
    width = 0.8 / len(methods)
    for place, name in enumerate(methods):
        heights = [100 * min(9.9, one["median"][name] or 9.9) for one in groups]
        at = np.arange(len(groups)) + (place - 0.5 * (len(methods) - 1)) * width
        label = methods[name] if name not in METHODS else None  # the others have theirs
        axis.bar(at, heights, width, color=colours[name], label=label)
    axis.set_xticks(range(len(groups)), labels)
    axis.axhline(10, color="#888888", lw=0.8, ls="--")
    axis.set(ylabel="median error, %", ylim=(0, 100))


def tell(title, found, methods, ours):
    """A table of summaries."""
    common.table(
        (title, "cases", *methods, "capped", "p75", "covered", "given up", "ms"),
        [
            (
                ", ".join(str(one[key]) for key in list(one)[:3]),
                one["cases"],
                *(one["median"].get(name) for name in methods),
                one["capped"][ours],
                one["p75"][ours],
                one["covered"],
                one["given_up"][ours],
                one["cpu_ms"],
            )
            for one in found
        ],
    )


def main():
    facts = common.machine()
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        every = [one | {"seen": seen} for seen in SEEN for one in cases(seen)]
        rows = list(pool.map(judged, every, chunksize=20))
        found = list(summaries(rows))
        of_searches = list(pool.map(judged, cases_of_searches(), chunksize=20))
        in_searches = list(summaries_of_searches(of_searches))
    tell("half, seen, group", found, METHODS, "ours")
    shown = [one for one in in_searches if one["half"] != "chosen on"]
    tell("part, siblings, group", shown, WITH_SIBLINGS | REPEATED, "siblings")
    common.save(
        "loss_curves",
        facts,
        {
            "methods": WITH_SIBLINGS | REPEATED,
            "interval": 0.9,
            "promised": {str(seen): promised(seen) for seen in SEEN},
            "summary": found,
            "searches": in_searches,
            "claims": claims(in_searches),
            "cases": [told(row) for row in rows if row["seen"] == SHOWN],
        },
    )
    draw(rows, found, in_searches, facts)


if __name__ == "__main__":
    main()
