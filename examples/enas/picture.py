"""What the search did, candidate by candidate, after figure 13 of the SMLT paper."""

POINTS, LINES = "#0b6fb8", "#d1662b"


def draw(rows, path):
    """What a model computes, its allocation, its throughput, and what that led to.

    Args:
        rows: Of each candidate that was trained: ``number``, ``mflops_per_sample``, ``workers``,
            ``memory_mb``, ``samples_per_s``, ``accuracy``.
        path: Of the picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4, 1, sharex=True, figsize=(8, 8), layout="constrained")
    numbers = [row["number"] for row in rows]
    columns = {
        "operations per sample,\nmillions": [row["mflops_per_sample"] for row in rows],
        "GB of all workers": [row["workers"] * row["memory_mb"] / 1024 for row in rows],
        "samples per s": [row["samples_per_s"] for row in rows],
        "accuracy": [row["accuracy"] for row in rows],
    }
    for axis, (label, values) in zip(axes, columns.items(), strict=True):
        axis.scatter(numbers, values, s=14, color=POINTS)
        axis.set_ylabel(label)
        axis.grid(color="#e3e3e3")
    for axis in axes[:3]:
        axis.set_yscale("log")
    for row, gb in zip(rows, columns["GB of all workers"], strict=True):
        if row["workers"] > 1:
            text = f"{row['workers']} workers"
            axes[1].annotate(text, (row["number"], gb), (4, 3), textcoords="offset points", size=7)
    quarter = max(1, len(rows) // 4)
    for first in range(0, len(rows) - quarter + 1, quarter):
        part = rows[first : first + quarter]
        mean = sum(row["accuracy"] for row in part) / quarter
        axes[3].plot([part[0]["number"], part[-1]["number"]], [mean, mean], color=LINES)
    axes[3].set_xlabel("candidate; the lines are means of quarters")
    figure.savefig(path, dpi=130)
    plt.close(figure)
