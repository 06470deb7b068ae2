"""NNI's trial API inside of a job: what code tells NNI, the session tells the driver.

A report carries under :data:`KIND` which of NNI's two calls it was; the number itself is
``default``, the name that NNI has for it in dictionaries.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import nni
from nni.runtime.trial_command_channel import (
    TrialCommandChannel,
    get_default_trial_command_channel,
    set_default_trial_command_channel,
)

import smlt_tune as smlt
from smlt_tune.errors import InvalidInput, UsageError
from smlt_tune.integrations.nni import job_parameters
from smlt_tune.integrations.nni.metrics import DEFAULT, FINAL, INTERMEDIATE, KIND


class SessionChannel(TrialCommandChannel):  # type: ignore[misc]
    """The job's end of the channel; NNI makes one for ``NNI_TRIAL_COMMAND_CHANNEL=import://``."""

    def receive_parameter(self) -> dict[str, Any]:
        """The job's parameters, as often as it asks."""
        return {"parameter_id": 0, "parameters": job_parameters.parameters_of_job}

    def send_metric(
        self, type: str, parameter_id: int | None, trial_job_id: str, sequence: int, value: Any
    ) -> None:
        """Reports a number, or a dictionary with a ``default``, on every worker alike.

        Raises:
            InvalidInput: It is no metric.
            UsageError: The function runs on several workers and trains as if it were alone.
        """
        session = smlt.session()
        if session.workers > 1 and not session.prepared:
            raise UsageError(
                f"this job has {session.workers} functions, and its code trains without "
                "session.prepare(): each of them trains alone what it was given. Pin workers=1, or "
                "train with smlt_tune.session()"
            )
        metrics = dict(value) if isinstance(value, Mapping) else {DEFAULT: value}
        if DEFAULT not in metrics:
            raise InvalidInput(
                f"a metric that is a dictionary needs a number under {DEFAULT!r}; it has: "
                f"{', '.join(map(str, metrics)) or 'nothing'}"
            )
        kind = FINAL if type == "FINAL" else INTERMEDIATE
        session.report(**{KIND: kind, **{str(name): each for name, each in metrics.items()}})


@contextmanager
def trial_api(parameters: Any) -> Iterator[None]:
    """Within it, NNI's trial API belongs to this job.

    What NNI keeps per process is put back: a function may run many jobs in turn, and the inline
    platform runs them in the driver.

    Args:
        parameters: What ``nni.get_next_parameter()`` is to give.
    """
    trial: Any = sys.modules["nni.trial"]
    before = trial._params, trial._intermediate_seq
    channel = get_default_trial_command_channel()
    try:
        set_default_trial_command_channel(SessionChannel())
        trial._params, trial._intermediate_seq = None, 0
        with job_parameters.given(parameters):
            yield
    finally:
        trial._params, trial._intermediate_seq = before
        set_default_trial_command_channel(channel)


def begin_with_parameters() -> None:
    """What NNI's own entry of a trial does first, so that ``get_current_parameter()`` works."""
    nni.get_next_parameter()
