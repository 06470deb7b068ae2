"""``smlt report --tensorboard``: what TensorBoard reads back."""

import sys

import pytest

from smlt_tune import cli
from smlt_tune.backend.watching import tensorboard
from smlt_tune.backend.watching.reading import Watch
from tests.backend.watching.journals import simulated

pytest.importorskip("tensorboard")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tensorboard") / "fleet"
    simulated(path, [{"name": "a", "best": 0.8}, {"name": "b", "best": 0.6}])
    return path


def test_every_report_of_every_job_is_there(folder, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "events"
    assert cli.main(["report", str(folder), "--tensorboard", str(out)]) == 0
    assert "wrote 3 runs" in capsys.readouterr().out
    assert not (tmp_path / "report.html").exists()
    shot = Watch(folder).snapshot()
    for job in shot.jobs:
        run = EventAccumulator(str(out / job.job_id)).Reload()
        told = run.Scalars("accuracy")
        values = [report.metrics["accuracy"] for report in job.reports]
        assert [one.value for one in told] == pytest.approx(values)
        assert [one.step for one in told] == list(range(1, len(values) + 1))
        assert told[0].wall_time == pytest.approx(
            shot.began_at + job.started_s + job.reports[0].time_s
        )
        assert run.Scalars("job/cost_usd")[-1].value == pytest.approx(job.reports[-1].cost_usd)
    money = EventAccumulator(str(out / "(fleet)")).Reload().Scalars("fleet/settled_usd")
    assert money[-1].value == pytest.approx(shot.money.settled)


def test_what_cannot_be_written_is_refused(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    command = ["report", str(folder), "--tensorboard"]
    assert cli.main([*command, str(tmp_path / "file")]) == 2
    assert "cannot write to" in capsys.readouterr().err
    assert cli.main([*command, str(tmp_path / "events")]) == 0
    assert cli.main([*command, str(tmp_path / "events")]) == 2
    assert "holds event files" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert cli.main([*command, str(tmp_path / "other")]) == 2
    assert tensorboard.MISSING in capsys.readouterr().err
