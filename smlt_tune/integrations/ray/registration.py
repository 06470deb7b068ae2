"""``register_smlt`` and ``unregister_smlt``."""

from pathlib import Path
from typing import Any

from smlt_tune.backend.fleet import Fleet
from smlt_tune.backend.platforms import open_platform
from smlt_tune.backend.platforms.base import Platform
from smlt_tune.errors import InvalidInput
from smlt_tune.integrations.ray import fleets, patches
from smlt_tune.integrations.ray.resources import resolve


def register_smlt(
    fleet: Fleet | None = None,
    *,
    path: str | Path | None = None,
    platform: str | Platform = "local",
    **options: Any,
) -> None:
    """Makes ``resources_per_trial="smlt"`` known to Ray Tune, and says where those trials run.

    Without ``fleet``, every experiment gets a fleet of its own, with the budget and the deadline
    given here, in ``<folder of the experiment>/smlt_fleet``. It is opened with the first trial,
    closed with the experiment, and continued by ``Tuner.restore``. Calling this again replaces what
    was registered before.

    Args:
        fleet: One fleet for all experiments. It stays yours to close; to restore an experiment
            after the driver died, open its folder again with ``Fleet.open``.
        path: Folder of one fleet for all experiments, opened with the first trial of this process
            and closed by :func:`unregister_smlt`. Needed if results do not go to a local folder.
        platform: Where functions run.
        **options: Further arguments of ``smlt_tune.Fleet``: ``budget_usd``, ``deadline_s``,
            ``parameter_store``, ``object_store``, ``project``, ...

    Raises:
        InvalidInput: Ray is not supported; or the arguments are wrong: the message lists every
            mistake.
        StoreUnavailable: The parameter store does not answer.
    """
    if fleet is None:
        registered = _own_fleets(path, platform, options)
    else:
        registered = fleets.Fleets(_checked(fleet, path, platform, options))
    patches.install(resolve)
    fleets.replace(registered)


def unregister_smlt() -> None:
    """Leaves Ray as it was, and closes the fleets that were opened here. Idempotent."""
    patches.uninstall()
    fleets.replace(None)


def _own_fleets(
    path: str | Path | None, platform: str | Platform, options: dict[str, Any]
) -> fleets.Fleets:
    own = open_platform(platform) if isinstance(platform, str) else None
    options = {**options, "platform": own or platform}
    try:
        Fleet(**options).close()  # says now what would be wrong later
    except BaseException as error:
        if own is not None:
            own.close()
        if isinstance(error, TypeError):
            raise InvalidInput(f"register_smlt: {error}") from error
        raise
    folder = None if path is None else Path(path).expanduser().absolute()
    return fleets.Fleets(None, folder, own, **options)


def _checked(fleet: Fleet, path: object, platform: object, options: dict[str, Any]) -> Fleet:
    mistakes = [f"{name} is an argument of the fleet: leave it out" for name in options]
    if not callable(getattr(fleet, "submit", None)):
        mistakes.append(f"fleet is a {type(fleet).__name__}: expected a smlt_tune.Fleet")
    elif fleet.closed:
        mistakes.append("the fleet is closed; open its folder again with Fleet.open")
    if path is not None:
        mistakes.append("a fleet has its path already: leave path out")
    if platform != "local":
        mistakes.append("a fleet has its platform already: leave platform out")
    if mistakes:
        raise InvalidInput(mistakes)
    return fleet
