"""What the workers of a job measure of one workload on one allocation, merged into one profile."""

from collections import deque
from collections.abc import Iterable

from smlt_tune.backend.resource_manager.observations import Allocation, Profile, Workload

#: A profile's times are of the newest chunks of iterations, at most so many.
#: Of them the slowest and the fastest quarter do not count: disturbed ones, and lucky ones.
CHUNKS, OUTER = 64, 0.25
#: A profile is worth telling after so many iterations or so much time of them, in seconds, ...
TOLD_ITERATIONS = 3
TOLD_S = 0.5
#: ... and again once there are so many times as many iterations.
TOLD_AGAIN = 2
#: The pace has changed if the newest chunks, so many, ...
DRIFT_CHUNKS = 5
#: ... are off what the last decision was based on by more than this share.
DRIFT = 0.2


class Measurement:
    """Chunks of iterations of one workload on one allocation, over all generations of a job.

    Args:
        job_id: Whose; unique in the project.
        workload: What is computed.
        allocation: On what.
    """

    def __init__(self, job_id: str, workload: Workload, allocation: Allocation) -> None:
        self._job_id = job_id
        self._workload = workload
        self.allocation = allocation
        self._chunks: deque[tuple[int, float, float]] = deque(maxlen=CHUNKS)
        self._seconds = 0.0
        self._told = 0
        self._basis_s = 0.0
        self.iterations = 0
        self.kept = 0
        self.other_share: float | None = None
        self.end_s: float | None = None
        self.start_s = self.hold_up_s = 0.0
        self.peak_mb = 0.0

    def add(self, iterations: int, iteration_s: float, sync_s: float) -> None:
        """Adds the means of some iterations that nothing has disturbed.

        Args:
            iterations: How many.
            iteration_s: Time of one, seconds.
            sync_s: Part of it that went into synchronisation, seconds.
        """
        self._chunks.append((iterations, iteration_s, min(sync_s, iteration_s)))
        self.iterations += iterations
        self._seconds += iterations * iteration_s

    @property
    def worth_telling(self) -> bool:
        """Whether there is enough of it, and much more than was told before."""
        enough = self.iterations >= TOLD_ITERATIONS or self._seconds >= TOLD_S
        return enough and self.iterations >= TOLD_AGAIN * self._told

    @property
    def drifted(self) -> bool:
        """Whether iterations take another time than the last decision was based on."""
        if not self._basis_s or len(self._chunks) < DRIFT_CHUNKS:
            return False
        newest = _middle((n, time) for n, time, _ in list(self._chunks)[-DRIFT_CHUNKS:])
        return abs(newest - self._basis_s) > DRIFT * self._basis_s

    def forget_the_past(self) -> None:
        """After a drift: what was measured before it does not hold any more."""
        newest = list(self._chunks)[-DRIFT_CHUNKS:]
        self._chunks.clear()
        self._chunks.extend(newest)
        self.iterations = sum(n for n, _, _ in newest)

    def decided(self) -> None:
        """What it says now is what a decision is based on."""
        self._basis_s = _middle((n, time) for n, time, _ in self._chunks)

    def profile(self) -> Profile:
        """As it stands, to be told."""
        self._told = self.iterations
        return Profile(
            self._job_id,
            self._workload,
            self.allocation,
            iterations=self.iterations,
            iteration_s=_middle((n, time) for n, time, _ in self._chunks),
            sync_s=_middle((n, sync) for n, _, sync in self._chunks),
            other_share=self.other_share,
            start_s=self.start_s,
            hold_up_s=self.hold_up_s,
            end_s=self.end_s,
            peak_mb=self.peak_mb,
        )


def _middle(weighted: Iterable[tuple[int, float]]) -> float:
    """The mean without the outer quarters of the weight; pairs of weight and value.

    It withstands chunks that were disturbed as the median does, but where iterations differ by
    turns it tells what many of them take.
    """
    pairs = sorted(weighted, key=lambda pair: pair[1])
    whole = sum(weight for weight, _ in pairs)
    low, high = OUTER * whole, (1.0 - OUTER) * whole
    total, counted, reached = 0.0, 0.0, 0
    for weight, value in pairs:
        counts = max(0.0, min(reached + weight, high) - max(reached, low))
        total += value * counts
        counted += counts
        reached += weight
    return total / counted
