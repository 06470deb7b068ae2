"""The examples of Ray Tune at small size, as users run them."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("ray.tune")

pytestmark = pytest.mark.xdist_group("ray")

EXAMPLES = Path(__file__).parents[2] / "examples" / "ray_tune"


@pytest.fixture
def run(tmp_path):
    """Runs an example with results in the test's folder; gives what it has printed."""
    temporary = Path(tempfile.mkdtemp(prefix="smlt-ray-"))  # a short path: it holds Unix sockets
    quiet = {"RAY_TMPDIR": str(temporary), "TMPDIR": str(temporary), "RAY_USAGE_STATS_ENABLED": "0"}

    def run(name, *arguments):
        done = subprocess.run(
            [sys.executable, EXAMPLES / name, *arguments, "--samples", "128", "--folder", tmp_path],
            env=os.environ | quiet | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    yield run
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.timeout(240)
def test_the_architecture_search_stays_within_its_budget_and_names_the_best(run):
    said = run("architecture_search.py", "--trials", "3", "--epochs", "2")
    assert 3 <= int(re.search(r"trained epochs: (\d+) of 6", said)[1]) <= 6
    assert 0 < float(re.search(r"cost: ([\d.]+) of 0.05 USD", said)[1]) <= 0.05
    assert re.search(r"best accuracy: 0\.\d+ with {'depth': \d", said)
    assert Path(re.search(r"its weights: file://(\S+)", said)[1]).is_file()


@pytest.mark.timeout(240)
def test_every_member_of_the_population_trains_to_the_end(run):
    said = run("population.py", "--trials", "2", "--epochs", "4", "--interval", "2")
    members = re.findall(r"accuracy 0\.\d+ after (\d+) epochs, lr 0\.\d+, 0\.\d+ USD", said)
    assert members == ["4", "4"]
