"""What functions were charged, written down where it outlives client and helper.

A bill is a file of one client of a fleet, named by ``Invocation.bill_path``: lines of JSON that are
only ever appended to.

| line | who writes it | when |
|---|---|---|
| ``opened`` | the client | before a helper gets its first order that names the bill; durable |
| ``begun`` | the helper | before it starts a delivery |
| ``ended`` | the helper | when a delivery is over, before the client is told |
| ``ended`` | the client | when it tells an end by itself, because the helper cannot |

The first ``ended`` of a delivery counts. Whatever is killed, the file keeps what was written: so
once a helper is gone, what it had not begun never ran, and what had begun and not ended was lost
with it. Only a machine that went down may have forgotten lines; then no more is known than what is
there.
"""

import errno
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smlt_tune.backend.platforms.base import Charge, InvocationResult
from smlt_tune.backend.platforms.local import linux
from smlt_tune.runtime.clock import Clock

#: How long a helper whose client is dead is waited for, seconds. It ends at once, unless it is
#: still loading modules.
HELPER_ENDS_S = 30.0
_POLL_S = 0.01
#: What of an order to the helper stands in a line.
_OF_BEGIN = ("invocation", "delivery")
_OF_END = (*_OF_BEGIN, "deliveries", "memory_mb", "timeout_s")
#: What every line of a kind has.
_NAMES = {
    "opened": {"helper", "ticks", "where"},
    "begun": set(_OF_BEGIN),
    "ended": {*_OF_END, "ending", "billed_ms"},
}
_UNREADABLE = "unreadable"

Line = dict[str, Any]


def write_opened(path: Path, helper: int) -> None:
    """Says which helper process may run what is on a bill; durable once it returns.

    Raises:
        OSError: It could not be written.
    """
    line = {"line": "opened", "helper": helper, "ticks": linux.start_ticks(helper)}
    _append(path, {**line, "where": _here()}, durable=True)


def write_begun(order: Line) -> None:
    """Says that a delivery is about to be started.

    Args:
        order: To the helper; names the bill, if there is one.

    Raises:
        OSError: It could not be written.
    """
    if order["bill"] is not None:
        _append(order["bill"], {"line": "begun", **{name: order[name] for name in _OF_BEGIN}})


def write_ended(order: Line, ending: str, billed_ms: int) -> None:
    """Says how a delivery has ended.

    Args:
        order: To the helper; names the bill, if there is one.
        ending: How.
        billed_ms: For how long it is billed, milliseconds.

    Raises:
        OSError: It could not be written.
    """
    if order["bill"] is not None:
        line = {"line": "ended", **{name: order[name] for name in _OF_END}}
        _append(order["bill"], {**line, "ending": ending, "billed_ms": billed_ms})


def read(path: Path, names: Iterable[str], clock: Clock) -> dict[str, Charge | None]:
    """What invocations of a client that is dead were charged.

    Waits until none of them runs any more.

    Args:
        path: Its bill.
        names: Of the invocations.
        clock: Time.

    Returns:
        By name, None for one that never ran. Those of which that cannot be known are left out.
    """
    here = _here()
    opened = [line for line in _lines(path) if line["line"] == "opened"]
    give_up_s = clock.monotonic() + HELPER_ENDS_S
    while (alive := any(_runs(line, here) for line in opened)) and clock.monotonic() < give_up_s:
        clock.sleep(_POLL_S)
    lines = _lines(path)
    complete = (
        not alive
        and all(here and line["where"] == here for line in opened)
        and all(line["line"] != _UNREADABLE for line in lines)
    )
    deliveries = _by_invocation(lines)
    found: dict[str, Charge | None] = {}
    for name in names:
        ended = [line for line in deliveries[name].values() if line is not None]
        begun = len(deliveries[name])
        if not complete:  # all that were ordered may have begun
            begun = max((line["deliveries"] for line in ended), default=1)
        if len(ended) >= begun:
            found[name] = _charge(ended) if ended else None
    return found


def together(results: list[InvocationResult]) -> InvocationResult:
    """One result for all deliveries of an invocation."""
    told = next((r for r in results if r.ending == "returned"), results[0])
    return InvocationResult(
        invocation_id=told.invocation_id,
        ending=told.ending,
        billed_s=sum(round(r.billed_s * 1000) for r in results) / 1000,
        deliveries=len(results),
        cold=any(r.cold for r in results),
        peak_mb=max(r.peak_mb for r in results),
        start_s=min((r.start_s for r in results if r.start_s > 0), default=0.0),
        cpu_s=sum(r.cpu_s for r in results),
        detail=told.detail,
    )


def _by_invocation(lines: list[Line]) -> defaultdict[str, dict[int, Line | None]]:
    """The end of every delivery that has begun or ended; None for one that has only begun."""
    found: defaultdict[str, dict[int, Line | None]] = defaultdict(dict)
    for line in lines:
        if line["line"] in ("begun", "ended"):
            deliveries = found[line["invocation"]]
            if deliveries.get(line["delivery"]) is None:
                deliveries[line["delivery"]] = line if line["line"] == "ended" else None
    return found


def _charge(ended: list[Line]) -> Charge:
    results = [
        InvocationResult(line["invocation"], line["ending"], line["billed_ms"] / 1000)
        for line in ended
    ]
    return Charge(ended[0]["memory_mb"], ended[0]["timeout_s"], together(results))


def _runs(opened: Line, here: str) -> bool:
    """Whether the helper of a line is alive, as far as this process can see it."""
    started = linux.start_ticks(opened["helper"])
    return bool(opened["where"] == here and started and started == opened["ticks"])


def _here() -> str:
    """This machine since it was started, and the processes that this one can see; "" if unknown."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return f"{started} {linux.pid_namespace()}"


def _append(path: str | Path, line: Line, *, durable: bool = False) -> None:
    data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(file, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if durable:
            os.fsync(file)
    finally:
        os.close(file)


def _lines(path: Path) -> list[Line]:
    """All lines; in the place of what is none (half a line, say) stands that it cannot be read."""
    try:
        texts = path.read_bytes().splitlines()
    except FileNotFoundError:  # nothing was ever to run
        return []
    return list(map(_line, texts))


def _line(text: bytes) -> Line:
    try:
        line = json.loads(text)
    except ValueError:
        line = None
    if isinstance(line, dict) and line.keys() >= _NAMES.get(line.get("line", ""), {_UNREADABLE}):
        return line
    return {"line": _UNREADABLE}
