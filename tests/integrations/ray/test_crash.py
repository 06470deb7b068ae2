"""Workers, drivers and clusters that are killed: nothing is lost, and nothing is trained twice.

SMLT_TEST_ROUNDS=20 kills at 20 different moments.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("ray.tune")

import ray
from ray import tune

import smlt_tune as smlt
from smlt_tune.integrations.ray import SmltResources
from tests import bills
from tests.conftest import eventually

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]

ROOT = Path(__file__).parents[3]
STEPS = 6
TRIALS = 3
ROUNDS = int(os.environ.get("SMLT_TEST_ROUNDS", "1"))

DRIVER = """\
import json, os, sys, time
from pathlib import Path
import ray
from ray import tune
import smlt_tune as smlt
from smlt_tune.backend.platforms.local import LocalPlatform
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from smlt_tune.integrations.ray import SmltResources, register_smlt, unregister_smlt

def train(config):
    import torch
    session = smlt.session()
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
    model, optimizer = session.prepare(model, optimizer)
    for epoch in session.epochs(6):
        for (x,) in session.batches((torch.ones(2, 1),), batch_size=2):
            with Path(config["notes"]).open("a") as notes:
                notes.write(f"{config['lr']:.1f} {epoch}\\n")
            time.sleep(0.3)
            optimizer.zero_grad()
            (-model(x)).mean().backward()
            optimizer.step()
        session.report(epoch=epoch, weight=model.weight.item())

if __name__ == "__main__":
    folder, mode, where, cluster = sys.argv[1:]
    own = dict(num_cpus=1, include_dashboard=False, _temp_dir=cluster)
    there = own if where == "new" else dict(address=cluster)
    ray.init(log_to_driver=False, logging_level="ERROR", **there)
    register_smlt(platform=LocalPlatform(concurrency=3), policy=PinnedOrDefault())
    trainable = tune.with_resources(train, SmltResources(workers=1))
    if mode == "restore":
        tuner = tune.Tuner.restore(folder + "/it", trainable)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={"lr": tune.grid_search([0.1, 0.2, 0.3]), "notes": folder + "/notes"},
            run_config=tune.RunConfig(storage_path=folder, name="it", verbose=0),
        )
    results = tuner.fit()
    told = [[r.metrics["training_iteration"], r.metrics["weight"], r.config["lr"]] for r in results]
    print("TOLD " + json.dumps(told))
    unregister_smlt()
    ray.shutdown()
"""


def driver(folder, mode, *cluster):
    (folder / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-W", "ignore", folder / "driver.py", folder, mode, *cluster]
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.timeout(400)
@pytest.mark.parametrize("attempt", range(ROUNDS))
@pytest.mark.parametrize("where", ["same", "new"])
def test_a_killed_driver_is_restored(cluster, tmp_path, ray_folder, where, attempt):
    address = ray.get_runtime_context().gcs_address
    clusters = [ray_folder / "1", ray_folder / "2"] if where == "new" else [address, address]
    first = driver(tmp_path, "fit", where, clusters[0])
    begun = 2 * TRIALS + 1 + attempt % (2 * TRIALS)
    try:
        eventually(lambda: len(lines(tmp_path / "notes")) >= begun or first.poll(), 120)
        assert first.poll() is None
    finally:  # with its cluster, if that is its own
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    second = driver(tmp_path, "restore", where, clusters[1])
    try:
        said, _ = second.communicate(timeout=150)
    finally:
        second.kill()
    [told] = [json.loads(line[5:]) for line in said.splitlines() if line.startswith("TOLD ")]
    assert [[count, pytest.approx(weight)] for count, weight, _ in told] == [
        [STEPS, STEPS * lr] for _, _, lr in told
    ]
    counts = Counter(lines(tmp_path / "notes"))
    assert len(counts) == TRIALS * STEPS
    [journal] = tmp_path.rglob("history.sqlite3")
    assert bills.paid(journal.parent) == bills.charged(journal.parent)
    for lr in ("0.1", "0.2", "0.3"):  # at most the step in which it was killed
        again = [line for line, times in counts.items() if times > 1 and line.startswith(lr)]
        assert len(again) <= 1
        assert all(counts[line] == 2 for line in again)


@pytest.mark.parametrize("attempt", range(ROUNDS))
@pytest.mark.parametrize("tier", ["worker", "host"])
def test_a_killed_worker_or_its_host_costs_at_most_one_step(fit, platform, tmp_path, tier, attempt):
    killed_at = (3 + attempt) % STEPS
    victim = None if tier == "worker" else platform._helper.pid  # all functions end with it

    def train(config):
        import torch

        session = smlt.session()
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model, optimizer = session.prepare(model, optimizer)
        for epoch in session.epochs(STEPS):
            for (x,) in session.batches((torch.ones(2, 1),), batch_size=2):
                with Path(config["notes"]).open("a") as notes:
                    notes.write(f"{epoch}\n")
                if epoch == config["at"] and not Path(config["killed"]).exists():
                    Path(config["killed"]).touch()
                    os.kill(config["victim"] or os.getpid(), signal.SIGKILL)
                    signal.pause()
                optimizer.zero_grad()
                (-model(x)).mean().backward()
                optimizer.step()
            session.report(epoch=epoch, weight=model.weight.item())

    paths = {name: str(tmp_path / name) for name in ("notes", "killed")}
    [result] = fit(
        train, SmltResources(workers=1), space={"at": killed_at, "victim": victim, **paths}
    )
    assert result.metrics["training_iteration"] == STEPS
    assert result.metrics["weight"] == pytest.approx(STEPS * 0.5)
    trained = sorted(int(line) for line in lines(tmp_path / "notes"))
    assert trained == sorted([*range(STEPS), killed_at])


def test_files_that_were_reported_are_there_after_a_kill(fit, tmp_path):
    def train(config):
        checkpoint = tune.get_checkpoint()
        step = int(Path(checkpoint.path, "step").read_text()) + 1 if checkpoint else 0
        while step < STEPS:
            if step == 3 and not Path(config["killed"]).exists():
                Path(config["killed"]).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            folder = Path(config["killed"] + "-files")
            folder.mkdir(exist_ok=True)
            (folder / "step").write_text(str(step))
            tune.report({"step": step}, checkpoint=tune.Checkpoint.from_directory(str(folder)))
            step += 1

    [result] = fit(train, space={"killed": str(tmp_path / "killed")})
    assert (result.metrics["step"], result.metrics["training_iteration"]) == (STEPS - 1, STEPS)
    assert Path(result.checkpoint.path, "step").read_text() == str(STEPS - 1)


def test_a_failed_trial_starts_again_from_its_checkpoint(fleet, tmp_path):
    def train(config):
        checkpoint = tune.get_checkpoint()
        step = int(Path(checkpoint.path, "step").read_text()) + 1 if checkpoint else 0
        while step < STEPS:
            if step == 3 and not Path(config["failed"]).exists():
                Path(config["failed"]).touch()
                raise RuntimeError("once")
            folder = Path(config["failed"] + "-files")
            folder.mkdir(exist_ok=True)
            (folder / "step").write_text(str(step))
            tune.report({"step": step}, checkpoint=tune.Checkpoint.from_directory(str(folder)))
            step += 1

    analysis = tune.run(
        train, resources_per_trial="smlt", config={"failed": str(tmp_path / "failed")},
        max_failures=1, storage_path=str(tmp_path), verbose=0,
    )  # fmt: skip
    result = analysis.trials[0].last_result
    assert (result["step"], result["training_iteration"]) == (STEPS - 1, STEPS)
    jobs = [job for job in fleet.jobs() if analysis.trials[0].trial_id in job.job_id]
    assert [job.status for job in jobs] == ["failed", "finished"]
