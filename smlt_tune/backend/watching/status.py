"""A fleet in the terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from smlt_tune.backend.sweeps import words
from smlt_tune.backend.watching.metrics import Metric, best, ranked
from smlt_tune.backend.watching.snapshot import CRASHED, OPEN, STATES, JobView, Snapshot

_COLOURS = {
    "open": "cyan", "running": "cyan", "queued": "dim", "paused": "yellow",
    "interrupted": "red", "finished": "green", "closed": "green", "stopped": "magenta",
    "failed": "red", "crashed": "red",
}  # fmt: skip
_BAR = 30
_FAILURES = 3


def picture(shot: Snapshot, metric: Metric, *, most: int = 20) -> RenderableType:
    """The fleet at a moment.

    Args:
        shot: What to show.
        metric: What its jobs are compared by.
        most: Lines of the table of jobs.
    """
    shown: list[RenderableType] = [_headline(shot), _money(shot), _time(shot)]
    leader = best(shot.jobs, metric)
    if leader is not None:
        value = words.value(leader.last(metric.name))
        shown.append(
            Text(f"best     {_clean(metric.name)} {value}  {_clean(leader.job_id)}", "green")
        )
    if shot.state == CRASHED:
        told = "its client ended without closing it: Fleet.open continues it; what is reserved may"
        shown.append(Text(f"{told} have been spent", "red"))
    if shot.jobs:
        shown += [Text(), _jobs(ranked(shot.jobs, metric), metric, most)]
    for failure in shot.failures[-_FAILURES:]:
        texts = (_clean(text) for text in (failure.job_id, failure.what, failure.detail))
        line = "  ".join((f"{words.seconds(failure.time_s):>8}", *texts))
        shown.append(Text(line, "red", no_wrap=True, overflow="ellipsis"))
    return Group(*shown)


def _headline(shot: Snapshot) -> Text:
    line = Text.assemble((f"fleet {_clean(shot.name)}", "bold"), "  ")
    line.append(shot.state, _COLOURS.get(shot.state, ""))
    line.append(f" in process {shot.pid}" if shot.pid is not None else "")
    counts = [f"{shot.count(state)} {state}" for state in STATES if shot.count(state)]
    size = shot.sizes[-1] if shot.sizes else None
    if size is not None and shot.state == OPEN:
        counts.append(f"{size.workers} workers with {size.memory_mb / 1024:,.1f} GB")
    return line.append(f"  {', '.join(counts) or 'no job was submitted'}")


def _money(shot: Snapshot) -> Text:
    money = shot.money
    text = f"settled {words.usd(money.settled)}  reserved {words.usd(money.reserved)}"
    if money.unknown < sum(not job.over for job in shot.jobs):
        left = f" without {money.unknown} jobs" if money.unknown else ""
        text += f"  expected {words.within(money.total, words.usd)}{left}"
    if not money.budget:
        return Text(f"money    {text}  no budget recorded")
    full = min(_BAR, round(_BAR * money.settled / money.budget))
    half = min(_BAR - full, round(_BAR * money.reserved / money.budget))
    return Text.assemble(
        "money    ",
        ("█" * full, "green"),
        ("▒" * half, "yellow"),
        ("·" * (_BAR - full - half), "dim"),
        f"  {text}  of {words.usd(money.budget)}",
    )


def _time(shot: Snapshot) -> Text:
    text = f"time     {words.seconds(shot.elapsed_s)}"
    if shot.deadline_s is not None:
        text += f"  deadline at {words.seconds(shot.deadline_s)}"
    if shot.end_s is not None:
        text += f"  running jobs are expected to end at {words.seconds(shot.end_s)}"
    return Text(text)


def _jobs(rows: Sequence[JobView], metric: Metric, most: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for head in ("job", "status", "on", _clean(metric.name) or "metric", "time", "cost", "why"):
        left = head in ("job", "status", "why")
        table.add_column(Text(head), justify="left" if left else "right", no_wrap=head != "why")
    for job in rows[:most]:
        table.add_row(
            Text(_clean(job.job_id)),
            Text(_clean(job.status), _COLOURS.get(job.status, "")),
            Text(_clean(words.allocation(job.allocation)) if job.allocation else "-"),
            words.value(job.last(metric.name)),
            words.seconds(job.time_s),
            words.usd(job.cost_usd),
            Text(_clean(job.reason), no_wrap=True, overflow="ellipsis"),
        )
    if len(rows) > most:
        table.add_row(Text(f"and {len(rows) - most} more", "dim"))
    return table


def _clean(text: str) -> str:
    """The first line, without what a terminal would obey."""
    first = next(iter(text.strip().splitlines()), "")
    return "".join(c if c.isprintable() else "?" for c in first)
