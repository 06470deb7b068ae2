"""Whose trial is it? Names of jobs, and the trials that a dead driver left RUNNING.

Before a trial's job is submitted, the trial gets two user attributes: ``smlt_fleet``, the name of
the fleet, and ``smlt_job``, the name of the job. They are the lease. A driver adopts a RUNNING
trial only if it holds the very fleet named there: the name is unique, it lives in the fleet's
folder, and the folder has one owner at a time, so a trial of another living driver is left alone.
(A study that belongs to one fleet has ``smlt_fleet`` itself: all its trials are that fleet's.)
Adopting means to run the objective on that very trial; parameters already suggested stay, and the
name leads back to the job.
"""

import re
import threading
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import TrialState

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet

FLEET = "smlt_fleet"
JOB = "smlt_job"

#: Names of the jobs that ``run`` follows in this process.
_followed: set[str] = set()
_lock = threading.Lock()


def claim(trial: optuna.trial.BaseTrial, fleet: "Fleet") -> tuple[str, bool]:
    """Records in the trial which job of which fleet it is going to be.

    Returns:
        The name of the job, the same as before for a trial that is run again; and whether it is.
    """
    known: str | None = trial.user_attrs.get(JOB)
    again = known is not None
    if known is None:
        study = getattr(trial, "study", None)
        prefix = study.study_name if study is not None else "fixed"
        prefix = re.sub(r"[^A-Za-z0-9_-]+", "-", prefix)[:40].strip("-") or "study"
        known = f"{prefix}-{trial.number}-{uuid.uuid4().hex[:8]}"
        trial.set_user_attr(FLEET, fleet.name)
        trial.set_user_attr(JOB, known)
    with _lock:
        _followed.add(known)
    return known, again


def release(name: str) -> None:
    """The job is not followed any more."""
    with _lock:
        _followed.discard(name)


def orphans(study: optuna.Study, fleet: "Fleet") -> list[int]:
    """Ids of the trials that a driver of this fleet left RUNNING when it died."""
    with _lock:
        followed = set(_followed)
    of_all = study.user_attrs.get(FLEET)
    return [
        trial._trial_id
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if trial.user_attrs.get(FLEET, of_all) == fleet.name
        and trial.user_attrs.get(JOB) not in followed
    ]


def stop_strays(study: optuna.Study, fleet: "Fleet") -> None:
    """Stops jobs whose trial is over: another driver took it for stale and failed it."""
    over = {
        trial.user_attrs.get(JOB)
        for trial in study.get_trials(deepcopy=False)
        if trial.user_attrs.get(FLEET) == fleet.name and trial.state.is_finished()
    }
    for job in fleet.jobs():
        if job.status in ("queued", "running") and job.job_id in over:
            job.stop("its trial is over")


class AdoptingStudy(optuna.Study):
    """The same study, which hands out orphaned trials before it creates new ones.

    It shares every attribute with the original (the stop flag, the thread-local state, the sampler
    and the pruner): what is done to one is done to the other.
    """

    __slots__ = ("_orphans", "_orphans_lock")

    def __init__(self, study: optuna.Study, trial_ids: Sequence[int]) -> None:
        self.__dict__ = study.__dict__
        self._orphans = list(trial_ids)
        self._orphans_lock = threading.Lock()
        # Optuna fails trials without a heartbeat before it asks for the next one.
        storage = self._storage
        if isinstance(storage, BaseHeartbeat) and storage.get_heartbeat_interval() is not None:
            for trial_id in trial_ids:
                storage.record_heartbeat(trial_id)

    def ask(self, *args: Any, **kwargs: Any) -> optuna.Trial:
        """The next orphaned trial, then new ones."""
        with self._orphans_lock:
            trial_id = self._orphans.pop(0) if self._orphans else None
        if trial_id is None:
            return super().ask(*args, **kwargs)
        self._thread_local.cached_all_trials = None
        return optuna.Trial(self, trial_id)
