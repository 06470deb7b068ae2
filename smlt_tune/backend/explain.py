"""Why a job had the allocations it had, from the journal of its fleet.

What the journal lacks (an older fleet, another policy) is left out, never guessed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from smlt_tune.backend.history import HistoryEvent
from smlt_tune.backend.resource_manager.observations import Allocation, Interval
from smlt_tune.errors import InvalidInput


@dataclass(frozen=True)
class Predicted:
    """What was expected from a decision to the end of the job; None where nothing was said.

    Attributes:
        iteration_s: Time per training iteration, seconds.
        time_s: To the end of the job, seconds.
        cost_usd: To the end of the job, USD.
        fits: Probability that the memory is enough.
    """

    iteration_s: Interval | None = None
    time_s: Interval | None = None
    cost_usd: Interval | None = None
    fits: float | None = None


@dataclass(frozen=True)
class Alternative:
    """An allocation that was considered and not taken; None where nothing was said."""

    allocation: Allocation
    time_s: float | None = None
    cost_usd: float | None = None


@dataclass(frozen=True)
class Happened:
    """What was measured on an allocation until the next one.

    Attributes:
        iterations: How many training iterations were measured.
        iteration_s: Time per training iteration, their mean, seconds; None if none was measured.
        peak_mb: Highest resident memory of a worker, MB; None if it is not known.
        out_of_memory: The memory was not enough.
        time_s: From the decision to the end of the job, seconds; None if another decision followed
            or the job has not ended.
        cost_usd: Of the whole job, USD; None unless this was its only decision and it has ended.
    """

    iterations: int = 0
    iteration_s: float | None = None
    peak_mb: float | None = None
    out_of_memory: bool = False
    time_s: float | None = None
    cost_usd: float | None = None


@dataclass(frozen=True)
class Step:
    """A decision on a job, or a generation that nobody decided on (a relaunch, say).

    Attributes:
        time_s: When, seconds since the job's first function started.
        allocation: What it had from then on.
        before: What it had until then; None at the beginning.
        reason: Why, in one line.
        generations: Numbers of the generations that were started because of it.
        decided: Whether the resource manager decided it.
        occasion: Why it was asked, in a word or two.
        own: Profiles of the job itself that were used; None if that was not recorded.
        siblings: Profiles of siblings that were used; None if that was not recorded.
        predicted: What was expected.
        alternatives: What else was considered.
        gain: Relative gain that was expected of the move; None if it was no move.
        goal: What the user wanted, in words.
        happened: What then was measured.
    """

    time_s: float
    allocation: Allocation
    before: Allocation | None
    reason: str
    generations: tuple[int, ...] = ()
    decided: bool = True
    occasion: str = ""
    own: int | None = None
    siblings: int | None = None
    predicted: Predicted = Predicted()
    alternatives: tuple[Alternative, ...] = ()
    gain: float | None = None
    goal: str = ""
    happened: Happened = Happened()


@dataclass(frozen=True)
class Explanation:
    """One job.

    Attributes:
        job_id: Which.
        status: ``finished``, ``stopped``, ``failed``; ``running`` if it has not ended.
        reason: Why it was stopped or what failed; empty otherwise.
        steps: What happened to its allocation, in order.
        duration_s: Of the whole job, seconds; None if it has not ended.
        cost_usd: Of the whole job, USD; None if it has not ended.
    """

    job_id: str
    status: str
    reason: str
    steps: tuple[Step, ...]
    duration_s: float | None = None
    cost_usd: float | None = None


def explain(events: Sequence[HistoryEvent], job_id: str) -> Explanation:
    """Why a job had the allocations it had.

    Args:
        events: Of its fleet.
        job_id: Of the job.

    Raises:
        InvalidInput: The fleet has no such job; names those that it has.
    """
    known = _job_ids(events)
    if job_id not in known:
        raise InvalidInput(_unknown(job_id, known))
    return _explanation(job_id, [event for event in events if event.job == job_id])


def explain_all(events: Sequence[HistoryEvent]) -> list[Explanation]:
    """The same for all jobs of a fleet, in the order of their submission."""
    of_job: dict[str, list[HistoryEvent]] = {job_id: [] for job_id in _job_ids(events)}
    for event in events:
        if event.job in of_job:
            of_job[event.job].append(event)
    return [_explanation(job_id, own) for job_id, own in of_job.items()]


def _job_ids(events: Iterable[HistoryEvent]) -> list[str]:
    return [event.job for event in events if event.kind == "job"]


def _unknown(job_id: str, known: list[str]) -> str:
    if not known:
        return f"the fleet has no job {job_id!r}: no job was submitted to it"
    near = get_close_matches(job_id, known, n=5) or known
    shown, more = near[:5], len(known) - len(near[:5])
    others = f" and {more} more" if more else ""
    return f"the fleet has no job {job_id!r}; it has {', '.join(shown)}{others}"


def _explanation(job_id: str, events: Sequence[HistoryEvent]) -> Explanation:
    ended = next((e.body for e in reversed(events) if e.kind == "ended"), None)
    steps = _Steps()
    for event in events:
        steps.take(event)
    if ended is None:
        return Explanation(job_id, "running", "", steps.finished(None))
    error = ended.get("error")
    return Explanation(
        job_id,
        str(ended.get("status", "ended")),
        ": ".join(map(str, error)) if error else str(ended.get("reason") or ""),
        steps.finished(ended),
        _number(ended.get("duration_s")),
        _number(ended.get("cost_usd")),
    )


@dataclass
class _Open:
    """A step while its events are still coming."""

    time_s: float
    allocation: Allocation
    reason: str
    evidence: Mapping[str, Any]
    decided: bool
    occasion: str = ""
    generations: list[int] = field(default_factory=list)
    profiles: list[Mapping[str, Any]] = field(default_factory=list)


class _Steps:
    """Puts the events of one job together."""

    def __init__(self) -> None:
        self._found: list[_Open] = []

    def take(self, event: HistoryEvent) -> None:
        body = event.body
        if event.kind == "decision":
            allocation = _allocation(body.get("allocation"))
            evidence = body.get("evidence")
            self._add(body, allocation, evidence if isinstance(evidence, Mapping) else {})
        elif event.kind == "generation":
            self._generation(body)
        elif event.kind == "profile":
            self._profile(body)

    def _add(
        self,
        body: Mapping[str, Any],
        allocation: Allocation | None,
        evidence: Mapping[str, Any] | None,
    ) -> None:
        if allocation is not None:
            time_s, reason = _number(body.get("time_s")) or 0.0, str(body.get("reason", ""))
            decided = evidence is not None
            occasion = str(body.get("occasion") or "")
            self._found.append(_Open(time_s, allocation, reason, evidence or {}, decided, occasion))

    def _generation(self, body: Mapping[str, Any]) -> None:
        """It carries out the decision before it, or stands for itself."""
        last = self._found[-1] if self._found else None
        default = last.allocation.store if last else ""
        allocation = _allocation({"store": default, **body})
        fits = last is not None and allocation == last.allocation
        if not (last and fits and last.decided and not last.generations):
            self._add(body, allocation, None)
        if self._found and "generation" in body:
            self._found[-1].generations.append(int(body["generation"]))

    def _profile(self, body: Mapping[str, Any]) -> None:
        """It belongs to the latest step on its allocation: functions of the old one still run."""
        allocation = _allocation(body.get("allocation"))
        for step in reversed(self._found):
            if step.allocation == allocation:
                step.profiles.append(body)
                return

    def finished(self, ended: Mapping[str, Any] | None) -> tuple[Step, ...]:
        before = [None, *(step.allocation for step in self._found)]
        decisions = sum(step.decided for step in self._found)
        last = next((step for step in reversed(self._found) if step.decided), None)
        steps = []
        for step, previous in zip(self._found, before, strict=False):
            end = ended if step is last else None
            steps.append(_step(step, previous, _happened(step, end, only=decisions == 1)))
        return tuple(steps)


def _step(step: _Open, before: Allocation | None, happened: Happened) -> Step:
    evidence = step.evidence
    own, siblings = evidence.get("own"), evidence.get("siblings")
    # Where nobody knew the length of the job, times to its end were assumed for comparison only.
    whole = evidence.get("length_known") is not False
    alternatives = (_alternative(one, whole) for one in _list(evidence.get("alternatives")))
    return Step(
        step.time_s,
        step.allocation,
        before,
        step.reason,
        tuple(step.generations),
        step.decided,
        step.occasion,
        own if isinstance(own, int) else None,
        siblings if isinstance(siblings, int) else None,
        _predicted(evidence.get("prediction"), whole),
        tuple(one for one in alternatives if one is not None),
        _number(evidence.get("gain")),
        str(evidence.get("goal") or ""),
        happened,
    )


def _happened(step: _Open, ended: Mapping[str, Any] | None, *, only: bool) -> Happened:
    timed = [p for p in step.profiles if not p.get("out_of_memory")]
    weights = [_number(p.get("iterations")) or 0.0 for p in timed]
    times = [_number(p.get("iteration_s")) or 0.0 for p in timed]
    iterations = sum(weights)
    spent = sum(weight * time_s for weight, time_s in zip(weights, times, strict=True))
    peaks = [_number(p.get("peak_mb")) or 0.0 for p in step.profiles]
    duration_s = _number(ended.get("duration_s")) if ended else None
    return Happened(
        iterations=round(iterations),
        iteration_s=spent / iterations if iterations else None,
        peak_mb=max(peaks, default=0.0) or None,
        out_of_memory=len(timed) < len(step.profiles),
        time_s=None if duration_s is None else max(0.0, duration_s - step.time_s),
        cost_usd=_number(ended.get("cost_usd")) if ended and only else None,
    )


def _allocation(body: object) -> Allocation | None:
    if not isinstance(body, Mapping):
        return None
    try:
        return Allocation(body["workers"], body["memory_mb"], body.get("store") or "default")
    except (KeyError, InvalidInput):
        return None


def _predicted(body: object, whole: bool) -> Predicted:
    if not isinstance(body, Mapping):
        return Predicted()
    return Predicted(
        _interval(body.get("iteration_s")),
        _interval(body.get("time_s")) if whole else None,
        _interval(body.get("cost_usd")) if whole else None,
        _number(body.get("fits")),
    )


def _alternative(body: object, whole: bool) -> Alternative | None:
    allocation = _allocation(body)
    if allocation is None or not isinstance(body, Mapping):
        return None
    if not whole:
        return Alternative(allocation)
    return Alternative(allocation, _middle(body.get("time_s")), _middle(body.get("cost_usd")))


def _middle(value: object) -> float | None:
    found = _interval(value)
    return _number(value) if found is None else found.mid


def _interval(value: object) -> Interval | None:
    ends = [_number(end) for end in _list(value)]
    if len(ends) != 3:
        return None
    low, mid, high = ends
    return None if low is None or mid is None or high is None else Interval(low, mid, high)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
