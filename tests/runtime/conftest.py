"""What tests of the runtime share."""

import pytest

from tests.runtime.harness import Job


@pytest.fixture
def one_thread():
    """For the speed of tests: threads of tiny sums wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def job(valkey, tmp_path):
    job = Job(valkey, tmp_path)
    yield job
    job.close()
