"""A search whose driver is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from nni.nas import strategy as nas
from nni.tools.nnictl.constants import NNI_HOME_DIR

import smlt_tune as smlt
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from tests import bills
from tests.conftest import eventually
from tests.integrations.nni.searches import experiment, score, slow

# The model space is the script's own: it has to travel to functions by value.
DRIVER = """\
import sys, warnings
warnings.simplefilter("ignore")
from tests.integrations.nni import searches
from tests.integrations.nni.test_nas_crash import search

class Space(searches.Space):
    pass

if __name__ == "__main__":
    search(sys.argv[1], Space()).run()
"""


def evolution():
    return nas.RegularizedEvolution(population_size=4, sample_size=2, mutation_prob=0.9, seed=1)


def search(folder, space=None, fleet=None, strategy=None):
    return experiment(
        strategy or evolution(), slow, folder, space=space, fleet=fleet, trials=8, concurrency=2,
        id="killed", arguments={"folder": str(folder), "seconds": 2.0},
    )  # fmt: skip


def epochs(folder):
    """The epochs that each architecture has begun, by its name."""
    found = {path.name: path.read_text().split() for path in Path(folder).glob("*-[0-2]")}
    return {name: list(map(int, begun)) for name, begun in found.items()}


@pytest.mark.timeout(300)
def test_the_search_of_a_killed_driver_goes_on_and_nothing_runs_twice(platform, tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "HOME": str(Path(NNI_HOME_DIR).parent)}
    driver = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    try:
        # Three have ended, and one of the two in flight has a checkpoint after its second epoch.
        eventually(lambda: driver.poll() is not None or _far_enough(epochs(tmp_path)), 170)
        assert driver.poll() is None
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    before = epochs(tmp_path)

    options = {"platform": platform, "policy": PinnedOrDefault()}
    with smlt.Fleet.open(tmp_path / "killed" / "fleet", **options) as fleet:
        spent = fleet.settled_usd
        ended = {job.job_id for job in fleet.jobs() if job.status == "finished"}
        assert len(ended) >= 2
        assert spent > 0
        again = search(tmp_path, fleet=fleet)
        again.resume()
        again.stop()
        candidates = again.candidates()
        assert len(candidates) == len(fleet.jobs()) == 8
        assert [c.status.value for c in candidates] == ["trained"] * 8
        assert [c.metric for c in candidates] == [score(c.sample) for c in candidates]
        assert [c.model.metrics.intermediates for c in candidates] == [[0.0, 1.0, 2.0, 3.0]] * 8
        assert sum(c.cost_usd for c in candidates) <= fleet.settled_usd + 1e-9
        assert fleet.settled_usd > spent
    assert bills.paid(fleet.path) == bills.charged(fleet.path)
    begun = epochs(tmp_path)
    for candidate in candidates:
        if candidate.name in ended:
            width, activation = candidate.sample["width"], candidate.sample["activation"]
            assert begun[f"{width}-{activation}"] == [0, 1, 2, 3]
    for name, earlier in before.items():
        if len(earlier) > 2:
            assert begun[name].count(0) == 1  # from a checkpoint
    # All rewards reached the strategy: its population is the four youngest of all eight.
    known = [(individual.x, individual.y) for individual in again.strategy._population]
    assert len(known) == 4
    assert all(y == score(x) for x, y in known)


def _far_enough(begun):
    lengths = sorted(map(len, begun.values()))
    return lengths.count(4) >= 3 and len(lengths) >= 4
