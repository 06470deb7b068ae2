"""What a function does for one trial of a tuner. Does not import NNI: that takes seconds."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from smlt_tune.integrations.nni.job_parameters import given

_VARIABLE = "NNI_TRIAL_COMMAND_CHANNEL"
_CHANNEL = "import://smlt_tune.integrations.nni.channel.SessionChannel"


@dataclass(frozen=True)
class TrialFunction:
    """A training function in whose jobs NNI's trial API works.

    Attributes:
        train: The user's function of the parameters.
    """

    train: Callable[[Any], Any]

    def __call__(self, parameters: Any) -> Any:
        """Trains with the parameters that the tuner has generated."""
        if "nni" in sys.modules:
            from smlt_tune.integrations.nni.channel import trial_api

            with trial_api(parameters):
                return self.train(parameters)
        with given(parameters), _channel_for_nni():
            return self.train(parameters)


@contextmanager
def _channel_for_nni() -> Iterator[None]:
    """An NNI that is imported within it finds this job at the other end of its channel."""
    environment = os.environ  # noqa: TID251 - where NNI looks when it is imported
    before = environment.get(_VARIABLE)
    environment[_VARIABLE] = _CHANNEL
    try:
        yield
    finally:
        del environment[_VARIABLE]
        if before is not None:
            environment[_VARIABLE] = before
