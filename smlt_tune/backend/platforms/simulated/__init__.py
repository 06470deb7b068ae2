"""Functions in virtual time, for sweeps that nobody wants to wait or pay for.

The scheduler, the ledger, the resource manager and the journal are the real ones; what is simulated
is everything beyond the platform and the stores: workers, which say and obey the same messages and
keys as real ones. Layout, from the scheduler outwards::

    platform.py          SimulatedPlatform: starts, failures, time limits, the bill
    generation.py        what the workers of a generation do
    delivery.py          one run of an invocation
    training.py          what a training function would do: time per iteration, loss curve
    options.py           what may be asked of the platform
    stores.py            both storage tiers
    changing_prices.py   prices that change
    virtual_time.py      the clock, and the agenda of what happens

``smlt_tune.backend.simulated_fleet`` drives them together.
"""

from smlt_tune.backend.platforms.simulated.options import SimulationOptions
from smlt_tune.backend.platforms.simulated.platform import SimulatedPlatform
from smlt_tune.backend.platforms.simulated.training import SimulatedTraining

__all__ = ["SimulatedPlatform", "SimulatedTraining", "SimulationOptions"]
