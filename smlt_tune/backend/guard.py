"""Keeps one server process alive for exactly as long as its client lives.

Runs by itself as ``python -I -S guard.py CLIENT BASE COMMAND...`` in a session of its own. It needs
little of the standard library and nothing else, so that it starts in some 20 milliseconds. CLIENT
is the process to watch, BASE the folder in which the server gets a directory of its own. The client
holds the other end of the guard's standard input:

1. the client writes the server's configuration and a NUL; ``{port}`` and ``{directory}`` in it are
   filled in. It goes to the server's standard input, since command lines are public;
2. the guard starts the server and answers on standard output, with a line each: ``listens``, the
   port, the directory; or ``failed`` and what the server said. It closes standard output;
3. a server that dies is started again at once, with the same configuration on the same port;
4. when standard input ends, however the client died, the guard kills the server, removes its
   directory with all that lies in it and exits. Should a forked child of the client hold that pipe
   open, then the change of the guard's parent says the same, a second later. A client that closes
   the server in good order writes one more byte first.

The kernel kills the server if the guard itself is killed (Linux).
"""

import ctypes
import os
import select
import shutil
import signal
import socket
import sys

#: Longest that a server may take until it listens, in seconds.
START_S = 10.0
_TICK_S = 1.0
_PR_SET_PDEATHSIG = 1


class Guard:
    """One server and its directory.

    Args:
        client: Process whose death ends everything.
        base: Folder in which to make the directory.
        command: The server's command line.
        config: What to write to its standard input.
    """

    def __init__(self, client: int, base: str, command: list[str], config: str) -> None:
        self._client = client
        self._command = command
        self.directory = f"{base}/smlt-store-{os.urandom(6).hex()}"
        os.mkdir(self.directory, 0o700)
        self._reserved = _reserve_port()
        self.port: int = self._reserved.getsockname()[1]
        self._config = config.format(port=self.port, directory=self.directory)
        self._signals = _signal_pipe()
        self.pid = 0
        self.orderly = False

    def serve(self) -> None:
        """Starts the server, reports, and stays until the client is gone."""
        try:
            self._start()
            if not self._listens():
                _answer("failed", self._log() or "it did not begin to listen")
                return
            _answer("listens", str(self.port), self.directory)
            self._watch()
        finally:
            self._stop()

    def _watch(self) -> None:
        settled = False
        while not self._client_gone(_TICK_S if self.pid else 0.05):
            if self._died():
                if settled:
                    self._start()
                settled = False  # a server that dies while it starts gets a pause
            elif not self.pid:
                self._start()
            else:
                settled = True

    def _client_gone(self, timeout_s: float) -> bool:
        """Waits for a sign of the client's or the server's death, or until the time is over."""
        readable, _, _ = select.select([0, self._signals], [], [], timeout_s)
        if self._signals in readable and signal.SIGTERM in os.read(self._signals, 64):
            return True
        if 0 in readable:
            if not os.read(0, 64):
                return True
            self.orderly = True  # a client that closes says so before the pipe ends
        return os.getppid() != self._client

    def _died(self) -> bool:
        if not self.pid:
            return False
        pid, _ = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.pid = 0
        return bool(pid)

    def _start(self) -> None:
        reading, writing = os.pipe()
        log = os.open(f"{self.directory}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        guard = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _become_server(self._command, guard, reading, log)
        os.close(log)
        os.write(writing, self._config.encode())  # fits into the pipe: never blocks
        os.close(writing)
        os.close(reading)
        with open(f"{self.directory}/pid.new", "w") as file:
            file.write(str(self.pid))
        os.replace(f"{self.directory}/pid.new", f"{self.directory}/pid")

    def _listens(self) -> bool:
        for _ in range(int(START_S / 0.001)):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return True
            if self._client_gone(0.001) or self._died():
                return False
        return False

    def _log(self) -> str:
        with open(f"{self.directory}/log", errors="replace") as file:
            return file.read()[-2000:].strip()

    def _stop(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        shutil.rmtree(self.directory, ignore_errors=True)
        # Functions of a client that died suddenly may still write for a moment.
        for _ in range(0 if self.orderly else 20):
            select.select([], [], [], 0.1)
            shutil.rmtree(self.directory, ignore_errors=True)


def _become_server(command: list[str], guard: int, config: int, log: int) -> None:
    """In the forked child: never returns."""
    try:
        os.dup2(config, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == guard:
            os.execv(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error}\n".encode())
    finally:
        os._exit(127)


def _reserve_port() -> socket.socket:
    """A free loopback port, bound but not listened on: the server may, chance may not, take it."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def _signal_pipe() -> int:
    """A descriptor that becomes readable when the server dies or the guard shall end."""
    reading, writing = os.pipe()
    for descriptor in (reading, writing):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(writing)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    return reading


def _answer(*lines: str) -> None:
    try:
        os.write(1, "\n".join(lines).encode())
    except BrokenPipeError:  # the client is gone; standard input says so too
        return
    finally:
        os.close(1)


def main() -> None:
    """Reads the configuration and serves it."""
    client, base, *command = sys.argv[1:]
    config = b""
    while not config.endswith(b"\0"):
        chunk = os.read(0, 65536)
        if not chunk:
            return
        config += chunk
    Guard(int(client), base, command, config[:-1].decode()).serve()


if __name__ == "__main__":
    main()
