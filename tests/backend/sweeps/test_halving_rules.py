"""Who goes on, from reports alone."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smlt_tune.backend.sweeps.halving_rules import (
    Schedule,
    Situation,
    Trial,
    geometric,
    situation,
)
from smlt_tune.errors import InvalidInput

SCHEDULE = Schedule("score", maximize=True, rungs=(1, 2, 4), factor=2)


def trials(*values, status="running"):
    return [Trial(tuple(each), status) for each in values]


def test_rungs_are_geometric():
    assert geometric(1, 3, 4) == (1, 3, 9, 27)
    assert geometric(2, 2, 1) == (2,)


@pytest.mark.parametrize(
    ("known", "entered", "to_come", "best", "over"),
    [
        # nothing has begun
        (trials([], [], [], [], status=""), [(0, 1, 2, 3)], {0, 1, 2, 3}, None, False),
        # one has come, leads, and waits for the others
        (trials([], [3.0], [], []), [(0, 1, 2, 3)], {0, 2, 3}, 1, False),
        # all have come: the best half goes on, the best first
        (trials([1.0], [3.0], [2.0], [0.0]), [(0, 1, 2, 3), (1, 2)], {1, 2}, 1, False),
        # what is reported later changes nothing about an earlier stage
        (
            trials([1.0], [3.0, 0.5], [2.0, 0.6], [0.0]),
            [(0, 1, 2, 3), (1, 2), (2,)],
            {2},
            2,
            False,
        ),
        # at the last rung a trial is there once it is over
        (
            trials([1.0], [3.0, 0.5], [2.0, 0.6, 0.6, 0.7], [0.0]),
            [(0, 1, 2, 3), (1, 2), (2,)],
            {2},
            2,
            False,
        ),
    ],
)
def test_a_stage_ends_when_all_have_come_to_its_rung(known, entered, to_come, best, over):
    assert situation(SCHEDULE, known) == Situation(tuple(entered), frozenset(to_come), best, over)


def test_who_is_lost_before_the_rung_loses_its_place_to_the_next():
    known = [
        Trial((3.0,), "paused"),
        Trial((), "failed"),
        Trial((), "stopped"),
        Trial((1.0,), "paused"),
    ]
    assert situation(SCHEDULE, known).entered[1] == (0, 3)


def test_who_is_lost_after_the_rung_takes_nobody_with_it():
    known = [Trial((3.0,), "failed"), Trial((2.0,), "paused"), Trial((1.0,), "paused")]
    now = situation(SCHEDULE, known)
    assert now.entered == ((0, 1, 2), (0,))
    assert now.over, "its one trial is lost"
    assert now.best == 0, "it has led at the last rung that any has come to"


def test_who_reports_no_number_loses_its_place():
    known = trials([math.nan], [1.0], [math.nan], [0.0], status="paused")
    assert situation(SCHEDULE, known).entered[1] == (1, 3)
    assert situation(SCHEDULE, trials([math.nan], status="paused")).best is None


def test_a_training_that_was_shorter_is_judged_by_its_last_report():
    schedule = Schedule("score", maximize=False, rungs=(2, 4), factor=2)
    known = [Trial((9.0, 1.0, 0.5), "paused"), Trial((0.1,), "finished")]
    now = situation(schedule, known)
    assert now.entered[1] == (1,)
    assert (now.best, now.over) == (1, True)


def test_everything_is_over_when_nobody_is_left():
    now = situation(SCHEDULE, trials([], [], status="failed"))
    assert (now.entered, now.best, now.over) == (((0, 1),), None, True)


@settings(deadline=None)  # the machine may be busy
@given(st.data())
def test_step_by_step_or_all_at_once_the_same_trials_go_on(data):
    """Also after a crash, whoever asks again goes on with the same trials."""
    count = data.draw(st.integers(1, 12))
    factor = data.draw(st.integers(2, 4))
    schedule = Schedule("x", data.draw(st.booleans()), geometric(1, factor, 3), factor)
    whole = [
        tuple(data.draw(st.floats(-9, 9)) for _ in range(schedule.rungs[-1])) for _ in range(count)
    ]
    lost = data.draw(st.dictionaries(st.integers(0, count - 1), st.integers(0, 3)))
    known = [Trial() for _ in range(count)]
    for _ in range(1000):
        now = situation(schedule, known)
        if now.over:
            break
        i = data.draw(st.sampled_from(sorted(now.to_come)))
        done = len(known[i].values)
        if lost.get(i) == done:
            known[i] = Trial(known[i].values, "failed")
        elif done == schedule.rungs[-1]:
            known[i] = Trial(whole[i], "finished")
        else:
            known[i] = Trial(whole[i][: done + 1], "running")
        later = situation(schedule, known)
        assert later.entered[: len(now.entered)] == now.entered, "what was decided stays"
    assert now.over
    for stage, here in enumerate(now.entered):
        assert len(here) <= schedule.trials(stage, count)
        for i in set(range(count)) - set(here):
            assert len(known[i].values) <= schedule.rungs[stage], "trained beyond its end"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rungs": ()}, "there are no rungs"),
        ({"rungs": (2, 1)}, "rungs must ascend"),
        ({"rungs": (0, 1)}, r"rungs\[0\] must be a whole number"),
        ({"factor": 1}, "factor must be"),
        ({"factor": 2.5}, "factor must be"),
        ({"metric": ""}, "metric must be"),
        ({"reports": 3}, "reports=3 are fewer"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(changes, message):
    given = {"metric": "score", "maximize": True, "rungs": (1, 2, 4), "factor": 2, **changes}
    with pytest.raises(InvalidInput, match=message):
        Schedule(**given)


def test_all_mistakes_of_a_schedule_are_told_at_once():
    with pytest.raises(InvalidInput) as caught:
        Schedule("", maximize=True, rungs=(), factor=0)
    assert len(caught.value.mistakes) == 3
