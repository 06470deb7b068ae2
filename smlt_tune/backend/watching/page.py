"""A fleet as HTML: what the live page and the report show alike. Everything is escaped here."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from urllib.parse import quote

from smlt_tune.backend.explain import Step
from smlt_tune.backend.job import STOPPED
from smlt_tune.backend.resource_manager.observations import Interval
from smlt_tune.backend.sweeps import words
from smlt_tune.backend.watching.charts import Dot, Line, chart
from smlt_tune.backend.watching.halt_report import halt_report
from smlt_tune.backend.watching.metrics import Metric, best, ranked
from smlt_tune.backend.watching.snapshot import (
    CRASHED,
    INTERRUPTED,
    OPEN,
    STATES,
    JobView,
    Snapshot,
)

#: Most curves in a chart, and most lines of a table of what happened; the page says what it leaves
#: out. The table of jobs has all of them.
MOST_CURVES, MOST_LINES = 200, 100

_POINTS_OF_A_CURVE = 60

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1240px; margin: 1.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.quiet, .facts span, th, .legend { color: #666; }
.warn { background: #fff4e0; border-left: 4px solid #d08700; padding: .5rem .8rem; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem 2.4rem; margin: 1rem 0; }
.facts b { display: block; font-size: 1.25rem; } .facts span { font-size: .85rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .6rem .8rem; border: 1px solid #e3e3e3; border-radius: 6px; }
figcaption { font-weight: 600; } svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #eaeaea;
         white-space: nowrap; vertical-align: top; }
th { font-weight: 600; } .l { text-align: left; }
td.why { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 14rem; }
tr.best td { background: #eef7f2; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.state { color: #fff; border-radius: 3px; padding: 0 .45em; font-size: .85em; background: #777; }
.open, .running { background: #1668b8; } .finished, .closed { background: #2a7d4f; }
.stopped, .paused { background: #8a6100; } .failed, .crashed, .interrupted { background: #b3261e; }
path { fill: none; stroke: #1668b8; stroke-width: 1.5; stroke-linecap: round; }
 path.limit { stroke: #b3261e; }
path.limit, path.front, path.forecast { stroke-dasharray: 5 4; }
path.reserved { stroke: #d08700; } path.front, path.forecast { stroke: #777; }
path.memory { stroke: #7b4ab0; } path.other { stroke: #9bb4cc; stroke-width: 1; }
path.top { stroke: #2a7d4f; stroke-width: 2.5; }
circle { fill: #9bb4cc; } circle.top { fill: #2a7d4f; }
line { stroke: #ececec; } line.axis { stroke: #888; }
text { font-size: 11px; fill: #555; }
text.end { text-anchor: end; } text.mid { text-anchor: middle; }
.bar rect { fill: #ececec; } .bar rect.spent { fill: #1668b8; }
.bar rect.reserved { fill: #e9b44c; }
.bar line { stroke: #222; stroke-width: 2; }
.legend { display: flex; gap: 1rem; font-size: .8rem; }
.key { display: inline-block; width: 14px; height: 3px; margin: 0 .4em .2em 0;
       background: #1668b8; }
.key.reserved { background: #d08700; } .key.limit { background: #b3261e; }
.key.top { background: #2a7d4f; } .key.other { background: #9bb4cc; }
.key.front { background: #777; }
"""


def fleet(shot: Snapshot, metric: Metric, *, links: bool) -> str:
    """Everything about a fleet.

    Args:
        shot: What to show.
        metric: What its jobs are compared by.
        links: Whether the names of jobs lead to pages of their own.
    """
    rows = ranked(shot.jobs, metric)
    return "".join(
        [
            _head(shot),
            _facts(shot, metric),
            _bar(shot),
            f'<div class="plots">{"".join(_charts(shot, rows, metric))}</div>',
            _cut(shot, metric, links),
            _jobs(shot, rows, metric, links),
            _decisions(shot, links),
            _failures(shot, links),
            _bill(shot),
        ]
    )


def job(view: JobView, metric: Metric, lines: Iterable[str]) -> str:
    """One job.

    Args:
        view: What to show.
        metric: What jobs are compared by.
        lines: Why it had its allocations, as text.
    """
    reports = [(one.time_s, one.number(metric.name)) for one in view.reports]
    points = [(time_s, value) for time_s, value in reports if value is not None]
    curve = chart(
        metric.name or "metric", [Line(view.job_id, points, "top")],
        x="time of the job", y=_number, zero=False,
    )  # fmt: skip
    sizes = [(step.time_s, float(step.allocation.workers)) for step in view.steps]
    workers = chart(
        "Workers", [Line("workers", _held(sizes, view.time_s), "workers", step=True)],
        x="time of the job", y=_number,
    )  # fmt: skip
    told = escape("\n".join(lines))
    return (
        f"<h1>{escape(view.job_id)} {_badge(view.status)}</h1>"
        f'<div class="plots">{curve}{workers}{_front([view])}</div>'
        f"<h2>Allocations, and why</h2><pre>{told}</pre>"
    )


def document(title: str, head: str, body: str) -> str:
    """A whole page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<title>{escape(title)}</title><meta name="viewport" content="width=device-width">'
        f'<link rel="icon" href="data:,">{head}</head><body>{body}</body></html>\n'
    )


def _head(shot: Snapshot) -> str:
    title = f"<h1>Fleet {escape(shot.name)} {_badge(shot.state)}</h1>"
    if shot.state != CRASHED:
        return title
    return (
        f'{title}<p class="warn">Its client ended without closing it: {shot.count(INTERRUPTED)} '
        f"jobs are unfinished, and {words.usd(shot.money.reserved)} that were reserved may have "
        "been spent. <code>Fleet.open</code> continues it from its checkpoints.</p>"
    )


def _facts(shot: Snapshot, metric: Metric) -> str:
    money, leader = shot.money, best(shot.jobs, metric)
    counts = ", ".join(f"{shot.count(state)} {state}" for state in STATES if shot.count(state))
    share = (
        f"of {words.usd(money.budget)} ({money.settled / money.budget:.0%})"
        if money.budget
        else "no budget recorded"
    )
    facts = [
        ("settled", words.usd(money.settled), share),
        ("reserved", words.usd(money.reserved), "worst case of what is under way"),
        ("expected in the end", *_forecast(shot)),
        ("time", words.seconds(shot.elapsed_s), _ends(shot)),
        ("jobs", str(len(shot.jobs)), counts or "none was submitted"),
        ("failures", str(len(shot.failures)), "functions lost, jobs failed"),
    ]
    if shot.state == OPEN and shot.sizes:
        size = shot.sizes[-1]
        facts.append(("workers", str(size.workers), f"{size.memory_mb / 1024:,.1f} GB"))
    if leader is not None:
        value = words.value(leader.last(metric.name))
        facts.insert(0, (f"best {metric.name}", value, leader.job_id))
    cells = (
        f"<div><span>{escape(what)}</span><b>{escape(value)}</b><span>{escape(more)}</span></div>"
        for what, value, more in facts
    )
    return f'<div class="facts">{"".join(cells)}</div>'


def _forecast(shot: Snapshot) -> tuple[str, str]:
    money = shot.money
    if money.unknown and money.unknown == sum(not one.over for one in shot.jobs):
        return "-", "nothing is known of the jobs that are left"
    more = f"{words.usd(money.total.low)} to {words.usd(money.total.high)}"
    if money.total.low == money.total.high:
        more = "every job has ended"
    without = f", without {money.unknown} jobs" if money.unknown else ""
    return words.usd(money.total.mid), more + without


def _ends(shot: Snapshot) -> str:
    parts = [] if shot.deadline_s is None else [f"deadline at {words.seconds(shot.deadline_s)}"]
    parts += [] if shot.end_s is None else [f"running jobs until {words.seconds(shot.end_s)}"]
    return ", ".join(parts) or "no deadline recorded"


def _bar(shot: Snapshot) -> str:
    """Spent, reserved and expected, against the budget."""
    money = shot.money
    if not money.budget:
        return ""
    whole = max(money.budget, money.settled + money.reserved)
    spent, held = 1000 * money.settled / whole, 1000 * money.reserved / whole
    at = min(1000.0, 1000 * money.total.mid / whole)
    return (
        '<svg class="bar" viewBox="0 0 1000 16" preserveAspectRatio="none" role="img" '
        'aria-label="budget"><rect width="1000" height="16"/>'
        f'<rect class="spent" width="{spent:.1f}" height="16"/>'
        f'<rect class="reserved" x="{spent:.1f}" width="{held:.1f}" height="16"/>'
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="16"/></svg>'
        '<p class="quiet">blue: settled, yellow: reserved, black: expected in the end, '
        "grey: free</p>"
    )


def _charts(shot: Snapshot, rows: Sequence[JobView], metric: Metric) -> Iterator[str]:
    time = "time of the fleet"
    now_s = shot.elapsed_s
    settled = _held([(one.time_s, one.settled) for one in shot.spending], now_s)
    taken = _held([(one.time_s, one.settled + one.reserved) for one in shot.spending], now_s)
    lines = [Line("settled", settled, "spent", True), Line("and reserved", taken, "reserved", True)]
    if shot.money.budget is not None and settled:
        budget = shot.money.budget
        lines.append(Line("budget", [(0.0, budget), (shot.elapsed_s, budget)], "limit"))
    keys = [("settled", "spent"), ("settled and reserved", "reserved"), ("budget", "limit")]
    yield chart("Money", lines, x=time, y=_dollars, legend=keys)
    workers = _held([(one.time_s, float(one.workers)) for one in shot.sizes], now_s)
    memory = _held([(one.time_s, one.memory_mb / 1024) for one in shot.sizes], now_s)
    yield chart("Workers", [Line("workers", workers, "workers", True)], x=time, y=_number)
    yield chart("Memory, GB", [Line("memory", memory, "memory", True)], x=time, y=_number)
    yield _curves(rows, metric)
    yield _front(rows)


def _curves(rows: Sequence[JobView], metric: Metric) -> str:
    leader = best(rows, metric)
    curves = []
    for view in rows:
        found = [(one.time_s, one.number(metric.name)) for one in view.reports]
        points = [(time_s, value) for time_s, value in found if value is not None]
        if points:
            thin = words.thinned(points, _POINTS_OF_A_CURVE)
            curves.append(Line(view.job_id, thin, "top" if view is leader else "other"))
    shown = curves[:MOST_CURVES]
    title = metric.title or "Reports"
    if len(shown) < len(curves):
        title += f": {len(shown)} of {len(curves)} jobs"
    shown.sort(key=lambda line: line.style == "top")  # drawn last: it lies on top
    keys = [("best finished job", "top"), ("others", "other")]
    across = "time of the job"
    return chart(title, shown, x=across, y=_number, zero=False, legend=keys)


def _front(jobs: Iterable[JobView]) -> str:
    """The allocations that the latest decision with alternatives chose from."""
    found = [
        (view.started_s or 0.0, step, view)
        for view in jobs
        for step in view.steps
        if step.predicted.time_s and step.predicted.cost_usd and step.alternatives
    ]
    title = "Time and cost of the allocations to choose from"
    if not found:
        return chart(title, [], x="time to the end", y=_dollars)
    _, step, view = max(found, key=lambda one: one[0] + one[1].time_s)
    time_s, cost_usd = step.predicted.time_s, step.predicted.cost_usd
    assert time_s is not None
    assert cost_usd is not None
    dots = [
        Dot(words.allocation(one.allocation), one.time_s, one.cost_usd, "other")
        for one in step.alternatives
        if one.time_s is not None and one.cost_usd is not None
    ]
    dots.append(
        Dot(f"chosen: {words.allocation(step.allocation)}", time_s.mid, cost_usd.mid, "top")
    )
    return chart(
        f"{title}: {view.job_id}", [Line("Pareto front", pareto(dots), "front")], dots,
        x="time to the end", y=_dollars,
        legend=[("chosen", "top"), ("not chosen", "other"), ("Pareto front", "front")],
    )  # fmt: skip


def pareto(dots: Sequence[Dot]) -> list[tuple[float, float]]:
    """Those that no other one beats in both, by x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted((dot.x, dot.y) for dot in dots):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _cut(shot: Snapshot, metric: Metric, links: bool) -> str:
    """What did not run to its end, why, and what that would have cost."""
    cut = [view for view in shot.jobs if view.status in (STOPPED, INTERRUPTED)]
    if not cut:
        return ""
    reasons = Counter(_first(view.reason) or view.status for view in cut)
    summary = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    halted = halt_report(shot)
    rest = {one.job.job_id: one.rest_usd for one in halted.cut}
    rows = [
        [_name(view, links), escape(_first(view.reason) or view.status),
         "-" if view.done is None else f"{view.done:.0%}", str(len(view.reports)),
         words.value(view.last(metric.name)), words.usd(view.cost_usd),
         _within(rest.get(view.job_id, view.rest_usd))]
        for view in cut[:MOST_LINES]
    ]  # fmt: skip
    heads = ["job", "why", "done", "reports", escape(metric.name) or "metric", "cost", "to finish"]
    told = "".join(f"<p>{escape(line)}.</p>" for line in halted.lines())
    return (
        f"<h2>Cut</h2><p>{len(cut)} of {len(shot.jobs)} jobs: {escape(summary)}"
        f"{_left_out(cut)}</p>{told}{_table(heads, rows, left=2)}"
    )


def _within(range_: Interval | None) -> str:
    return "-" if range_ is None else words.within(range_, words.usd)


def _jobs(shot: Snapshot, rows: Sequence[JobView], metric: Metric, links: bool) -> str:
    if not rows:
        return "<h2>Jobs</h2><p>No job was submitted.</p>"
    leader = best(shot.jobs, metric)
    heads = ["job", "status", escape(metric.name) or "metric", "reports", "on", "time", "cost",
             "reserved", "expected", "why"]  # fmt: skip
    cells = [
        [
            _name(view, links),
            _badge(view.status),
            words.value(view.last(metric.name)),
            str(len(view.reports)),
            escape(words.allocation(view.allocation)) if view.allocation else "-",
            words.seconds(view.time_s),
            words.usd(view.cost_usd),
            words.usd(view.reserved_usd),
            words.usd(view.expected_usd.mid) if view.expected_usd else "-",
            escape(_first(view.reason)),
        ]
        for view in rows
    ]
    marked = {place for place, view in enumerate(rows) if view is leader}
    return f"<h2>Jobs</h2>{_table(heads, cells, left=2, marked=marked)}"


def _decisions(shot: Snapshot, links: bool) -> str:
    found: list[tuple[float, JobView, Step]] = [
        ((view.started_s or view.submitted_s) + step.time_s, view, step)
        for view in shot.jobs
        for step in view.steps
        if step.decided and step.allocation != step.before
    ]
    if not found:
        return ""
    found.sort(key=lambda one: -one[0])
    rows = []
    for at_s, view, step in found[:MOST_LINES]:
        before = f"{words.allocation(step.before)} > " if step.before else ""
        cost = step.predicted.cost_usd
        rows.append(
            [_name(view, links), words.seconds(at_s),
             escape(before + words.allocation(step.allocation)),
             words.within(cost, words.usd) if cost else "-", escape(step.reason)]
        )  # fmt: skip
    heads = ["job", "at", "allocation", "expected from there", "why"]
    return f"<h2>Allocation decisions{_left_out(found)}</h2>{_table(heads, rows, left=1)}"


def _failures(shot: Snapshot, links: bool) -> str:
    if not shot.failures:
        return ""
    known = {view.job_id: view for view in shot.jobs}
    latest = shot.failures[::-1]
    rows = [
        [_name(known[one.job_id], links), escape(one.what), words.seconds(one.time_s),
         _detail(one.detail)]
        for one in latest[:MOST_LINES]
    ]  # fmt: skip
    heads = ["job", "what", "at", "detail"]
    return f"<h2>Failures{_left_out(latest)}</h2>{_table(heads, rows, left=2)}"


def _bill(shot: Snapshot) -> str:
    lines = [[escape(one.what), _exact(one.settled), _exact(one.reserved)] for one in shot.bill]
    lines.append(["all", _exact(shot.money.settled), _exact(shot.money.reserved)])
    return f"<h2>Bill</h2>{_table(['what', 'settled', 'reserved'], lines, left=1)}"


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int, marked: Iterable[int] = ()
) -> str:
    """A table of HTML; the first ``left`` columns and one called why or detail hold text."""
    wide = ("why", "detail")
    kinds = [
        "why" if head in wide and place >= left else "l" if place < left else ""
        for place, head in enumerate(heads)
    ]
    head = "".join(
        f'<th class="{"l" if kind else ""}">{one}</th>'
        for kind, one in zip(kinds, heads, strict=True)
    )
    body = []
    chosen = set(marked)
    for place, row in enumerate(rows):
        cells = "".join(
            f'<td class="{kind}">{one}</td>' for kind, one in zip(kinds, row, strict=True)
        )
        body.append(f"<tr{' class=best' if place in chosen else ''}>{cells}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _left_out(found: Sequence[object]) -> str:
    return f" ({MOST_LINES} of {len(found)} are shown)" if len(found) > MOST_LINES else ""


def _name(view: JobView, links: bool) -> str:
    name = escape(view.job_id)
    return f'<a href="/jobs/{quote(view.job_id, safe="")}">{name}</a>' if links else name


def _badge(state: str) -> str:
    return f'<span class="state {escape(state)}">{escape(state)}</span>'


def _detail(text: str) -> str:
    """The first line; the rest unfolds."""
    first, _, rest = text.strip().partition("\n")
    if not rest:
        return escape(first)
    return f"<details><summary>{escape(first)}</summary>{escape(rest)}</details>"


def _first(text: str) -> str:
    return text.strip().partition("\n")[0]


def _held(points: list[tuple[float, float]], until_s: float) -> list[tuple[float, float]]:
    """What holds since the last point."""
    return [*points, (max(until_s, points[-1][0]), points[-1][1])] if points else []


def _exact(amount: float) -> str:
    return f"${amount:,.9f}"


def _dollars(amount: float) -> str:
    return f"${amount:.3g}"


def _number(value: float) -> str:
    return f"{value:,.4g}"
