import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import smlt_tune

PUBLIC = [
    "Cheapest",
    "Fastest",
    "Fleet",
    "Job",
    "JobOutcome",
    "ModelFeatures",
    "Report",
    "Session",
    "SmltError",
    "Target",
    "Workload",
    "__version__",
    "model_features",
    "session",
]

#: What the package needs for itself.
INTERNAL = {"Any", "TYPE_CHECKING", "import_module"}


def test_all_is_what_is_documented():
    assert sorted(smlt_tune.__all__) == PUBLIC


def test_all_is_what_is_visible():
    visible = {
        name
        for name in dir(smlt_tune)
        if not name.startswith("_")
        and name not in INTERNAL
        and not isinstance(vars(smlt_tune).get(name), ModuleType)
    }
    assert visible | {"__version__"} == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_resolves_and_is_documented(name):
    value = getattr(smlt_tune, name)
    assert name == "__version__" or inspect.getdoc(value)


def test_an_unknown_name_is_told():
    with pytest.raises(AttributeError, match=r"^module 'smlt_tune' has no attribute 'Flet'$"):
        smlt_tune.Flet  # noqa: B018


def test_importing_the_package_loads_nothing():
    code = "import sys, smlt_tune; print(*(m for m in sys.modules if m.startswith('smlt_tune.')))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []
