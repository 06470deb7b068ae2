"""The event loop of the helper process: forks instances, ends them, keeps them warm.

Single-threaded, because it forks. Everything it does to a process it does here, so that whatever
becomes of the client, one place knows what has to be cleaned up.
"""

import contextlib
import json
import os
import resource
import selectors
import signal
import socket
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smlt_tune.backend.platforms.local import bills, channel, instance, linux
from smlt_tune.backend.platforms.local.isolation import Cage, Isolation, Share
from smlt_tune.backend.platforms.local.options import Billing, billed_ms
from smlt_tune.runtime.clock import Clock

#: How often it is tried again to remove limits from which processes have not yet gone, seconds.
BURY_AGAIN_S = 0.01
#: How long the end waits for killed processes, seconds.
LAST_WAIT_S = 10.0


@dataclass(frozen=True)
class Settings:
    """What the client tells its helper.

    Attributes:
        client: Process of the client.
        entry: ``module:function`` that instances run.
        concurrency: How many instances may exist.
        billing: By what deliveries are billed.
        keep_alive_s: How long an idle instance stays warm, seconds.
        isolation: Name of the isolation.
        preload: Modules to import once, where they are installed.
    """

    client: int
    entry: str
    concurrency: int
    billing: Billing
    keep_alive_s: float
    isolation: str
    preload: list[str]


@dataclass
class _Delivery:
    """One run of an invocation; times in seconds of the clock."""

    order: channel.Message
    cold: bool
    started: float
    deadline: float

    @property
    def number(self) -> int:
        """By which the client knows it."""
        return int(self.order["delivery"])


@dataclass
class _Instance:
    """One forked process.

    Attributes:
        pid: Its id; also that of its process group.
        sock: To it.
        share: What it may use.
        cage: What keeps it to that.
        idle_until: When it ends if nothing comes, seconds; while it has no delivery.
        delivery: What it runs.
        cpu_s: CPU time of what it ran before, seconds.
        peak: Highest resident memory of the function as a whole, bytes.
        ending: Why it was killed, if it was while it ran something.
        detail: The same for people.
        dying: It was killed and has not been reaped yet.
    """

    pid: int
    sock: socket.socket
    share: Share
    cage: Cage
    idle_until: float = 0.0
    delivery: _Delivery | None = None
    cpu_s: float = 0.0
    peak: int = 0
    ending: str = ""
    detail: str = ""
    dying: bool = False


class Supervisor:
    """Runs until the client says so or is gone.

    Args:
        control: To the client.
        settings: What the client wants.
        isolation: How instances are limited.
        clock: Source of time.
    """

    def __init__(
        self, control: socket.socket, settings: Settings, isolation: Isolation, clock: Clock
    ) -> None:
        self._control = control
        self._settings = settings
        self._isolation = isolation
        self._clock = clock
        self._instances: OrderedDict[int, _Instance] = OrderedDict()  # least recently used first
        self._graves: list[Cage] = []
        self._made = 0
        self._ending = False
        self._preloaded = linux.resident(os.getpid()) or linux.Resident(0, 0)
        self._selector = selectors.DefaultSelector()
        self._wake, wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake, False)
        self._watch(control, self._on_control)
        self._watch(self._wake, self._on_wake)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        self._fds = [self._wake, wake]
        self._watch_client()

    def run(self) -> None:
        """Serves the client, then ends every instance and removes every trace of them."""
        self._isolation.reap(self._clock)
        self._isolation.open()
        try:
            self._tell("ready", preloaded_mb=self._preloaded.total / linux.MB)
            while not self._ending:
                for key, _ in self._selector.select(self._wait_s()):
                    key.data()
                self._reap()
                self._look_at_clock()
        finally:
            self._close()

    # What the client says

    def _watch_client(self) -> None:
        """Its end of the socket may outlive it in a process that it has forked."""
        try:
            client = os.pidfd_open(self._settings.client)
        except ProcessLookupError:
            self._end()
        except OSError:
            return  # before Linux 5.3: the socket has to do
        else:
            self._fds.append(client)
            self._watch(client, self._end)

    def _on_control(self) -> None:
        frame = channel.receive(self._control)
        if frame is None:
            self._end()
        elif frame[0]["do"] == "run":
            self._deliver(frame[0], frame[1])
        else:
            self._cancel(frame[0]["delivery"])

    def _deliver(self, order: channel.Message, payload: bytes) -> None:
        try:
            bills.write_begun(order)
        except OSError as error:  # what is not on the bill must not run: nobody would know of it
            self._tell_end(order, "crashed", f"could not write the bill: {error}")
            return
        started = self._clock.monotonic()
        share = Share(order["memory_mb"], order["cores"], self._preloaded)
        if share.own_bytes <= 0:
            detail = (
                f"the preloaded modules alone take {self._preloaded.total / linux.MB:.0f} MB of "
                f"the function's {share.memory_mb} MB: give it more memory, or preload less"
            )
            self._tell_end(order, "out_of_memory", detail, peak=self._preloaded.total)
            return
        try:
            found, cold = self._hand_over(order, payload, share)
        except OSError as error:
            self._tell_end(order, "crashed", f"could not start a function: {error}")
            return
        found.delivery = _Delivery(order, cold, started, started + order["timeout_s"])
        found.peak = 0
        self._instances.move_to_end(found.pid)

    def _hand_over(
        self, order: channel.Message, payload: bytes, share: Share
    ) -> tuple[_Instance, bool]:
        """Gives the payload to a warm instance, else to a new one; True if it is new."""
        fd = os.memfd_create("payload")
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(payload)
            request = {"log": order["log"]}
            for warm in self._idle():
                if warm.share == share:
                    linux.signal_all([warm.pid], signal.SIGCONT)
                    warm.cage.resume()
                    try:
                        self._send(warm, {**request, "cold": False}, fd)
                    except OSError:
                        self._kill(warm)  # it died in its sleep
                        continue
                    return warm, False
            self._make_room()
            fresh = self._fork(share)
            self._send(fresh, {**request, "cold": True}, fd)
            return fresh, True
        finally:
            os.close(fd)

    @staticmethod
    def _send(to: _Instance, request: dict[str, Any], fd: int) -> None:
        socket.send_fds(to.sock, [json.dumps(request).encode()], [fd])

    def _cancel(self, number: int) -> None:
        for each in self._instances.values():
            if each.delivery is not None and each.delivery.number == number:
                self._kill(each, "cancelled", "cancelled")

    # Instances

    def _idle(self) -> list[_Instance]:
        return [i for i in self._instances.values() if i.delivery is None and not i.dying]

    def _make_room(self) -> None:
        alive = sum(not i.dying for i in self._instances.values())
        for each in self._idle()[: max(0, alive - self._settings.concurrency + 1)]:
            self._kill(each)

    def _fork(self, share: Share) -> _Instance:
        self._made += 1
        cage = self._isolation.cage(self._made, share)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            self._graves.append(cage)
            raise
        if pid == 0:
            self._forget_all(ours)
            instance.main(theirs, self._settings.entry, parent, cage.enter)
        theirs.close()
        cage.adopt(pid)
        made = _Instance(pid, ours, share, cage)
        self._instances[pid] = made
        self._watch(ours, lambda: self._on_instance(made))
        return made

    def _forget_all(self, ours: socket.socket) -> None:
        """In a new instance: lets go of everything that belongs to the helper."""
        self._selector.close()
        for fd in self._fds:
            os.close(fd)
        ours.close()
        self._control.close()
        for each in self._instances.values():
            each.sock.close()

    def _on_instance(self, of: _Instance) -> None:
        try:
            data = of.sock.recv(instance.MAX_DATAGRAM, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._unwatch(of)
        elif of.delivery is not None:
            self._on_answer(of, of.delivery, json.loads(data))

    def _on_answer(self, of: _Instance, delivery: _Delivery, answer: dict[str, Any]) -> None:
        if "running" in answer:
            self._tell("running", delivery=delivery.number)
            return
        if of.dying:
            return  # why it was ended counts
        of.peak = of.share.whole_bytes(answer["peak"], answer["files"])
        ok = answer["ok"]
        exceeded = of.cage.exceeded_mb(of.peak)
        if answer["no_memory"] or (exceeded and (not ok or of.cage.interval_s is not None)):
            self._finish(of, delivery, "out_of_memory", "", answer["cpu_s"])
        else:
            ending = "returned" if ok else "crashed"
            self._finish(of, delivery, ending, answer["error"], answer["cpu_s"])
        if ok and not exceeded and self._settings.keep_alive_s > 0:
            of.idle_until = self._clock.monotonic() + self._settings.keep_alive_s
            linux.signal_all([of.pid], signal.SIGSTOP)  # Lambda freezes idle instances too
        else:
            self._kill(of)

    def _finish(
        self, of: _Instance, delivery: _Delivery, ending: str, detail: str, cpu_s: float
    ) -> None:
        """Tells the client how the delivery of an instance ended; ``cpu_s`` since its start."""
        of.delivery = None
        if ending == "out_of_memory":
            of.peak = max(of.peak, int(of.cage.exceeded_mb(of.peak) * linux.MB))
            detail = (
                f"used {of.peak / linux.MB:.1f} MB, its limit is {of.share.memory_mb} MB: give the "
                "function more memory"
            )
        self._tell_end(
            delivery.order,
            ending,
            detail,
            cold=delivery.cold,
            wall_s=self._clock.monotonic() - delivery.started,
            cpu_s=max(0.0, cpu_s - of.cpu_s),
            peak=of.peak,
        )
        of.cpu_s = cpu_s

    def _kill(self, which: _Instance, ending: str = "", detail: str = "") -> None:
        if which.dying:
            return
        which.dying, which.ending, which.detail = True, ending, detail
        now = linux.resident(which.pid)
        if now is not None:
            highest = linux.status_bytes(which.pid, "VmHWM")
            which.peak = max(which.peak, which.share.whole_bytes(highest, now.files))
        which.cage.kill()
        linux.kill_group(which.pid)
        linux.signal_all([which.pid], signal.SIGKILL)

    # What the kernel says

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            dead = self._instances.pop(pid, None)
            if dead is not None:  # else one that a function has left behind
                self._bury(dead, status, usage)

    def _bury(self, dead: _Instance, status: int, usage: resource.struct_rusage) -> None:
        while dead.sock.fileno() in self._selector.get_map():
            self._on_instance(dead)  # its last words
        dead.sock.close()
        if dead.delivery is not None:
            cpu_s = usage.ru_utime + usage.ru_stime
            # NOTE: its own peak may lack what it shares with the helper.
            dead.peak = max(dead.peak, usage.ru_maxrss * 1024, self._preloaded.total)
            ending, detail = dead.ending, dead.detail
            if not ending:
                ending, detail = "crashed", _cause(os.waitstatus_to_exitcode(status))
                if dead.cage.exceeded_mb(dead.peak):
                    ending = "out_of_memory"
            self._finish(dead, dead.delivery, ending, detail, cpu_s)
        linux.kill_group(dead.pid)
        dead.cage.kill()
        self._graves.append(dead.cage)
        self._fill_graves()

    def _fill_graves(self) -> None:
        for cage in self._graves:
            cage.kill()
        self._graves = [cage for cage in self._graves if not cage.remove()]

    # What the clock says

    def _wait_s(self) -> float | None:
        now = self._clock.monotonic()
        times = [now + BURY_AGAIN_S] if self._graves else []
        for each in self._instances.values():
            if each.dying:
                continue
            if each.delivery is None:
                times.append(each.idle_until)
            else:
                times.append(each.delivery.deadline)
                if each.cage.interval_s is not None:
                    times.append(now + each.cage.interval_s)
        return max(0.0, min(times) - now) if times else None

    def _look_at_clock(self) -> None:
        self._fill_graves()
        now = self._clock.monotonic()
        for each in list(self._instances.values()):
            if each.dying:
                continue
            if each.delivery is not None:
                self._look_at(each, each.delivery, now)
            elif each.idle_until <= now:
                self._kill(each)

    def _look_at(self, busy: _Instance, delivery: _Delivery, now: float) -> None:
        if now >= delivery.deadline:
            limit_s = delivery.order["timeout_s"]
            self._kill(busy, "timed_out", f"ran longer than its time limit of {limit_s:g} s")
        elif busy.cage.interval_s is not None:
            busy.cage.enforce(now)
            if busy.cage.exceeded_mb(0):
                self._kill(busy, "out_of_memory")

    # The end

    def _end(self) -> None:
        self._ending = True

    def _close(self) -> None:
        for each in list(self._instances.values()):
            self._kill(each, "cancelled", "the platform was closed")
        deadline = self._clock.monotonic() + LAST_WAIT_S
        while self._clock.monotonic() < deadline:
            self._reap()
            self._fill_graves()
            left = linux.children(os.getpid())
            linux.signal_all(left, signal.SIGKILL)
            if not left and not self._graves and not self._instances:
                break
            self._clock.sleep(0.002)
        self._isolation.close()

    # Helpers

    def _watch(self, source: socket.socket | int, call: Callable[[], None]) -> None:
        self._selector.register(source, selectors.EVENT_READ, call)

    def _unwatch(self, of: _Instance) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(of.sock)

    def _tell(self, event: str, **facts: Any) -> None:
        with contextlib.suppress(OSError):  # the client is gone: the loop learns it by itself
            channel.send(self._control, {"event": event, **facts})

    def _tell_end(
        self,
        order: channel.Message,
        ending: str,
        detail: str,
        *,
        cold: bool = True,
        wall_s: float = 0.0,
        cpu_s: float = 0.0,
        peak: int = 0,
    ) -> None:
        billed = billed_ms(
            self._settings.billing, wall_s, cpu_s, order["cores"], order["timeout_s"]
        )
        try:  # first: the client may die before it has read the message, and the other way round
            bills.write_ended(order, ending, billed)
        except OSError as error:
            print(f"could not write the bill: {error}", file=sys.stderr)  # noqa: T201
        self._tell(
            "ended",
            delivery=order["delivery"],
            ending=ending,
            detail=detail,
            cold=cold,
            billed_ms=billed,
            cpu_s=cpu_s,
            peak_mb=peak / linux.MB,
        )


def _cause(code: int) -> str:
    if code >= 0:
        return f"exited with code {code} before it returned"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    return f"killed by signal {-code} ({name})"


def single_threaded() -> bool:
    """Whether the calling process may fork safely."""
    return len(os.listdir("/proc/self/task")) == 1
