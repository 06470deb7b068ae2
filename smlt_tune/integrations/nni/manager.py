"""What the driver asks of NNI's manager, and tells it, for one trial of a tuner."""

import json
from typing import Any

import nni
import requests

from smlt_tune.errors import SmltError
from smlt_tune.integrations.nni.metrics import Metric
from smlt_tune.runtime.clock import SYSTEM_CLOCK, Clock

#: How long one request may take, and how long the manager may take to know a trial, seconds.
TIMEOUT_S = 60.0
#: Pause between questions, seconds.
_PAUSE_S = 0.1
#: How NNI stores that a trial of an earlier manager will be started again, but is not yet.
_TO_BE_RESUMED = "ADD_RESUMED"


class ManagerGone(SmltError):
    """NNI's manager does not answer, or does not know the trial: nobody waits for it any more."""


class ManagedTrial:
    """The manager's side of a trial.

    Args:
        port: Of the manager.
        prefix: Of its URLs; empty for none.
        trial: Its id.
        channel: URL that the trial's metrics go to.
        clock: Time.
    """

    def __init__(
        self, port: int, prefix: str, trial: str, channel: str, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        base = f"http://localhost:{port}/{prefix}" if prefix else f"http://localhost:{port}"
        self._api, self._trial, self._channel = f"{base}/api/v1/nni", trial, channel
        self._clock = clock
        self._parameter_id: Any = None
        self._intermediates = 0
        self._known: set[tuple[str, int]] = set()

    def parameters(self) -> Any:
        """What the tuner has generated for this trial; waits until the manager knows it.

        That mends two faults. The manager starts a trial before it registers it, and drops what
        trials report that it does not know; it registers those that it resumes, whose parameters
        it has stored, no sooner. And it gives parameters to whoever asks first: trials that start
        in another order than they were made would train each other's.

        Raises:
            ManagerGone: It is not there, or does not get to know the trial.
        """
        until = self._clock.monotonic() + TIMEOUT_S
        while not (found := self._stored_parameters()):
            if self._clock.monotonic() > until:
                raise ManagerGone(f"NNI's manager does not know the trial {self._trial}")
            self._clock.sleep(_PAUSE_S)
        record = nni.load(found)
        self._parameter_id = record["parameter_id"]
        before_resumed = self._get(f"metric-data/{self._trial}") or ()
        self._known = {(metric["type"], metric["sequence"]) for metric in before_resumed}
        return record["parameters"]

    def _stored_parameters(self) -> str | None:
        """Parameters of a trial that the manager has registered; None of any other."""
        trial = self._get(f"trial-jobs/{self._trial}")
        if trial.get("status") == _TO_BE_RESUMED or not trial.get("hyperParameters"):
            return None
        parameters: str = trial["hyperParameters"][0]
        return parameters

    def report(self, metric: Metric) -> None:
        """Passes a metric on, unless the manager has had it from an earlier driver.

        Raises:
            ManagerGone: It is not there.
        """
        kind, sequence = ("FINAL", 0) if metric.final else ("PERIODICAL", self._intermediates)
        self._intermediates += not metric.final
        if (kind, sequence) in self._known:
            return
        content = {
            "parameter_id": self._parameter_id,
            "trial_job_id": self._trial,
            "type": kind,
            "sequence": sequence,
            "value": nni.dump(metric.value),
        }
        command = {"type": "metric", "metric": json.dumps(content)}
        self._request("PUT", self._channel, json=command).raise_for_status()

    def _get(self, path: str) -> Any:
        response = self._request("GET", f"{self._api}/{path}")
        return response.json() if response.ok and response.content else {}

    def _request(self, method: str, url: str, **arguments: Any) -> requests.Response:
        try:
            return requests.request(method, url, timeout=TIMEOUT_S, **arguments)
        except requests.RequestException as error:
            raise ManagerGone(f"NNI's manager does not answer: {error}") from error
