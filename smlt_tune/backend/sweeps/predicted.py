"""What the trials of a sweep would take, for those who divide its budget among them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from smlt_tune.backend.late_policy import missing
from smlt_tune.backend.planning import measure
from smlt_tune.backend.resource_manager.observations import Option, Workload
from smlt_tune.backend.sweeps import words
from smlt_tune.backend.sweeps.plan import typical_of
from smlt_tune.backend.sweeps.stage_allocations import OptionsOf, options_of_workloads
from smlt_tune.backend.sweeps.sweep import Sweep

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet


def options_of(sweep: Sweep, fleet: "Fleet", say: Callable[[str], None]) -> OptionsOf | None:
    """What a trial that stands for all would take, after a dry iteration of some of them.

    Args:
        sweep: Whose trials.
        fleet: Predicts.
        say: Is told what is looked at.

    Returns:
        None where the file pins allocations, or where there is nothing to predict with.
    """
    pinned = sweep.workers is not None or sweep.memory_mb is not None
    if pinned or missing():
        return None

    def predict(workload: Workload) -> list[Option]:
        most = sweep.max_workers
        found = fleet.options(workload)
        return [one for one in found if most is None or one.allocation.workers <= most]

    workloads = []
    for params in typical_of(sweep):
        say(f"looking at {words.settings(params)}")
        workloads.append(measure(sweep.train, sweep.config_of(params)))
    return options_of_workloads(predict, workloads)
