"""A fleet that is used from several threads, closed at odd moments, or fails while it opens."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import smlt_tune as smlt
from smlt_tune.backend import fleet as fleet_module
from smlt_tune.backend.fleet import Fleet
from smlt_tune.backend.job import Job, JobSpec, JobState, Report
from smlt_tune.backend.ledger import Ledger
from smlt_tune.backend.platforms.base import InvocationResult, PlatformLimits
from smlt_tune.backend.prices import load_prices
from smlt_tune.backend.store_costs import StoreCosts
from smlt_tune.errors import BudgetExhausted, FleetClosed, InvalidInput, StorageFull
from smlt_tune.runtime import keys, wire


class StillPlatform:
    """Its functions do nothing until they are cancelled."""

    name = fingerprint = "still"

    def __init__(self, deliveries=1):
        self.limits = PlatformLimits(128, 10240, 900.0, 4, deliveries, 4)
        self.calls = {}

    def invoke(self, invocation, on_done):
        self.calls[invocation.invocation_id] = on_done

    def cancel(self, invocation_id):
        on_done = self.calls.pop(invocation_id, None)
        if on_done:
            on_done(InvocationResult(invocation_id, "cancelled", 0.1))

    def vcpus(self, memory_mb):
        return 1.0

    def close(self):
        pass


def nothing(config):
    return config


@pytest.fixture
def still():
    return StillPlatform()


@pytest.fixture
def fleet(still, valkey):
    with Fleet(platform=still, parameter_store=valkey.url) as fleet:
        yield fleet


def together(*actions):
    """Runs them at the same time; what they returned or raised."""
    gate = threading.Barrier(len(actions))

    def run(action):
        gate.wait()
        try:
            return action()
        except smlt.SmltError as error:
            return error

    with ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(run, actions))


def test_submissions_of_several_threads_are_jobs_of_their_own(fleet):
    def submit_some():
        return [fleet.submit(nothing, threading.get_ident()).job_id for _ in range(10)]

    given = [name for names in together(*[submit_some] * 8) for name in names]
    assert len(set(given)) == 80
    assert sorted(job.job_id for job in fleet.jobs()) == sorted(given)


def test_a_name_of_several_threads_is_one_job(fleet):
    jobs = together(*[lambda: fleet.submit(nothing, name="mine")] * 8)
    assert {job.job_id for job in jobs} == {"mine"}
    assert len(fleet.jobs()) == 1
    assert len([e for e in fleet._history.read() if e.kind == "job"]) == 1


def test_a_users_name_is_not_given_again(fleet):
    named = fleet.submit(nothing, name="job-0001")
    others = [fleet.submit(nothing).job_id for _ in range(3)]
    assert len({named.job_id, *others}) == 4


@pytest.mark.parametrize("name", [["a"], 3, "", "a b"])
def test_a_name_that_is_none(fleet, name):
    with pytest.raises(InvalidInput, match="must consist of 1 to 200"):
        fleet.submit(nothing, name=name)


def test_jobs_while_submitting(fleet):
    done = threading.Event()

    def look():
        seen = 0
        while not done.is_set():
            now = len(fleet.jobs())
            assert now >= seen
            seen = now
            assert all(job.cost_usd >= 0 for job in fleet.jobs())
        return seen

    def submit():
        try:
            for _ in range(60):
                fleet.submit(nothing)
        finally:
            done.set()

    seen, _ = together(look, submit)
    assert seen <= 60
    assert len(fleet.jobs()) == 60


def test_a_job_that_cannot_be_recorded_is_none(fleet, monkeypatch):
    def full(*_):
        raise StorageFull("no space")

    with monkeypatch.context() as patch:
        patch.setattr(fleet._history, "append", full)
        with pytest.raises(StorageFull):
            fleet.submit(nothing)
    assert fleet.jobs() == []


@pytest.mark.parametrize("attempt", range(3))
def test_closing_while_others_submit_leaves_nobody_waiting(still, valkey, attempt):
    fleet = Fleet(platform=still, parameter_store=valkey.url)
    accepted, enough = [], threading.Event()

    def submit():
        while True:
            try:
                accepted.append(fleet.submit(nothing))
            except FleetClosed:
                return
            finally:
                if len(accepted) > 10 * attempt:
                    enough.set()

    def close():
        enough.wait()
        fleet.close()

    together(submit, submit, submit, close)
    for job in accepted:
        outcome = job.result(5)
        assert (outcome.status, outcome.reason) == ("stopped", "the fleet was closed")
    assert fleet.reserved_usd == 0
    assert not still.calls


def test_whoever_closes_comes_back_once_it_is_closed(still, valkey, tmp_path):
    fleet = Fleet(platform=still, parameter_store=valkey.url, path=tmp_path)
    job = fleet.submit(nothing)

    def close():
        fleet.close()
        assert job.status == "stopped"
        assert not any(thread.is_alive() for thread in fleet._threads)
        with pytest.raises(FleetClosed):
            fleet._history.read()

    assert together(close, close, close) == [None] * 3
    Fleet.open(tmp_path, platform=still, parameter_store=valkey.url).close()


def test_interrupted_while_closing(still, valkey, tmp_path, monkeypatch):
    fleet = Fleet(platform=still, parameter_store=valkey.url, path=tmp_path)
    job = fleet.submit(nothing)

    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fleet._threads[0], "join", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fleet.close()
    assert fleet.closed
    fleet.close()
    assert job.result(0).status == "stopped"
    assert not any(thread.is_alive() for thread in fleet._threads)
    Fleet.open(tmp_path, platform=still, parameter_store=valkey.url).close()


def test_interrupted_and_closed_again_by_a_handler(still, valkey, monkeypatch):
    """A signal's handler runs in the middle of close() and calls it itself."""
    fleet = Fleet(platform=still, parameter_store=valkey.url)
    join = fleet._threads[0].join

    def handler():
        monkeypatch.setattr(fleet._threads[0], "join", join)
        fleet.close()

    monkeypatch.setattr(fleet._threads[0], "join", handler)
    fleet.close()
    assert not any(thread.is_alive() for thread in fleet._threads)


def children():
    """Processes of this one."""
    return {
        pid
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    }


def fail(*_, **__):
    raise ZeroDivisionError


class NthStartFails:
    def __init__(self, nth):
        self.left, self.start = nth, threading.Thread.start

    def __call__(self, thread):
        if thread.name.startswith("smlt-"):
            self.left -= 1
            if self.left == 0:
                raise ZeroDivisionError
        self.start(thread)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (fleet_module, "load_prices"),
        (fleet_module, "open_platform"),
        (fleet_module, "open_object_store"),
        (fleet_module, "open_parameter_store"),
        (fleet_module, "ArtifactManager"),
        (fleet_module, "TaskScheduler"),
        (StoreCosts, "begin"),
        (Fleet, "_restore"),
        (fleet_module, "Ledger"),
        (threading.Thread, 1),
        (threading.Thread, 2),
    ],
)
def test_a_fleet_that_fails_while_it_opens_leaves_nothing(tmp_path, monkeypatch, place, name):
    before, threads = children(), set(threading.enumerate())
    with monkeypatch.context() as patch:
        if isinstance(name, int):
            start = NthStartFails(name)
            patch.setattr(threading.Thread, "start", lambda thread: start(thread))
        else:
            patch.setattr(place, name, fail)
        with pytest.raises(ZeroDivisionError):
            Fleet(platform="inline", path=tmp_path)
    assert children() <= before
    assert set(threading.enumerate()) <= threads
    Fleet(platform="inline", path=tmp_path, _resume=True).close()


def test_all_that_a_worker_said_is_heard_before_its_end(still, valkey, monkeypatch):
    """However much there is to read, and whoever reads it."""
    monkeypatch.setattr(fleet_module, "READ_LIMIT", 3)
    monkeypatch.setattr(Fleet, "_listen", lambda self: None)
    with Fleet(platform=still, parameter_store=valkey.url) as fleet:
        job = fleet.submit(nothing, workers=1, name="a")
        events = keys.FleetKeys(fleet.name).events
        said = [wire.Ready("a", 0, 0, 0)]
        said += [wire.Reported("a", 0, 0, 0, index=i, metrics={"i": i}) for i in range(10)]
        said += [wire.Finished("a", 0, 0, 0, checkpoint=None, value=5, reports=[],
                               other_share=None, end_s=None)]  # fmt: skip
        name = "a.g0.r0.i0"
        while name not in still.calls:
            threading.Event().wait(0.005)
        for event in said:
            fleet._store.append(events, event.encode(), ttl_s=60)
        still.calls.pop(name)(InvocationResult(name, "returned", 0.1))
        outcome = job.result(10)
        assert (outcome.value, len(outcome.reports)) == (5, 10)


def test_the_scheduler_survives_what_it_cannot_handle(fleet, monkeypatch):
    handled = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(fleet._scheduler, "abandon", fail)
        fleet._queue.put(fail)
        fleet._queue.put(handled.set)
        assert handled.wait(10)
    job = fleet.submit(nothing)
    job.stop()
    assert job.result(10).status == "stopped"


def test_a_job_too_large_for_a_platform_that_delivers_twice(valkey):
    """It could never start, and nobody behind it either."""
    with Fleet(platform=StillPlatform(deliveries=2), parameter_store=valkey.url) as fleet:
        with pytest.raises(InvalidInput, match=r"workers=3 is more than .* at once \(2\)"):
            fleet.submit(nothing, workers=3)
        job = fleet.submit(nothing, workers=2)
        with pytest.raises(InvalidInput, match=r"workers=3 is more than .* at once \(2\)"):
            job.resize(workers=3)


def test_every_reader_gets_every_report():
    state = JobState(JobSpec("a", "f", "c"))
    job = Job(
        state,
        stop=fail,
        resize=fail,
        cost=fail,
        logs=Path("none"),
        acknowledge=fail,
        pause=fail,
        resume=fail,
    )
    started = threading.Barrier(6)

    def read():
        started.wait()
        return [report.index for report in job.reports()]

    def write():
        started.wait()
        for index in range(200):
            state.add_report(Report(index, {}, 0.0, 0.0, 1, 128, 0))
        state.update(status="stopped")

    *readers, _ = together(*[read] * 5, write)
    assert readers == [list(range(200))] * 5
    assert read_alone(job) == list(range(200))


def read_alone(job):
    return [report.index for report in job.reports()]


class FakeClock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def hourly():
    """(costs, ledger, clock, what was stopped) of a store for 0.156 USD an hour."""

    def make(budget_usd):
        ledger, clock, stopped = Ledger(budget_usd), FakeClock(), []
        costs = StoreCosts(
            ledger, load_prices(), "cache.m4.large", clock, lambda: stopped.append(clock.now)
        )
        return costs, ledger, clock, stopped

    return make


def test_every_hour_is_paid_even_if_nobody_looked(hourly):
    """The machine slept, or the scheduler was late: the store was there all the time."""
    costs, ledger, clock, _ = hourly(10.0)
    costs.begin()
    clock.now = 5 * 3600.0 + 60
    for _ in range(8):
        costs.tick()
    costs.end()
    costs.end()
    assert ledger.settled_usd == pytest.approx(6 * 0.156)
    assert ledger.reserved_usd == 0


def test_a_store_that_is_not_paid_any_more_serves_nobody(hourly):
    costs, ledger, clock, stopped = hourly(0.2)
    costs.begin()
    clock.now = 3600.0
    costs.tick()
    clock.now += 1.0
    costs.tick()  # jobs that were submitted since are stopped too
    assert stopped == [3600.0, 3601.0]
    assert ledger.settled_usd == pytest.approx(0.156)
    costs.end()
    assert ledger.reserved_usd == 0


def test_a_store_beyond_the_budget(hourly):
    costs, *_ = hourly(0.1)
    with pytest.raises(BudgetExhausted):
        costs.begin()
