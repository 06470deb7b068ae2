"""Places where functions run. Each knows the protocol in ``base``, none knows another."""

from importlib import import_module

from smlt_tune.backend.platforms.base import Platform
from smlt_tune.errors import InvalidInput

#: Name, and where its class is; imported on first use.
PLATFORMS = {
    "inline": "smlt_tune.backend.platforms.inline:InlinePlatform",
    "local": "smlt_tune.backend.platforms.local:LocalPlatform",
    "ray": "smlt_tune.backend.platforms.ray_cluster:RayPlatform",
}


def open_platform(platform: str | Platform) -> Platform:
    """A platform by its name, with default options; a platform object as it is.

    Raises:
        InvalidInput: There is none of that name.
    """
    if not isinstance(platform, str):
        return platform
    if platform not in PLATFORMS:
        known = ", ".join(repr(name) for name in sorted(PLATFORMS))
        raise InvalidInput(f"there is no platform {platform!r}: expected {known}, or an object")
    module, _, name = PLATFORMS[platform].partition(":")
    made: Platform = getattr(import_module(module), name)()
    return made
