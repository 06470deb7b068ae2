"""What a platform charges, from dated data files.

| symbol | meaning | unit |
|---|---|---|
| m | memory of a function; a GB is 1,024 MB | MB |
| t | billed time, every delivery rounded up to the billing step | s |
| n | deliveries: how often a function was started | |
| p_fn, p_invoke | price of memory-time, price of a start | USD per GB-s, USD |

Cost of an invocation (CE-scaling eq. 4, with t the time of all deliveries together, so that k and n
appear once): ``n p_invoke + t (m / 1024) p_fn``.

Every method computes exactly, in fractions, and rounds the result up to a whole nano-dollar, which
is the unit of the ledger: the sum of what the methods return is then the sum that the ledger books.
A nano-dollar is fine enough (the smallest charge there is, one start of a function, is 200 of them)
and rounding up cannot make a budget look larger than it is.

Price files are JSON; ``price_data/`` holds those that come with the package, and any other file of
the same form can be given by its path.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from smlt_tune.errors import InvalidInput

NANOS_PER_USD = 10**9
MB_PER_GB = 1024

#: Sums of floats are off by far less than one such part, amounts that differ differ by far more.
_NOISE_PER_NANO = 1000
_NOISE_PER_UNIT = 10**9

_SCHEMA = 1
_LARGEST = 10**6
_KEYS = {
    "": {
        "schema",
        "provider",
        "region",
        "as_of",
        "currency",
        "sources",
        "function",
        "object_store",
        "parameter_store",
    },
    "function.": {"gb_second", "request", "billing_step_s", "init_limit_s"},
    "object_store.": {"put_per_1000", "get_per_1000"},
    "parameter_store.": {"hour", "billing_step_h"},
}
_DEFAULT = "aws-us-east-1-2026-01"


def usd_to_nanos(usd: float) -> int:
    """Whole nano-dollars, rounded up.

    A value less than a thousandth of a nano-dollar above a whole one is that whole one, so that the
    noise of adding floats does not cost a nano-dollar (0.1 + 0.2 is 300,000,000 of them).

    Args:
        usd: An amount in USD, as a float; exact to the nano-dollar below a million.

    Raises:
        InvalidInput: It is negative, infinite or not a number.
    """
    over, under = _ratio(usd, "an amount in USD")
    above_noise = over * NANOS_PER_USD * _NOISE_PER_NANO - under
    return max(0, -(-above_noise // (under * _NOISE_PER_NANO)))


def nanos_to_usd(nanos: int) -> float:
    """USD as a float; :func:`usd_to_nanos` gives the same nano-dollars back."""
    return nanos / NANOS_PER_USD


@dataclass(frozen=True)
class StorePrice:
    """What a parameter store costs while it stands.

    Attributes:
        hour_usd: USD per hour.
        billing_step_h: Every step that has begun is billed whole, hours.
    """

    hour_usd: Decimal
    billing_step_h: Decimal


@dataclass(frozen=True)
class Prices:
    """One price list, for functions of one architecture. See :func:`load_prices`.

    Attributes:
        name: Of the data file, without its ending.
        provider: Whose prices they are.
        region: Where they hold.
        as_of: Year and month (and day) in which they held.
        currency: Always ``USD``.
        architecture: Of the functions, ``x86_64`` or ``arm64``.
        gb_second_usd: Memory-time, USD per GB-s.
        request_usd: One start of a function, USD.
        billing_step_s: Durations are rounded up to a multiple of it, seconds.
        init_limit_s: Longest initialisation that is billed on top of a function's time, seconds.
        put_usd: One write to the object store, USD.
        get_usd: One read from the object store, USD.
        parameter_stores: Hourly prices by row.
        sources: Where the figures come from.
    """

    name: str
    provider: str
    region: str
    as_of: str
    currency: str
    architecture: str
    gb_second_usd: Decimal
    request_usd: Decimal
    billing_step_s: Decimal
    init_limit_s: Decimal
    put_usd: Decimal
    get_usd: Decimal
    parameter_stores: Mapping[str, StorePrice] = field(hash=False)
    sources: tuple[str, ...]

    def invocation_usd(self, memory_mb: int, billed_s: float, deliveries: int = 1) -> float:
        """Cost of an invocation that has ended.

        Args:
            memory_mb: Memory of the function, MB.
            billed_s: Time of all deliveries together, seconds, as the platform billed it.
            deliveries: How often it was started.

        Returns:
            USD, rounded up to a nano-dollar.
        """
        duration = _exact(billed_s, "billed_s")
        return nanos_to_usd(self._invocation_nanos(memory_mb, duration, deliveries))

    def worst_case_usd(
        self,
        memory_mb: int,
        timeout_s: float,
        deliveries: int = 1,
        object_puts: int = 0,
        object_gets: int = 0,
        init_s: float | None = None,
    ) -> float:
        """The most that an invocation can cost; what the ledger reserves for it.

        Every delivery initialises as long as it may, then runs until its time is over. The parts
        are rounded like those of the settlement, which therefore cannot exceed it.

        Args:
            memory_mb: Memory of the function, MB.
            timeout_s: The platform ends a delivery after this time, seconds.
            deliveries: How often the platform may run it at most.
            object_puts: Writes to the object store, of all deliveries together.
            object_gets: Reads from the object store, of all deliveries together.
            init_s: Initialisation that the platform bills on top of the time-out, seconds; None
                for the price list's limit, 0 where it counts within the time-out.

        Returns:
            USD, rounded up to a nano-dollar.
        """
        functions = _worst_nanos(self, memory_mb, timeout_s, deliveries, init_s)
        return nanos_to_usd(functions + self._object_nanos(object_puts, object_gets))

    def object_requests_usd(self, puts: int, gets: int) -> float:
        """Cost of requests to the object store, USD, rounded up to a nano-dollar."""
        return nanos_to_usd(self._object_nanos(puts, gets))

    def parameter_store_usd(self, row: str, hours: float) -> float:
        """Cost of a parameter store that stood for some time.

        Args:
            row: Name of the price, such as ``cache.m4.large``, or ``own``.
            hours: How long it stood; hours that have begun are billed whole.

        Returns:
            USD, rounded up to a nano-dollar.

        Raises:
            InvalidInput: There is no such row.
        """
        if row not in self.parameter_stores:
            known = ", ".join(sorted(self.parameter_stores))
            raise InvalidInput(f"no price for the parameter store {row!r} in {self.name}: {known}")
        price = self.parameter_stores[row]
        billed = _round_up(_exact(hours, "hours"), price.billing_step_h)
        return nanos_to_usd(_nanos_up(billed * Fraction(price.hour_usd)))

    def _invocation_nanos(self, memory_mb: int, duration: Fraction, deliveries: int) -> int:
        steps = _steps(duration, self.billing_step_s)
        mb, per_mb = _ratio(memory_mb, "memory_mb")
        starts, per_one = _ratio(deliveries, "deliveries")
        step_nanos, start_nanos, under = self._rates
        over = steps * mb * step_nanos * per_one + starts * start_nanos * per_mb
        return -(-over // (under * per_mb * per_one))

    @cached_property
    def _rates(self) -> tuple[int, int, int]:
        """Nano-dollars per MB and billing step, and per start, over a common denominator."""
        gb_second, start = Fraction(self.gb_second_usd), Fraction(self.request_usd)
        step = gb_second / MB_PER_GB * Fraction(self.billing_step_s) * NANOS_PER_USD
        start *= NANOS_PER_USD
        under = math.lcm(step.denominator, start.denominator)
        return int(step * under), int(start * under), under

    def _object_nanos(self, puts: int, gets: int) -> int:
        if not puts and not gets:
            return 0
        written = _exact(puts, "object puts") * Fraction(self.put_usd)
        return _nanos_up(written + _exact(gets, "object gets") * Fraction(self.get_usd))


@lru_cache(maxsize=1024)  # of many functions alike the same is asked
def _worst_nanos(
    prices: Prices, memory_mb: int, timeout_s: float, deliveries: int, init_s: float | None
) -> int:
    init = Fraction(prices.init_limit_s) if init_s is None else _exact(init_s, "init_s")
    longest = _round_up(_exact(timeout_s, "timeout_s") + init, prices.billing_step_s)
    return prices._invocation_nanos(memory_mb, longest * deliveries, deliveries)


def load_prices(name_or_path: str | Path = _DEFAULT, *, architecture: str = "x86_64") -> Prices:
    """Reads a price list.

    Args:
        name_or_path: Name of a list that comes with the package, or a path to a JSON file: a
            :class:`~pathlib.Path`, or text that contains a slash or ends in ``.json``.
        architecture: Of the functions.

    Raises:
        InvalidInput: There is no such list, or it has mistakes; the error lists them all.
    """
    name, text = _read(name_or_path)
    return _Reader(name).prices(text, architecture)


def _read(name_or_path: str | Path) -> tuple[str, str]:
    """Name and content of a price list."""
    given = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in given or given.endswith(".json"):
        try:
            return Path(given).stem, Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"cannot read the price list {given}: {error}") from error
    folder = files("smlt_tune.backend") / "price_data"
    known = sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name[-5:] == ".json")
    if given not in known:
        raise InvalidInput(f"no price list is called {given!r}; there is {', '.join(known)}")
    return given, (folder / f"{given}.json").read_text(encoding="utf-8")


def _exact(value: float, what: str) -> Fraction:
    """The decimal number that a float shows as, not its binary neighbour."""
    return Fraction(*_ratio(value, what))


def _ratio(value: float, what: str) -> tuple[int, int]:
    """The same, as numerator and denominator: integers are several times as fast as fractions."""
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise InvalidInput(f"{what} must be a finite number of at least 0, not {number!r}")
    return Decimal(repr(number)).as_integer_ratio()


def _nanos_up(usd: Fraction) -> int:
    return math.ceil(usd * NANOS_PER_USD)


def _round_up(value: Fraction, step: Decimal) -> Fraction:
    """The next multiple of the step, once the noise of adding floats is off the value."""
    return _steps(value, step) * Fraction(step)


def _steps(value: Fraction, step: Decimal) -> int:
    """How many steps that is."""
    clean = round(value * _NOISE_PER_UNIT)
    over, under = step.as_integer_ratio()
    return -(-clean * under // (over * _NOISE_PER_UNIT))


class _Reader:
    """Reads a price file and gathers what is wrong with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.mistakes: list[str] = []

    def prices(self, text: str, architecture: str) -> Prices:
        """The price list, or InvalidInput with every mistake."""
        document = self._document(text)
        function = self._section(document, "function")
        rates = self._numbers(
            self._section(function, "gb_second", "function."), "function.gb_second."
        )
        if rates and architecture not in rates:
            self.mistakes.append(
                f"no price for the architecture {architecture!r}: {', '.join(sorted(rates))}"
            )
        objects = self._section(document, "object_store")
        prices = Prices(
            name=self.name,
            provider=self._text(document, "provider"),
            region=self._text(document, "region"),
            as_of=self._text(document, "as_of", r"\d{4}-\d{2}(-\d{2})?", "a date such as 2026-01"),
            currency=self._text(document, "currency", "USD", "USD"),
            architecture=architecture,
            gb_second_usd=rates.get(architecture, Decimal(0)),
            request_usd=self._number(function, "request", "function."),
            billing_step_s=self._number(function, "billing_step_s", "function.", positive=True),
            init_limit_s=self._number(function, "init_limit_s", "function."),
            put_usd=self._number(objects, "put_per_1000", "object_store.") / 1000,
            get_usd=self._number(objects, "get_per_1000", "object_store.") / 1000,
            parameter_stores=self._stores(self._section(document, "parameter_store")),
            sources=self._sources(document),
        )
        self._unknown(document, "")
        self._unknown(function, "function.")
        self._unknown(objects, "object_store.")
        if self.mistakes:
            raise InvalidInput([f"price list {self.name}: {mistake}" for mistake in self.mistakes])
        return prices

    def _document(self, text: str) -> dict[str, Any]:
        try:
            document = json.loads(
                text,
                parse_float=Decimal,
                parse_constant=Decimal,
                object_pairs_hook=self._without_duplicates,
            )
        except ValueError as error:
            raise InvalidInput(f"price list {self.name}: is not JSON: {error}") from error
        if not isinstance(document, dict):
            raise InvalidInput(f"price list {self.name}: must be an object")
        if document.get("schema") != _SCHEMA:
            raise InvalidInput(
                f"price list {self.name}: schema is {document.get('schema')!r}; "
                f"this version reads {_SCHEMA}"
            )
        return document

    def _without_duplicates(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        self.mistakes += [f"{key} is given twice" for key in sorted({*keys}) if keys.count(key) > 1]
        return dict(pairs)

    def _section(self, document: dict[str, Any], key: str, prefix: str = "") -> dict[str, Any]:
        def fits(value: object) -> bool:
            return isinstance(value, dict) and bool(value)

        return self._take(document, key, prefix, fits, "an object with entries") or {}

    def _text(
        self, document: dict[str, Any], key: str, pattern: str = r".+", form: str = "text"
    ) -> str:
        def fits(value: object) -> bool:
            return isinstance(value, str) and re.fullmatch(pattern, value) is not None

        return self._take(document, key, "", fits, form) or ""

    def _sources(self, document: dict[str, Any]) -> tuple[str, ...]:
        def fits(value: object) -> bool:
            return (
                isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
            )

        return tuple(self._take(document, "sources", "", fits, "a list of texts") or ())

    def _number(
        self, section: dict[str, Any], key: str, prefix: str, *, positive: bool = False
    ) -> Decimal:
        def fits(value: object) -> bool:
            if isinstance(value, bool) or not isinstance(value, int | Decimal):
                return False
            return (
                Decimal(value).is_finite() and (value > 0 or not positive) and 0 <= value < _LARGEST
            )

        form = f"a number {'above' if positive else 'of at least'} 0"
        return Decimal(self._take(section, key, prefix, fits, form) or 0)

    def _numbers(self, section: dict[str, Any], prefix: str) -> dict[str, Decimal]:
        return {key: self._number(section, key, prefix) for key in section}

    def _stores(self, section: dict[str, Any]) -> dict[str, StorePrice]:
        stores = {}
        for row in section:
            store = self._section(section, row, "parameter_store.")
            prefix = f"parameter_store.{row}."
            if store:
                stores[row] = StorePrice(
                    hour_usd=self._number(store, "hour", prefix),
                    billing_step_h=self._number(store, "billing_step_h", prefix, positive=True),
                )
                self._unknown(store, "parameter_store.", prefix)
        return stores

    def _take(
        self,
        section: dict[str, Any],
        key: str,
        prefix: str,
        fits: Callable[[object], bool],
        form: str,
    ) -> Any:
        """The value under the key, or None and a mistake."""
        if key not in section:
            if section:
                self.mistakes.append(f"{prefix}{key} is missing")
        elif fits(section[key]):
            return section[key]
        else:
            self.mistakes.append(f"{prefix}{key} must be {form}, not {_shown(section[key])}")
        return None

    def _unknown(self, section: dict[str, Any], kind: str, prefix: str | None = None) -> None:
        extra = sorted(section.keys() - _KEYS[kind])
        self.mistakes += [
            f"{kind if prefix is None else prefix}{key} is not known" for key in extra
        ]


def _shown(value: object) -> str:
    """A value from a file, as a message shows it."""
    return str(value) if isinstance(value, Decimal) else repr(value)
