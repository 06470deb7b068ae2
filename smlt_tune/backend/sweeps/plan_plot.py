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

#: Most points of a front that are labelled.
_LABELS = 6
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
    axes.set(xscale="log", yscale="log", xlabel="time to the end", ylabel="cost")
    axes.set_title(picture.title, loc="left", fontsize=10.5, weight="bold", pad=26)
    front = [one for one in picture.front if one != picture.chosen]
    line = sorted(picture.front, key=lambda one: one.time_s.mid)
    axes.plot(
        [one.time_s.mid for one in line], [one.cost_usd.mid for one in line],
        color=_FRONT, lw=1.4, alpha=0.6, zorder=2,
    )  # fmt: skip
    _points(axes, front, "Pareto front, 90 % intervals", _FRONT, "o", 4)
    _points(axes, [picture.chosen], f"recommended: {picture.chosen.label}", _CHOSEN, "D", 8)
    if picture.deadline_s is not None:
        axes.axvline(picture.deadline_s, color=_LIMIT, ls="--", lw=1.4, label="deadline")
    if picture.budget_usd is not None:
        axes.axhline(picture.budget_usd, color=_LIMIT, ls=":", lw=1.6, label="budget")
    for number, one in enumerate(words.thinned(line, _LABELS)):
        if one != picture.chosen:
            _label(axes, one, above=bool(number % 2))
    _ticks(axes)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncol=4, columnspacing=1.2,
        handletextpad=0.5, borderaxespad=0.0, fontsize=8.5,
    )  # fmt: skip


def _points(
    axes: "Axes", points: Sequence[Point], label: str, colour: str, marker: str, size: int
) -> None:
    if not points:
        return
    axes.errorbar(
        [one.time_s.mid for one in points], [one.cost_usd.mid for one in points],
        xerr=_arms([one.time_s for one in points]), yerr=_arms([one.cost_usd for one in points]),
        fmt=marker, ms=size, color=colour, ecolor=colour, elinewidth=0.8, capsize=2,
        alpha=1.0 if marker == "D" else 0.75, label=label, zorder=4 if marker == "D" else 3,
    )  # fmt: skip


def _arms(ranges: Sequence[Interval]) -> list[list[float]]:
    return [[one.mid - one.low for one in ranges], [one.high - one.mid for one in ranges]]


def _label(axes: "Axes", one: Point, *, above: bool) -> None:
    axes.annotate(
        one.label, (one.time_s.mid, one.cost_usd.mid), xytext=(5, 5 if above else -11),
        textcoords="offset points", fontsize=7.5, color="#444444", zorder=5,
    )  # fmt: skip


def _ticks(axes: "Axes") -> None:
    """Times and sums as people write them, also within a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, say in ((axes.xaxis, words.seconds), (axes.yaxis, words.usd)):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _, say=say: say(value)))
        axis.set_minor_formatter(NullFormatter())
