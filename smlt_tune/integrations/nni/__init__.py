"""NNI 3.0: architecture searches and tuners whose trials are jobs of a fleet.

    from nni.nas.experiment import NasExperimentConfig
    from smlt_tune.integrations.nni import SmltNasExperiment

    config = NasExperimentConfig("smlt", "simplified", max_trial_number=100, trial_concurrency=8)
    config.execution_engine.budget_usd = 2.0
    experiment = SmltNasExperiment(space, evaluator, strategy, config)
    experiment.run()

Names are loaded on first use: the client that NNI starts for every trial of a tuner imports this
package, and must stay small.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smlt_tune.integrations.nni.config import SmltEngineConfig
    from smlt_tune.integrations.nni.engine import SmltExecutionEngine
    from smlt_tune.integrations.nni.experiment import SmltNasExperiment, install
    from smlt_tune.integrations.nni.hpo import SmltExperiment
    from smlt_tune.integrations.nni.one_shot import search_one_shot

_HOMES = {
    "SmltEngineConfig": "smlt_tune.integrations.nni.config",
    "SmltExecutionEngine": "smlt_tune.integrations.nni.engine",
    "SmltExperiment": "smlt_tune.integrations.nni.hpo",
    "SmltNasExperiment": "smlt_tune.integrations.nni.experiment",
    "install": "smlt_tune.integrations.nni.experiment",
    "search_one_shot": "smlt_tune.integrations.nni.one_shot",
}

__all__ = [
    "SmltEngineConfig",
    "SmltExecutionEngine",
    "SmltExperiment",
    "SmltNasExperiment",
    "install",
    "search_one_shot",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'smlt_tune.integrations.nni' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
