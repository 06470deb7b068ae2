"""Numbers as people read them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from smlt_tune.backend.resource_manager.observations import DEFAULT_STORE, Allocation, Interval

T = TypeVar("T")


def usd(amount: float | None) -> str:
    """Dollars: cents, and more decimals for what costs less than a dollar or a cent."""
    if amount is None:
        return "no limit"
    decimals = 2 if abs(amount) >= 1 else 4 if abs(amount) >= 0.01 or amount == 0 else 6
    return f"${amount:,.{decimals}f}"


def seconds(duration: float) -> str:
    """``48 s``, ``3:05`` or ``2:03:05``."""
    if round(duration) < 60:
        return f"{duration:.0f} s" if duration >= 10 else f"{duration:.1f} s"
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def brief(duration: float) -> str:
    """A time per iteration: ``31.6 ms`` or ``1.25 s``."""
    return f"{1000 * duration:.3g} ms" if duration < 1 else f"{duration:.3g} s"


def within(range_: Interval, say: Callable[[float], str]) -> str:
    """A prediction with its 90 % interval: ``48 s (40 s to 1:02)``."""
    return f"{say(range_.mid)} ({say(range_.low)} to {say(range_.high)})"


def allocation(one: Allocation) -> str:
    """``4 x 1769 MB``, and the store unless it is the only one."""
    store = "" if one.store == DEFAULT_STORE else f" on {one.store}"
    return f"{one.workers} x {one.memory_mb} MB{store}"


def allocations(several: Sequence[Allocation]) -> str:
    """``1 to 4 x 1769 MB``."""
    workers = span(one.workers for one in several)
    return f"{workers} x {span(one.memory_mb for one in several)} MB"


def span(numbers: Iterable[int]) -> str:
    """``4`` if they are all the same, else ``1 to 4``."""
    seen = sorted(set(numbers))
    return str(seen[0]) if len(seen) == 1 else f"{seen[0]} to {seen[-1]}"


def value(number: Any) -> str:
    """A parameter or a metric, at most some seven characters if it is a number."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return "-" if number is None else str(number)
    if isinstance(number, int):
        return f"{number:,}" if abs(number) >= 10_000 else str(number)
    return f"{number:.4f}" if 0.01 <= abs(number) < 100 or number == 0 else f"{number:.3g}"


def settings(params: dict[str, Any]) -> str:
    """``depth=2 lr=0.0031``."""
    return " ".join(f"{name}={value(chosen)}" for name, chosen in params.items())


def thinned(rows: Sequence[T], most: int) -> list[T]:
    """At most so many of some rows, evenly, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]
