"""smlt_tune: every trial of a search as a serverless, distributed training job.

Names are loaded on first use: importing the package loads neither torch nor the backend, so that a
function which imports it stays small.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet, Job, JobOutcome, Report
    from smlt_tune.backend.goals import Cheapest, Fastest, Target
    from smlt_tune.backend.resource_manager.observations import Workload
    from smlt_tune.errors import SmltError
    from smlt_tune.runtime.dry_run import model_features
    from smlt_tune.runtime.features import ModelFeatures
    from smlt_tune.runtime.session import Session, session

__version__ = "0.1.0"

_HOMES = {
    "Cheapest": "smlt_tune.backend.goals",
    "Fastest": "smlt_tune.backend.goals",
    "Fleet": "smlt_tune.backend.fleet",
    "Job": "smlt_tune.backend.fleet",
    "JobOutcome": "smlt_tune.backend.fleet",
    "ModelFeatures": "smlt_tune.runtime.features",
    "Report": "smlt_tune.backend.fleet",
    "Session": "smlt_tune.runtime.session",
    "SmltError": "smlt_tune.errors",
    "Target": "smlt_tune.backend.goals",
    "Workload": "smlt_tune.backend.resource_manager.observations",
    "model_features": "smlt_tune.runtime.dry_run",
    "session": "smlt_tune.runtime.session",
}

__all__ = [
    "Cheapest",
    "Fastest",
    "Fleet",
    "Job",
    "JobOutcome",
    "ModelFeatures",
    "Report",
    "Session",
    "SmltError",
    "Target",
    "Workload",
    "__version__",
    "model_features",
    "session",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'smlt_tune' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
