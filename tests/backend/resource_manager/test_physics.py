import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlt_tune.backend.resource_manager.physics import (
    PRIOR,
    THETA_MEAN,
    IterationTime,
    JobTerms,
    Points,
    free_bandwidth,
    worker_bytes,
)
from smlt_tune.backend.resource_manager.tables import PlatformTable, StoreTable

SIZES = (128, 1769, 3538, 10240)
TABLE = PlatformTable("t", SIZES, (128 / 1769, 1.0, 2.0, 5.8), 1e10, 1e8, 1e-9, 2.0, 0.1)


def theta(**values):
    chosen = {name: median for name, (median, _) in PRIOR.items()} | values
    return np.log([max(value, 1e-30) for value in chosen.values()])


def point(workers=1, memory_mb=1769, *, p=1e6, m=4e6, f=1e8, batch=100, latency=1e-3, store=1e9):
    values = (workers, memory_mb, p, m, f, batch, latency, store)
    return Points(*(np.array([float(value)]) for value in values))


def seconds(at, **unknowns):
    return float(np.exp(IterationTime(TABLE)(at, theta(**unknowns)).ln_s[0]))


NOTHING = dict.fromkeys(PRIOR, 0.0) | {"phi": 1e12}


@pytest.mark.parametrize(
    ("at", "unknowns", "expected"),
    [
        # kappa F b / R: 1e8 FLOP x 100 samples at 1e10 FLOP/s
        (point(), {"kappa": 1}, 1.0),
        (point(memory_mb=128), {"kappa": 1}, 1769 / 128),
        (point(memory_mb=3538), {"kappa": 1}, 0.5),
        (point(workers=4), {"kappa": 1}, 0.25),
        (point(workers=3), {"kappa": 1}, 0.34),  # the largest part: ceil(100 / 3) samples
        (point(), {"kappa": 2}, 2.0),
        # small parts are inefficient: as if there were beta samples more
        (point(workers=100), {"kappa": 1, "beta": 4}, 0.05),
        (point(), {"pi": 1e-9}, 1e-3),
        (point(memory_mb=3538), {"tau": 0.1}, 0.05),
        # Amdahl: half of it parallel, at twice the speed: 1 / (1 / 2 + 1 / 4)
        (point(memory_mb=3538), {"tau": 0.1, "phi": 1.0}, 0.075),
        (point(memory_mb=128), {"tau": 0.1, "phi": 1.0}, 0.1 * 1769 / 128),
        # waiting for the slowest
        (point(workers=4), {"tau": 1, "varsigma": 0.1}, 1 + 0.1 * math.sqrt(2 * math.log(4))),
        (point(), {"tau": 1, "varsigma": 0.1}, 1.0),
        # 3 M - 2 M / n bytes over the link, where the store is far wider
        (point(workers=2, store=1e15), {"omega": 1}, 2 * 4e6 / 1e8),
        (point(workers=4, store=1e15), {"omega": 1}, 2.5 * 4e6 / 1e8),
        # n times that over the store, where the link is far wider
        (point(workers=4, store=1e6), {"omega": 1, "Omega": 1}, 4 * 2.5 * 4e6 / 1e6),
        # as wide as each other: the fourth norm
        (point(workers=2, store=2e8), {"omega": 1, "Omega": 1}, 0.08 * 2**0.25),
        (point(workers=2), {"lambda": 1}, 1e-3 * (4 + 7 / 5)),
        (point(workers=2, memory_mb=3538), {"eta": 1}, 1e-9 * 8e6 / 2),
        # one worker synchronises nothing
        (point(), {"tau": 1, "lambda": 1, "eta": 1}, 1.0),
    ],
)  # fmt: skip
def test_time_per_iteration_in_closed_form(at, unknowns, expected):
    # Bandwidths divide: 0 would be infinitely slow.
    chosen = NOTHING | {"omega": 1e15, "Omega": 1e15} | unknowns
    assert seconds(at, **chosen) == pytest.approx(expected, rel=1e-6)


@given(
    st.integers(1, 200),
    st.integers(128, 10240),
    st.floats(1e4, 1e8),
    st.integers(1, 4096),
    st.integers(0, 2**32),
)
def test_the_gradient_is_the_slope(workers, memory_mb, parameters, batch, seed):
    at = point(workers, memory_mb, p=parameters, m=4 * parameters, f=50 * parameters, batch=batch)
    model = IterationTime(TABLE)
    where = THETA_MEAN + np.random.default_rng(seed).normal(size=len(PRIOR))
    gradient = model(at, where).gradient[0]
    for i in range(len(PRIOR)):
        step = np.zeros(len(PRIOR))
        step[i] = 1e-5
        slope = (model(at, where + step).ln_s[0] - model(at, where - step).ln_s[0]) / 2e-5
        assert gradient[i] == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("i", range(len(PRIOR)), ids=list(PRIOR))
def test_the_derivative_of_computation_is_its_slope(i):
    model, at, where = IterationTime(TABLE), point(6, 4000.0), THETA_MEAN + 0.1
    step = 1e-5 * (np.arange(len(PRIOR)) == i)
    up, down = (model.computation(at, where + sign * step).ln_s[0] for sign in (1, -1))
    assert model.computation(at, where).gradient[0, i] == pytest.approx(
        (up - down) / 2e-5, abs=1e-6
    )


def test_a_worker_alone_does_nothing_but_compute():
    model, at = IterationTime(TABLE), point(1)
    assert model.computation(at, THETA_MEAN).ln_s == pytest.approx(model(at, THETA_MEAN).ln_s)


def test_shares_add_up_to_the_whole():
    one, many = vars(point(1)).values(), vars(point(8)).values()
    at = Points(*(np.concatenate(pair) for pair in zip(one, many, strict=True)))
    share = IterationTime(TABLE)(at, THETA_MEAN).compute_share
    assert share[0] == 1.0
    assert 0.0 < share[1] < 1.0


def terms(**changed):
    given = {
        "iterations": np.array([100.0]),
        "other_share": 0.0,
        "start_s": 2.0,
        "hold_up_s": 0.0,
        "end_s": 0.0,
        "before_s": np.array([2.0]),
        "before_usd": np.array([0.0]),
        "starts": np.array([1.0]),
        "time_limit_s": 900.0,
        "workers": np.array([4.0]),
        "memory_mb": np.array([2048.0]),
        "gb_second_usd": 1e-5,
        "request_usd": 1e-3,
        "store_usd_per_s": np.array([0.0]),
        "store_usd_per_request": np.array([0.0]),
    }
    return JobTerms(**(given | changed))


@pytest.mark.parametrize(
    ("changed", "time_s", "cost_usd"),
    [
        # 2 s of start and 100 iterations of 0.5 s, on 4 x 2 GB
        ({}, 52.0, 4 * (1e-3 + 52 * 2 * 1e-5)),
        ({"other_share": 0.2}, 62.0, 4 * (1e-3 + 62 * 2 * 1e-5)),
        # 3 s after the last epoch
        ({"end_s": 3.0}, 55.0, 4 * (1e-3 + 55 * 2 * 1e-5)),
        # it trains already
        ({"before_s": np.array([0.0]), "starts": np.array([0.0])}, 50.0, 4 * 50 * 2 * 1e-5),
        # it moves: it trained on for 2 s, for 0.5 USD, while new functions started
        (
            {"before_s": np.array([2.5]), "before_usd": np.array([0.5])},
            52.5,
            0.5 + 4 * (1e-3 + 52 * 2 * 1e-5),
        ),
        # 50 s in generations of at most 20 s: two hand-overs
        (
            {"time_limit_s": 20.0, "hold_up_s": 0.5},
            52.0 + 2 * 0.5,
            4 * (3 * 1e-3 + (50 + 2 * 0.5 + 3 * 2) * 2 * 1e-5),
        ),
        ({"store_usd_per_s": np.array([0.1])}, 52.0, 4 * (1e-3 + 52 * 2 * 1e-5) + 50 * 0.1),
        # 3 n + 1 requests of every worker in every iteration
        (
            {"store_usd_per_request": np.array([1e-6])},
            52.0,
            4 * (1e-3 + 52 * 2 * 1e-5) + 100 * 4 * 13 * 1e-6,
        ),
    ],
)
def test_time_and_cost_of_a_job_in_closed_form(changed, time_s, cost_usd):
    of = terms(**changed)
    assert of.time_s(np.array([0.5]))[0] == pytest.approx(time_s)
    assert of.cost_usd(np.array([0.5]))[0] == pytest.approx(cost_usd)


def test_one_worker_makes_no_requests_to_a_store():
    alone = terms(workers=np.array([1.0]), store_usd_per_request=np.array([1.0]))
    assert alone.cost_usd(np.array([0.5]))[0] < 0.01


@pytest.mark.parametrize(("workers", "expected"), [(1, 0), (2, 8e6), (4, 10e6), (1000, 11.992e6)])
def test_bytes_that_a_worker_moves(workers, expected):
    assert worker_bytes(4e6, workers) == pytest.approx(expected)


@pytest.mark.parametrize(("load", "expected"), [(0.0, 1e9), (4e8, 6e8), (5e9, 1e8)])
def test_a_store_that_others_use_has_less_left(load, expected):
    assert free_bandwidth(StoreTable(1e-3, 1e9), load) == expected


def test_speed_is_interpolated_between_the_sizes_of_the_table():
    assert TABLE.speed_at(1769) == pytest.approx(1.0)
    assert TABLE.speed_at(500) == pytest.approx(500 / 1769)
    assert TABLE.speed_at([2000, 3000]) == pytest.approx([2000 / 1769, 3000 / 1769])
