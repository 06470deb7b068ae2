"""Platform tables: where they come from, and the law that functions of one size follow.

A platform's table is the one that ``smlt calibrate`` has kept for its fingerprint in the user's
folder, or else one that comes with the package in ``platform_data/``. A shipped table says what one
core does; how many cores stand behind a function of m MB is the platform's to say.

| symbol | meaning | unit |
|---|---|---|
| v(m) | virtual CPUs of a function, ``Platform.vcpus`` | 1 |
| k(m) | threads that it computes with: max(1, floor(v)) | 1 |
| c(m) | cores behind it: ``Scales.cores`` or, for want of it, min(v, k) | 1 |
| e(k) | share of a core that a training loop makes of each of k threads' | 1 |
| s(m) | its speed, c(m) e(k(m)) over the same at 1,769 MB | 1 |

Speed jumps where k does, and a table interpolates in ln m: it holds both sides of every jump.
"""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from smlt_tune.backend.platforms.base import MB_PER_VCPU, Platform, Scales
from smlt_tune.backend.resource_manager.tables import PlatformTable, StoreTable
from smlt_tune.errors import InvalidInput, StorageFull

_SCHEMA = 1
#: Shipped tables by the name of the platform.
_SHIPPED = {"local": "local", "inline": "inline", "ray": "ray", "aws": "aws-lambda"}
_GENERIC = "generic"
_LARGEST = 1e18
#: Slopes of d ln c / d ln m that differ by less are one.
_STRAIGHT = 1e-6

_RATES = ("bandwidth",)
_TIMES = ("start_s", "warm_start_s")
_STORE_TIMES = ("latency_s", "usd_per_hour", "usd_per_request")


@dataclass(frozen=True)
class Core:
    """What comes with the package for platforms of a kind.

    Attributes:
        flops: What a training loop gets out of one core, FLOP/s.
        handling_s: CPU seconds of one core per synchronised byte.
        efficiency: e(k) for k = 1, 2, ...; the last one holds for more threads.
        speed: Speeds by size, MB, where they do not follow from the platform's cores; or empty.
        bandwidth: See :class:`PlatformTable`; so are the following.
        start_s: The same.
        warm_start_s: The same.
        stores: The same.
        as_of: When that was known.
        sources: Where it comes from, and what of it was not measured.
    """

    flops: float
    handling_s: float
    efficiency: tuple[float, ...]
    speed: Mapping[int, float]
    bandwidth: float
    start_s: float
    warm_start_s: float
    stores: Mapping[str, StoreTable]
    as_of: str
    sources: tuple[str, ...]


def user_home() -> Path:
    """The user's folder for what holds for all projects: ``SMLT_HOME``, or ``~/.smlt``."""
    given = os.environ.get("SMLT_HOME")  # noqa: TID251 - the one place that asks for it
    return Path(given) if given else Path.home() / ".smlt"


def platform_table(platform: Platform, *, home: str | Path | None = None) -> PlatformTable:
    """The table of a platform: what was kept of its calibration, or what comes with the package.

    Kinds of stores that the calibration has not measured are those of the shipped table.

    Args:
        platform: Which.
        home: The user's folder, where calibrations are kept; None to look at none.

    Raises:
        InvalidInput: The kept calibration has mistakes; lists them all.
    """
    shipped = shipped_table(platform)
    kept = None if home is None else read_table(home, platform.fingerprint)
    return shipped if kept is None else replace(kept, stores={**shipped.stores, **kept.stores})


def shipped_table(platform: Platform) -> PlatformTable:
    """What the package knows of a platform before it was calibrated."""
    core = load_core(_SHIPPED.get(platform.name, _GENERIC))
    cores = cores_of(platform)
    reference = cores(MB_PER_VCPU)
    if core.speed:
        sizes, speeds = tuple(core.speed), tuple(core.speed.values())
    else:
        sizes = bends(platform)

        def power(size: int) -> float:
            efficiency = core.efficiency[: threads_of(platform, size)][-1]
            return cores(size) * efficiency

        speeds = tuple(power(size) / power(MB_PER_VCPU) for size in sizes)
    return PlatformTable(
        fingerprint=platform.fingerprint,
        memory_mb=sizes,
        speed=speeds,
        flops=core.flops * reference,
        bandwidth=core.bandwidth,
        handling_s=core.handling_s / reference,
        start_s=core.start_s,
        warm_start_s=core.warm_start_s,
        stores=core.stores,
    )


def threads_of(platform: Platform, memory_mb: int) -> int:
    """Threads that a function of that size computes with; the worker sets them so."""
    return max(1, math.floor(platform.vcpus(memory_mb)))


def cores_of(platform: Platform) -> Callable[[int], float]:
    """The platform's law c: cores behind a function by its size, MB."""
    if isinstance(platform, Scales):
        return platform.cores
    return lambda memory_mb: min(platform.vcpus(memory_mb), threads_of(platform, memory_mb))


def bends(platform: Platform) -> tuple[int, ...]:
    """The sizes between which k is constant and ln c linear in ln m, both ends among them; MB."""
    low, high = platform.limits.min_memory_mb, platform.limits.max_memory_mb
    cores_at = cores_of(platform)
    sizes = np.arange(low, high + 1)
    cores = np.array([cores_at(int(size)) for size in sizes])
    threads = np.array([threads_of(platform, int(size)) for size in sizes])
    slopes = np.diff(np.log(cores)) / np.diff(np.log(sizes))
    inner = np.flatnonzero(np.abs(np.diff(slopes)) > _STRAIGHT) + 1
    jumps = np.flatnonzero(np.diff(threads))
    found = sizes[np.concatenate([inner, jumps, jumps + 1])]
    return tuple(sorted({low, high, *map(int, found)}))


def load_core(name: str) -> Core:
    """A table that comes with the package.

    Raises:
        InvalidInput: It has mistakes; lists them all.
    """
    text = (files("smlt_tune.backend") / "platform_data" / f"{name}.json").read_text("utf-8")
    return read_core(text, f"platform_data/{name}.json")


def read_core(text: str, where: str) -> Core:
    """A table of one core from JSON.

    Raises:
        InvalidInput: It has mistakes; lists them all.
    """
    reader = _Reader(text, where)
    known = {"flops", "handling_s", *_RATES, *_TIMES, "stores", "as_of", "sources"}
    both = {"efficiency", "speed"} & set(reader.document)
    if len(both) != 1:
        reader.mistakes.append("it must have either efficiency or speed")
    core = Core(
        flops=reader.number("flops", above=True),
        handling_s=reader.number("handling_s", above=True),
        efficiency=reader.numbers("efficiency") if "efficiency" in both else (1.0,),
        speed=reader.speeds() if "speed" in both else {},
        bandwidth=reader.number("bandwidth", above=True),
        **{name: reader.number(name) for name in _TIMES},
        stores=reader.stores(),
        as_of=reader.text("as_of", r"\d{4}-\d{2}-\d{2}"),
        sources=reader.texts("sources"),
    )
    reader.finish(known | both)
    return core


def read_table(home: str | Path, fingerprint: str) -> PlatformTable | None:
    """The calibration that was kept for a platform; None if there is none.

    Raises:
        InvalidInput: It has mistakes; lists them all.
    """
    path = table_path(home, fingerprint)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read the calibration {path}: {error}") from error
    hint = ": smlt calibrate measures a new one"
    reader = _Reader(text, str(path), hint)
    table = PlatformTable(
        fingerprint=reader.text("fingerprint"),
        memory_mb=reader.sizes(),
        speed=reader.numbers("speed"),
        flops=reader.number("flops", above=True),
        bandwidth=reader.number("bandwidth", above=True),
        handling_s=reader.number("handling_s", above=True),
        **{name: reader.number(name) for name in _TIMES},
        stores=reader.stores(),
        measured=reader.text("measured", r"\d{4}-\d{2}-\d{2}"),
    )
    if table.memory_mb and table.speed and len(table.memory_mb) != len(table.speed):
        reader.mistakes.append(f"{len(table.memory_mb)} sizes have {len(table.speed)} speeds")
    if table.fingerprint and table.fingerprint != fingerprint:
        reader.mistakes.append(f"it is of {table.fingerprint!r}, not of {fingerprint!r}")
    reader.finish(set(asdict(table)))
    return table


def check_home(home: str | Path) -> None:
    """Makes the folder for calibrations, before anybody measures one.

    Raises:
        InvalidInput: It cannot be used.
    """
    folder = _folder(home)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidInput(f"cannot use the folder {folder}: {error.strerror}") from error


def keep_table(table: PlatformTable, home: str | Path) -> Path:
    """Writes a calibration for later fleets; readers see the old one or the whole new one.

    Returns:
        The file.

    Raises:
        InvalidInput: The folder cannot be used.
        StorageFull: There is no space left; the old one stays.
    """
    check_home(home)
    path = table_path(home, table.fingerprint)
    text = json.dumps({"schema": _SCHEMA, **asdict(table)}, indent=1) + "\n"
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise StorageFull(f"cannot write {path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def table_path(home: str | Path, fingerprint: str) -> Path:
    """Where the calibration of a platform is kept."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", fingerprint)[:80].strip("-.")
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:8]
    return _folder(home) / f"{readable}-{digest}.json"


def _folder(home: str | Path) -> Path:
    return Path(home) / "platforms"


class _Reader:
    """Reads a table from JSON and gathers what is wrong with it.

    Args:
        text: The file.
        where: Its name, for messages.
        hint: What to do about mistakes.

    Raises:
        InvalidInput: It is no JSON object, or one of another schema.
    """

    def __init__(self, text: str, where: str, hint: str = "") -> None:
        self.where, self.hint = where, hint
        self.mistakes: list[str] = []
        try:
            document = json.loads(text, object_pairs_hook=self._once)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"{where}: is not JSON ({error}){hint}") from error
        if not isinstance(document, dict):
            raise InvalidInput(f"{where}: must be an object{hint}")
        self.document: dict[str, Any] = document
        if document.get("schema") != _SCHEMA:
            raise InvalidInput(
                f"{where}: schema is {document.get('schema')!r}; this version reads {_SCHEMA}{hint}"
            )

    def finish(self, known: set[str]) -> None:
        """Raises InvalidInput if anything was wrong, or is unknown."""
        extra = sorted(set(self.document) - known - {"schema"})
        self.mistakes += [f"{key} is not known" for key in extra]
        if self.mistakes:
            raise InvalidInput([f"{self.where}: {each}{self.hint}" for each in self.mistakes])

    def number(self, key: str, *, above: bool = False) -> float:
        """A finite number of at least 0, or above it."""
        form = "a number above 0" if above else "a number of at least 0"
        value = self._take(self.document, key, "", lambda v: _is_number(v, above=above), form)
        return 0.0 if value is None else float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers above 0 that is not empty."""

        def fits(value: Any) -> bool:
            return isinstance(value, list) and bool(value) and all(map(_is_positive, value))

        found = self._take(self.document, key, "", fits, "a list of numbers above 0")
        return tuple(map(float, found or ()))

    def sizes(self) -> tuple[int, ...]:
        """Sizes of functions, ascending."""

        def fits(value: Any) -> bool:
            return (
                isinstance(value, list)
                and bool(value)
                and all(isinstance(v, int) and _is_positive(v) for v in value)
                and value == sorted(set(value))
            )

        found = self._take(self.document, "memory_mb", "", fits, "whole numbers above 0, ascending")
        return tuple(found or ())

    def speeds(self) -> dict[int, float]:
        """Speeds by size."""

        def fits(value: Any) -> bool:
            return (
                isinstance(value, dict)
                and bool(value)
                and all(re.fullmatch(r"[1-9]\d{0,8}", key) for key in value)
                and all(map(_is_positive, value.values()))
            )

        form = "numbers above 0 by size in MB"
        found = self._take(self.document, "speed", "", fits, form) or {}
        return {int(size): float(found[size]) for size in sorted(found, key=int)}

    def stores(self) -> dict[str, StoreTable]:
        """Parameter stores by kind."""
        section = self._take(
            self.document, "stores", "", lambda value: isinstance(value, dict), "an object"
        )
        stores = {}
        for kind, given in (section or {}).items():
            prefix = f"stores.{kind}"
            if not isinstance(given, dict):
                self.mistakes.append(f"{prefix} must be an object, not {given!r}")
                continue
            values = {
                name: self._take(given, name, f"{prefix}.", _is_number, "a number of at least 0")
                for name in _STORE_TIMES
            }
            values["bandwidth"] = self._take(
                given, "bandwidth", f"{prefix}.", _is_positive, "a number above 0"
            )
            self.mistakes += [
                f"{prefix}.{key} is not known" for key in sorted({*given} - {*values})
            ]
            stores[kind] = StoreTable(**{name: float(v or 0) for name, v in values.items()})
        return stores

    def text(self, key: str, pattern: str = r".+") -> str:
        """Text of some form."""

        def fits(value: Any) -> bool:
            return isinstance(value, str) and re.fullmatch(pattern, value) is not None

        form = "text" if pattern == r".+" else "a date such as 2026-01-31"
        return self._take(self.document, key, "", fits, form) or ""

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts that is not empty."""

        def fits(value: Any) -> bool:
            return (
                isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
            )

        return tuple(self._take(self.document, key, "", fits, "a list of texts") or ())

    def _take(
        self,
        section: Mapping[str, Any],
        key: str,
        prefix: str,
        fits: Callable[[Any], bool],
        form: str,
    ) -> Any:
        """The value under the key, or None and a mistake."""
        if key not in section:
            self.mistakes.append(f"{prefix}{key} is missing")
        elif fits(section[key]):
            return section[key]
        else:
            self.mistakes.append(f"{prefix}{key} must be {form}, not {section[key]!r}")
        return None

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        self.mistakes += [f"{key} is given twice" for key in sorted({*keys}) if keys.count(key) > 1]
        return dict(pairs)


def _is_number(value: Any, *, above: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and (value > 0 if above else value >= 0) and value < _LARGEST


def _is_positive(value: Any) -> bool:
    return _is_number(value, above=True)
