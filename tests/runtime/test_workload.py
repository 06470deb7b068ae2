from dataclasses import replace

import pytest

from smlt_tune.runtime.data import DataIterator
from smlt_tune.runtime.position import NO_EPOCH, Position
from smlt_tune.runtime.workload import MEASURED_ITERATIONS, Course, WorkloadTeller

DATA = DataIterator(
    size=100,
    batch_size=30,
    shuffle=True,
    drop_last=False,
    seed=0,
    epoch=0,
    loop=1,
    rank=0,
    workers=1,
)


def course_of(epochs, *loops, base=0):
    """One whose first epoch has these loops: (data, batch size)."""
    course = Course()
    course.begin_epochs(base, epochs)
    for number, (data, batch_size) in enumerate(loops, 1):
        course.note(replace(data, epoch=base, loop=number), batch_size)
    return course


def left(course, *position):
    course.position = Position(*position)
    return course.left()


class TestCourse:
    def test_nothing_is_known_before_something_has_trained_or_without_epochs(self):
        assert course_of(3).total() is None
        course = Course()
        course.note(replace(DATA, epoch=NO_EPOCH), 30)
        assert (course.total(), course.left()) == (None, None)

    @pytest.mark.parametrize(
        ("drop_last", "batch_size", "expected"),
        [
            (False, 30, 3 * 4),
            (True, 30, 3 * 3),
            (False, lambda epoch: 30, 3 * 4),
            (False, lambda epoch: 30 * (epoch + 1), 4 + 2 + 2),
            (True, lambda epoch: 30 * (epoch + 1), 3 + 1 + 1),
            (False, lambda epoch: 30 if epoch == 0 else 1 / 0, None),
            (False, lambda epoch: 30 if epoch == 0 else 0, None),
        ],
    )
    def test_total(self, drop_last, batch_size, expected):
        course = course_of(3, (replace(DATA, drop_last=drop_last), batch_size))
        assert (course.total(), left(course, 0, 1, 0)) == (expected, expected)

    def test_several_loops_are_counted_as_they_are_seen(self):
        course = course_of(3, (DATA, 30))
        assert course.total() == 12
        course.note(replace(DATA, loop=2, batch_size=50), 50)
        assert course.total() == 12 + 6
        assert course.trains(replace(DATA, epoch=2, loop=2))
        assert not course.trains(replace(DATA, loop=3))

    def test_left(self):
        course = course_of(3, (DATA, lambda e: 30 * (e + 1)), (replace(DATA, batch_size=50), 50))
        assert course.total() == (4 + 2) + (2 + 2) + (2 + 2)
        assert left(course) == 14
        assert left(course, 0, 1, 0) == 14
        assert left(course, 0, 1, 3) == 11
        assert left(course, 0, 2, 0) == 10
        assert left(course, 0, 2, 2) == 8
        assert left(course, 0, 3, 7) == 8  # an evaluation after them
        assert left(course, 1) == 8
        assert left(course, 2, 2, 1) == 1
        assert left(course, 3) == 0

    def test_a_batch_size_that_changes_against_what_was_foreseen(self):
        size = {"now": 30}
        course = course_of(4, (DATA, lambda epoch: size["now"]))
        assert course.total() == 16
        size["now"] = 60
        course.note(replace(DATA, epoch=1, batch_size=60), lambda epoch: size["now"])
        assert left(course, 1, 1, 0) == 3 * 2

    def test_a_loop_that_the_program_breaks_out_of_is_that_short_again(self):
        course = course_of(4, (DATA, 30))
        course.ended(DATA, 2)
        course.note(replace(DATA, epoch=1), 30)
        assert left(course, 1, 1, 0) == 3 * 2
        course.ended(replace(DATA, epoch=1), 4)
        course.note(replace(DATA, epoch=2), 30)
        assert left(course, 2, 1, 0) == 2 * 4

    def test_epochs_in_several_parts(self):
        course = course_of(3, (DATA, 30))
        course.begin_epochs(4, 2)
        assert course.total() is None
        course.note(replace(DATA, epoch=4, batch_size=50), 50)
        assert course.total() == 3 * 4 + 2 * 2
        assert left(course, 5, 1, 1) == 1

    def test_what_was_done_in_a_part_that_this_invocation_skipped_is_not_known(self):
        course = course_of(3)
        course.begin_epochs(4, 2)
        course.note(replace(DATA, epoch=4), 30)
        assert course.total() is None
        assert left(course, 5, 1, 1) == 3

    def test_epochs_without_end_tell_nothing(self):
        called = []
        assert course_of(10**9, (DATA, called.append)).total() is None
        assert course_of(10**9, (DATA, 30)).total() is None
        assert called == []


class Meter:
    def __init__(self, *, backward=True, failed=False):
        self.flops, self.activation_bytes = 60, 30
        self.backward, self.failed = backward, failed


class Objects:
    def __init__(self):
        self.size = (5, 20)

    def trained(self):
        return self.size

    def measure(self, batch, *, in_job):
        assert in_job
        return Meter()


class TestTeller:
    @pytest.fixture
    def told(self):
        return []

    @pytest.fixture
    def teller(self, told):
        return WorkloadTeller(lambda **workload: told.append(workload))

    def test_only_news_are_told(self, teller, told):
        objects = Objects()
        assert teller.tell(objects, 8, 100)
        assert not teller.tell(objects, 8, 100)
        assert teller.tell(objects, 16, 50)
        assert teller.tell(objects, 16, 40)
        objects.size = (3, 12)
        assert teller.tell(objects, 16, 40)
        assert [(t["parameters"], t["batch"], t["iterations"]) for t in told] == [
            (5, 8, 100),
            (5, 16, 50),
            (5, 16, 40),
            (3, 16, 40),
        ]

    def test_one_iteration_is_measured(self, teller, told):
        teller.measured(teller.meter(Objects(), None), 3)
        assert teller.meter(Objects(), None) is None
        teller.tell(Objects(), 8, None)
        assert (told[0]["flops_per_sample"], told[0]["activation_bytes"]) == (20, 10)

    def test_what_cannot_be_measured_is_told_as_not_known(self, teller, told):
        assert teller.meter(Objects(), None)
        teller.measured(Meter(failed=True), 3)
        assert teller.meter(Objects(), None) is None
        teller.tell(Objects(), 8, None)
        assert (told[0]["flops_per_sample"], told[0]["activation_bytes"]) == (0, 0)

    def test_without_a_backward_pass_the_search_ends(self, teller):
        for _ in range(MEASURED_ITERATIONS):
            assert teller.meter(Objects(), None)
            teller.measured(Meter(backward=False), 3)
        assert teller.meter(Objects(), None) is None

    def test_without_prepared_objects_nothing_is_told(self, teller, told):
        assert teller.meter(None, None) is None
        assert not teller.tell(None, 8, 10)
        assert told == []

    def test_a_worker_that_need_not_tell_measures_nothing(self):
        teller = WorkloadTeller(None)
        assert teller.meter(Objects(), None) is None
        assert not teller.tell(Objects(), 8, 10)
