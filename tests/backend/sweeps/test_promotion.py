"""Money goes where it buys most time of the trial that wins in the end."""

import random

import pytest

from smlt_tune.backend.resource_manager.observations import Allocation, Option
from smlt_tune.backend.sweeps.halving_rules import Schedule
from smlt_tune.backend.sweeps.promotion import (
    Promotions,
    best_option,
    chance,
    lower_hull,
    price_of_time,
)

#: Twice the workers: somewhat less than half of the time, for more money.
OPTIONS = [Option(Allocation(n, 1769), 60 / n**0.8, 0.01 * n**0.3) for n in (1, 2, 4, 8, 16)]
SCHEDULE = Schedule("loss", maximize=False, rungs=(1, 3, 9), factor=3)


def options(share):
    return [Option(one.allocation, share * one.time_s, share * one.cost_usd) for one in OPTIONS]


def promotions(budget_usd, trials=27):
    return Promotions([SCHEDULE], trials, options, budget_usd)


#: What 27 trials cost at least, of which 9 and then 3 go on.
LEAST_USD = 0.01 * (27 * 1 / 9 + 9 * 2 / 9 + 3 * 6 / 9)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_one_in_so_many_goes_on_and_the_best_are_the_most_likely(factor):
    quantiles = [(i + 0.5) / 200 / factor for i in range(200)]
    chances = [chance(u, factor) for u in quantiles]
    assert sum(chances) / 200 == pytest.approx(1 / factor, abs=0.01)
    assert chances == sorted(chances, reverse=True)
    assert chance(0.5 / factor, factor, rho=0.0) == pytest.approx(1 / factor, abs=1e-6)


def test_only_what_is_best_at_some_price_is_looked_at():
    chance_of = random.Random(1)
    many = [
        Option(Allocation(n, 512), chance_of.uniform(1, 10), chance_of.uniform(1, 10))
        for n in range(1, 60)
    ]
    few = lower_hull(many)
    assert len(few) < 15
    for price in (0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 10.0, 1e6):
        assert best_option(few, price) == best_option(many, price)


def test_the_price_of_time_spends_what_there_is_and_no_more():
    segments = [
        (27.0, 1 / 9, options(1 / 9)),
        (9.0, 1 / 3, options(2 / 9)),
        (3.0, 1.0, options(6 / 9)),
    ]

    def cost_usd(price):
        return sum(n * best_option(of, price * w).cost_usd for n, w, of in segments)

    for budget_usd in (1.05 * LEAST_USD, 1.3 * LEAST_USD, 2 * LEAST_USD):
        price = price_of_time(segments, budget_usd)
        assert cost_usd(price) <= budget_usd < cost_usd(1.5 * price)
    assert price_of_time(segments, 0.9 * LEAST_USD) == 0.0
    assert cost_usd(price_of_time(segments, 100.0)) == cost_usd(1e9)


def test_survivors_get_what_is_fast_and_the_others_what_is_cheap():
    chosen = promotions(1.4 * LEAST_USD)
    begins = [chosen.begins(trial).workers for trial in range(27)]
    for trial in range(26, 8, -1):
        chosen.ends(trial, 0, 100.0 + trial, 0.01 / 9)
    survivors = [chosen.goes_on(trial, 0, float(trial), 0.01 / 9) for trial in range(9)]
    last = chosen.goes_on(0, 1, 0.0, 0.01 / 9 + 0.01 * survivors[0].workers ** 0.3 * 2 / 9)
    assert sum(begins) < 1.5 * 27
    assert survivors[0].workers > max(begins)
    assert survivors[0].workers >= survivors[8].workers
    assert last.workers >= survivors[0].workers
    assert chosen.goes_on(0, 2, 0.0, 0.05) is None


def test_what_is_dearer_than_expected_leaves_less_for_those_to_come():
    workers = {}
    for dearer in (1.0, 1.3):
        chosen = promotions(1.6 * LEAST_USD)
        for trial in range(27):
            chosen.begins(trial)
        for trial in range(26, 8, -1):
            chosen.ends(trial, 0, 100.0 + trial, dearer * 0.01 / 9)
        workers[dearer] = chosen.goes_on(0, 0, 0.0, dearer * 0.01 / 9).workers
    assert workers[1.3] < workers[1.0]


def test_nothing_is_kept_for_a_trial_that_has_failed_but_what_it_has_cost_is_gone():
    workers = {}
    for spent in (None, 0.0, 0.5 * LEAST_USD):
        chosen = promotions(1.4 * LEAST_USD)
        for trial in range(26):
            chosen.begins(trial)
        if spent is not None:
            for trial in range(1, 26):
                chosen.leaves(trial, spent / 25)
                chosen.leaves(trial, spent / 25)  # told twice, it counts once
        workers[spent] = chosen.begins(26).workers
    assert workers[0.5 * LEAST_USD] < workers[None] < workers[0.0]


def test_without_money_everything_is_as_cheap_as_it_can_be():
    chosen = promotions(0.5 * LEAST_USD)
    assert {chosen.begins(trial).workers for trial in range(27)} == {1}
    assert chosen.goes_on(3, 0, 0.0, 0.01).workers == 1


def test_brackets_share_the_budget_and_survivors_of_bold_ones_are_the_likeliest_to_win():
    rungs = [(1, 3, 9), (3, 9), (9,)]
    brackets = [Schedule("loss", maximize=False, rungs=each, factor=3) for each in rungs]
    # Of 18 + 6 + 3 trials as many as that come to each end: 2, 2 and 3.
    least_usd = 0.01 * (18 * 1 + 6 * 2 + 2 * 6 + 6 * 3 + 2 * 6 + 3 * 9) / 9
    bracket_of = [*[0] * 18, *[1] * 6, *[2] * 3].__getitem__
    chosen = Promotions(brackets, 27, options, 1.3 * least_usd, bracket_of=bracket_of)
    first = [chosen.begins(trial).workers for trial in range(27)]
    # New ones are equally likely to win, so that a second of theirs is worth the same everywhere.
    assert max(first) - min(first) <= 1
    assert chosen.schedule_of(20).rungs == (3, 9)
    for trial in (*range(6, 18), *range(20, 24)):
        chosen.ends(trial, 0, 100.0 + trial, 0.0)
    bold = chosen.goes_on(0, 0, 0.0, 0.01 / 9)
    bolder = chosen.goes_on(0, 1, 0.0, 0.01 / 3)
    cautious = chosen.goes_on(18, 0, 0.0, 0.01 / 3)
    assert bolder.workers >= bold.workers >= cautious.workers > max(first)
    assert chosen.goes_on(24, 0, 0.0, 0.01) is None
    poor = Promotions(brackets, 27, options, 0.9 * least_usd, bracket_of=bracket_of)
    assert {poor.begins(trial).workers for trial in range(27)} == {1}


def test_no_trial_takes_functions_that_others_wait_for():
    rich = Promotions([SCHEDULE], 9, options, 100.0, functions=16, parallel=4)
    for trial in range(9):
        assert rich.begins(trial).workers == 4
        if trial < 6:
            rich.ends(trial, 0, float(trial), 0.01)
    assert rich.goes_on(6, 0, -1.0, 0.01).workers == 4  # beside two others: 16 // 3
    rich.ends(7, 0, 9.0, 0.01)
    assert rich.goes_on(8, 0, -2.0, 0.01).workers == 8
    rich.ends(6, 1, 9.0, 0.01)
    assert rich.goes_on(8, 1, -3.0, 0.01).workers == 16  # alone
