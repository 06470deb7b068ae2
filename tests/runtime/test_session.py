import pytest

from smlt_tune.runtime import wire
from smlt_tune.runtime.checkpoint import KEEP_OF_REPORTS
from smlt_tune.runtime.session import Session
from tests.runtime.harness import Job
from tests.runtime.programs import PROGRAMS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def other(valkey, tmp_path):
    job = Job(valkey, tmp_path / "other")
    yield job
    job.close()


def alone(program, seed=1):
    """The program in a debugger: weights and reports."""
    with Session(seed=seed) as session:
        return program(), list(session._reports.made.values())


every_program = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())


# --- a run that is interrupted gives what an undisturbed one gives --------------------------------


@every_program
def test_one_worker_that_leaves_after_every_iteration(job, program):
    expected, reports = alone(program)
    [value], generations = job.run_with_leaves(program, lambda _: 1)
    assert value == expected
    assert job.reports() == reports
    assert generations > 2


@every_program
@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_in_lockstep_names_a_checkpoint_with_every_report(job, other, program, workers):
    """Whoever begins there goes on as if nothing had happened."""
    [expected, *_] = [work.value for work in other.run(program, workers)]
    assert job.run(program, workers, lockstep=True)[0].value == expected
    assert job.reports() == other.reports()
    told = job.events(wire.Reported)
    assert all(event.checkpoint for event in told)
    kept = [event for event in told[-KEEP_OF_REPORTS:]]
    for event in {event.checkpoint: event for event in kept}.values():
        start = event.checkpoint
        [value, *_] = [w.value for w in job.run(program, workers, start=start, lockstep=True)]
        assert value == expected


@every_program
def test_two_workers_that_leave_after_every_iteration(job, other, program):
    works = other.run(program, 2)
    expected = works[0].value
    assert works[1].value == expected
    values, generations = job.run_with_leaves(program, lambda _: 2)
    assert values == [expected, expected]
    assert job.reports() == other.reports()
    assert generations > 2
