"""What the search did, candidate by candidate, after figure 13 of the SMLT paper."""

POINTS, LINES = "#0b6fb8", "#d1662b"


def draw(rows, path):
    """Model size, workers and their memory, throughput, and what they led to.

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
    columns = {
        "parameters": [row["parameters"] for row in rows],
        "workers": [row["workers"] for row in rows],
        "samples per s": [row["samples_per_s"] for row in rows],
        "accuracy": [row["accuracy"] for row in rows],
    }
    for axis, (label, values) in zip(axes, columns.items(), strict=True):
        axis.scatter(numbers, values, s=14, color=POINTS)
        axis.set_ylabel(label)
        axis.grid(color="#e3e3e3")
    axes[0].set_yscale("log")
    axes[2].set_yscale("log")
    memory = axes[1].twinx()
    memory.step(numbers, [row["memory_mb"] for row in rows], where="mid", color=LINES, lw=0.8)
    memory.set_ylabel("memory of each, MB", color=LINES)
    quarter = max(1, len(rows) // 4)
    for first in range(0, len(rows) - quarter + 1, quarter):
        part = rows[first : first + quarter]
        mean = sum(row["accuracy"] for row in part) / quarter
        axes[3].plot([part[0]["number"], part[-1]["number"]], [mean, mean], color=LINES)
    axes[3].set_xlabel("candidate; the lines are means of quarters")
    figure.savefig(path, dpi=130)
    plt.close(figure)
