"""The parameters of the job that this process runs. Does not import NNI."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: What ``nni.get_next_parameter()`` gives.
parameters_of_job: Any = {}


@contextmanager
def given(parameters: Any) -> Iterator[None]:
    """Within it, these are the job's parameters."""
    global parameters_of_job
    before, parameters_of_job = parameters_of_job, parameters
    try:
        yield
    finally:
        parameters_of_job = before
