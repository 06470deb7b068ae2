"""From a value in a file to a checked one. Each raises Mistake with what was expected."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from smlt_tune.backend.sweeps.document import Mistake, did_you_mean

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def text(value: Any) -> str:
    """Non-empty text."""
    if not (isinstance(value, str) and value):
        raise Mistake(f"expected text, not {value!r}")
    return value


def number(value: Any) -> float:
    """A finite number. YAML reads ``1e-3`` as text; it is meant as a number."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise Mistake(f"expected a number, not {value!r}")
    return found


def positive(value: Any) -> float:
    """A number above 0."""
    found = number(value)
    if found <= 0:
        raise Mistake(f"expected a number above 0, not {value!r}")
    return found


def whole(value: Any) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise Mistake(f"expected a whole number, not {value!r}")
    return value


def count(value: Any) -> int:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise Mistake(f"expected a whole number of at least 1, not {value!r}")
    return value


def natural(value: Any) -> int:
    """A whole number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Mistake(f"expected a whole number of at least 0, not {value!r}")
    return value


def several(value: Any) -> int:
    """A whole number of at least 2."""
    if count(value) < 2:
        raise Mistake(f"expected a whole number of at least 2, not {value!r}")
    return int(value)


def non_negative(value: Any) -> float:
    """A number of at least 0."""
    found = number(value)
    if found < 0:
        raise Mistake(f"expected a number of at least 0, not {value!r}")
    return found


def percent(value: Any) -> float:
    """A number between 0 and 100."""
    found = number(value)
    if not 0 <= found <= 100:
        raise Mistake(f"expected a number from 0 to 100, not {value!r}")
    return found


def truth(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise Mistake(f"expected true or false, not {value!r}")
    return value


def duration(value: Any) -> float:
    """Seconds, from a number of seconds or from text such as ``90s``, ``10m`` or ``1h30m``."""
    if isinstance(value, str):
        parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", value)
        if parts and "".join(amount + unit for amount, unit in parts) == value:
            value = sum(float(amount) * _UNITS[unit] for amount, unit in parts)
    try:
        return positive(value)
    except Mistake:
        raise Mistake(f"expected a time such as 90s, 10m or 1h30m, not {value!r}") from None


def one_of(names: Iterable[str]) -> Callable[[Any], str]:
    """One of some words; null counts as ``none``."""
    known = list(names)

    def convert(value: Any) -> str:
        word = "none" if value is None else value
        if word not in known:
            raise Mistake(
                f"expected one of {', '.join(known)}, not {word!r}{did_you_mean(word, known)}"
            )
        return str(word)

    return convert


def mapping(value: Any) -> dict[Any, Any]:
    """A mapping."""
    if not isinstance(value, dict):
        raise Mistake(f"expected settings, not {value!r}")
    return value


def words(value: Any) -> tuple[str, ...]:
    """A list of words."""
    if not (isinstance(value, list) and all(isinstance(word, str) for word in value)):
        raise Mistake(f"expected a list of names, not {value!r}")
    return tuple(value)
