"""Small charts as inline SVG: no script, no style attribute, nothing to load."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from smlt_tune.backend.sweeps import words

_WIDTH, _HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 12, 10, 40

#: Most points that are drawn of a line.
MOST_POINTS = 400

_TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200)

Point = tuple[float, float]
Say = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: For people; told when the pointer rests on it.
        points: x ascending.
        style: Class of the line, see the style sheet.
        step: Each value holds until the next point.
    """

    name: str
    points: Sequence[Point]
    style: str
    step: bool = False


@dataclass(frozen=True)
class Dot:
    """A single point of a chart, with what is told when the pointer rests on it."""

    name: str
    x: float
    y: float
    style: str


def chart(
    title: str,
    lines: Sequence[Line],
    dots: Sequence[Dot] = (),
    *,
    x: str,
    y: Say,
    zero: bool = True,
    legend: Sequence[tuple[str, str]] = (),
) -> str:
    """A figure with axes; says so if there is nothing to draw.

    Args:
        title: Above it.
        lines: To draw.
        dots: To draw on top.
        x: Label of the axis, which is one of time in seconds.
        y: How the numbers of the vertical axis are written; the title says what they are.
        zero: Whether the vertical axis begins at 0 if nothing lies below.
        legend: Names of styles.
    """
    points = [p for line in lines for p in line.points] + [(dot.x, dot.y) for dot in dots]
    if not points:
        return f"<figure><figcaption>{escape(title)}</figcaption><p>nothing yet</p></figure>"
    across = _Axis.over(
        (p[0] for p in points), _LEFT, _WIDTH - _RIGHT, zero=True, round_step=_time_step
    )
    up = _Axis.over(
        (p[1] for p in points), _HEIGHT - _BOTTOM, _TOP, zero=zero, round_step=_round_step
    )
    drawn = [*_grid(across, up, x, y)]
    drawn += (_line(line, across, up) for line in lines if line.points)
    drawn += (_dot(dot, across, up) for dot in dots)
    keys = "".join(
        f'<span><i class="key {style}"></i>{escape(name)}</span>' for name, style in legend
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'{"".join(drawn)}</svg><div class="legend">{keys}</div></figure>'
    )


@dataclass(frozen=True)
class _Axis:
    """Maps numbers to places; ``ticks`` are round numbers."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    @classmethod
    def over(
        cls,
        numbers: Iterable[float],
        start: float,
        end: float,
        *,
        zero: bool,
        round_step: Callable[[float], float],
    ) -> "_Axis":
        found = list(numbers)
        low, high = min(found), max(found)
        if zero:
            low = min(low, 0.0)
        if high <= low:
            high = low + (abs(low) or 1.0)
        step = round_step((high - low) / 4)
        low = step * math.floor(low / step + 1e-9)
        count = math.ceil((high - low) / step - 1e-9)
        ticks = tuple(low + k * step for k in range(count + 1))
        return cls(low, ticks[-1], start, end, ticks)

    def place(self, number: float) -> str:
        share = (number - self.low) / (self.high - self.low)
        return f"{self.start + share * (self.end - self.start):.1f}"


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, at least so much."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= least * (1 - 1e-9))


def _time_step(least: float) -> float:
    """So many seconds, minutes or hours as people count by."""
    return next((step for step in _TIME_STEPS_S if step >= least), None) or _round_step(least)


def _grid(across: _Axis, up: _Axis, x: str, y: Say) -> Iterable[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for tick in up.ticks:
        at = up.place(tick)
        yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at}" y2="{at}"/>'
        yield f'<text class="end" x="{_LEFT - 6}" y="{at}" dy="4">{escape(y(tick))}</text>'
    for tick in across.ticks:
        at = across.place(tick)
        yield f'<text class="mid" x="{at}" y="{bottom + 16}">{escape(words.seconds(tick))}</text>'
    yield f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    yield f'<text class="mid" x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}">{escape(x)}</text>'


def _line(line: Line, across: _Axis, up: _Axis) -> str:
    points = words.thinned(line.points, MOST_POINTS)
    path = [f"M{across.place(points[0][0])} {up.place(points[0][1])}"]
    for x, y in points[1:]:
        to = across.place(x)
        path.append(f"H{to}V{up.place(y)}" if line.step else f"L{to} {up.place(y)}")
    name = f"<title>{escape(line.name)}</title>"
    path += ["h0"] if len(points) == 1 else []  # a dot
    return f'<path class="{line.style}" d="{"".join(path)}">{name}</path>'


def _dot(dot: Dot, across: _Axis, up: _Axis) -> str:
    name = f"<title>{escape(dot.name)}</title>"
    where = f'cx="{across.place(dot.x)}" cy="{up.place(dot.y)}"'
    return f'<circle class="{dot.style}" {where} r="4">{name}</circle>'
