"""``smlt status``, ``smlt report`` and ``smlt dashboard``."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from urllib.request import urlopen

import pytest

from smlt_tune import cli
from tests.backend.watching.journals import simulated


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("commands") / "fleet"
    simulated(path, [{"name": "a", "best": 0.8}])
    return path


def test_status_prints_a_table_or_json(folder, capsys):
    assert cli.main(["status", str(folder)]) == 0
    assert re.search(r"a +finished +2 x 1769 MB +0\.7500", capsys.readouterr().out)
    assert cli.main(["status", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["jobs"][0]["job_id"] == "a"


def test_report_writes_one_file(folder, tmp_path, capsys):
    out = tmp_path / "r.html"
    assert cli.main(["report", str(folder), "--out", str(out)]) == 0
    assert "best accuracy" in out.read_text()
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "no" / "r.html")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_sweep_says_what_its_jobs_are_compared_by(folder, tmp_path):
    kept, out = tmp_path / "kept", tmp_path / "r.html"
    shutil.copytree(folder, kept)
    for direction, title in (("minimize", "smaller"), ("maximize", "larger")):
        (kept / "sweep.yaml").write_text(f"metric: accuracy\ndirection: {direction}\n")
        assert cli.main(["report", str(kept), "--out", str(out)]) == 0
        assert f"accuracy ({title} is better)" in out.read_text()
    (kept / "sweep.yaml").write_text("metric: nobody_reports_it\n")
    assert cli.main(["report", str(kept), "--out", str(out)]) == 0


@pytest.mark.parametrize("command", ["status", "report", "dashboard"])
@pytest.mark.parametrize("wrong", [["/nonexistent"], ["FOLDER", "--metric", "f1"]])
def test_what_cannot_be_shown_is_refused(folder, capsys, command, wrong):
    arguments = [str(folder) if one == "FOLDER" else one for one in wrong]
    assert cli.main([command, *arguments]) == 2
    assert re.search("there is no fleet|no job has reported", capsys.readouterr().err)


@pytest.mark.parametrize(("host", "secret"), [("127.0.0.1", ""), ("0.0.0.0", r"\?token=[\w-]{32}")])
def test_dashboard_prints_where_it_is_and_ends_with_ctrl_c(folder, host, secret):
    command = [sys.executable, "-m", "smlt_tune.cli", "dashboard", str(folder), "--host", host]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().strip()
            assert re.fullmatch(rf"http://{re.escape(host)}:\d+/{secret}", address)
            if not secret:
                with urlopen(f"{address}view", timeout=60) as answer:
                    assert b"1 finished" in answer.read()
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()


def test_status_watches_until_ctrl_c(folder):
    command = [sys.executable, "-m", "smlt_tune.cli", "status", str(folder), "--watch"]
    environment = {**os.environ, "FORCE_COLOR": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            seen = ""
            while seen.count("finished") < 3:  # it draws again
                seen += process.stdout.readline()
            os.kill(process.pid, signal.SIGINT)
            process.stdout.read()
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
