"""The synthetic truth is what its documentation says, and nobody can beat its optimum."""

import math

import numpy as np
import pytest
from allocation.ours import LiveJob, facts_of
from allocation.peers import PEERS, Problem
from allocation.truth import GOALS, LIMITS, MAX_MB, PRICES, Case, Family

from smlt_tune.backend.resource_manager.observations import Allocation, Decision


def case_of(goal, seed=7):
    return Case(Family(seed).candidate(0), goal, np.random.default_rng(1))


@pytest.mark.parametrize("goal", GOALS)
def test_nothing_beats_the_optimum_and_the_optimum_keeps_the_limit(goal):
    case = case_of(goal)
    score, over, short = case.run(case.oracle)
    assert score == pytest.approx(0.0, abs=1e-6)
    assert over == 0.0
    assert not short
    rng = np.random.default_rng(2)
    anywhere = np.exp(rng.uniform(np.log([1, 128]), np.log([200, 10_240]), (300, 2))).round()
    scores = [case.run(Allocation(int(n), int(m)))[0] for n, m in anywhere]
    assert min(scores) > -0.5  # between two sizes of the grid a little may be left


def test_a_broken_limit_counts_twice_on_top_of_the_regret():
    case = case_of("cheapest in time")
    score, over = case.score(1.1 * case.goal.deadline_s, 1.2 * case.best)
    assert over == pytest.approx(10.0)
    assert score == pytest.approx(20.0 + 2 * 10.0)


def test_memory_decides_what_runs_and_a_failure_tells_a_lower_bound():
    candidate = Family(7).candidate(0)
    rng = np.random.default_rng(0)
    peak = float(candidate.peak_mb(1))
    short = candidate.measure(Allocation(1, math.floor(peak)), rng)
    assert short.out_of_memory
    assert short.peak_mb <= peak
    assert short.iteration_s == 0.0
    enough = candidate.measure(Allocation(1, math.ceil(peak)), rng)
    assert not enough.out_of_memory
    assert enough.peak_mb == pytest.approx(peak, rel=0.05)
    assert candidate.peak_mb(8) < peak


def test_a_failed_start_is_paid_before_more_memory_is_taken():
    case = case_of("cheapest")
    small = Allocation(1, 128)
    assert not case.candidate.fits(1, 128)
    memory_mb = 128
    while not case.candidate.fits(1, memory_mb):
        memory_mb = min(2 * memory_mb, MAX_MB)
    score, _, short = case.run(small)
    assert short
    assert score > case.run(Allocation(1, memory_mb))[0]


def test_measurements_scatter_around_the_truth_with_a_tail_to_the_right():
    candidate, rng = Family(7).candidate(0), np.random.default_rng(0)
    truth = float(candidate.iteration_s(4, 4096))
    seen = [candidate.measure(Allocation(4, 4096), rng).iteration_s for _ in range(2000)]
    ratio = np.array(seen) / truth
    assert np.median(ratio) == pytest.approx(1.0, abs=0.02)
    assert ratio.max() > 1.3
    assert ratio.min() > 0.9


def test_the_table_that_is_told_is_wrong_by_about_eight_percent():
    errors = []
    for seed in range(20):
        family = Family(seed)
        sizes = np.array(family.table.memory_mb)
        errors += list(np.log(family.table.speed_at(sizes) / family.speed(sizes)))
    assert 0.05 < np.std(errors) < 0.15


def test_speed_jumps_where_another_virtual_cpu_becomes_visible():
    jumps = [
        abs(np.log(family.speed(np.array(3009)) / family.speed(np.array(3008))))
        for family in map(Family, range(20))
    ]
    assert np.median(jumps) > 0.01


def test_candidates_are_the_same_every_time_and_differ_in_size():
    first, again = (Family(3).candidate(5) for _ in range(2))
    assert first.workload == again.workload
    sizes = [Family(3).candidate(i).parameters for i in range(30)]
    assert max(sizes) > 10 * min(sizes)
    assert min(sizes) >= 0.5e6
    assert max(sizes) <= 110e6


class Fixed:
    """A policy that never moves."""

    def __init__(self, allocation):
        self._allocation = allocation

    def observe(self, profile):
        pass

    def first(self, facts):
        return Decision(self._allocation, "told")

    def review(self, facts):
        return None


@pytest.mark.parametrize("goal", GOALS)
def test_a_job_in_pieces_takes_and_costs_what_it_does_at_once(goal):
    case = case_of(goal)
    ride = LiveJob(Fixed(case.oracle), case, np.random.default_rng(0)).run()
    seconds, usd = case.candidate.whole(case.oracle.workers, case.oracle.memory_mb)
    assert seconds > LIMITS.time_limit_s / 10
    assert ride.seconds == pytest.approx(seconds)
    assert ride.usd == pytest.approx(usd)
    assert len(ride.profiles) >= 3


@pytest.mark.parametrize("name", ["random", "smlt", "loggp"])
@pytest.mark.parametrize("goal", ["cheapest in time", "fastest"])
def test_a_peer_recommends_nothing_worse_than_what_it_began_with(name, goal):
    case = case_of(goal)
    family = case.candidate.family
    default = Allocation(1, MAX_MB)
    problem = Problem(facts_of(case), family.table, family.stores, PRICES, default)
    peer, rng = PEERS[name](problem, np.random.default_rng(0)), np.random.default_rng(0)
    assert peer.recommend() == default
    for _ in range(7):
        where = peer.suggest()
        assert 1 <= where.workers <= LIMITS.max_workers
        assert LIMITS.min_memory_mb <= where.memory_mb <= LIMITS.max_memory_mb
        peer.observe(case.candidate.measure(where, rng))
    # Measurements are off by a few percent, and an overshoot counts twice.
    assert case.run(peer.recommend())[0] <= case.run(default)[0] + 10
