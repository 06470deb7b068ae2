"""When money or time will not do for all jobs, the best are finished."""

import math
import random

import pytest

import smlt_tune as smlt
from smlt_tune.backend.history import History, read_history
from smlt_tune.backend.platforms.simulated import (
    SimulatedPlatform,
    SimulatedTraining,
    SimulationOptions,
)
from smlt_tune.backend.rationing import BUDGET, DEADLINE, Claim, held_back
from smlt_tune.backend.resource_manager.policy import PinnedOrDefault
from smlt_tune.backend.simulated_fleet import SimulatedFleet
from smlt_tune.backend.watching.halt_report import halt_report
from smlt_tune.backend.watching.snapshot import Client, take
from smlt_tune.errors import InvalidInput
from smlt_tune.runtime.features import ModelFeatures
from tests import jobs

FEATURES = ModelFeatures(1000, 4000, 6000.0, 100.0)


def claim(name, *values, usd=1.0, seconds=10.0, **known):
    begun = {"begun": True, "has_functions": True, "order": ord(name), **known}
    return Claim(name, values, usd=usd, seconds=seconds, **begun)


def fresh(name, **needs):
    return claim(name, begun=False, has_functions=False, **needs)


@pytest.mark.parametrize(
    ("claims", "money_usd", "time_s", "held"),
    [
        # Nobody is held back as long as there is enough, or nobody knows.
        ([], 0.0, math.inf, {}),
        ([claim("a", 0.1), claim("b", 0.2)], 2.0, math.inf, {}),
        ([claim("a", 0.1), claim("b", 0.2)], math.inf, math.inf, {}),
        ([claim("a", 0.1, usd=None), claim("b", 0.2)], 1.0, math.inf, {}),
        # No new jobs, then not the worst.
        ([claim("a", 0.1), fresh("b")], 1.5, math.inf, {"b": BUDGET}),
        ([claim("a", 0.1), claim("b", 0.2), fresh("c")], 1.5, math.inf, {"a": BUDGET, "c": BUDGET}),
        # Nobody is judged before its first report.
        ([claim("a"), claim("b")], 1.5, math.inf, {}),
        ([claim("a"), claim("b", 0.1)], 0.5, math.inf, {"b": BUDGET}),
        # Two are compared at the last report that both have.
        ([claim("a", 0.1, 0.5, 0.7), claim("b", 0.2, 0.6)], 1.5, math.inf, {"a": BUDGET}),
        # What does not do for a better one may do for the next.
        ([claim("a", 0.1), claim("b", 0.2, usd=9.0)], 1.5, math.inf, {"b": BUDGET}),
        # Whoever comes back needs some to spare.
        ([claim("a", 0.1, has_functions=False)], 1.05, math.inf, {}),
        (
            [claim("a", 0.1, has_functions=False), claim("b", 0.2, has_functions=False)],
            2.15,
            math.inf,
            {"a": BUDGET},
        ),
        # What nobody can be finished with goes to the best.
        ([claim("a", 0.1), claim("b", 0.2)], 0.5, math.inf, {"a": BUDGET}),
        ([fresh("a"), fresh("b")], 0.0, math.inf, {"b": BUDGET}),
        # Time: nothing begins that would not end; what runs uses it up, unless it is in the way.
        ([claim("a", 0.1, seconds=60), fresh("b", seconds=60)], 9.0, 50.0, {"b": DEADLINE}),
        (
            [claim("a", 0.1, seconds=60), claim("b", 0.2, has_functions=False)],
            9.0,
            50.0,
            {"a": DEADLINE},
        ),
        (
            [fresh("a", seconds=60), fresh("b", seconds=60)],
            9.0,
            50.0,
            dict.fromkeys("ab", DEADLINE),
        ),
        ([fresh("a", seconds=None)], 9.0, 50.0, {}),
    ],
)
def test_the_best_go_on(claims, money_usd, time_s, held):
    random.Random(1).shuffle(claims)
    found = held_back(claims, money_usd=money_usd, time_s=time_s, maximize=True)
    assert found == held


def test_it_may_be_too_early_to_judge():
    claims = [claim("a", 0.1), claim("b", 0.2), fresh("c")]
    options = {"time_s": math.inf, "maximize": True, "explores": True}
    assert held_back(claims, money_usd=1.5, **options) == {"c": BUDGET}
    assert held_back(claims, money_usd=3.5, **options) == {}


def test_smaller_may_be_better():
    claims = [claim("a", 0.1), claim("b", 0.2)]
    assert held_back(claims, money_usd=1.0, time_s=9.0, maximize=False) == {"b": BUDGET}


def train(config):
    """Better the larger its quality is, from the first report on."""
    return SimulatedTraining(
        epochs=10,
        iterations=20,
        iteration_s=lambda workers, memory_mb, batch: 1.0 / workers,
        metrics=lambda epoch: {"accuracy": config["quality"] * (1 - 0.5 ** (epoch + 1))},
        features=FEATURES,
        batch=8,
    )


#: Of the jobs of a sweep, in the order of their submission.
QUALITIES = [0.1, 0.4, 0.7, 0.2, 0.5, 0.8, 0.3, 0.6]
#: What one of them costs, about, USD.
JOB_USD = 0.0058


def swept(jobs=QUALITIES, concurrency=1000, **options):
    """Runs a sweep; its jobs by their qualities, what is known afterwards, and who was paused."""
    platform = SimulatedPlatform(SimulationOptions(concurrency=concurrency))
    with SimulatedFleet(platform, policy=PinnedOrDefault(), **options) as fleet:
        submitted = [
            fleet.submit(train, {"quality": quality}, workers=2, memory_mb=1769) for quality in jobs
        ]
        fleet.run_until_idle()
        assert all(job.status != "paused" for job in submitted)
        events = fleet.history.read()
        shot = take(events, client=Client(), now_at=fleet.now_s)
    paused = {event.job for event in events if event.kind == "paused"}
    return dict(zip(jobs, submitted, strict=True)), shot, paused


def finished(jobs):
    return {quality for quality, job in jobs.items() if job.status == "finished"}


@pytest.mark.parametrize("affordable", [2, 3, 5])
def test_as_money_runs_out_the_worst_are_paused_and_the_best_are_finished(affordable):
    budget_usd = (affordable + 0.5) * JOB_USD
    without, _, _ = swept(budget_usd=budget_usd)
    jobs, shot, _ = swept(budget_usd=budget_usd, metric="accuracy")
    done = finished(jobs)
    assert len(finished(without)) < len(done)
    assert done == set(sorted(QUALITIES)[len(QUALITIES) - len(done) :])
    assert len(done) <= affordable
    cut = [job.result() for quality, job in jobs.items() if quality not in done]
    assert {outcome.reason for outcome in cut} == {"budget"}
    assert all(outcome.checkpoint for outcome in cut if outcome.reports)
    assert 0.95 * budget_usd <= shot.money.settled <= budget_usd


def test_nobody_is_paused_while_there_is_enough_or_no_metric():
    for options in ({"budget_usd": 9 * JOB_USD, "metric": "accuracy"}, {"budget_usd": 4 * JOB_USD}):
        assert swept(**options)[-1] == set()


def test_at_the_deadline_nothing_begins_that_would_not_end():
    # Four at a time, 104 s each: the second wave would end at 208 s.
    jobs, shot, _ = swept(concurrency=8, deadline_s=150.0, metric="accuracy")
    assert finished(jobs) == set(QUALITIES[:4])
    late = [job.result() for job in list(jobs.values())[4:]]
    assert {(outcome.reason, len(outcome.reports)) for outcome in late} == {("deadline", 0)}
    assert shot.elapsed_s < 120  # nobody waits for it
    headline, more = halt_report(shot).lines()
    assert headline == "4 of 8 jobs finished; the deadline cut 4: 4 never began"
    assert more.startswith("to finish them would have cost $0.02")


def test_the_halt_report_says_what_was_cut_and_what_it_would_have_cost():
    jobs, shot, _ = swept(budget_usd=3.5 * JOB_USD, metric="accuracy")
    report = halt_report(shot)
    done = finished(jobs)
    assert (report.jobs, report.finished, report.unknown) == (8, len(done), 0)
    assert {cut.job.job_id for cut in report.cut} == {
        job.job_id for quality, job in jobs.items() if quality not in done
    }
    for cut in report.cut:
        assert 0.0 < cut.job.done < 1.0
        assert cut.rest_usd.mid == pytest.approx((1 - cut.job.done) * JOB_USD, rel=0.1)
    assert report.rest_usd.mid == pytest.approx(sum(cut.rest_usd.mid for cut in report.cut))
    headline, more = report.lines()
    assert headline == (
        f"{len(done)} of 8 jobs finished; the budget cut {8 - len(done)}: {8 - len(done)} stopped "
        "on the way, with a checkpoint"
    )
    assert more.startswith("to finish them would have cost $0.0")


def test_the_halt_report_of_a_fleet_that_cut_nothing_is_empty():
    assert halt_report(swept()[1]).lines() == []
    assert halt_report(take([], client=Client(), now_at=0.0)).lines() == []


# --- what users do meanwhile ----------------------------------------------------------------------


@pytest.fixture
def halted():
    """A fleet that has paused the job "bad", so that "good" can be finished."""
    platform = SimulatedPlatform(SimulationOptions())
    options = {"policy": PinnedOrDefault(), "budget_usd": 1.75 * JOB_USD, "metric": "accuracy"}
    with SimulatedFleet(platform, **options) as fleet:
        for name, quality in (("bad", 0.1), ("good", 0.9)):
            fleet.submit(train, {"quality": quality}, workers=2, memory_mb=1769, name=name)
        assert fleet.run_until(lambda: fleet.jobs()[0].status == "paused")
        yield fleet


def test_who_is_paused_holds_nothing_and_goes_on_with_what_is_left(halted):
    bad, good = halted.jobs()
    assert halted.ledger.job_reserved_usd("bad") == 0
    assert not halted.idle
    reports = len(bad.result().reports)
    assert (good.result().status, bad.result().reason) == ("finished", "budget")
    paused = next(e for e in halted.history.read() if e.kind == "paused")
    assert (paused.job, paused.body) == ("bad", {"reason": "budget"})
    before = [e for e in halted.history.read() if e.kind == "report" and e.seq < paused.seq]
    assert reports > sum(e.job == "bad" for e in before)


def test_what_begins_meanwhile_waits(halted):
    late = halted.submit(train, {"quality": 1.0}, workers=1, memory_mb=1769)
    assert halted.run_until(lambda: late.status == "paused")
    assert halted.jobs()[1].result().status == "finished"
    assert late.allocations == ()


def test_a_user_may_pause_and_stop_but_not_overrule(halted):
    bad, good = halted.jobs()
    bad.resume()  # it is not theirs to resume
    halted.run_until(lambda: good.status != "running")
    assert good.result().status == "finished"
    bad.pause()
    halted.run_until_idle()
    assert bad.status == "paused"
    bad.resume()
    assert bad.result().reason == "budget"


def test_a_fleet_that_is_opened_again_knows_whom_it_held_back(platform, tmp_path):
    place = {"platform": platform, "object_store": f"file://{tmp_path / 'objects'}"}
    place |= {"metric": "accuracy", "policy": PinnedOrDefault()}
    with smlt.Fleet(**place, path=tmp_path / "a", budget_usd=0.0004) as fleet:
        first = fleet.submit(jobs.train, {"epochs": 100, "pause": 0.05}, workers=1)
        next(first.reports())
        second = fleet.submit(jobs.train, {"epochs": 1, "pause": 0}, workers=1)
        state = fleet._states[second.job_id]
        with state.changed:
            assert state.changed.wait_for(lambda: state.status == "paused", 30)
        events = read_history(tmp_path / "a")
    with History(tmp_path / "b") as copied:  # as the client would have left it had it died then
        for event in events:
            copied.append(event.kind, event.job, event.body)
    with smlt.Fleet.open(tmp_path / "b", **place, budget_usd=1.0) as fleet:
        first, second = fleet.jobs()
        assert second.result(60).status == "finished"
        first.stop()
        told = [e.kind for e in read_history(tmp_path / "b") if e.job == second.job_id]
    assert told.index("paused") < told.index("resumed") < told.index("generation")


def test_every_mistake_is_listed():
    with pytest.raises(InvalidInput) as refused:
        SimulatedFleet(SimulatedPlatform(), metric="", mode="best")
    assert len(refused.value.mistakes) == 2
