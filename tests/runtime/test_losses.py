"""Workers vanish anywhere in a program, and others take their places."""

import random
import threading
import time

import pytest

from smlt_tune.runtime import aggregator, handover, wire
from smlt_tune.runtime.handover import Membership
from smlt_tune.runtime.session import Session
from tests.runtime.harness import Job, Killed, Work
from tests.runtime.programs import PROGRAMS


@pytest.fixture(autouse=True)
def quick(monkeypatch, one_thread):
    monkeypatch.setattr(aggregator, "LOOK_AROUND_S", 0.01)
    monkeypatch.setattr(handover, "LAST_WORD_S", 0.5)


@pytest.fixture(autouse=True)
def mortal(monkeypatch):
    """Before and after whatever concerns others, a worker whose time has come vanishes."""

    def pulsing(original):
        def around(*args, **kwargs):
            pulse()
            result = original(*args, **kwargs)
            pulse()
            return result

        return around

    for owner, names in (
        (Session, ("report", "mean", "_on_backward", "_on_step", "finish")),
        (Membership, ("enter", "last_word", "agree_on_init")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, pulsing(getattr(owner, name)))


def pulse():
    work = threading.current_thread()
    if isinstance(work, Work):
        work.pulses = getattr(work, "pulses", 0) + 1
        if work.pulses == getattr(work, "dies_at", None):
            raise Killed


@pytest.fixture
def make_job(valkey, tmp_path):
    jobs = []

    def make():
        jobs.append(Job(valkey, tmp_path / str(len(jobs))))
        return jobs[-1]

    yield make
    for job in jobs:
        job.close()


def survive(job, program, workers, deaths, *, leave=False, lockstep=False):
    """Plays the scheduler; ``deaths`` gives when the next worker to be started dies, or None.

    Returns the values of the workers that have finished and how often the job was rolled back.
    """

    def begin(start):
        for work in job.begin(program, workers, start=start, leave=leave, lockstep=lockstep):
            work.dies_at = deaths()

    def fence(patience_s=0.0):
        for work in job.works:
            work.join(patience_s)
        job.store.delete([job.names.open])
        job.join()

    begin(None)
    rollbacks = 0
    until = time.monotonic() + 60
    while time.monotonic() < until:
        time.sleep(0.002)
        failed = [w.error for w in job.works if w.error]
        assert not failed, failed
        ended = not any(w.is_alive() for w in job.works)
        finished = any(w.how == "finished" for w in job.works)
        if job.works[0].how == "finished" or (ended and finished):
            fence()
            return [w.value for w in job.works if w.how == "finished"], rollbacks
        told = [e for e in job.events(wire.HandedOver) if e.generation == job.generation]
        if told:
            fence(0.2)  # they leave by themselves
            begin(told[0].checkpoint)
            continue
        dead = [w.spec.rank for w in job.works if w.how == "killed"]
        inside = any(w.how == "running" and getattr(w, "pulses", 0) > 1 for w in job.works)
        stuck = [e for e in job.events(wire.Stuck) if e.generation == job.generation]
        if stuck or (dead and not inside):
            rollbacks += 1
            fence()
            begin(job.latest())
            continue
        for rank in dead:
            job.replace(rank, program)
            job.works[rank].dies_at = deaths()
    raise AssertionError([(w.spec.rank, w.how) for w in job.works])


def some_deaths(seed, count, low=3, high=40):
    source = random.Random(seed)
    left = [source.randint(low, high) for _ in range(count)]
    return lambda: left.pop() if left else None


every_program = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())


@every_program
@pytest.mark.parametrize(("seed", "lockstep"), [(1, False), (2, False), (3, True)])
def test_nobody_notices_that_workers_vanish(make_job, program, seed, lockstep):
    undisturbed, job = make_job(), make_job()
    expected = undisturbed.run(program, 2)[0].value
    deaths = some_deaths(f"{program.__name__}{seed}", 6)
    values, _ = survive(job, program, 2, deaths, lockstep=lockstep)
    assert values
    assert all(value == expected for value in values)
    assert job.reports() == undisturbed.reports()


@pytest.mark.parametrize("name", ["means_in_the_loop", "by_hand", "growing_batches"])
def test_nobody_notices_that_workers_vanish_while_all_leave_again_and_again(make_job, name):
    program = PROGRAMS[name]
    undisturbed, job = make_job(), make_job()
    expected = undisturbed.run(program, 3)[0].value
    values, _ = survive(job, program, 3, some_deaths(name, 12, 2, 30), leave=True)
    assert all(value == expected for value in values)
    assert job.reports() == undisturbed.reports()
