"""The plots of a report, as SVG. The only module that draws; matplotlib is loaded on first use."""

import io
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from smlt_tune.backend.sweeps.board import Board, Row, ranked

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = "plots need matplotlib: pip install 'smlt-tune[report]'"

COLOURS = {
    "finished": "#2a7f62",
    "pruned": "#d9a441",
    "stopped": "#8a5a9e",
    "failed": "#c0392b",
    "waiting": "#999999",
    "running": "#3478b6",
}
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "smlt",
    "figure.constrained_layout.use": True,
}


def available() -> bool:
    """Whether matplotlib can be loaded."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(board: Board) -> dict[str, str]:
    """All plots: title -> SVG."""
    rows = board.snapshot()
    return {
        f"Best {board.sweep.metric} over time": _svg(lambda axes: _best(axes, board, rows, "time")),
        f"Best {board.sweep.metric} over money spent": _svg(
            lambda axes: _best(axes, board, rows, "cost")
        ),
        "Learning curves": _svg(lambda axes: _curves(axes, board, rows)),
        "Cost of each trial": _svg(lambda axes: _costs(axes, rows)),
        "Accuracy for the money".replace("Accuracy", board.sweep.metric.capitalize()): _svg(
            lambda axes: _scatter(axes, board, rows)
        ),
        "Budget": _svg(lambda axes: _budget(axes, board)),
    }


def _svg(paint: Callable[["Axes"], None]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.4))
        paint(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return re.sub(
        r'(<svg[^>]*?) height="[^"]*"( [^>]*?) width="[^"]*"', r"\1\2", text[text.index("<svg") :]
    )


def _best(axes: "Axes", board: Board, rows: list[Row], over: str) -> None:
    """A step for every report that was better than all before it; all reports as dots."""
    seen = sorted(
        (point.elapsed_s, point.value) for row in rows for point in row.points
        if point.value is not None and math.isfinite(point.value)
    )  # fmt: skip
    steps: list[tuple[float, float]] = []
    better = max if board.sweep.maximize else min
    xs = [_spent(board, at) if over == "cost" else at for at, _ in seen]
    for x, (_, value) in zip(xs, seen, strict=True):
        steps.append((x, better(value, steps[-1][1]) if steps else value))
    axes.plot(xs, [value for _, value in seen], "o", ms=3, color="#b5b5b5", label="reports")
    if steps:
        end = _spent(board, board.elapsed_s) if over == "cost" else board.elapsed_s
        steps.append((max(end, steps[-1][0]), steps[-1][1]))
        axes.step(*zip(*steps, strict=True), where="post", color=COLOURS["finished"], lw=2)
        axes.annotate(
            f"{steps[-1][1]:.4g}", steps[-1], xytext=(0, 5), textcoords="offset points",
            ha="right", color=COLOURS["finished"], weight="bold",
        )  # fmt: skip
    axes.locator_params(axis="x", nbins=6)
    axes.set(xlabel="USD spent" if over == "cost" else "seconds", ylabel=board.sweep.metric)
    _show(axes, board, rows)


def _legend(axes: "Axes") -> None:
    """Above the plot, where it hides nothing."""
    from matplotlib.collections import PathCollection

    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    legend = axes.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncol=6,
        columnspacing=1.2, handletextpad=0.5, borderaxespad=0.0,
    )  # fmt: skip
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([30])


def _whole_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _spent(board: Board, at: float) -> float:
    """Spent by then, USD."""
    return next((s.spent_usd for s in reversed(board.spending) if s.elapsed_s <= at), 0.0)


def _numbers(rows: list[Row]) -> list[float]:
    """Every finite value of the metric."""
    values = [point.value for row in rows for point in row.points]
    return [value for value in values if value is not None and math.isfinite(value)]


def _show(axes: "Axes", board: Board, rows: list[Row]) -> None:
    """Chooses the range of values so that a few trials that went wrong do not flatten the rest."""
    values = sorted(_numbers(rows))
    if len(values) < 2:
        return
    quarter, middle, three = (values[len(values) * n // 4] for n in (1, 2, 3))
    reach = 3 * max(three - quarter, abs(middle) / 100)
    low, high = values[0], values[-1]
    if board.sweep.maximize:
        low = max(low, quarter - reach)
    else:
        high = min(high, three + reach)
    hidden = sum(not low <= value <= high for value in values)
    margin = 0.1 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + 1.4 * margin)
    if hidden:
        axes.set_ylabel(f"{board.sweep.metric} ({hidden} worse ones not shown)")


def _curves(axes: "Axes", board: Board, rows: list[Row]) -> None:
    labelled: set[str] = set()
    for row in rows:
        curve = [(n, p.value) for n, p in enumerate(row.points, 1) if p.value is not None]
        if not curve:
            continue
        label = None if row.state in labelled else row.state
        labelled.add(row.state)
        colour = COLOURS[row.state]
        xs, ys = zip(*curve, strict=True)
        axes.plot(xs, ys, color=colour, lw=1.3, alpha=0.8, label=label)
        axes.plot(xs[-1], ys[-1], "o" if row.state == "finished" else "X", ms=5, color=colour)
    axes.set(xlabel="report", ylabel=board.sweep.metric)
    _show(axes, board, rows)
    _whole_numbers(axes)
    _legend(axes)


def _costs(axes: "Axes", rows: list[Row]) -> None:
    labelled: set[str] = set()
    for row in rows:
        label = None if row.state in labelled else row.state
        labelled.add(row.state)
        axes.bar(row.trial, 1000 * row.cost_usd, 0.75, color=COLOURS[row.state], label=label)
    axes.set(xlabel="trial", ylabel="cost in thousandths of a dollar")
    _whole_numbers(axes)
    axes.grid(visible=False, axis="x")
    axes.margins(x=0.02)
    _legend(axes)


def _scatter(axes: "Axes", board: Board, rows: list[Row]) -> None:
    leaders = [row.trial for row in ranked(rows, maximize=board.sweep.maximize)[:1]]
    labelled: set[str] = set()
    for row in rows:
        if row.value is None:
            continue
        label = None if row.state in labelled else row.state
        labelled.add(row.state)
        x = 1000 * row.cost_usd
        axes.scatter(
            x, row.value, 12 + 14 * row.workers, COLOURS[row.state], alpha=0.8, label=label
        )
        if row.trial not in leaders:
            continue
        axes.annotate(
            f"trial {row.trial}",
            (x, row.value),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=7.5,
        )
    axes.set(
        xlabel="cost in thousandths of a dollar (larger dots: more workers)",
        ylabel=board.sweep.metric,
    )
    axes.margins(x=0.08)
    _show(axes, board, rows)
    _legend(axes)


def _budget(axes: "Axes", board: Board) -> None:
    times = [one.elapsed_s for one in board.spending]
    spent = [one.spent_usd for one in board.spending]
    together = [one.spent_usd + one.held_usd for one in board.spending]
    fill: dict[str, Any] = {"step": "post", "lw": 0}
    axes.fill_between(times, spent, together, color="#f0d9a8", label="reserved", **fill)
    axes.fill_between(times, 0, spent, color="#8fc1ad", label="spent", **fill)
    budget = board.sweep.budget_usd
    if budget:
        axes.axhline(budget, color=COLOURS["failed"], lw=1.5, ls="--", label="budget")
    axes.set(xlabel="seconds", ylabel="USD", ylim=(0, None))
    _legend(axes)
