"""What the extra ``nni`` declares is what NNI needs, and what these tests run with."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
EXTRA = [Requirement(line) for line in PROJECT["project"]["optional-dependencies"]["nni"]]


def needs(requirement):
    """What an installed package requires here."""
    for line in metadata.requires(requirement.name) or ():
        found = Requirement(line)
        if found.marker is None or found.marker.evaluate({"extra": ""}):
            yield found


def test_the_declared_pins_and_all_that_nni_needs_are_installed_together():
    required = [*EXTRA, *(found for requirement in EXTRA for found in needs(requirement))]
    wrong = [
        f"{requirement}: {installed} is installed"
        for requirement in required
        if (installed := metadata.version(requirement.name)) not in requirement.specifier
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "fault"),
    [
        ("filelock", "3.12"),  # its lock hangs NNI's list of experiments
        ("setuptools", "81"),  # pkg_resources is gone: nnictl does not start
    ],
)
def test_versions_that_break_nni_are_excluded(package, fault):
    [requirement] = [r for r in EXTRA if r.name == package]
    assert fault not in requirement.specifier


def test_nni_is_pinned_to_the_version_whose_faults_are_known():
    [nni] = [r for r in EXTRA if r.name == "nni"]
    assert nni.specifier == SpecifierSet("==3.0")


def test_what_nni_needs_and_does_not_declare_can_be_imported():
    program = "import nni.tools.nnictl.nnictl, nni.nas.evaluator.pytorch, nni.nas.strategy"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=120)
