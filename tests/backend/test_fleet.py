"""The fleet's public face: what it refuses, what it returns, how jobs end."""

import socket
import threading
import time

import numpy as np
import pytest

import smlt_tune as smlt
from smlt_tune.backend.embedded_store import EmbeddedStore
from smlt_tune.backend.platforms.inline import InlinePlatform
from smlt_tune.errors import (
    FleetClosed,
    FunctionLost,
    InvalidInput,
    OutOfMemory,
    StoreError,
    TrainingFunctionError,
)
from smlt_tune.runtime.checkpoint import Checkpoints
from smlt_tune.runtime.stores.directory import DirectoryStore
from tests import jobs


def nothing(config):
    return config


class FarAway(InlinePlatform):
    """Its functions run on other machines."""

    elsewhere = True


def test_functions_on_other_machines_need_stores_that_they_reach(tmp_path):
    with pytest.raises(InvalidInput) as refused:
        smlt.Fleet(platform=FarAway())
    assert [m.split()[0] for m in refused.value.mistakes] == ["parameter_store", "object_store"]
    with EmbeddedStore() as store:
        given = {"parameter_store": store.url, "object_store": tmp_path.as_uri()}
        smlt.Fleet(platform=FarAway(), **given).close()


def test_a_fleet_lists_every_mistake_at_once(tmp_path):
    with pytest.raises(InvalidInput) as refused:
        smlt.Fleet(
            platform="lamda",
            budget_usd=-1,
            deadline_s=0,
            object_store="ftp://somewhere",
            prices="free-of-charge",
            hang_timeout_s=float("nan"),
            path=tmp_path,
        )
    mistakes = refused.value.mistakes
    assert mistakes[:3] == (
        "budget_usd must be a number at least 0, or None, not -1",
        "deadline_s must be a number above 0, or None, not 0",
        "hang_timeout_s must be a number above 0, or None, not nan",
    )
    assert (
        "there is no platform 'lamda': expected 'inline', 'local', 'ray', or an object" in mistakes
    )
    assert any("ftp://" in m and "file://" in m for m in mistakes)
    assert any("free-of-charge" in m for m in mistakes)
    assert len(mistakes) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameter_store_price": "gold"}, "no price for the parameter store 'gold'"),
        ({"store_options": {"colour": "red"}}, "colour"),
    ],
)
def test_a_fleet_refuses_options_it_does_not_know(platform, options, message):
    with pytest.raises(InvalidInput, match=message):
        smlt.Fleet(platform=platform, **options)


def test_a_fleet_without_parameter_store_server_says_so(platform):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"redis://:topsecret@127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(StoreError) as refused:
            smlt.Fleet(platform=platform, parameter_store=url)
    assert "check that the server runs" in str(refused.value)
    assert "topsecret" not in str(refused.value)


def test_a_folder_with_a_record_is_not_overwritten(platform, tmp_path):
    smlt.Fleet(platform=platform, path=tmp_path).close()
    with pytest.raises(
        InvalidInput, match=r"holds the record of an earlier fleet: continue it with"
    ):
        smlt.Fleet(platform=platform, path=tmp_path)
    with pytest.raises(
        InvalidInput, match=r"there is no fleet in .*: Fleet\(path=...\) starts one"
    ):
        smlt.Fleet.open(tmp_path / "elsewhere", platform=platform)


def test_submit_lists_every_mistake_at_once(fleet):
    with pytest.raises(InvalidInput) as refused:
        fleet.submit(
            "train.py",
            threading.Lock(),
            goal="cheap",
            workers=99,
            memory_mb=64,
            min_workers=5,
            max_workers=3,
            seed=-1,
            shards=1.5,
            name="a/b",
        )
    text = str(refused.value)
    for part in (
        "the training function must be callable with a configuration, got 'train.py'",
        "name='a/b' must consist of 1 to 200 letters, digits, '.', '_' and '-'",
        "seed must be a whole number of at least 0, not -1",
        "shards must be a whole number of at least 0, not 1.5",
        "goal",
        "min_workers=5 is more than max_workers=3",
        "workers=99 is more than the platform can run at once (12)",
        "memory_mb=64 is not among what the platform offers (128 to 10240 MB)",
        "the configuration cannot be sent to a worker: TypeError",
    ):
        assert part in text
    assert fleet.jobs() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"resize\(\) needs workers=, memory_mb=, store=, lease_s=, or several"),
        ({"workers": 0}, "workers must be a whole number of at least 1, not 0"),
        ({"workers": 13}, r"workers=13 is more than the platform can run at once \(12\)"),
        ({"memory_mb": 20_000}, "memory_mb=20000 is not among what the platform offers"),
    ],
)
def test_resize_refuses_what_cannot_be(fleet, arguments, message):
    job = fleet.submit(nothing)
    with pytest.raises(InvalidInput, match=message):
        job.resize(**arguments)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((np.zeros(3), np.zeros(4)), r"data set 'd': its arrays differ in length: \[3, 4\]"),
        (np.zeros((0, 2)), "data set 'd' is empty"),
        ((), "data set 'd' is empty"),
        (np.array([{}], dtype=object), "is no array of numbers"),
        (3, "is no array of numbers"),
    ],
)
def test_upload_refuses_what_is_no_data_set(fleet, data, message):
    with pytest.raises(InvalidInput, match=message):
        fleet.upload("d", data)


def test_a_closed_fleet_takes_nothing_more(platform):
    fleet = smlt.Fleet(platform=platform)
    fleet.close()
    fleet.close()
    for use in (lambda: fleet.submit(nothing), lambda: fleet.upload("d", np.zeros(3))):
        with pytest.raises(FleetClosed, match=r"start another one, or continue this one"):
            use()


def test_what_a_function_gets_and_returns(fleet):
    outcome = fleet.submit(nothing, {"a": [1, 2.5, "x", None]}).result(60)
    assert (outcome.status, outcome.value) == ("finished", {"a": [1, 2.5, "x", None]})
    assert outcome.reports == ()
    assert outcome.metrics == {}
    assert outcome.checkpoint is None
    assert outcome.cost_usd > 0


def test_a_value_that_is_no_json_is_left_out(fleet):
    assert fleet.submit(lambda _: object()).result(60).value is None


def test_the_same_name_is_the_same_job(fleet):
    first = fleet.submit(nothing, 1, name="mine")
    again = fleet.submit(nothing, 2, name="mine")
    assert first.job_id == again.job_id == "mine"
    assert again.result(60).value == 1
    assert [job.job_id for job in fleet.jobs()] == ["mine"]


def use_upload(config):
    session = smlt.session()
    rows = [
        (float(x.sum()), int(y[0]))
        for x, y in session.batches("numbers", batch_size=2, shuffle=False)
    ]
    return session.mean(sum(total for total, _ in rows), 1.0 / session.workers)


def test_uploaded_data_reach_every_worker(fleet):
    x = np.arange(12.0).reshape(6, 2)
    fleet.upload("numbers", (x, np.arange(6)))
    for workers in (1, 3):
        assert fleet.submit(use_upload, workers=workers).result(60).value == x.sum()


def test_a_data_set_that_was_not_uploaded(fleet):
    with pytest.raises(TrainingFunctionError, match=r"no data set 'numbers' was uploaded"):
        fleet.submit(use_upload).result(60)


def fail(config):
    session = smlt.session()
    session.report(loss=1.0)
    if session.rank == config:
        raise KeyError("no such layer")
    session.mean(1.0)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_function_ends_that_job_only(fleet, workers):
    other = fleet.submit(nothing, 7)
    job = fleet.submit(fail, workers - 1, workers=workers)
    with pytest.raises(TrainingFunctionError, match="KeyError: 'no such layer'") as failed:
        job.result(60)
    assert 'raise KeyError("no such layer")' in failed.value.worker_traceback
    assert "worker.py" not in failed.value.worker_traceback
    assert failed.value.job_id == job.job_id
    assert job.status == "failed"
    with pytest.raises(TrainingFunctionError):
        list(job.reports())
    assert other.result(60).value == 7


def leave_by(config):
    import os
    import sys

    if config == "sys.exit":
        sys.exit(3)
    sys.stdout.write("about to vanish\n")
    sys.stdout.flush()
    os._exit(3)


def test_a_function_that_calls_exit(fleet):
    with pytest.raises(TrainingFunctionError, match="SystemExit: 3"):
        fleet.submit(leave_by, "sys.exit").result(60)


def test_a_function_that_keeps_dying_is_given_up(fleet):
    job = fleet.submit(leave_by, "os._exit", workers=1)
    with pytest.raises(FunctionLost, match=r"6 losses in a row without any progress"):
        job.result(60)
    assert all(log == "about to vanish\n" for log in job.logs().values())
    assert len(job.logs()) == 6


def grow(config):
    import numpy as np

    session = smlt.session()
    kept = []
    for step in session.epochs(config):
        kept.append(np.ones(100 * 2**20 // 8))
        session.report(step=step)
    return len(kept)


def test_out_of_memory_is_told_with_the_peak(fleet):
    job = fleet.submit(grow, 20, workers=1, memory_mb=800)
    with pytest.raises(
        OutOfMemory, match=r"its limit is 800 MB\. Give it more memory_mb"
    ) as failed:
        job.result(60)
    assert failed.value.limit_mb == 800
    assert 700 <= failed.value.peak_mb <= 900


def test_out_of_memory_without_a_pin_doubles_the_memory(fleet):
    outcome = fleet.submit(grow, 17, workers=1).result(60)
    assert outcome.value == 17
    assert [a.memory_mb for a in outcome.allocations] == [1769, 3538]
    assert [r.metrics["step"] for r in outcome.reports] == list(range(17))


def test_stop_frees_functions_and_reservation_at_once(platform, tmp_path):
    with smlt.Fleet(platform=platform, budget_usd=1.0) as fleet:
        endless = {"epochs": 1000, "pause": 0.05, "notes": str(tmp_path)}
        job = fleet.submit(jobs.train, endless, workers=3, memory_mb=1769)
        next(job.reports())
        assert fleet.reserved_usd > 0
        job.stop("pruned")
        outcome = job.result(20)
        assert (outcome.status, outcome.reason) == ("stopped", "pruned")
        assert fleet.reserved_usd == 0
        assert not any(jobs.alive(pid) for pid in jobs.pids(tmp_path))
        job.stop("again")
        assert job.result(1) is outcome


def test_result_gives_up_waiting_when_told_to(fleet, tmp_path):
    job = fleet.submit(jobs.train, {"epochs": 1000, "pause": 0.05})
    with pytest.raises(TimeoutError, match=r"is still \w+ after 0.1 s"):
        job.result(0.1)
    job.stop()


def test_a_deadline_stops_what_still_runs(platform):
    with smlt.Fleet(platform=platform, deadline_s=4.0) as fleet:
        job = fleet.submit(jobs.train, {"epochs": 1000, "pause": 0.02}, workers=2, memory_mb=1769)
        outcome = job.result(30)
        assert (outcome.status, outcome.reason) == ("stopped", "deadline")
        assert outcome.checkpoint is not None


def test_reports_carry_what_they_cost(fleet):
    job = fleet.submit(jobs.train, {"epochs": 4, "pause": 0.02}, workers=2, memory_mb=1024)
    reports = list(job.reports())
    assert [r.index for r in reports] == [0, 1, 2, 3]
    costs = [r.cost_usd for r in reports]
    assert costs == sorted(costs)
    assert costs[0] > 0
    assert {(r.workers, r.memory_mb, r.generation) for r in reports} == {(2, 1024, 0)}
    assert list(job.reports()) == reports


def test_the_final_checkpoint_is_a_safetensors_file(fleet):
    from safetensors.torch import load

    outcome = fleet.submit(jobs.train, {"epochs": 1, "pause": 0}, workers=2).result(60)
    folder, _, key = outcome.checkpoint.partition("/jobs/")
    store = DirectoryStore(folder.removeprefix("file://"))
    tensors = load(Checkpoints(store, outcome.job_id).load(f"jobs/{key}"))
    names = [name for name in tensors if name.startswith("0.")]
    assert len(names) == 9  # two linear layers, batch norm with its three buffers
    assert store.list("jobs/") == [f"jobs/{key}"]  # nothing else is left of the job


def test_jobs_wait_for_free_functions(fleet, tmp_path):
    """12 functions at once: five jobs of four workers cannot all run together."""
    running = [
        fleet.submit(jobs.train, {"epochs": 1, "pause": 0.02, "notes": str(tmp_path)}, workers=4)
        for _ in range(5)
    ]
    most = 0
    while not all(job.status == "finished" for job in running):
        most = max(most, sum(jobs.alive(pid) for pid in jobs.pids(tmp_path)))
        assert not any(job.status == "failed" for job in running)
        time.sleep(0.02)
    assert most <= 12
    assert all(job.result(1).status == "finished" for job in running)


def test_inline_runs_in_this_process():
    import os

    with smlt.Fleet(platform="inline") as fleet:
        assert fleet.submit(lambda _: os.getpid()).result(60).value == os.getpid()
        outcome = fleet.submit(jobs.train, {"epochs": 2, "pause": 0}).result(60)
        assert len(outcome.reports) == 2
        with pytest.raises(InvalidInput, match=r"workers=2 is more than the platform can run"):
            fleet.submit(jobs.train, {}, workers=2)


def test_nothing_is_left_in_a_parameter_store_of_the_users(platform):
    import redis

    with EmbeddedStore() as store:
        with smlt.Fleet(platform=platform, parameter_store=store.url) as fleet:
            fleet.submit(jobs.train, {"epochs": 2, "pause": 0}, workers=3).result(60)
            running = fleet.submit(jobs.train, {"epochs": 1000, "pause": 0.01}, workers=2)
            next(running.reports())
            client = redis.Redis.from_url(store.url)
            names = client.keys("*")
            assert names
            assert all(client.ttl(name) != -1 for name in names)  # everything expires by itself
        assert client.keys("*") == []
        client.close()


def test_secrets_are_not_shown(platform, tmp_path):
    with EmbeddedStore() as store:
        secret = store.url.split(":")[2].split("@")[0]
        with smlt.Fleet(platform=platform, parameter_store=store.url, path=tmp_path) as fleet:
            job = fleet.submit(nothing)
            job.result(60)
            shown = repr(fleet) + repr(job) + repr(fleet._scheduler._settings)
        written = b"".join(f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())
        assert secret not in shown
        assert secret.encode() not in written
