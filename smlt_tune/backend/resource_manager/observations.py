"""What the resource manager is told, and what it says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from smlt_tune.errors import InvalidInput
from smlt_tune.runtime.features import ModelFeatures

DEFAULT_STORE = "default"


@dataclass(frozen=True)
class Allocation:
    """What one generation of a job runs on.

    Attributes:
        workers: How many functions.
        memory_mb: Memory of each, MB; gives its share of CPU too.
        store: Parameter store that they synchronise over.

    Raises:
        InvalidInput: A number is not whole or below 1, or the store has no name.
    """

    workers: int
    memory_mb: int
    store: str = DEFAULT_STORE

    def __post_init__(self) -> None:
        mistakes = not_counts({"workers": self.workers, "memory_mb": self.memory_mb})
        if not self.store:
            mistakes.append("store must have a name")
        if mistakes:
            raise InvalidInput([f"Allocation: {mistake}" for mistake in mistakes])


@dataclass(frozen=True)
class Workload:
    """What one job computes.

    Attributes:
        features: Of its model.
        batch: Global batch size, samples.
        iterations: Training iterations of the whole job; None if nobody knows.
        function: Digest of the training function; trials of the same one are the closest siblings.
    """

    features: ModelFeatures
    batch: int
    iterations: int | None = None
    function: str = ""


@dataclass(frozen=True)
class Profile:
    """What was measured of one (model, batch, allocation).

    Attributes:
        job_id: Whose; unique in the project.
        workload: What it computed.
        allocation: On what.
        iterations: How many training iterations the times are means of.
        iteration_s: Time per training iteration, synchronisation included, seconds.
        sync_s: Part of it that went into synchronisation, seconds.
        other_share: Time outside of training iterations (evaluation, checkpoints) over the time
            inside; None if no whole epoch was seen.
        start_s: From the invocation of its functions until they trained (all were ready, and others
            had left), seconds; 0 if not known.
        hold_up_s: For how long the hand-over to them held up training: state that is saved and
            restored, cold caches; seconds, 0 if there was none.
        end_s: What the job did after its last epoch (a last evaluation, its result), seconds; None
            if it did not train to its end here.
        peak_mb: Highest resident memory of a worker, MB; 0 if not known.
        out_of_memory: The memory was not enough. Then ``peak_mb`` is a lower bound and there are no
            times.
    """

    job_id: str
    workload: Workload
    allocation: Allocation
    iterations: int
    iteration_s: float
    sync_s: float = 0.0
    other_share: float | None = None
    start_s: float = 0.0
    hold_up_s: float = 0.0
    end_s: float | None = None
    peak_mb: float = 0.0
    out_of_memory: bool = False


#: Half-width of a 90 % interval, in standard deviations.
Z90 = 1.645


@dataclass(frozen=True)
class Interval:
    """A prediction: the middle and the ends of the 90 % interval."""

    low: float
    mid: float
    high: float


@dataclass(frozen=True)
class Prediction:
    """What an allocation is expected to do for the rest of a job.

    Attributes:
        allocation: On what.
        iteration_s: Time per training iteration, seconds.
        time_s: From now to the job's end, start-up included, seconds.
        cost_usd: From now to the job's end, USD.
        fits: Probability that the memory is enough.
    """

    allocation: Allocation
    iteration_s: Interval
    time_s: Interval
    cost_usd: Interval
    fits: float


@dataclass(frozen=True)
class Option:
    """What an allocation is expected to do for a job, without intervals.

    Attributes:
        allocation: On what.
        time_s: From the invocation of its functions to its end, seconds.
        cost_usd: Of the same, USD.
    """

    allocation: Allocation
    time_s: float
    cost_usd: float


@dataclass(frozen=True)
class Plan:
    """What is known of a job before it costs anything.

    Attributes:
        chosen: What the resource manager would take.
        front: The allocations that nothing beats in both time and cost, by time.
        feasible: False if no allocation can be expected to keep the goal's limit, even with luck.
        notes: What the user should know, one sentence each: an infeasible goal with the nearest
            feasible one, or that nothing is known of the length of the job.
        own: Profiles of the job itself that entered.
        siblings: Profiles of siblings that entered.
    """

    chosen: Prediction
    front: tuple[Prediction, ...]
    feasible: bool
    notes: tuple[str, ...]
    own: int
    siblings: int


@dataclass(frozen=True)
class Decision:
    """An allocation, and why.

    Attributes:
        allocation: What was chosen.
        reason: In one line, for people.
        evidence: The facts behind it, as JSON: observations used, prediction, alternatives, gain.
    """

    allocation: Allocation
    reason: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


def not_counts(given: Mapping[str, object]) -> list[str]:
    """A sentence for each value that is no whole number of at least 1."""
    return [
        f"{name} must be a whole number of at least 1, not {value!r}"
        for name, value in given.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]
