"""A plan as a picture: time against cost. matplotlib is loaded on first use."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smlt_tune.backend.resource_manager.observations import Interval, Plan
from smlt_tune.backend.sweeps import plots, words
from smlt_tune.backend.sweeps.plan import SweepPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Most points of a front that are drawn, and most marks on the axis of time.
_SHOWN, _MOST_TIMES = 10, 8
_TIMES = [
    *(0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400),
    *(28_800, 57_600, *(86_400 * 2.0**power for power in range(12))),
]
_FRONT, _CHOSEN, _LIMIT = (
    plots.COLOURS["running"],
    plots.COLOURS["finished"],
    plots.COLOURS["failed"],
)


@dataclass(frozen=True)
class Point:
    """Something that takes time and money."""

    label: str
    time_s: Interval
    cost_usd: Interval


@dataclass(frozen=True)
class Picture:
    """What is drawn.

    Attributes:
        title: Above it.
        chosen: The recommended point.
        front: What nothing beats in both time and cost, by time.
        deadline_s: Line at a time, seconds; None for none.
        budget_usd: Line at a cost, USD; None for none.
    """

    title: str
    chosen: Point
    front: Sequence[Point]
    deadline_s: float | None = None
    budget_usd: float | None = None


def of_job(
    plan: Plan, title: str, *, deadline_s: float | None, budget_usd: float | None
) -> Picture:
    """The picture of a job's plan."""
    chosen, *front = (
        Point(words.allocation(one.allocation), one.time_s, one.cost_usd)
        for one in (plan.chosen, *plan.front)
    )
    return Picture(title, chosen, front, deadline_s, budget_usd)


def of_sweep(
    plan: SweepPlan, title: str, *, deadline_s: float | None, budget_usd: float | None
) -> Picture:
    """The picture of a sweep's plan."""
    chosen, *front = (
        Point(words.allocations(one.allocations), one.time_s, one.cost_usd)
        for one in (plan.chosen, *plan.front)
    )
    return Picture(title, chosen, front, deadline_s, budget_usd)


def write(picture: Picture, path: Path) -> None:
    """Draws it into a file; the name's ending says of what kind.

    Args:
        picture: What to draw.
        path: Where to; its folder must exist.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(plots.STYLE):
        figure = Figure(figsize=(7.2, 4.6), dpi=160)
        _paint(figure.add_subplot(), picture)
        figure.savefig(path)


def _paint(axes: "Axes", picture: Picture) -> None:
    axes.set(xscale="log", yscale="log", xlabel="time to the end", ylabel="cost, USD")
    axes.set_title(picture.title, loc="left", fontsize=10.5, weight="bold", pad=24)
    front = sorted(picture.front, key=lambda one: one.time_s.mid)
    axes.plot(
        [one.time_s.mid for one in front], [one.cost_usd.mid for one in front],
        color=_FRONT, lw=1.6, zorder=3,
    )  # fmt: skip
    others = [one for one in words.thinned(front, _SHOWN) if one != picture.chosen]
    _points(axes, others, "Pareto front, 90 % intervals", _FRONT, chosen=False)
    label = f"recommended: {picture.chosen.label}"
    _points(axes, [picture.chosen], label, _CHOSEN, chosen=True)
    if picture.deadline_s is not None:
        axes.axvline(picture.deadline_s, color=_LIMIT, ls="--", lw=1.4, label="deadline")
    if picture.budget_usd is not None:
        axes.axhline(picture.budget_usd, color=_LIMIT, ls=":", lw=1.8, label="budget")
    axes.margins(0.05)
    _ticks(axes)
    _labels(axes, picture.chosen, others)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncol=4, columnspacing=1.2,
        handletextpad=0.5, borderaxespad=0.0, fontsize=8.5,
    )  # fmt: skip


def _points(
    axes: "Axes", points: Sequence[Point], label: str, colour: str, *, chosen: bool
) -> None:
    """Points with their intervals; those of the front are pale, as there are many."""
    if not points:
        return
    times, costs = [one.time_s for one in points], [one.cost_usd for one in points]
    bars = axes.errorbar(
        [one.mid for one in times], [one.mid for one in costs],
        xerr=_arms(times), yerr=_arms(costs), fmt="D" if chosen else "o", ms=8 if chosen else 5,
        color=colour, elinewidth=1.6 if chosen else 1.0, capsize=3 if chosen else 0, label=label,
        zorder=5 if chosen else 4,
    )  # fmt: skip
    for bar in bars[2]:
        bar.set_alpha(1.0 if chosen else 0.28)


def _arms(ranges: Sequence[Interval]) -> list[list[float]]:
    return [[one.mid - one.low for one in ranges], [one.high - one.mid for one in ranges]]


def _labels(axes: "Axes", chosen: Point, others: Sequence[Point]) -> None:
    """Names the points of the front that stand apart from those that have a name already."""
    from matplotlib.patheffects import withStroke

    def place(one: Point) -> tuple[float, float]:
        x, y = axes.transData.transform((one.time_s.mid, one.cost_usd.mid))
        across, up = axes.transAxes.inverted().transform((x, y))
        return float(across), float(up)

    named = [place(chosen)]
    for one in (*others[:1], *reversed(others[1:])):
        across, up = place(one)
        if any(abs(across - x) < 0.18 and abs(up - y) < 0.055 for x, y in named):
            continue
        named.append((across, up))
        axes.annotate(
            one.label, (one.time_s.mid, one.cost_usd.mid), xytext=(6, 6),
            textcoords="offset points", fontsize=8, color="#333333", zorder=6,
            ha="right" if across > 0.8 else "left",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip


def _ticks(axes: "Axes") -> None:
    """Times and sums as people count them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    low, high = axes.get_xlim()
    shown = words.thinned([time for time in _TIMES if low <= time <= high], _MOST_TIMES)
    if len(shown) > 1:
        axes.xaxis.set_major_locator(FixedLocator(shown))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.seconds(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"${value:g}"))
