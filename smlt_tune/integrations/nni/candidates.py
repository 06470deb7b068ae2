"""The candidates of a search: what the driver knows of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nni.nas.space import ExecutableModelSpace, ModelStatus, SimplifiedModelSpace

from smlt_tune.backend.job import AllocationRecord, DecisionRecord
from smlt_tune.backend.resource_manager.observations import Workload

if TYPE_CHECKING:
    from smlt_tune.backend.job import Job


@dataclass(eq=False)
class Candidate:
    """One architecture that a strategy has submitted.

    Attributes:
        number: How many were submitted before it.
        name: Of its job.
        model: As NNI knows it, with its metrics.
        workload: What training it takes, if that was measured before it started.
        status: ``frozen`` while it waits, then NNI's status of the model; ``failed`` stays also if
            a strategy tries the model again, which is a new candidate.
        job: Its job; None before that, and if there never was one.
        error: Why it failed or was interrupted.
        earlier_usd: What its jobs have cost that were stopped before it was resumed, USD.
    """

    number: int
    name: str
    model: SimplifiedModelSpace
    workload: Workload | None = None
    status: ModelStatus = ModelStatus.Frozen
    job: "Job | None" = None
    error: str = ""
    earlier_usd: float = 0.0

    @property
    def over(self) -> bool:
        """Whether it has been decided."""
        return bool(self.status.completed())

    @property
    def sample(self) -> Mapping[str, Any]:
        """The architecture: choices by label."""
        return self.model.sample or {}

    @property
    def metric(self) -> float | None:
        """Its final metric."""
        value: float | None = self.model.metric
        return value

    @property
    def cost_usd(self) -> float:
        """What it has cost so far, USD; also if it failed."""
        return self.earlier_usd + (self.job.cost_usd if self.job else 0.0)

    @property
    def allocations(self) -> tuple[AllocationRecord, ...]:
        """Its generations: workers, memory, reason and decision of each."""
        return self.job.allocations if self.job else ()

    @property
    def decisions(self) -> tuple[DecisionRecord, ...]:
        """What the resource manager said of it, with the evidence."""
        return self.job.decisions if self.job else ()

    def __str__(self) -> str:
        return f"candidate {self.number} ({self.name})"

    def to_state(self) -> dict[str, Any]:
        """For NNI's checkpoint."""
        return {
            "name": self.name,
            "sample": self.model.sample,
            "status": self.status.value,
            "metrics": self.model.metrics._dump(),
            "error": self.error,
        }

    @classmethod
    def from_state(
        cls,
        number: int,
        state: Mapping[str, Any],
        space: ExecutableModelSpace,
        jobs: "Mapping[str, Job]",
    ) -> "Candidate":
        """What :meth:`to_state` gave.

        One that is not over has no metrics: its job reports again what it has reported. Where that
        job was stopped when the search was interrupted, it gets another one.

        Args:
            number: How many there are before it.
            state: Of the checkpoint.
            space: It is frozen from that.
            jobs: Of the fleet, by name.
        """
        model = space.freeze(state["sample"])
        candidate = cls(number, state["name"], model, error=state["error"])
        status = ModelStatus(state["status"])
        candidate.job = jobs.get(candidate.name)
        if status.completed():
            candidate.status = model.status = status
            model.metrics = type(model.metrics)._load(**state["metrics"])
            return candidate
        attempt = 1
        while candidate.job is not None and candidate.job.status == "stopped":
            candidate.earlier_usd += candidate.job.cost_usd
            attempt += 1
            candidate.name = f"{state['name']}-{attempt}"
            candidate.job = jobs.get(candidate.name)
        return candidate
