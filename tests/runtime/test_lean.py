import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "ray",
    "optuna",
    "nni",
    "scipy",
    "pandas",
    "gpytorch",
    "botorch",
    "smlt_tune.backend",
    "smlt_tune.integrations",
)


@pytest.mark.parametrize("module", ["worker", "dry_run"])
def test_the_entries_of_the_runtime_load_nothing_heavy(module):
    """What import-linter cannot see: what is loaded on the way, by packages and by libraries."""
    code = f"import sys, smlt_tune.runtime.{module}; print(*sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = out.stdout.split()
    assert f"smlt_tune.runtime.{module}" in loaded
    assert [m for m in loaded if any(m == h or m.startswith(f"{h}.") for h in HEAVY)] == []
