import pytest

from smlt_tune.runtime.pace import Pace


def chunk_of(iterations, *, batch_s=1.0):
    """What is told of iterations: functions that do something at a time, or None."""
    pace, now = Pace(0.0), 100.0
    pace.loop_begins(now)
    for happens in iterations:
        now += batch_s
        if happens:
            now += happens(pace, now) or 0.0
        pace.trained(now, whole=happens is not half)
    return pace.take_chunk()


def half(pace, now):
    """A smaller batch at the end of a loop."""
    return -0.5


def waits(pace, now):
    pace.waited(0.25)


def saves(pace, now):
    pace.saved(30.0)
    return 30.0


def evaluates(pace, now):
    pace.put_aside(30.0)
    return 30.0


def test_the_first_iteration_of_an_invocation_does_not_count():
    assert chunk_of([None]) == (0, 0.0, 0.0)
    assert chunk_of([lambda *_: 50.0, None, None]) == (2, 1.0, 0.0)


def test_times_are_means_and_hold_what_is_waited():
    assert chunk_of([None, waits, waits, lambda *_: 1.5]) == (3, 1.5, pytest.approx(0.5 / 3))


def test_iterations_that_wait_for_the_next_period_of_the_cpu_count():
    # Three go through, the fourth stands still: the median would be 1 s.
    assert chunk_of([None, *3 * [None, None, None, lambda *_: 16.0]]) == (12, 5.0, 0.0)


@pytest.mark.parametrize("where", [1, 4, 8])
def test_one_that_something_has_disturbed_does_not_count(where):
    happens = [None] * 9
    happens[where] = lambda pace, _: pace.waited(20.0) or 20.0
    assert chunk_of(happens) == (7, 1.0, 0.0)


def test_an_only_one_counts_however_long_it_took():
    assert chunk_of([None, lambda *_: 50.0]) == (1, 51.0, 0.0)


def test_disturbed_and_smaller_iterations_do_not_count():
    assert chunk_of([None, saves, evaluates, half]) == (0, 0.0, 0.0)
    assert chunk_of([None, saves, None, evaluates, None, half]) == (2, 1.0, 0.0)


def test_a_checkpoint_between_two_iterations_disturbs_the_next_one():
    pace = Pace(0.0)
    pace.loop_begins(0.0)
    pace.trained(1.0, whole=True)
    pace.saved(5.0)
    pace.trained(7.0, whole=True)
    assert pace.take_chunk() == (0, 0.0, 0.0)
    pace.trained(8.0, whole=True)
    assert pace.take_chunk() == (1, 1.0, 0.0)


def test_what_lies_between_two_loops_belongs_to_no_iteration():
    pace = Pace(0.0)
    for start_s in (0.0, 100.0):
        pace.loop_begins(start_s)
        pace.trained(start_s + 1.0, whole=True)
        pace.trained(start_s + 2.0, whole=True)
    assert pace.take_chunk() == (3, 1.0, 0.0)


def test_a_chunk_is_told_once():
    pace = Pace(0.0)
    for i in range(4):
        pace.trained(float(i), whole=True)
    assert pace.take_chunk() == (3, 1.0, 0.0)
    assert pace.take_chunk() == (0, 0.0, 0.0)


def test_what_was_forgotten_is_not_told():
    pace = Pace(0.0)
    for i in range(4):
        pace.trained(float(i), whole=True)
    pace.forget_chunk()
    assert pace.take_chunk() == (0, 0.0, 0.0)


def epoch(pace, start_s, *, whole=True):
    """Of 10 s: two training iterations of 2 s, in one of them a checkpoint of 1 s; the rest."""
    pace.epoch_begins(start_s, whole=whole)
    pace.loop_begins(start_s + 1)
    pace.trained(start_s + 3, whole=True)
    pace.saved(1.0)
    pace.trained(start_s + 6, whole=True)
    return start_s + 10


def test_other_share_is_that_of_whole_epochs():
    pace = Pace(0.0)
    assert pace.other_share() is None
    now = epoch(pace, 5.0, whole=False)
    assert pace.other_share() is None
    now = epoch(pace, now)
    assert pace.other_share() is None
    now = epoch(pace, now)
    assert pace.other_share() == 6 / 4
    pace.epoch_begins(now + 4, whole=True)
    assert pace.other_share() == (6 + 10) / (4 + 4)


def test_the_end_is_what_comes_after_the_last_epoch_or_the_iteration_that_broke_it_off():
    pace = Pace(0.0)
    assert pace.end_s(9.0) is None
    pace.epoch_begins(0.0, whole=True)
    pace.loop_begins(0.0)
    assert pace.end_s(9.0) is None
    pace.trained(2.0, whole=True)
    assert pace.end_s(9.0) == 7.0
    pace.held_up(4.0)
    assert pace.end_s(9.0) == 3.0
    pace.epoch_begins(8.0, whole=True)
    assert pace.end_s(9.0) == 1.0
    pace.held_up(0.5)
    assert pace.end_s(9.0) == 0.5


def test_waiting_for_the_client_belongs_to_no_iteration_and_no_epoch():
    pace = Pace(0.0)
    now = 0.0
    for _ in range(2):
        now = epoch(pace, now)
        pace.held_up(1000.0)  # in the report at its end
        now += 1000.0
    pace.epoch_begins(now, whole=True)
    assert pace.other_share() == 6 / 4
    pace.loop_begins(now)
    pace.tick(now)
    pace.held_up(1000.0)  # in mid-iteration
    pace.trained(now + 1002.0, whole=True)
    pace.trained(now + 1004.0, whole=True)
    pace.tick(now + 1004.0)
    assert pace.take_chunk() == (1, 2.0, 0.0)  # the disturbed one does not count
    assert pace.slowest_s < 100
