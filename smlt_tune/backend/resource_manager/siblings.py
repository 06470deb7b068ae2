"""Profiles of all jobs, and quick access to those of similar models."""

import math
from typing import Any

import numpy as np

from smlt_tune.backend.resource_manager.observations import Allocation, Profile, Workload
from smlt_tune.backend.resource_manager.physics import sample_flops

#: Observations that enter a decision.
NEAREST = 64
#: Distance to a sibling with another training function, in e-folds of model size.
OTHER_FUNCTION = 3.0


class ProfileBook:
    """What was observed in a project. Not thread-safe."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._profiles: list[Profile] = []
        self._coordinates = np.zeros((64, 3))
        self._functions: dict[str, int] = {}
        self._function_of = np.zeros(64, dtype=np.int64)
        self._of_job: dict[str, list[int]] = {}

    def add(self, profile: Profile) -> None:
        """A later profile of the same (job, model, batch, allocation) replaces the earlier one."""
        work = profile.workload
        key = (profile.job_id, work.features, work.batch, profile.allocation)
        number = self._numbers.setdefault(key, len(self._profiles))
        if number < len(self._profiles):
            self._profiles[number] = profile
            return
        if number == len(self._coordinates):
            self._coordinates = np.concatenate([self._coordinates, self._coordinates])
            self._function_of = np.concatenate([self._function_of, self._function_of])
        self._profiles.append(profile)
        self._coordinates[number] = _coordinates(work)
        self._function_of[number] = self._functions.setdefault(work.function, len(self._functions))
        self._of_job.setdefault(profile.job_id, []).append(number)

    def tried(self, job_id: str, workload: Workload) -> set[Allocation]:
        """The allocations on which a job has computed this before."""
        own = (self._profiles[i] for i in self._of_job.get(job_id, []))
        alike = (workload.features, workload.batch)
        return {p.allocation for p in own if (p.workload.features, p.workload.batch) == alike}

    def typical(self) -> Workload | None:
        """Of the trial in the middle of all, to stand for one that nothing is known of."""
        if not self._profiles:
            return None
        coordinates = self._coordinates[: len(self._profiles)]
        middle = np.median(coordinates, axis=0)
        return self._profiles[int(np.argmin(((coordinates - middle) ** 2).sum(axis=1)))].workload

    def nearest(self, workload: Workload, job_id: str) -> list[Profile]:
        """The job's own profiles first, then those of the most similar models."""
        own = self._of_job.get(job_id, [])[-NEAREST // 2 :]
        size = len(self._profiles)
        away = ((self._coordinates[:size] - _coordinates(workload)) ** 2).sum(axis=1)
        function = self._functions.get(workload.function, -1)
        away = np.sqrt(away) + OTHER_FUNCTION * (self._function_of[:size] != function)
        away[self._of_job.get(job_id, [])] = np.inf
        count = min(NEAREST, size)
        order = np.argpartition(away, count - 1)[:count] if size else np.zeros(0, dtype=np.int64)
        others = [int(i) for i in order[np.argsort(away[order])] if np.isfinite(away[i])]
        return [self._profiles[i] for i in (*own, *others)]


def _coordinates(workload: Workload) -> tuple[float, float, float]:
    features = workload.features
    return (
        math.log(max(1, features.parameters)),
        math.log(sample_flops(features)),
        math.log(max(1, workload.batch)),
    )
