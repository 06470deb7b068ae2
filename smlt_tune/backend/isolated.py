"""A call of the user's code in a process of its own, so that nothing it does reaches the client.

The process leads a process group, which is killed once the answer is there, when the time is over,
and when the client is gone, however it died: then the pipe between the two ends. The function, its
arguments and the answer travel through that pipe alone.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from tempfile import TemporaryFile
from typing import IO, Any, TypeVar

import cloudpickle

import smlt_tune
from smlt_tune.backend.artifact_manager import pickled
from smlt_tune.errors import FunctionLost, SmltError, TrainingFunctionError

T = TypeVar("T")

#: How much of the process's output is quoted when it dies, bytes.
_QUOTE = 2_000

# With the module path of the client before anything else is imported: user code lies there.
_BOOTSTRAP = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from smlt_tune.backend.isolated import serve; serve(int(sys.argv[2]))"
)


def call(
    function: Callable[..., T], *args: Any, timeout_s: float, advice: str = "", **kwargs: Any
) -> T:
    """Calls a function in a new process and waits for what it returns.

    Args:
        function: What to call; it and its arguments are pickled as training functions are.
        *args: Of the function.
        timeout_s: Longest time to wait, seconds.
        advice: What to do if that was not enough; for the error message.
        **kwargs: Of the function.

    Returns:
        What the function returned; must be possible to pickle.

    Raises:
        InvalidInput: The function or an argument cannot be pickled.
        SmltError: The function raised that.
        TrainingFunctionError: It raised anything else; carries the traceback.
        FunctionLost: There was no answer in time, or the process died.
    """
    request = pickled((function, args, kwargs), "the training function or its configuration")
    ours, theirs = Pipe()
    with ours, TemporaryFile() as output:
        with theirs:
            process = _start(theirs.fileno(), output)
        answer = None
        try:
            with suppress(EOFError, OSError):
                ours.send_bytes(request)
                if not ours.poll(timeout_s):
                    raise FunctionLost(f"no answer within {timeout_s:g} s{advice and '; '}{advice}")
                answer = pickle.loads(ours.recv_bytes())
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # not waited for yet: the id is still its
            code = process.wait()
        if answer is None:
            raise FunctionLost(_epitaph(code, output))
    value, error = answer
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def _start(pipe: int, output: IO[bytes]) -> "subprocess.Popen[bytes]":
    path = json.dumps([str(entry) for entry in sys.path])
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _BOOTSTRAP, path, str(pipe)],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=(pipe,),
        start_new_session=True,  # Ctrl-C is for the client
    )


def _epitaph(code: int, output: IO[bytes]) -> str:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    output.seek(max(0, output.seek(0, os.SEEK_END) - _QUOTE))
    said = output.read().decode(errors="replace").strip()
    hint = "; the machine may have run out of memory" if code == -signal.SIGKILL else ""
    return f"the process ended ({how}) before it answered{hint}{said and ': '}{said}"


def serve(pipe: int) -> None:
    """In the new process: one request, one answer."""
    connection = Connection(pipe)
    request = connection.recv_bytes()
    threading.Thread(target=_die_with_client, args=(connection,), daemon=True).start()
    value, error = None, None
    try:
        function, args, kwargs = cloudpickle.loads(request)
        value = function(*args, **kwargs)
    except SmltError as raised:
        error = raised
    except BaseException as raised:  # noqa: BLE001 - SystemExit too is an answer
        text = f"{type(raised).__name__}: {raised}"
        error = TrainingFunctionError(text, worker_traceback=_users_part(raised))
    connection.send_bytes(pickle.dumps((value, error)))
    threading.Event().wait()  # until the client ends the group


def _die_with_client(connection: Connection) -> None:
    """The client sends nothing more: what comes next is the end of the pipe."""
    connection.poll(None)
    os.killpg(os.getpid(), signal.SIGKILL)


def _users_part(error: BaseException) -> str:
    """The traceback without this package's own frames at its beginning."""
    trace, own = error.__traceback__, os.path.dirname(smlt_tune.__file__) + os.sep
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(own):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace or error.__traceback__))
