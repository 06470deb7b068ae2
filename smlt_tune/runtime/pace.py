"""How fast a session goes.

What the scheduler is told of it decides what the job runs on, so a time must be that of
undisturbed training iterations. It is their mean, not their median: a function that may use a part
of a core only stands still until the platform's next period again and again (20 ms on AWS Lambda),
so that some iterations take a period longer than others, and only the mean tells what many take.
"""

from dataclasses import dataclass, field

#: The longest iteration of a chunk does not count if it took so many times as long as any other:
#: something has disturbed it that nobody knows of.
STALLED = 3.0


@dataclass
class _Chunk:
    """Training iterations since the last word; times in seconds, (whole, in synchronisation)."""

    count: int = 0
    whole_s: float = 0.0
    sync_s: float = 0.0
    longest: tuple[float, float] = (0.0, 0.0)
    second_s: float = 0.0

    def add(self, whole_s: float, sync_s: float) -> None:
        self.count += 1
        self.whole_s += whole_s
        self.sync_s += sync_s
        if whole_s > self.longest[0]:
            self.second_s, self.longest = self.longest[0], (whole_s, sync_s)
        else:
            self.second_s = max(self.second_s, whole_s)

    def means(self) -> tuple[int, float, float]:
        """How many, and the means of both times."""
        count, whole_s, sync_s = self.count, self.whole_s, self.sync_s
        longest_s, its_sync_s = self.longest
        if count > 1 and longest_s > STALLED * self.second_s:
            count, whole_s, sync_s = count - 1, whole_s - longest_s, sync_s - its_sync_s
        return (count, whole_s / count, sync_s / count) if count else (0, 0.0, 0.0)


@dataclass
class Pace:
    """How fast a session goes, and when it has last done what it does now and then.

    All times are in seconds, on the clock's ``monotonic``.

    Attributes:
        started_s: When the session began.
        slowest_s: Longest time between two iterations' ends, waiting for others left out.
        sync_s: Time spent waiting for others, so far.
        iterations: How many there were, of any loop.
        checkpoint_cost_s: What the last checkpoint took.
        between_boundaries_s: Longest time between two boundaries.
    """

    started_s: float
    slowest_s: float = 0.0
    sync_s: float = 0.0
    iterations: int = 0
    checkpoint_cost_s: float = 0.0
    between_boundaries_s: float = 0.0
    # The training iteration that is under way.
    _begun_s: float = 0.0
    _begun_sync_s: float = 0.0
    _aside_s: float = 0.0
    _disturbed: bool = True  # the first one of an invocation always is: caches are cold
    _chunk: _Chunk = field(default_factory=_Chunk)
    # Of the present epoch, if it was seen from its beginning, and of all such epochs.
    _epoch_s: float | None = None
    _inside_s: float = 0.0
    _all_inside_s: float = 0.0
    _all_outside_s: float = 0.0
    _trained_s: float | None = None  # when the last training iteration ended

    def __post_init__(self) -> None:
        self.last_boundary_s = self.started_s
        self.last_progress_s = self.last_tick_s = self.started_s
        self.last_checkpoint_s = self.last_asked_s = self.started_s

    def waited(self, seconds: float) -> None:
        """For others: that says nothing about this worker's pace."""
        self.sync_s += seconds
        self.last_boundary_s += seconds
        self.last_tick_s += seconds

    def saved(self, seconds: float) -> None:
        """A checkpoint was made."""
        self.checkpoint_cost_s = seconds
        self.last_boundary_s += seconds
        self.last_tick_s += seconds
        self.put_aside(seconds)

    def held_up(self, seconds: float) -> None:
        """The client had to consume a report first: no part of an iteration, nor of an epoch."""
        self.last_boundary_s += seconds
        self.last_tick_s += seconds
        self.put_aside(seconds)
        if self._epoch_s is not None:
            self._epoch_s += seconds
        if self._trained_s is not None:
            self._trained_s += seconds

    def put_aside(self, seconds: float) -> None:
        """Something took place that is no part of the training iteration under way."""
        self._aside_s += seconds
        self._disturbed = True

    def reached_boundary(self, now_s: float) -> None:
        """At a boundary inside a loop."""
        passed_s = now_s - self.last_boundary_s
        self.between_boundaries_s = max(self.between_boundaries_s, passed_s)
        self.last_boundary_s = now_s

    def tick(self, now_s: float) -> None:
        """An iteration of any loop has ended."""
        self.iterations += 1
        self.slowest_s = max(self.slowest_s, now_s - self.last_tick_s)
        self.last_tick_s = now_s

    def loop_begins(self, now_s: float) -> None:
        """A loop that may train begins."""
        self.last_boundary_s = self._begun_s = now_s
        self._begun_sync_s, self._aside_s = self.sync_s, 0.0

    def trained(self, now_s: float, *, whole: bool) -> None:
        """A training iteration has ended; the next one begins.

        Args:
            now_s: The time.
            whole: It was one like the others, no smaller one at the end of a loop.
        """
        took_s = now_s - self._begun_s - self._aside_s
        self._inside_s += took_s
        if whole and not self._disturbed:
            self._chunk.add(took_s, self.sync_s - self._begun_sync_s)
        self._begun_s, self._begun_sync_s = now_s, self.sync_s
        self._aside_s, self._disturbed = 0.0, False
        self._trained_s = now_s

    def epoch_begins(self, now_s: float, *, whole: bool) -> None:
        """An epoch begins, and the one before it has ended.

        Args:
            now_s: The time.
            whole: The epoch is not one that an earlier invocation has begun.
        """
        if self._epoch_s is not None:
            self._all_inside_s += self._inside_s
            self._all_outside_s += now_s - self._epoch_s - self._inside_s
        self._epoch_s, self._inside_s = now_s if whole else None, 0.0

    def other_share(self) -> float | None:
        """Time outside of training iterations over the time inside; None if not known yet."""
        return self._all_outside_s / self._all_inside_s if self._all_inside_s else None

    def end_s(self, now_s: float) -> float | None:
        """Time since the last epoch, or since training ended in its midst; None before any."""
        if self._trained_s is None:
            return None
        return now_s - max(self._trained_s, self._epoch_s or self._trained_s)

    def forget_chunk(self) -> None:
        """What comes is not like what was."""
        self._chunk = _Chunk()

    def take_chunk(self) -> tuple[int, float, float]:
        """The undisturbed training iterations since the last time.

        Returns:
            (how many, mean time, mean time in synchronisation).
        """
        chunk, self._chunk = self._chunk, _Chunk()
        return chunk.means()
