"""What the search did, candidate by candidate, after figure 13 of the SMLT paper."""

from itertools import pairwise


def draw(rows, path):
    """Throughput, workers and model size, and what they led to.

    Args:
        rows: Of each candidate that was trained: ``number``, ``parameters``, ``workers``,
            ``memory_mb``, ``samples_per_s``, ``accuracy``.
        path: Of the picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4, 1, sharex=True, figsize=(8, 8), layout="constrained")
    numbers = [row["number"] for row in rows]
    shown = [
        ("parameters", "parameters", "log"),
        ("memory_mb", "memory of all\nfunctions, MB", "log"),
        ("samples_per_s", "samples per s", "log"),
        ("accuracy", "accuracy", "linear"),
    ]
    for axis, (name, label, scale) in zip(axes, shown, strict=True):
        values = [row[name] * (row["workers"] if name == "memory_mb" else 1) for row in rows]
        axis.scatter(numbers, values, s=14, color="#0b6fb8")
        axis.set(ylabel=label, yscale=scale)
        axis.grid(color="#e3e3e3")
    last = axes[-1]
    if len(rows) >= 8:
        width = len(rows) // 4
        parts = [rows[i : i + width] for i in range(0, 4 * width, width)]
        means = [sum(row["accuracy"] for row in part) / len(part) for part in parts]
        for part, mean in zip(parts, means, strict=True):
            span = part[0]["number"], part[-1]["number"]
            last.plot(span, [mean, mean], color="#d1662b")
        for (left, right), (a, b) in zip(pairwise(parts), pairwise(means), strict=True):
            last.plot([left[-1]["number"], right[0]["number"]], [a, b], color="#d1662b", lw=0.5)
    workers = axes[1].twinx()
    workers.step(numbers, [row["workers"] for row in rows], where="mid", color="#d1662b", lw=0.8)
    workers.set_ylabel("workers", color="#d1662b")
    last.set_xlabel("candidate")
    figure.savefig(path, dpi=130)
    plt.close(figure)
