"""Where the trials of a tuner meet the driver: each connection stands for one job."""

import hmac
import json
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smlt_tune.errors import JobError, SmltError
from smlt_tune.integrations.nni.limits import FLEET_IS_OVER
from smlt_tune.integrations.nni.manager import ManagedTrial
from smlt_tune.integrations.nni.metrics import LOG, MetricReader

if TYPE_CHECKING:
    from smlt_tune.backend.job import Job

#: Starts a trial's job: takes the trial's id and its parameters.
Submit = Callable[[str, Any], "Job"]


class TrialServer:
    """Listens on a socket that only this user can reach, for clients that know its token.

    Args:
        file: Where to write down how it is reached; readable for this user only.
        port: Of NNI's manager.
        prefix: Of the manager's URLs; empty for none.
        metric: Name of the number that jobs report; None for NNI's trial API.
        submit: Starts jobs.
        over: Called when the fleet's budget or deadline has stopped a job.
    """

    def __init__(
        self,
        file: Path,
        port: int,
        prefix: str,
        metric: str | None,
        submit: Submit,
        over: Callable[[], None],
    ) -> None:
        self._port, self._prefix, self._metric = port, prefix, metric
        self._submit, self._over = submit, over
        self._folder = tempfile.mkdtemp(prefix="smlt-nni-")  # a short path: sockets need that
        self._token = secrets.token_hex(16)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(f"{self._folder}/socket")
        self._socket.listen(128)
        self._lock = threading.Lock()
        self._closed = False
        self._trials: set[threading.Thread] = set()
        address = {"socket": f"{self._folder}/socket", "token": self._token, "port": port,
                   "prefix": prefix}  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.chmod(0o600)
        file.write_text(json.dumps(address), encoding="utf-8")
        self._acceptor = threading.Thread(target=self._accept, name="smlt-nni-trials", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """No further trials; waits for those that run, whose clients are gone. Idempotent."""
        with self._lock:
            self._closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the acceptor up
        self._acceptor.join()
        self._socket.close()
        for thread in list(self._trials):
            thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            with self._lock:
                self._trials.add(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        """The thread of a trial, from its hello to its end."""
        # An OSError: the client is gone, and with it the trial.
        with connection, connection.makefile("rb") as stream, suppress(OSError):
            answer = self._answer(stream)
            if answer is not None:
                connection.sendall(json.dumps({"error": answer}).encode() + b"\n")
            connection.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._trials.discard(threading.current_thread())

    def _answer(self, stream: Any) -> str | None:
        """Why a trial did not train to its end, or nothing; None to whoever is no client."""
        try:
            hello = json.loads(stream.readline())
            if not hmac.compare_digest(str(hello["token"]), self._token):
                return None
            trial, channel = hello["trial"], hello["channel"]
        except (ValueError, KeyError, TypeError):
            return None
        try:
            return self._run(trial, channel, stream)
        except Exception as error:  # noqa: BLE001 - the boundary of the thread
            LOG.exception("trial %s could not be run", trial)
            return f"{type(error).__name__}: {error}"

    def _run(self, trial: str, channel: str, stream: Any) -> str:
        """Runs a trial's job to its end; returns why it did not train to its own."""
        managed = ManagedTrial(self._port, self._prefix, trial, channel)
        try:
            job = self._submit(trial, managed.parameters())
        except SmltError as error:
            return str(error)
        watch = threading.Thread(target=_stop_with_client, args=(stream, job), daemon=True)
        watch.start()
        why = self._follow(job, managed, trial)
        if why:
            LOG.warning("trial %s (%s): %s", trial, job.job_id, why)
        return why

    def _follow(self, job: "Job", managed: ManagedTrial, trial: str) -> str:
        reader = MetricReader(self._metric)
        try:
            for report in job.reports():
                metric = reader.read(report.metrics, f"trial {trial}")
                if metric is not None:
                    managed.report(metric)
            outcome = job.result()
            result = reader.result()
            if outcome.status == "finished" and result is not None:
                managed.report(result)
        except JobError as error:
            trace = getattr(error, "worker_traceback", "")
            return f"{type(error).__name__}: {error}\n{trace}".strip()
        except SmltError as error:
            job.stop("nobody can use its reports")
            with suppress(JobError):
                job.result()
            return str(error)
        if outcome.reason in FLEET_IS_OVER:
            self._over()
        return f"stopped: {outcome.reason}" if outcome.status == "stopped" else ""


def _stop_with_client(stream: Any, job: "Job") -> None:
    """The client says nothing more: what comes next is its end."""
    with suppress(OSError, ValueError):
        stream.read(1)
    job.stop("its trial was cancelled")  # does nothing to a job that is over
