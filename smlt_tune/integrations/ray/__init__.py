"""Ray Tune trials as jobs of a fleet: ``resources_per_trial="smlt"``.

    from smlt_tune.integrations.ray import SmltResources, register_smlt

    register_smlt(platform="local", budget_usd=5.0)
    tune.run(train, resources_per_trial="smlt", ...)
    tune.Tuner(tune.with_resources(train, SmltResources(max_workers=8)), ...).fit()

Search algorithms, schedulers, stoppers, loggers and ``Tuner.restore`` stay what they are. A trial
takes no process, CPU or placement group of the Ray cluster.

Names are loaded on first use: the modules :mod:`~smlt_tune.integrations.ray.programs` and
:mod:`~smlt_tune.integrations.ray.tune_session` run inside functions, which must not import Ray
unless the user's code does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smlt_tune.integrations.ray.registration import register_smlt, unregister_smlt
    from smlt_tune.integrations.ray.resources import SmltResources

_HOMES = {
    "SmltResources": "smlt_tune.integrations.ray.resources",
    "register_smlt": "smlt_tune.integrations.ray.registration",
    "unregister_smlt": "smlt_tune.integrations.ray.registration",
}

__all__ = ["SmltResources", "register_smlt", "unregister_smlt"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
