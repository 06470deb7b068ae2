"""The client's handle on its helper process."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from dataclasses import asdict

from smlt_tune.backend.platforms.local import channel, linux
from smlt_tune.backend.platforms.local.supervisor import LAST_WAIT_S, Settings

#: How long a helper that was told to end may take, seconds.
END_S = LAST_WAIT_S + 5.0
#: How much of the helper's output is quoted when it dies, bytes.
_QUOTE = 2_000

# With the module path of the client before anything else is imported: user code lies there.
_BOOTSTRAP = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from smlt_tune.backend.platforms.local.zygote import main; main(int(sys.argv[2]), sys.argv[3])"
)


class Helper:
    """A running helper process. It starts at once; preloading goes on in the background.

    Args:
        settings: What it is told.
    """

    def __init__(self, settings: Settings) -> None:
        self.control, theirs = socket.socketpair()
        self._output = os.memfd_create("smlt-helper")
        # What functions start inherits it, even if it leaves their process group and session.
        self._mark = f"smlt-helper-{secrets.token_hex(8)}"
        path = json.dumps([str(entry) for entry in sys.path])
        try:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-c", _BOOTSTRAP),
                    *(path, str(theirs.fileno()), self._mark),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._output,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is for the client
            )
        except OSError:
            self.control.close()
            os.close(self._output)
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        channel.send(self.control, asdict(settings))

    def end(self) -> None:
        """Tells it to end; it says how its instances ended before it does."""
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """Ends it without giving it a chance to clean up."""
        self._process.kill()

    def bury(self) -> str:
        """Waits for its end, forcing it if need be, kills what it has left behind.

        Closes everything but :attr:`control`, which other threads may be using.

        Returns:
            For people: how it ended.
        """
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        code = self._process.returncode
        if code != 0:
            while left := linux.marked(self._mark):
                linux.signal_all(left, signal.SIGKILL)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        said = self._said()
        with contextlib.suppress(OSError):
            os.close(self._output)
        return f"{how}: {said}" if said else how

    def _said(self) -> str:
        try:
            size = os.fstat(self._output).st_size
            data = os.pread(self._output, _QUOTE, max(0, size - _QUOTE))
        except OSError:
            return ""
        return data.decode(errors="replace").strip()
