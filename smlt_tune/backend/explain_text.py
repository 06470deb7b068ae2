"""Explanations as people read them."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from smlt_tune.backend.explain import Explanation, Happened, Predicted, Step
from smlt_tune.backend.sweeps import words


def told(job: Explanation) -> Iterator[str]:
    """One job, line by line."""
    ends = [words.seconds(job.duration_s)] if job.duration_s is not None else []
    ends += [words.usd(job.cost_usd)] if job.cost_usd is not None else []
    why = f" ({job.reason.splitlines()[0]})" if job.reason else ""
    yield f"{job.job_id}  {'  '.join([job.status + why, *ends])}"
    if not job.steps:
        yield "it has not got an allocation yet"
    for step in job.steps:
        yield ""
        yield from _step(step)


def table(jobs: Sequence[Explanation]) -> Table:
    """All jobs, one a line."""
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("job", "state", "time", "cost", "allocations", "why the last one"):
        shown.add_column(name, justify="right" if name in ("time", "cost") else "left")
    for job in jobs:
        moves = [step for step in job.steps if step.allocation != step.before]
        shown.add_row(
            job.job_id,
            job.status,
            "-" if job.duration_s is None else words.seconds(job.duration_s),
            "-" if job.cost_usd is None else words.usd(job.cost_usd),
            " > ".join(words.allocation(step.allocation) for step in moves) or "-",
            moves[-1].reason if moves else "-",
        )
    return shown


def _step(step: Step) -> Iterator[str]:
    moved = ""
    if step.before is not None and step.before != step.allocation:
        moved = f"{words.allocation(step.before)} > "
    yield f"{words.seconds(step.time_s):>8}  {moved}{words.allocation(step.allocation)}"
    for name, text in _details(step):
        yield f"          {name:<10} {text}"


def _details(step: Step) -> Iterator[tuple[str, str]]:
    yield "reason", step.reason or "not recorded"
    if step.occasion:
        yield "occasion", step.occasion
    if step.goal:
        yield "goal", step.goal
    if step.own is not None or step.siblings is not None:
        yield "known", f"{step.own or 0} measurements of its own, {step.siblings or 0} of siblings"
    if step.gain is not None:
        yield "gain", f"{step.gain:.0%} expected of the move"
    if expected := _predicted(step.predicted):
        yield "predicted", expected
    if happened := _happened(step.happened):
        yield "happened", happened
    for number, one in enumerate(step.alternatives):
        facts = [] if one.time_s is None else [words.seconds(one.time_s)]
        facts += [] if one.cost_usd is None else [words.usd(one.cost_usd)]
        text = f"{words.allocation(one.allocation)}{': ' if facts else ''}{', '.join(facts)}"
        yield "" if number else "instead of", text
    if not step.decided:
        yield "decided", "by nobody: it was started again"


def _predicted(one: Predicted) -> str:
    parts = [f"{words.within(one.time_s, words.seconds)} to the end"] if one.time_s else []
    parts += [words.within(one.cost_usd, words.usd)] if one.cost_usd else []
    parts += (
        [f"{words.within(one.iteration_s, words.brief)} per iteration"] if one.iteration_s else []
    )
    parts += [f"memory is enough with {one.fits:.0%}"] if one.fits is not None else []
    return "; ".join(parts)


def _happened(one: Happened) -> str:
    parts = [f"{words.seconds(one.time_s)} to the end"] if one.time_s is not None else []
    parts += [words.usd(one.cost_usd)] if one.cost_usd is not None else []
    if one.iteration_s is not None:
        parts.append(
            f"{words.brief(one.iteration_s)} per iteration, over {one.iterations:,} of them"
        )
    if one.peak_mb is not None:
        parts.append(f"at most {one.peak_mb:,.0f} MB in use")
    if one.out_of_memory:
        parts.append("the memory was not enough")
    return "; ".join(parts)
