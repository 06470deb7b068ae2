"""The candidates of a search: what the driver knows of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nni.nas.space import ExecutableModelSpace, ModelStatus, SimplifiedModelSpace

from smlt_tune.backend.job import AllocationRecord, DecisionRecord, Report
from smlt_tune.backend.resource_manager.observations import Workload

if TYPE_CHECKING:
    from smlt_tune.backend.job import Job


@dataclass(eq=False)
class Candidate:
    """One architecture that a strategy has submitted.

    Attributes:
        number: How many were submitted before it.
        name: Of its first job, and the beginning of the names of further ones.
        model: As NNI knows it, with its metrics.
        workload: What training it takes, if that was measured before it started.
        status: ``frozen`` while it waits, then NNI's status of the model; ``failed`` stays also if
            a strategy tries the model again, which is a new candidate.
        job: Its job; None before that, and if there never was one.
        error: Why it failed or was interrupted.
        stopped: Its earlier jobs, which were stopped when the search was interrupted.
    """

    number: int
    name: str
    model: SimplifiedModelSpace
    workload: Workload | None = None
    status: ModelStatus = ModelStatus.Frozen
    job: "Job | None" = None
    error: str = ""
    stopped: "tuple[Job, ...]" = ()

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
        return sum(job.cost_usd for job in (*self.stopped, self.job) if job)

    @property
    def allocations(self) -> tuple[AllocationRecord, ...]:
        """Its generations: workers, memory, reason and decision of each."""
        return self.job.allocations if self.job else ()

    @property
    def decisions(self) -> tuple[DecisionRecord, ...]:
        """What the resource manager said of it, with the evidence."""
        return self.job.decisions if self.job else ()

    @property
    def job_name(self) -> str:
        """Of the job that it has or gets."""
        return _job_name(self.name, len(self.stopped))

    @property
    def start_from(self) -> str | None:
        """The newest checkpoint of its earlier jobs."""
        found = (job.result().checkpoint for job in reversed(self.stopped))
        return next((checkpoint for checkpoint in found if checkpoint), None)

    def earlier_reports(self) -> list[Report]:
        """What its earlier jobs have told, in order."""
        found = {report.index: report for job in self.stopped for report in job.result().reports}
        return [found[index] for index in sorted(found)]

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

        One that is not over has no metrics: its jobs are asked again for what they have reported.
        Where the last of them was stopped when the search was interrupted, it gets another one.

        Args:
            number: How many there are before it.
            state: Of the checkpoint.
            space: It is frozen from that.
            jobs: Of the fleet, by name.
        """
        model = space.freeze(state["sample"])
        candidate = cls(number, state["name"], model, error=state["error"])
        status = ModelStatus(state["status"])
        found: list[Job] = []
        while (job := jobs.get(_job_name(candidate.name, len(found)))) is not None:
            found.append(job)
        if status.completed():
            candidate.status = model.status = status
            model.metrics = type(model.metrics)._load(**state["metrics"])
        if found and (status.completed() or found[-1].status != "stopped"):
            candidate.job = found.pop()
        candidate.stopped = tuple(found)
        return candidate


def _job_name(name: str, earlier: int) -> str:
    return f"{name}-{earlier + 1}" if earlier else name
