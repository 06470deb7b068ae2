"""Which keys every object store takes."""

import re

from smlt_tune.errors import InvalidInput

_KEY = re.compile(r"[A-Za-z0-9._-]{1,200}(/[A-Za-z0-9._-]{1,200})*")
_PREFIX = re.compile(r"([A-Za-z0-9._-]{1,200}/)*[A-Za-z0-9._-]{0,200}")
_LONGEST = 700


def check_key(key: str) -> None:
    """Refuses what is no key of an object.

    Raises:
        InvalidInput: It is empty, too long, absolute, has ``.`` or ``..`` as a part, or characters
            that not every store takes.
    """
    if not _KEY.fullmatch(key) or _strays(key):
        raise InvalidInput(
            f"{key!r} is no key of an object: it must be /-separated names of letters, digits, "
            f"'.', '_', '-', none of them '.' or '..', each of 200 characters at most, "
            f"{_LONGEST} in all"
        )


def check_prefix(prefix: str) -> None:
    """Refuses what no key can start with.

    Raises:
        InvalidInput: As for :func:`check_key`; an empty prefix or a ``/`` at its end is fine.
    """
    if not _PREFIX.fullmatch(prefix) or _strays(prefix.rpartition("/")[0]):
        raise InvalidInput(f"{prefix!r} is no prefix of a key of an object: no key starts with it")


def _strays(key: str) -> bool:
    return len(key) > _LONGEST or not {".", ".."}.isdisjoint(key.split("/"))
