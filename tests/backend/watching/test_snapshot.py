"""What is said of a fleet is what its journal says: empty, one job, many, dead, at every moment."""

import json
import math
from itertools import pairwise

import pytest

from smlt_tune.backend.history import HistoryEvent
from smlt_tune.backend.prices import usd_to_nanos
from smlt_tune.backend.watching.metrics import Metric, best, choose, ranked
from smlt_tune.backend.watching.snapshot import Client, take
from smlt_tune.errors import InvalidInput
from tests.backend.watching.journals import opened_with, repeated, simulated

HERE, NOBODY = Client(pid=7), Client()
CONFIGS = [
    {"name": "good", "best": 0.9},
    {"name": "bad", "best": 0.5},
    {"name": "long", "epochs": 400},
    {"name": "broken", "broken": "no such layer"},
]


def by_hand(kind, job="", /, at=0.0, **body):
    return HistoryEvent(0, at, kind, job, body)


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    """Four jobs, some functions lost, one job paused meanwhile and stopped by the budget."""

    def pause(fleet):
        fleet.run_until(lambda: fleet.now_s >= 10)
        job = next(job for job in fleet.jobs() if job.job_id == "long")
        job.pause()
        fleet.run_until(lambda: job.status == "paused")
        fleet.run_until(lambda: fleet.now_s >= 60)
        job.resume()

    folder = tmp_path_factory.mktemp("journal") / "fleet"
    return simulated(
        folder, CONFIGS, act=pause, budget_usd=0.01, deadline_s=9000, crashes_per_hour=60
    )


def test_a_fleet_without_jobs():
    shot = take([], client=NOBODY, now_at=5.0)
    assert (shot.state, shot.jobs, shot.elapsed_s) == ("closed", (), 0.0)
    shot = take([by_hand("fleet", name="f", at=3.0)], client=HERE, now_at=5.0)
    assert (shot.name, shot.state, shot.elapsed_s) == ("f", "open", 2.0)
    assert (shot.money.settled, shot.money.reserved, shot.money.budget) == (0.0, 0.0, None)


def test_a_fleet_that_has_ended(journal):
    shot = take(journal, client=NOBODY, now_at=math.inf)
    assert shot.state == "closed"
    assert {job.job_id: job.status for job in shot.jobs} == {
        "good": "finished",
        "bad": "finished",
        "long": "stopped",
        "broken": "failed",
    }
    good, _, long, broken = shot.jobs
    assert good.last("accuracy") == pytest.approx(0.9 * (1 - 0.5**4))
    assert len(good.reports) == 4
    assert long.reason == "budget"
    assert "ZeroDivisionError" in broken.reason
    assert shot.elapsed_s == pytest.approx(journal[-1].at - journal[0].at)
    assert shot.deadline_s == 9000
    lost = sum(job.lost for job in shot.jobs)
    assert lost > 0
    assert len(shot.failures) == lost + 1  # and the job that failed
    assert (shot.sizes[-1].workers, shot.sizes[-1].memory_mb) == (0, 0)
    assert shot.money.total.mid == pytest.approx(shot.money.settled)


def test_the_money_is_that_of_the_ledger_at_every_moment(journal):
    entries = {}
    for end, event in enumerate(journal, 1):
        if event.kind != "ledger":
            continue
        entries[event.body["entry_id"]] = event.body
        shot = take(journal[:end], client=HERE, now_at=event.at)
        open_ = [e["reserved_usd"] for e in entries.values() if e["settled_usd"] is None]
        paid = [e["settled_usd"] for e in entries.values() if e["settled_usd"] is not None]
        assert usd_to_nanos(shot.money.settled) == sum(map(usd_to_nanos, paid))
        assert usd_to_nanos(shot.money.reserved) == sum(map(usd_to_nanos, open_))
        assert shot.money.settled + shot.money.reserved <= shot.money.budget + 1e-12
        assert sum(usd_to_nanos(one.settled) for one in shot.bill) == sum(map(usd_to_nanos, paid))
        assert sum(job.reserved_usd for job in shot.jobs) == pytest.approx(sum(open_))


def test_a_job_waits_runs_pauses_and_ends(journal):
    seen, workers = [], []
    for end in range(1, len(journal) + 1):
        shot = take(journal[:end], client=HERE, now_at=journal[end - 1].at)
        for job in shot.jobs:
            if job.job_id == "long" and [job.status] != seen[-1:]:
                seen.append(job.status)
                others = [one for one in shot.jobs if one.status == "running" and one != job]
                size = shot.sizes[-1].workers if shot.sizes else 0
                workers.append(size - sum(one.allocation.workers for one in others))
    assert seen == ["queued", "running", "paused", "queued", "running", "stopped"]
    assert workers == [0, 2, 0, 0, 2, 0]


def test_who_has_the_fleet_open_tells_a_crash_from_a_run(journal):
    half = [one for one in journal if one.at <= journal[0].at + 4]
    at = half[-1].at
    running = take(half, client=HERE, now_at=at + 100)
    assert (running.state, running.pid, running.elapsed_s) == ("open", 7, pytest.approx(104, abs=1))
    assert {job.status for job in running.jobs} == {"running", "failed"}
    dead = take(half, client=NOBODY, now_at=at + 100)
    assert dead.state == "crashed"
    assert dead.elapsed_s == pytest.approx(at - journal[0].at)
    assert {job.status for job in dead.jobs} == {"interrupted", "failed"}
    assert dead.money.reserved > 0
    assert take(half, client=Client(known=False), now_at=at).state == "unknown"


def test_a_thousand_jobs(journal):
    one = take(journal, client=NOBODY, now_at=0)
    shot = take(repeated(journal, 250), client=NOBODY, now_at=0)
    assert len(shot.jobs) == 1000
    assert [shot.count(s) for s in ("finished", "stopped", "failed")] == [500, 250, 250]
    paid_by_jobs = one.money.settled - sum(c.settled for c in one.bill[1:])
    assert shot.money.settled == pytest.approx(250 * paid_by_jobs)


def test_the_forecast_is_the_latest_prediction_on_top_of_what_was_spent_by_then():
    small = {"workers": 1, "memory_mb": 512, "store": "default"}
    predicted = {"time_s": [50, 60, 80], "cost_usd": [0.2, 0.3, 0.5]}
    paid = {"entry_id": "x", "job": "a", "what": "a function", "reserved_usd": 0.2}
    events = [
        by_hand("fleet", name="f", budget_usd=2.0, deadline_s=500.0),
        by_hand("job", "a"),
        by_hand("job", "b"),
        by_hand("generation", "a", generation=0, **small, reason="", time_s=0.0),
        by_hand("ledger", "a", at=10.0, **paid, settled_usd=0.1),
        by_hand(
            "decision", "a", at=20.0, allocation=small, reason="", occasion="", time_s=20.0,
            evidence={"prediction": predicted},
        ),
    ]  # fmt: skip
    shot = take(events, client=HERE, now_at=30.0)
    total = shot.money.total
    assert [total.low, total.mid, total.high] == pytest.approx([0.3, 0.4, 0.6])
    assert (shot.money.unknown, shot.end_s) == (1, 80.0)  # nothing is known of b
    again = by_hand("fleet", name="f", at=100.0, budget_usd=3.0, deadline_s=50.0)
    shot = take([*events, again], client=HERE, now_at=100.0)
    assert (shot.money.budget, shot.deadline_s) == (3.0, 150.0)


def test_what_an_older_or_newer_journal_has_or_lacks_is_passed_over():
    events = [
        by_hand("fleet", name="f"),
        by_hand("weather", "", mood="fine"),
        by_hand("job", "a"),
        by_hand("paused", "never submitted"),
        by_hand("generation", "a", generation=0, workers=2, memory_mb=512, reason="", time_s=0),
        by_hand("report", "a", index=0, time_s=1, cost_usd=0, metrics={"loss": math.nan, "x": "?"}),
    ]
    shot = take(events, client=HERE, now_at=0)
    assert shot.jobs[0].last("loss") is None
    assert (shot.money.budget, shot.deadline_s) == (None, None)
    told = json.loads(json.dumps(shot.to_json(), allow_nan=False))
    assert told["jobs"][0]["reports"][0]["metrics"] == {"loss": None, "x": "?"}


def test_a_report_that_is_made_again_replaces_the_first():
    report = {"time_s": 1, "cost_usd": 0}
    events = [
        by_hand("job", "a"),
        by_hand("report", "a", index=1, metrics={"loss": 2.0}, **report),
        by_hand("report", "a", index=0, metrics={"loss": 3.0}, **report),
        by_hand("report", "a", index=1, metrics={"loss": 1.0}, **report),
    ]
    (job,) = take(events, client=HERE, now_at=0).jobs
    assert [one.metrics["loss"] for one in job.reports] == [3.0, 1.0]


# --- what jobs are compared by --------------------------------------------------------------------


def test_jobs_are_ranked_by_a_metric_whose_direction_is_known(journal):
    shot = take(journal, client=NOBODY, now_at=0)
    metric = choose(shot.jobs)
    assert metric == Metric("accuracy", maximize=True)
    assert [job.job_id for job in ranked(shot.jobs, metric)] == ["good", "bad", "long", "broken"]
    assert best(shot.jobs, metric).job_id == "good"  # long was better, but did not end
    assert best(shot.jobs, choose(shot.jobs, mode="min")).job_id == "bad"
    for one, other in pairwise(ranked(shot.jobs, metric)[:2]):
        assert one.last("accuracy") > other.last("accuracy")


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (["epoch", "val_loss"], Metric("val_loss", maximize=False)),
        (["loss", "accuracy"], Metric("accuracy", maximize=True)),
        (["epoch"], Metric("epoch", maximize=None)),
        ([], Metric("", maximize=None)),
    ],
)
def test_the_metric_is_told_from_its_name_or_not_at_all(metrics, expected):
    report = {"index": 0, "time_s": 1, "cost_usd": 0, "metrics": dict.fromkeys(metrics, 1.0)}
    end = {"status": "finished", "reason": "", "cost_usd": 0.0, "duration_s": 1.0}
    events = [by_hand("job", "a"), by_hand("report", "a", **report), by_hand("ended", "a", **end)]
    jobs = take(events, client=NOBODY, now_at=0).jobs
    assert choose(jobs) == expected
    assert (best(jobs, expected) is None) == (expected.maximize is None)


def test_a_metric_that_nobody_reports_or_understands_is_refused(journal):
    jobs = take(journal, client=NOBODY, now_at=0).jobs
    with pytest.raises(InvalidInput, match=r"'f1'; they report accuracy, epoch"):
        choose(jobs, "f1")
    with pytest.raises(InvalidInput, match="--mode min or --mode max"):
        choose(jobs, "epoch")
    assert choose(jobs, "epoch", "min") == Metric("epoch", maximize=False)
    assert choose((), "loss") == Metric("loss", maximize=False)  # nothing was reported yet


def test_what_a_client_was_given_may_be_missing(journal):
    assert take(opened_with(journal, None, None), client=NOBODY, now_at=0).money.budget is None
