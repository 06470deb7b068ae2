"""From a job to its trial: reports, pruning, how it ended."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import optuna

from smlt_tune.errors import BudgetExhausted, InvalidInput, JobError
from smlt_tune.integrations.optuna import checks
from smlt_tune.integrations.optuna.drive import FLEET_IS_OVER, Drive

if TYPE_CHECKING:
    from smlt_tune.backend.job import Job, JobOutcome, Report


@dataclass
class Calls:
    """Earlier calls of ``run`` for the same trial in this execution of its objective."""

    names: list[str] = field(default_factory=list)
    next_step: int = 0
    cost_usd: float = 0.0
    seconds: float = 0.0


def _until_failure(job: "Job") -> "Iterator[Report]":
    """All reports. That the job failed is left to ``result``."""
    with suppress(JobError):
        yield from job.reports()


class Follower:
    """Passes a job's reports to its trial and the end of the job to Optuna."""

    def __init__(
        self,
        trial: optuna.trial.BaseTrial,
        job: "Job",
        metric: str,
        step: str | None,
        calls: Calls,
        drive: Drive,
        *,
        again: bool,
        lockstep: bool,
        judged: "Callable[[Job, Report, bool], None] | None" = None,
    ) -> None:
        self._trial, self._job, self._metric, self._step = trial, job, metric, step
        self._calls, self._drive, self._lockstep = calls, drive, lockstep
        self._judged = judged or (lambda job, report, pruned: None)
        self._first_step = calls.next_step
        study = getattr(trial, "study", None)
        self._single = study is None or len(study.directions) == 1
        self._told: set[int] = set()
        if again and study is not None and self._single:
            self._told = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values)

    def follow(self, watch: "Callable[[Job, Report | None], None] | None") -> "JobOutcome":
        """Until the job ends or the pruner ends it."""
        try:
            if watch:
                watch(self._job, None)
            pruned = self._reports(watch)
            if pruned:
                self._job.stop("pruned")
            outcome = self._outcome()
        except BaseException:
            self._job.stop("abandoned")
            raise
        return self._conclude(outcome, pruned)

    def _reports(self, watch: "Callable[[Job, Report | None], None] | None") -> str:
        """Returns why the trial is to be pruned; nothing if the job ended by itself."""
        first = True
        for report in _until_failure(self._job):
            self._drive.trained = True
            if watch:
                watch(self._job, report)
            if self._metric in report.metrics:
                pruned = self._pass_on(report)
                self._judged(self._job, report, pruned)
                if pruned:
                    value = report.metrics[self._metric]
                    return f"pruned at report {report.index} with {self._metric} {value:g}"
            elif first:
                raise checks.unknown_metric(self._metric, self._trial.number, report.metrics)
            if self._lockstep:
                self._job.acknowledge(report.index + 1)
            first = False
        return ""

    def _pass_on(self, report: "Report") -> bool:
        """Tells the trial one report. Returns whether to prune."""
        value = self._number(report, self._metric)
        step = self._first_step + report.index
        if self._step:
            step = int(self._number(report, self._step))
        self._calls.next_step = max(self._calls.next_step, step + 1)
        if not self._single or step in self._told:
            return False
        self._told.add(step)
        self._trial.report(value, step)
        return self._trial.should_prune()

    def _number(self, report: "Report", name: str) -> float:
        if name not in report.metrics:
            raise checks.unknown_metric(name, self._trial.number, report.metrics)
        try:
            return float(report.metrics[name])
        except (TypeError, ValueError):
            raise InvalidInput(
                f"trial {self._trial.number} reports {name}={report.metrics[name]!r}: "
                "expected a number"
            ) from None

    def _outcome(self) -> "JobOutcome":
        try:
            outcome = self._job.result()
        finally:
            self._describe()
        self._attr("smlt_checkpoint", outcome.checkpoint)
        self._calls.seconds += outcome.duration_s
        self._attr("smlt_seconds", self._calls.seconds)
        return outcome

    def _describe(self) -> None:
        """What is known of failed jobs too."""
        allocation = self._job.allocation
        self._calls.cost_usd += self._job.cost_usd
        self._attr("smlt_cost_usd", self._calls.cost_usd)
        self._attr("smlt_workers", allocation and allocation.workers)
        self._attr("smlt_memory_mb", allocation and allocation.memory_mb)

    def _attr(self, name: str, value: Any) -> None:
        self._trial.set_user_attr(name, value)

    def _conclude(self, outcome: "JobOutcome", pruned: str) -> "JobOutcome":
        if self._drive.ending == "interrupted" and outcome.status == "stopped":
            self._attr("smlt_stopped", "interrupted")
            raise KeyboardInterrupt
        if pruned:
            self._attr("smlt_stopped", "pruned")
            raise optuna.TrialPruned(pruned)
        if outcome.status == "stopped":
            self._stopped(outcome)
        if not outcome.reports:
            raise checks.unknown_metric(self._metric, self._trial.number, ())
        return outcome

    def _stopped(self, outcome: "JobOutcome") -> None:
        reason = outcome.reason or "stopped"
        self._attr("smlt_stopped", reason)
        if reason in FLEET_IS_OVER:
            self._drive.end(reason)
        if reason == "budget" and not outcome.reports:
            raise BudgetExhausted(
                f"trial {self._trial.number}: the budget does not pay for a first report "
                f"({outcome.cost_usd:.6f} USD spent on it)"
            )
        raise optuna.TrialPruned(f"stopped after {len(outcome.reports)} reports: {reason}")
