"""Why a job had its allocations: from journals that are whole, old, foreign or broken."""

import json
import sqlite3

import pytest

from smlt_tune import cli
from smlt_tune.backend.explain import explain, explain_all
from smlt_tune.backend.history import History, read_history
from smlt_tune.backend.resource_manager.observations import Allocation, Interval

SMALL = {"workers": 2, "memory_mb": 1769, "store": "default"}
LARGE = {"workers": 4, "memory_mb": 3008, "store": "default"}
EVIDENCE = {
    "own": 0,
    "siblings": 12,
    "goal": "cheapest within 5:00",
    "prediction": {
        "iteration_s": [0.025, 0.029, 0.034],
        "time_s": [40.0, 48.0, 62.0],
        "cost_usd": [0.0009, 0.0011, 0.0014],
        "fits": 0.99,
    },
    "alternatives": [
        {**SMALL, "workers": 1, "time_s": 80.0, "cost_usd": 0.001},
        {**LARGE, "time_s": [20.0, 25.0, 30.0], "cost_usd": [0.001, 0.002, 0.003]},
    ],
    "workload": {"batch": 64},
}


def profile(allocation, iterations, iteration_s, **more):
    return {
        "allocation": allocation,
        "iterations": iterations,
        "iteration_s": iteration_s,
        "peak_mb": 400.0,
        **more,
    }


def decision(allocation, reason, time_s, **evidence):
    return {
        "allocation": allocation,
        "reason": reason,
        "occasion": "workload" if evidence else "first",
        "time_s": time_s,
        "evidence": EVIDENCE | evidence,
    }


def generation(number, allocation, reason, time_s):
    return {"generation": number, **allocation, "reason": reason, "time_s": time_s}


WHOLE = [
    ("fleet", "", {"name": "f"}),
    ("job", "a", {}),
    ("decision", "a", decision(SMALL, "cheapest that keeps the deadline", 0.0)),
    ("generation", "a", generation(1, SMALL, "cheapest that keeps the deadline", 0.0)),
    ("job", "b", {}),
    ("profile", "a", profile(SMALL, 30, 0.030)),
    ("profile", "a", profile(SMALL, 10, 0.034, peak_mb=512.0)),
    ("decision", "a", decision(LARGE, "the batch grew", 32.0, own=2, gain=0.21)),
    ("generation", "a", generation(2, LARGE, "the batch grew", 32.5)),
    ("profile", "a", profile(SMALL, 10, 0.034)),  # its functions still trained
    ("profile", "a", profile(LARGE, 100, 0.010, peak_mb=700.0)),
    ("generation", "a", generation(3, LARGE, "the time limit is near", 50.0)),
    ("ended", "a", {"status": "finished", "reason": "", "cost_usd": 0.002, "duration_s": 65.0}),
]


@pytest.fixture
def fleet(tmp_path):
    def write(events):
        with History(tmp_path / "fleet") as history:
            for event in events:
                history.append(*event)
        return tmp_path / "fleet"

    return write


def test_every_decision_is_told_with_what_was_expected_and_what_happened(fleet):
    job = explain(read_history(fleet(WHOLE)), "a")
    assert (job.status, job.duration_s, job.cost_usd) == ("finished", 65.0, 0.002)
    first, second, relaunch = job.steps

    assert (first.before, first.allocation) == (None, Allocation(2, 1769))
    assert (first.own, first.siblings, first.gain) == (0, 12, None)
    assert (first.occasion, second.occasion) == ("first", "workload")
    assert first.goal == "cheapest within 5:00"
    assert first.predicted.time_s == Interval(40.0, 48.0, 62.0)
    assert first.predicted.fits == 0.99
    assert [(a.allocation, a.time_s, a.cost_usd) for a in first.alternatives] == [
        (Allocation(1, 1769), 80.0, 0.001),
        (Allocation(4, 3008), 25.0, 0.002),
    ]
    assert first.happened.iterations == 50
    assert first.happened.iteration_s == pytest.approx((30 * 0.030 + 20 * 0.034) / 50)
    assert first.happened.peak_mb == 512.0
    assert first.happened.time_s is None  # it did not last to the end of the job
    assert first.happened.cost_usd is None

    assert (second.before, second.allocation) == (Allocation(2, 1769), Allocation(4, 3008))
    assert (second.own, second.gain, second.generations) == (2, 0.21, (2,))
    assert second.happened.iteration_s == pytest.approx(0.010)
    assert second.happened.time_s == pytest.approx(33.0)

    assert not relaunch.decided
    assert (relaunch.reason, relaunch.generations) == ("the time limit is near", (3,))
    assert relaunch.before == relaunch.allocation


def test_a_single_decision_is_held_against_the_whole_bill(fleet):
    events = [*WHOLE[:4], ("ended", "a", {"status": "finished", "cost_usd": 1.5, "duration_s": 9})]
    (step,) = explain(read_history(fleet(events)), "a").steps
    assert (step.happened.cost_usd, step.happened.time_s) == (1.5, 9.0)


def test_running_out_of_memory_is_told(fleet):
    lost = profile(SMALL, 0, 0.0, out_of_memory=True, peak_mb=1769.0)
    (step,) = explain(read_history(fleet([*WHOLE[:4], ("profile", "a", lost)])), "a").steps
    assert step.happened.out_of_memory
    assert step.happened.peak_mb == 1769.0
    assert step.happened.iteration_s is None


def test_times_that_were_assumed_for_a_job_of_unknown_length_are_not_told(fleet):
    events = [("job", "a", {}), ("decision", "a", decision(SMALL, "", 0.0, length_known=False))]
    (step,) = explain(read_history(fleet(events)), "a").steps
    assert (step.predicted.time_s, step.predicted.cost_usd) == (None, None)
    assert step.predicted.iteration_s == Interval(0.025, 0.029, 0.034)
    assert {(one.time_s, one.cost_usd) for one in step.alternatives} == {(None, None)}


@pytest.mark.parametrize(
    "body",
    [
        {"allocation": SMALL},
        {"allocation": SMALL, "evidence": None},
        {"allocation": SMALL, "evidence": {"prediction": None, "alternatives": None}},
        {"allocation": SMALL, "evidence": {"prediction": {"time_s": [1, 2], "fits": "yes"}}},
        {"allocation": SMALL, "evidence": {"alternatives": [{}, 3, {"workers": 0}]}},
        {"allocation": {"workers": 2, "memory_mb": 1769}, "evidence": {"own": None}},
    ],
)
def test_what_the_journal_lacks_is_left_out(fleet, body, capsys):
    folder = fleet([("job", "a", {}), ("decision", "a", body)])
    (step,) = explain(read_history(folder), "a").steps
    assert step.allocation == Allocation(2, 1769)
    assert step.predicted.time_s is None
    assert step.alternatives == ()
    assert cli.main(["explain", "a", "--path", str(folder)]) == 0
    assert "2 x 1769 MB" in capsys.readouterr().out


@pytest.mark.parametrize("body", [{}, {"allocation": 3}, {"allocation": {"workers": -1}}])
def test_an_event_without_an_allocation_is_passed_over(fleet, body):
    events = [("job", "a", {}), ("decision", "a", body), ("profile", "a", body)]
    assert explain(read_history(fleet(events)), "a").steps == ()


def test_generations_of_a_fleet_that_recorded_no_decisions_stand_for_themselves(fleet):
    old = {"workers": 2, "memory_mb": 1769}
    events = [
        ("job", "a", {}),
        ("generation", "a", generation(1, old, "pinned, or the default", 0.0)),
        ("generation", "a", generation(2, {**old, "workers": 3}, "resize", 8.0)),
        ("ended", "a", {"status": "stopped", "reason": "budget", "error": None}),
    ]
    job = explain(read_history(fleet(events)), "a")
    assert [(step.decided, step.reason) for step in job.steps] == [
        (False, "pinned, or the default"),
        (False, "resize"),
    ]
    assert (job.status, job.reason) == ("stopped", "budget")


def test_the_command_tells_one_job(fleet, capsys):
    assert cli.main(["explain", "a", "--path", str(fleet(WHOLE))]) == 0
    out = capsys.readouterr().out
    for fact in (
        "cheapest that keeps the deadline",
        "cheapest within 5:00",
        "0 measurements of its own, 12 of siblings",
        "48 s (40 s to 1:02)",
        "memory is enough with 99%",
        "2 x 1769 MB > 4 x 3008 MB",
        "21% expected",
        "10 ms per iteration, over 100 of them",
        "at most 700 MB",
        "1 x 1769 MB: 1:20, $0.001",
        "the time limit is near",
    ):
        assert fact in out
    assert out.index("cheapest that keeps") < out.index("the batch grew") < out.index("time limit")


def test_the_command_tells_all_jobs_in_short(fleet, capsys):
    folder = fleet(WHOLE)
    assert cli.main(["explain", "--path", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (a,) = (line for line in lines if line.startswith("a "))
    (b,) = (line for line in lines if line.startswith("b "))
    assert "finished" in a
    assert "2 x 1769 MB > 4 x 3008 MB" in a
    assert "the batch grew" in a  # not why it was started again on the same
    assert "running" in b
    assert [job.job_id for job in explain_all(read_history(folder))] == ["a", "b"]


def test_the_command_gives_json(fleet, capsys):
    folder = str(fleet(WHOLE))
    cli.main(["explain", "a", "--json", "--path", folder])
    one = json.loads(capsys.readouterr().out)
    assert one["steps"][1]["allocation"] == {"workers": 4, "memory_mb": 3008, "store": "default"}
    cli.main(["explain", "--json", "--path", folder])
    assert [job["job_id"] for job in json.loads(capsys.readouterr().out)] == ["a", "b"]


def test_a_fleet_without_jobs(fleet, capsys):
    folder = str(fleet([("fleet", "", {"name": "f"})]))
    assert cli.main(["explain", "--path", folder]) == 0
    assert "no job was submitted" in capsys.readouterr().out
    assert cli.main(["explain", "a", "--path", folder]) == 2
    assert "no job 'a': no job was submitted" in capsys.readouterr().err


def _other_program(path):
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE notes (text)")
    db.close()


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (lambda path: path.unlink(), 2, "there is no fleet in"),
        (lambda path: path.write_bytes(b"no database" * 999), 1, "is damaged"),
        (lambda path: (path.unlink(), _other_program(path)), 2, "was not written by smlt_tune"),
    ],
    ids=["missing", "damaged", "another program's"],
)
def test_a_journal_that_cannot_be_read_is_an_error(fleet, capsys, spoil, code, message):
    folder = fleet(WHOLE)
    spoil(folder / "history.sqlite3")
    assert cli.main(["explain", "a", "--path", str(folder)]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("jobs", "asked", "message"),
    [
        (["trial-1", "trial-2"], "trial-3", "no job 'trial-3'; it has trial-"),
        (["apple"], "zzz", "no job 'zzz'; it has apple"),
        ([f"{n:04}" for n in range(40)], "xyz", "it has 0000, 0001, 0002, 0003, 0004 and 35 more"),
    ],
)
def test_an_unknown_job_lists_the_known_ones(fleet, capsys, jobs, asked, message):
    folder = fleet([("job", job, {}) for job in jobs])
    assert cli.main(["explain", asked, "--path", str(folder)]) == 2
    assert message in capsys.readouterr().err
