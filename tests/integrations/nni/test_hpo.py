"""NNI's tuners: real manager, real clients, trials as jobs.

SMLT_TEST_TRIALS=200 SMLT_TEST_CONCURRENCY=64 runs more trials, more at once.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from itertools import islice
from pathlib import Path

import nni
import pytest
from nni.experiment.config import ExperimentConfig
from requests import HTTPError

import smlt_tune as smlt
from smlt_tune.errors import InvalidInput
from smlt_tune.integrations.nni import SmltExperiment
from tests.conftest import eventually, free_ports

TRIALS = int(os.environ.get("SMLT_TEST_TRIALS", "32"))
CONCURRENCY = int(os.environ.get("SMLT_TEST_CONCURRENCY", "16"))

SPACE = {
    "x": {"_type": "uniform", "_value": [0, 1]},
    "y": {"_type": "choice", "_value": [1, 2, 3]},
}


def quadratic(config):
    session = smlt.session()
    for step in range(3):
        session.report(loss=(config["x"] - 0.5) ** 2 + config["y"] - step / 10)


def existing(_):
    """Code that was written for NNI."""
    import nni

    config = nni.get_next_parameter()
    assert nni.get_current_parameter("y") == config["y"]
    for step in range(3):
        nni.report_intermediate_result(config["y"] + step)
    nni.report_final_result({"default": config["y"] * 10, "x": config["x"]})


def endless(config):
    import time

    session = smlt.session()
    session.report(loss=1.0, pid=os.getpid())
    for step in range(10_000):
        time.sleep(0.1)
        session.report(loss=1.0 + step)


def failing(config):
    raise ValueError("nothing to learn here")


def worsening(config):
    """The last one is worse than the two before it, and would take long."""
    import time

    session = smlt.session()
    for step in range(400 if config["y"] == 3 else 4):
        session.report(loss=float((step + 1) * config["y"]))
        time.sleep(0.1)


def experiment(train, folder, fleet, *, trials, concurrency, id=None, tuner="Random", **options):
    config = ExperimentConfig("local")
    config.search_space = options.pop("space", SPACE)
    config.tuner.name = tuner
    config.max_trial_number, config.trial_concurrency = trials, concurrency
    config.experiment_working_directory = str(folder)
    options = {"workers": 1, "memory_mb": 1769, "metric": "loss", **options}
    return SmltExperiment(train, config, id, fleet=fleet, **options)


class Running:
    """An experiment that is started, and stopped at the end.

    NNI gives a tuner ten seconds to start, which is short on a busy machine: so it is tried again.
    """

    def __init__(self, make, *, resume=False):
        for _ in range(4):
            self.made = make()
            [port] = free_ports(1)
            start = self.made.resume if resume else self.made.run
            with warnings.catch_warnings():  # NNI forgets a socket when it looks for its port
                warnings.simplefilter("ignore", ResourceWarning)
                start(port, wait_completion=False)
            if eventually(lambda: self.made.get_status() == "ERROR" or begun(self.made)) == "yes":
                return
            self.made.stop()
        raise AssertionError("NNI's tuner does not start")

    def __enter__(self):
        return self.made

    def __exit__(self, *_):
        manager = self.made._proc
        self.made.stop()
        assert manager is None or manager.poll() is not None


def begun(made):
    """Whether the tuner has given the first parameters."""
    try:
        return "yes" if made.list_trial_jobs() else ""
    except HTTPError:
        return ""


def done(made):
    eventually(lambda: made.get_status() == "DONE", 150 + TRIALS)


def trials(made):
    """Trials with their parameters, intermediate and final results, by id."""
    metrics = made.get_job_metrics()
    found = {}
    for trial in made.list_trial_jobs():
        told = sorted(metrics.get(trial.trialJobId, []), key=lambda metric: metric.sequence)
        finals = [m.data for m in told if m.type == "FINAL"]
        steps = [m.data for m in told if m.type == "PERIODICAL"]
        parameters = trial.hyperParameters[0].parameters
        found[trial.trialJobId] = (trial.status, parameters, steps, finals)
    return found


def test_no_metric_of_many_fast_trials_is_lost(fleet, tmp_path):
    options = {"trials": TRIALS, "concurrency": CONCURRENCY, "tuner": "TPE"}
    with Running(lambda: experiment(quadratic, tmp_path, fleet, **options)) as made:
        done(made)
        found = trials(made)
        jobs = {job.job_id: job for job in fleet.jobs()}  # also those of other tests
        assert len(found) == TRIALS
        for trial, (status, parameters, steps, finals) in found.items():
            told = [r.metrics["loss"] for r in jobs[f"{made.id}-{trial}"].result().reports]
            best = (parameters["x"] - 0.5) ** 2 + parameters["y"]
            assert status == "SUCCEEDED"
            assert steps == told == pytest.approx([best, best - 0.1, best - 0.2])
            assert finals == [told[-1]]
        assert len({str(parameters) for _, parameters, _, _ in found.values()}) > 1
        # The portal shows what the tuner was told.
        exported = {e.trialJobId: (e.parameter, e.value) for e in made.export_data()}
        assert exported == {t: (p, finals[0]) for t, (_, p, _, finals) in found.items()}
        page = http.client.HTTPConnection("localhost", made.port)
        page.request("GET", "/")
        assert b"<html" in page.getresponse().read().lower()
        page.close()


def test_code_written_for_nni_runs_as_it_is(fleet, tmp_path):
    with Running(
        lambda: experiment(existing, tmp_path, fleet, trials=3, concurrency=3, metric=None)
    ) as made:
        done(made)
        for status, parameters, steps, finals in trials(made).values():
            y = parameters["y"]
            assert (status, steps) == ("SUCCEEDED", [y, y + 1, y + 2])
            assert finals == [{"default": 10 * y, "x": parameters["x"]}]


def test_a_trial_fails_like_its_job_and_the_client_says_why(fleet, tmp_path):
    with Running(lambda: experiment(failing, tmp_path, fleet, trials=1, concurrency=1)) as made:
        done(made)
        [(status, *_)] = trials(made).values()
        assert status == "FAILED"
        [said] = tmp_path.rglob("trial.stderr")
        assert "ValueError: nothing to learn here" in said.read_text()


def test_a_client_that_is_cancelled_or_killed_takes_its_job_along(fleet, tmp_path):
    with Running(lambda: experiment(endless, tmp_path, fleet, trials=2, concurrency=2)) as made:
        jobs = eventually(lambda: running(fleet, made, 2), 150)
        eventually(lambda: all(job.cost_usd > 0 for job in jobs))
        cancelled, killed = jobs
        made.kill_trial_job(cancelled.job_id.rpartition("-")[2])
        os.kill(client(made, killed), signal.SIGKILL)
        for job in jobs:
            outcome = job.result(60)
            assert (outcome.status, outcome.reason) == ("stopped", "its trial was cancelled")
        assert fleet.reserved_usd == 0
        done(made)
        assert all(status != "SUCCEEDED" for status, *_ in trials(made).values())
    assert clients(made) == []


def test_an_assessor_stops_the_jobs_of_trials_that_are_worse(fleet, tmp_path):
    def make():
        made = experiment(
            worsening, tmp_path, fleet, trials=3, concurrency=1, tuner="GridSearch",
            space={"y": SPACE["y"]},
        )  # fmt: skip
        made.config.assessor.name = "Medianstop"
        made.config.assessor.class_args = {"optimize_mode": "minimize", "start_step": 1}
        return made

    with Running(make) as made:
        done(made)
        found = {p["y"]: (status, len(steps)) for status, p, steps, _ in trials(made).values()}
        assert found[3][0] in ("EARLY_STOPPED", "USER_CANCELED")  # NNI's local service mixes them
        assert found[3][1] < 400
        assert fleet.reserved_usd == 0


def test_the_budget_of_the_fleet_ends_the_experiment(platform, tmp_path):
    with (
        smlt.Fleet(platform=platform, budget_usd=0.0003) as fleet,
        Running(lambda: experiment(endless, tmp_path, fleet, trials=50, concurrency=2)) as made,
    ):
        done(made)
        assert 0 < len(trials(made)) < 50
        assert 0 < fleet.settled_usd <= 0.0003
        assert fleet.reserved_usd == 0


DRIVER = """\
import sys, time, warnings
warnings.simplefilter("ignore")
import smlt_tune as smlt
from tests.integrations.nni import test_hpo

if __name__ == "__main__":
    folder, train, trials = sys.argv[1:]
    options = {"trials": int(trials), "concurrency": 1}
    train = getattr(test_hpo, train)
    with smlt.Fleet(path=folder + "/fleet") as fleet:
        running = test_hpo.Running(lambda: test_hpo.experiment(train, folder, fleet, **options))
        with running as made:
            test_hpo.tell(folder + "/begun", f"{made.id} {made.port}")
            test_hpo.done(made)
            test_hpo.tell(folder + "/done", "")
            time.sleep(1000)
"""


def tell(path, text):
    """Writes a file, all of it at once."""
    Path(path + ".new").write_text(text)
    Path(path + ".new").rename(path)


def told(driver, path):
    """What a driver that lives has written to a file."""
    eventually(lambda: driver.poll() is not None or path.exists(), 250)
    assert driver.poll() is None
    return path.read_text()


def driver_of(folder, train, trials):
    """A process that runs an experiment; says when it has begun, and when all trials are done."""
    script = folder / "driver.py"
    script.write_text(DRIVER)
    home = Path(nni.tools.nnictl.constants.NNI_HOME_DIR).parent
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), train, str(trials)],
        env=os.environ | {"PYTHONPATH": os.getcwd(), "HOME": str(home)},
    )


def test_the_manager_ends_with_a_driver_that_is_killed_while_no_trial_runs(tmp_path):
    with driver_of(tmp_path, "quadratic", trials=1) as driver:
        try:
            port = int(told(driver, tmp_path / "begun").split()[1])
            told(driver, tmp_path / "done")
            assert listens(port)
            assert mentioned(str(port), "manager_guard")
        finally:
            driver.kill()
    eventually(lambda: not mentioned(tmp_path, "") and not mentioned(str(port), ""), 100)
    assert not listens(port)


def test_nothing_outlives_a_driver_that_is_killed_and_its_experiment_goes_on(platform, tmp_path):
    with driver_of(tmp_path, "endless", trials=3) as driver:
        try:
            name, port = told(driver, tmp_path / "begun").split()
            eventually(lambda: driver.poll() is not None or mentioned(tmp_path, "trial"), 170)
            eventually(lambda: driver.poll() is not None or [*tmp_path.glob("fleet/logs/*")], 170)
            assert driver.poll() is None
        finally:
            driver.kill()
    eventually(lambda: not mentioned(tmp_path, "") and not listens(int(port)), 100)
    with smlt.Fleet.open(tmp_path / "fleet", platform=platform) as fleet:
        [job] = fleet.jobs()

        def make():
            return experiment(endless, tmp_path, fleet, trials=3, concurrency=1, id=name)

        with Running(make, resume=True) as made:
            [(_, _, before, _)] = trials(made).values()
            eventually(lambda: len(next(iter(trials(made).values()))[2]) > len(before) + 3)

            def nothing_is_lost():  # NNI may store a result before the one that it got before it
                [(_, _, steps, _)] = trials(made).values()
                return steps == [r.metrics["loss"] for r in islice(job.reports(), len(steps))]

            eventually(nothing_is_lost)
            assert [each.job_id for each in fleet.jobs()] == [job.job_id]


def test_all_mistakes_in_the_arguments_are_told_at_once(fleet):
    with pytest.raises(InvalidInput) as error:
        SmltExperiment("train", fleet=fleet, workers=0, memory_mb=-1)
    assert "train='train'" in str(error.value)
    assert "workers" in str(error.value)
    assert "memory_mb" in str(error.value)
    with pytest.raises(InvalidInput, match="function_count= is no bound"):
        SmltExperiment(quadratic, fleet=fleet, function_count=3)


def test_a_client_without_the_token_gets_nothing(fleet, tmp_path):
    with Running(lambda: experiment(endless, tmp_path, fleet, trials=1, concurrency=1)) as made:
        [file] = tmp_path.rglob("smlt.json")
        assert file.stat().st_mode & 0o077 == 0
        address = json.loads(file.read_text())
        before = len(fleet.jobs())
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address["socket"])
            hello = {"token": "guessed", "trial": "T", "channel": "http://localhost:1/"}
            connection.sendall(json.dumps(hello).encode() + b"\n")
            assert connection.recv(1) == b""
        assert not any(job.job_id == f"{made.id}-T" for job in fleet.jobs()[before:])


def running(fleet, made, number):
    jobs = [
        job for job in fleet.jobs() if job.job_id.startswith(made.id) and job.status == "running"
    ]
    return jobs if len(jobs) == number else None


def processes():
    """Command lines and environments of all processes."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        yield int(folder.name), [part.decode(errors="replace") for part in command], environment


def clients(made):
    """Processes of the experiment's clients."""
    return [
        pid
        for pid, command, environment in processes()
        if "smlt_tune.integrations.nni.trial" in command and f"/{made.id}/" in " ".join(command)
    ]


def client(made, job):
    """The process of a job's client."""
    trial = job.job_id.rpartition("-")[2]
    mine = set(clients(made))
    [pid] = [p for p, _, env in processes() if p in mine and f"_JOB_ID={trial}".encode() in env]
    return pid


def mentioned(folder, what):
    """Processes whose command line mentions a folder."""
    return [
        p for p, command, _ in processes() if str(folder) in (c := " ".join(command)) and what in c
    ]


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
