import numpy as np
import pytest

from smlt_tune.backend.resource_manager.memory import Holdings, MemoryModel

MB = 2**20


def holdings(*rows):
    """Rows of (parameters in MB of float32, activations in MB, trial)."""
    p, a, trial = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    return Holdings(p * MB / 4, a * MB, trial)


def model(rows, peaks, exceeded=None):
    seen = holdings(*rows) if rows else Holdings(*(np.zeros(0) for _ in range(3)))
    return MemoryModel(seen, peaks, exceeded or [False] * len(peaks))


def test_nothing_seen_gives_the_prior_with_room_for_error():
    mean, sd = model([], []).peak_mb(holdings((10, 100, 0)))
    assert mean[0] == pytest.approx(280 + 5 * 10 + 1.3 * 100)
    assert sd[0] > 100


def test_siblings_teach_base_copies_and_activations():
    rows = [(p, a, i) for i, (p, a) in enumerate([(1, 10), (50, 20), (5, 400), (80, 300), (2, 60)])]
    peaks = [350 + 4 * p + 1.1 * a for p, a, _ in rows]
    mean, sd = model(rows, peaks).peak_mb(holdings((40, 200, 99)))
    assert mean[0] == pytest.approx(350 + 160 + 220, rel=0.05)
    assert sd[0] < 120


def test_a_trial_keeps_its_own_offset():
    rows = [(10, 100, 0), (10, 100, 1)]
    mean, _ = model(rows, [400, 520]).peak_mb(holdings((10, 100, 0), (10, 100, 1), (10, 100, 2)))
    assert mean[0] == pytest.approx(400, rel=0.03)
    assert mean[1] == pytest.approx(520, rel=0.03)
    assert mean[0] < mean[2] < mean[1]


def test_what_was_seen_to_fit_fits():
    seen = model([(10, 100, 0)], [430])
    fits = seen.fits(holdings((10, 100, 0), (10, 100, 0)), np.array([512.0, 400.0]))
    assert fits[0] > 0.99
    assert fits[1] < 0.1


@pytest.mark.parametrize("others", [[], [(10, 100, 1)]])
def test_out_of_memory_says_that_the_peak_lies_above(others):
    rows, peaks = [(10, 100, 0), *others], [1024.0, *(450.0 for _ in others)]
    failed = model(rows, peaks, [True, *(False for _ in others)])
    at = holdings((10, 100, 0), (10, 100, 0), (10, 100, 0))
    fits = failed.fits(at, np.array([1024.0, 1200.0, 4096.0]))
    assert fits[0] < 0.2
    assert fits[0] < fits[1] < fits[2]
    assert fits[2] > 0.95


def test_a_bound_below_what_is_known_anyway_changes_nothing():
    rows = [(10, 2000, i) for i in range(4)]
    sure = model(rows[1:], [3000.0] * 3)
    bounded = model(rows, [512.0, 3000.0, 3000.0, 3000.0], [True, False, False, False])
    at = holdings((10, 2000, 9))
    assert bounded.peak_mb(at)[0] == pytest.approx(sure.peak_mb(at)[0], rel=0.02)


def test_half_the_part_of_the_batch_needs_less():
    seen = model([(1, 800, 0)], [1400])
    mean, _ = seen.peak_mb(holdings((1, 800, 0), (1, 400, 0)))
    assert mean[1] < mean[0] - 300


def test_unknown_activations_leave_more_doubt():
    _, sd = model([], []).peak_mb(holdings((100, 0, 0), (100, 1e-9, 0)))
    assert sd[0] > 1.3 * sd[1]
