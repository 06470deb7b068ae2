import subprocess
import sys

HEAVY = (
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


def test_the_entry_of_a_function_loads_nothing_heavy():
    """What import-linter cannot see: what is loaded on the way, by packages and by libraries."""
    code = "import sys, smlt_tune.runtime.worker; print(*sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = out.stdout.split()
    assert "smlt_tune.runtime.worker" in loaded
    assert [m for m in loaded if any(m == h or m.startswith(f"{h}.") for h in HEAVY)] == []
