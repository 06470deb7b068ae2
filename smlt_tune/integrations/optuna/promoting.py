"""What trials of ASHA and Hyperband run on under one budget.

See :mod:`smlt_tune.backend.sweeps.promotion`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from smlt_tune.backend.resource_manager.observations import Allocation
from smlt_tune.backend.sweeps.board import Row
from smlt_tune.backend.sweeps.halving_rules import Schedule
from smlt_tune.backend.sweeps.predicted import options_of
from smlt_tune.backend.sweeps.promotion import Promotions
from smlt_tune.backend.sweeps.sweep import Sweep
from smlt_tune.integrations.optuna.pruners import FACTOR, bracket_of, rungs

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet
    from smlt_tune.backend.job import Job, Report


class Promoting:
    """Moves trials to other allocations when they go on after a rung.

    Args:
        promotions: Chooses; its rungs are those of the pruner, and the end of the training.
    """

    def __init__(self, promotions: Promotions) -> None:
        self._promotions = promotions

    def restore(self, row: Row) -> None:
        """A trial was over before this client began."""
        self.begins(row.trial)
        for count, point in enumerate(row.points, 1):
            ends = row.state == "pruned" and count == len(row.points)
            self._came_to(row.trial, count, point.value, point.cost_usd, ends=ends)
        self.leaves(row.trial, row.cost_usd)

    def begins(self, trial: int) -> Allocation:
        """What a trial runs on first."""
        return self._promotions.begins(trial)

    def leaves(self, trial: int, cost_usd: float) -> None:
        """A trial is over, whatever the reason; idempotent."""
        self._promotions.leaves(trial, cost_usd)

    def judged(self, trial: int, job: "Job", report: "Report", pruned: bool) -> None:
        """The pruner has judged a report."""
        metric = self._promotions.schedule_of(trial).metric
        value, count = report.metrics.get(metric), report.index + 1
        place = self._came_to(trial, count, value, report.cost_usd, ends=pruned)
        if place is None or count < len(job.reported):  # it was told to an earlier client
            return
        now = job.allocation
        if now is None or (now.workers, now.memory_mb) != (place.workers, place.memory_mb):
            job.resize(workers=place.workers, memory_mb=place.memory_mb)

    def _came_to(
        self, trial: int, count: int, value: object, cost_usd: float, *, ends: bool
    ) -> Allocation | None:
        schedule = self._promotions.schedule_of(trial)
        if count not in schedule.rungs:
            return None
        rung = schedule.rungs.index(count)
        number = float(value) if isinstance(value, int | float) else math.nan
        if not math.isfinite(number):
            number = -math.inf if schedule.maximize else math.inf
        if ends:
            self._promotions.ends(trial, rung, number, cost_usd)
            return None
        return self._promotions.goes_on(trial, rung, number, cost_usd)


def promoting(sweep: Sweep, fleet: "Fleet", say: Callable[[str], None]) -> Promoting | None:
    """For a sweep with ASHA or Hyperband whose budget is to be divided; None for any other."""
    if sweep.budget_usd is None or sweep.pruner.name not in ("asha", "hyperband"):
        return None
    if "max_reports" not in sweep.pruner.options:
        say(
            "survivors get what others get, because the pruner's last rung is not known: give it "
            "max_reports, the reports of a whole training"
        )
        return None
    predicted = options_of(sweep, fleet, say)
    if predicted is None:
        return None
    found = rungs(sweep.pruner)
    factor = sweep.pruner.options.get("factor", FACTOR[sweep.pruner.name])
    promotions = Promotions(
        [Schedule(sweep.metric, sweep.maximize, each, factor) for each in found],
        sweep.trials,
        predicted,
        sweep.budget_usd,
        bracket_of=partial(bracket_of, sweep.name, len(found), factor),
        functions=fleet.platform.limits.functions,
        parallel=sweep.parallel,
    )
    return Promoting(promotions)
