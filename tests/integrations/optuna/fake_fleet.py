"""A fleet in this process: threads instead of functions, as much of the contract as trials see."""

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from smlt_tune.backend.platforms.base import PlatformLimits
from smlt_tune.errors import BudgetExhausted, FleetClosed, JobError

STEP_USD = 0.001


@dataclass(frozen=True)
class Allocation:
    workers: int
    memory_mb: int


@dataclass(frozen=True)
class Report:
    index: int
    metrics: dict[str, Any]
    cost_usd: float
    time_s: float
    workers: int = 1
    memory_mb: int = 1769
    generation: int = 0


@dataclass(frozen=True)
class JobOutcome:
    job_id: str
    status: str
    reason: str
    metrics: dict[str, Any]
    value: Any
    reports: tuple[Report, ...]
    allocations: tuple[Allocation, ...]
    cost_usd: float
    duration_s: float
    checkpoint: str | None


@dataclass(eq=False)
class FakeJob:
    job_id: str
    fleet: "FakeFleet"
    allocation: Allocation
    seen: list[Report] = field(default_factory=list)
    reason: str = ""
    error: Exception | None = None
    value: Any = None
    status: str = "running"

    def __post_init__(self):
        self.changed = threading.Condition()

    @property
    def cost_usd(self) -> float:
        return STEP_USD * len(self.seen) + STEP_USD / 2

    def report(self, **metrics: Any) -> None:
        """What a session does: raises when the job is to stop."""
        with self.changed:
            if self.reason:
                raise StopTraining
            if not self.fleet.pay():
                self.reason = "budget"
                raise StopTraining
            self.seen.append(Report(len(self.seen), metrics, self.cost_usd, float(len(self.seen))))
            self.changed.notify_all()

    def wait(self, seconds: float) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.reason, timeout=seconds)
            if self.reason:
                raise StopTraining

    def work(self, train: Callable[..., Any], config: Any) -> None:
        status = "finished"
        try:
            self.value = train(config, self)
        except StopTraining:
            status = "stopped"
        except Exception as error:
            status, self.error = "failed", JobError(repr(error), job_id=self.job_id)
        with self.changed:
            self.status = status
            self.changed.notify_all()

    def reports(self) -> Iterator[Report]:
        for at in itertools.count():
            with self.changed:
                while len(self.seen) <= at and self.status == "running":
                    self.changed.wait()
                if len(self.seen) <= at:
                    if self.error:
                        raise self.error
                    return
                report = self.seen[at]
            yield report

    def result(self, timeout_s: float | None = None) -> JobOutcome:
        with self.changed:
            if not self.changed.wait_for(lambda: self.status != "running", timeout_s):
                raise TimeoutError
        if self.error:
            raise self.error
        last = self.seen[-1].metrics if self.seen else {}
        return JobOutcome(
            self.job_id, self.status, self.reason, last, self.value, tuple(self.seen),
            (self.allocation,), self.cost_usd, float(len(self.seen)), f"ckpt/{self.job_id}",
        )  # fmt: skip

    def logs(self) -> dict[str, str]:
        return {}

    def acknowledge(self, count: int) -> None:
        """Reports are told as they come."""

    def stop(self, reason: str = "stopped") -> None:
        with self.changed:
            if self.status == "running" and not self.reason:
                self.reason = reason
            self.changed.notify_all()


class StopTraining(BaseException):
    pass


class FakeFleet:
    """Training functions take ``(config, job)`` and report to the job."""

    budget_usd: float | None = None
    platform = SimpleNamespace(limits=PlatformLimits(128, 10_240, 900.0, concurrency=8))

    def __init__(self, path: Path, budget_steps: int | None = None) -> None:
        path.mkdir(exist_ok=True)
        self.path = path
        self.name = path.name
        self.closed = False
        self.by_name: dict[str, FakeJob] = {}
        self.steps_left = budget_steps
        self.lock = threading.Lock()

    def pay(self) -> bool:
        with self.lock:
            if self.steps_left is None:
                return True
            self.steps_left -= 1
            return self.steps_left >= 0

    def submit(self, train, config=None, *, name=None, workers=None, memory_mb=None, **_):
        if self.closed:
            raise FleetClosed("the fleet is closed")
        if name in self.by_name:
            return self.by_name[name]
        if self.steps_left is not None and self.steps_left < 1:
            raise BudgetExhausted("the rest of the budget does not pay for a step")
        job = FakeJob(name, self, Allocation(workers or 2, memory_mb or 1769))
        self.by_name[name] = job
        threading.Thread(target=job.work, args=(train, config), daemon=True).start()
        return job

    def jobs(self):
        return list(self.by_name.values())

    @property
    def settled_usd(self) -> float:
        return sum(job.cost_usd for job in self.jobs() if job.status != "running")

    @property
    def reserved_usd(self) -> float:
        return STEP_USD * sum(job.status == "running" for job in self.jobs())
