"""What a job will take, before it costs anything.

One dry iteration of the training function, in a process of its own on the client's machine, tells
what it computes; the resource manager predicts the rest. No platform is asked to run anything.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smlt_tune.backend import isolated
from smlt_tune.backend.artifact_manager import pickled
from smlt_tune.backend.goals import Cheapest, Goal
from smlt_tune.backend.job import train_mistakes
from smlt_tune.backend.platform_tables import platform_table
from smlt_tune.backend.platforms.base import Platform, PlatformLimits
from smlt_tune.backend.prices import Prices, load_prices
from smlt_tune.backend.profiles import FILE as PROFILES
from smlt_tune.backend.profiles import ProfileStore
from smlt_tune.backend.resource_manager.manager import ResourceManager
from smlt_tune.backend.resource_manager.observations import DEFAULT_STORE, Plan, Profile, Workload
from smlt_tune.backend.resource_manager.policy import Bounds, JobFacts, Plans, check
from smlt_tune.errors import InvalidInput
from smlt_tune.runtime.dry_run import dry_run

#: How long the training function may take to the end of its first iteration, seconds.
DRY_RUN_S = 120.0
#: Kind of the store that a fleet starts for itself.
_OWN_STORE = "redis"


@dataclass(frozen=True)
class JobPlan:
    """What is known of one job before it costs anything.

    Attributes:
        workload: What it computes.
        goal: What the user wants of it.
        plan: What the resource manager makes of that.
    """

    workload: Workload
    goal: Goal
    plan: Plan


def plan_job(
    train: Callable[[Any], Any],
    config: Any = None,
    *,
    policy: Plans,
    limits: PlatformLimits,
    goal: Goal | None = None,
    bounds: Bounds = Bounds(),  # noqa: B008 - frozen
    functions: int | None = None,
    datasets: Mapping[str, Any] | None = None,
    timeout_s: float = DRY_RUN_S,
) -> JobPlan:
    """Plans a job without starting it.

    Args:
        train: Training function, as for ``Fleet.submit``.
        config: Its configuration.
        policy: Predicts.
        limits: Of the platform.
        goal: What the user wants; the cheapest by default.
        bounds: What the user fixed.
        functions: How many functions it gets at most; all of the platform's by default.
        datasets: Arrays (or a tuple of them) of the data sets that the function asks for by name.
        timeout_s: How long the function may take to the end of its first iteration, seconds.

    Raises:
        InvalidInput: Lists everything that is wrong with the arguments.
        UsageError: The function does not train, or what it computes cannot be measured.
        TrainingFunctionError: The function raised; carries the traceback.
        FunctionLost: It did not come to the end of an iteration.
    """
    wanted = Cheapest() if goal is None else goal
    facts = JobFacts("plan", limits, wanted, bounds, functions=functions or limits.functions)
    if mistakes := train_mistakes(train) + check(facts):
        raise InvalidInput(mistakes)
    workload = measure(train, config, datasets=datasets, timeout_s=timeout_s)
    facts = replace(facts, workload=workload, iterations_left=workload.iterations)
    return JobPlan(workload, wanted, policy.plan(facts))


def measure(
    train: Callable[[Any], Any],
    config: Any = None,
    *,
    datasets: Mapping[str, Any] | None = None,
    timeout_s: float = DRY_RUN_S,
) -> Workload:
    """What a training function computes, found out by one dry iteration in a process of its own.

    Args:
        train: Training function.
        config: Its configuration.
        datasets: Arrays (or a tuple of them) of the data sets that the function asks for by name.
        timeout_s: How long it may take, seconds.

    Raises:
        InvalidInput: The function or its configuration cannot be pickled.
        UsageError: The function does not train, or what it computes cannot be measured.
        TrainingFunctionError: The function raised; carries the traceback.
        FunctionLost: It did not come to the end of an iteration.
    """
    advice = (
        "the training function has not come to the end of its first iteration: let it load less "
        "for a plan, or allow more time (timeout_s, --dry-run-timeout)"
    )
    found = isolated.call(
        dry_run, train, config, datasets=datasets, timeout_s=timeout_s, advice=advice
    )
    digest = hashlib.sha256(pickled(train, "the training function")).hexdigest()
    return Workload(found.features, found.batch, found.iterations, digest)


def resource_manager(
    platform: Platform,
    *,
    project: Path | None = None,
    home: Path | None = None,
    prices: Prices | None = None,
) -> ResourceManager:
    """The resource manager for planning, with what is known of a platform.

    Args:
        platform: Nothing is run on it.
        project: Folder with the profiles of earlier fleets; None to plan without them.
        home: The user's folder, where calibrations are kept; None to look at none.
        prices: What functions cost; the default list if None.

    Raises:
        InvalidInput: The folder holds no profiles, or those of another version or program.
        ObjectDamaged: The profiles are damaged.
    """
    table = platform_table(platform, home=home)
    profiles: Sequence[Profile] = ()
    if project is not None:
        if not (project / PROFILES).is_file():
            raise InvalidInput(f"there are no profiles in {project}: it holds no {PROFILES}")
        with ProfileStore(project) as known:
            profiles = known.profiles(platform.fingerprint)
    stores = {DEFAULT_STORE: table.stores[_OWN_STORE]}
    return ResourceManager(table, stores, prices or load_prices(), profiles)
