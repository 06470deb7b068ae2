"""Which job belongs to a trial.

A job's name says it: experiment, trial, configuration, start and attempt. So it is found again in
another process, where neither objects nor the bytes of their pickles are the same.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from itertools import count
from typing import Any

from smlt_tune.backend.fleet import Fleet
from smlt_tune.backend.job import FAILED, STOPPED, Job
from smlt_tune.integrations.ray.results import Pointer
from smlt_tune.integrations.ray.staging import Staged
from smlt_tune.integrations.ray.tune_session import Trial


def attach(
    fleet: Fleet,
    trial: Trial,
    staged: Staged,
    options: Mapping[str, Any],
    start: Pointer | None,
) -> Job:
    """The job that a trial goes on with: the one that it had, or a new one.

    Args:
        fleet: Where.
        trial: Whose.
        staged: Its program.
        options: Further arguments of ``Fleet.submit``.
        start: The checkpoint that it is to restore. One of its own is where its job is taken up;
            any other, and one of a job that has ended, is where a new job starts.
    """
    own = _prefix(trial)
    job = None
    if start is not None and start.job.startswith(own):
        job = next((job for job in fleet.jobs() if job.job_id == start.job), None)
    if job is None or job.status in (FAILED, STOPPED):
        job = _submit(fleet, trial, staged, options, start)
    else:
        _resize(job, options)
    job.resume()
    return job


def jobs_of(fleet: Fleet, experiment: str) -> list[Job]:
    """The jobs of an experiment, in the order of their submission."""
    prefix = _experiment_prefix(experiment)
    return [job for job in fleet.jobs() if job.job_id.startswith(prefix)]


def _submit(
    fleet: Fleet, trial: Trial, staged: Staged, options: Mapping[str, Any], start: Pointer | None
) -> Job:
    """The first attempt to train from there that has not failed."""
    prefix = _prefix(trial) + (_digest(start.uri) if start else "new")
    attempts = (
        fleet.submit(
            staged.program,
            trial,
            name=f"{prefix}-{attempt}",
            lockstep=True,
            start_from=start.uri if start else None,
            **options,
        )
        for attempt in count()
    )
    return next(job for job in attempts if job.status not in (FAILED, STOPPED))


def _resize(job: Job, options: Mapping[str, Any]) -> None:
    """Gives the job the size that its trial asks for by now."""
    pinned = {name: options.get(name) for name in ("workers", "memory_mb")}
    at = job.allocation
    if at and any(value not in (None, getattr(at, name)) for name, value in pinned.items()):
        job.resize(**pinned)


def _experiment_prefix(experiment: str) -> str:
    return f"tune-{_digest(experiment)}-"


def _prefix(trial: Trial) -> str:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", trial.trial_id)[:100]
    configuration = json.dumps(trial.config, sort_keys=True, default=_named)
    return f"{_experiment_prefix(trial.experiment)}{name}-{_digest(configuration)}-"


def _named(value: Any) -> str:
    """What of an object is the same in every process."""
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]
