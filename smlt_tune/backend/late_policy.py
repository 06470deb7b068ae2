"""The allocation policy of a fleet that was given none: made once it is needed."""

import importlib.util
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from smlt_tune.backend.platforms.base import Platform
from smlt_tune.backend.prices import Prices
from smlt_tune.backend.resource_manager.observations import Decision, Option, Profile
from smlt_tune.backend.resource_manager.policy import (
    AllocationPolicy,
    JobFacts,
    PinnedOrDefault,
    Plans,
    is_pinned,
)
from smlt_tune.errors import InvalidInput, UsageError

_LOG = logging.getLogger(__name__)

#: Modules that the resource manager needs, of the extra ``gp``.
NEEDED = ("scipy", "threadpoolctl")


class LatePolicy:
    """Stands for a policy that takes long to make, because of what it imports.

    It is made for the first who leaves something open; jobs with nothing left to choose never wait
    for it, nor does what is observed meanwhile. May be used from several threads.

    Args:
        make: Makes the policy.
    """

    def __init__(self, make: Callable[[], AllocationPolicy]) -> None:
        self._make = make
        self._policy: AllocationPolicy | None = None
        self._observed: list[Profile] = []
        self._making, self._lock = threading.Lock(), threading.Lock()

    def made(self) -> AllocationPolicy:
        """The policy that this stands for; makes it, or waits for who does."""
        with self._making:
            if self._policy is None:
                policy = self._made()
                with self._lock:
                    for profile in self._observed:
                        policy.observe(profile)
                    self._observed.clear()
                    self._policy = policy
        return self._policy

    def observe(self, profile: Profile) -> None:  # noqa: D102 - the contract is the protocol's
        with self._lock:
            if self._policy is None:
                self._observed.append(profile)
                return
        self._policy.observe(profile)

    def first(self, facts: JobFacts) -> Decision:  # noqa: D102
        return self._for(facts).first(facts)

    def after_out_of_memory(  # noqa: D102
        self, facts: JobFacts, peak_mb: float
    ) -> Decision | None:
        return self._for(facts).after_out_of_memory(facts, peak_mb)

    def review(self, facts: JobFacts) -> Decision | None:  # noqa: D102
        return self._for(facts).review(facts)

    def _for(self, facts: JobFacts) -> AllocationPolicy:
        return PinnedOrDefault() if is_pinned(facts) else self.made()

    def _made(self) -> AllocationPolicy:
        try:
            return self._make()
        except Exception:  # noqa: BLE001 - jobs wait for it
            _LOG.exception("the resource manager cannot be used; sizes are pinned or the default")
            return PinnedOrDefault()


def planner(policy: AllocationPolicy) -> Plans | None:
    """The policy, or the one that it stands for, if it can plan."""
    made = policy.made() if isinstance(policy, LatePolicy) else policy
    return made if isinstance(made, Plans) else None


def options_of(policy: AllocationPolicy, facts: JobFacts) -> tuple[Option, ...]:
    """What a job would take with each allocation.

    Args:
        policy: Of its fleet.
        facts: With a workload.

    Raises:
        UsageError: The policy cannot tell.
    """
    able = planner(policy)
    if able is None:
        raise UsageError(
            "nothing can be planned with this allocation policy: leave the choice to the resource "
            "manager (policy=None, and pip install 'smlt-tune[gp]')"
        )
    return able.options(facts)


def missing() -> list[str]:
    """What the resource manager needs and is not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def resource_manager(
    platform: Platform,
    prices: Prices,
    stores: Mapping[str, tuple[str, str]],
    profiles: Iterable[Profile],
) -> AllocationPolicy:
    """The resource manager, or the simplest policy where what it needs is not installed.

    Args:
        platform: Where functions run.
        prices: What things cost.
        stores: URL and row of the price list of each parameter store, by name.
        profiles: What is known from earlier fleets.
    """
    if lacking := missing():
        _LOG.warning(
            "sizes of jobs are not optimised, because %s is not installed: "
            "pip install 'smlt-tune[gp]'",
            " and ".join(lacking),
        )
        return PinnedOrDefault()
    for slow in ("scipy.linalg", "scipy.special"):  # here, not in the middle of a decision
        importlib.import_module(slow)
    from smlt_tune.backend.platform_tables import platform_table, shipped_table, user_home
    from smlt_tune.backend.resource_manager.manager import ResourceManager

    try:
        table = platform_table(platform, home=user_home())
    except InvalidInput as error:
        _LOG.warning("the calibration of the platform is not used: %s", error)
        table = shipped_table(platform)
    known = {}
    for name, (url, row) in stores.items():
        scheme = url.partition("://")[0]
        hour_usd = float(prices.parameter_stores[row].hour_usd)
        known[name] = replace(
            table.stores.get(scheme, table.stores["redis"]), usd_per_hour=hour_usd
        )
    return ResourceManager(table, known, prices, profiles)
