import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smlt_tune.backend.loss_curves import FEWEST, Forecast, forecast, moved
from smlt_tune.backend.resource_manager.observations import Interval
from smlt_tune.backend.sibling_curves import MOST
from smlt_tune.errors import InvalidInput

CURVES = Path(__file__).parents[2] / "benchmarks" / "curves" / "curves.json"
SEARCHES = CURVES.with_name("searches.json")
EPOCHS = np.arange(1, 101)
FALLING = {
    "CE-scaling": 1 / (0.3 * EPOCHS + 1) + 0.2,
    "power": EPOCHS**-0.5,
    "power with offset": (EPOCHS + 2.0) ** -1.2 + 0.1,
    "exponential": np.exp(-EPOCHS / 20) + 0.1,
    "Weibull": np.exp(-((EPOCHS / 15) ** 0.6)) + 0.3,
    "Hill": 1 / (1 + (EPOCHS / 10) ** 1.5) + 0.05,
}


def expected(epochs, low=None, high=None):
    return Forecast(Interval(low or epochs, epochs, high or epochs), 1.0)


@pytest.mark.parametrize("name", FALLING)
def test_a_smooth_curve_of_any_family_is_continued_to_its_target(name):
    curve = FALLING[name]
    for reached in (40, 60):
        found = forecast(curve[:30], float(curve[reached - 1]), best=0.0)
        assert found.epochs.mid == pytest.approx(reached, rel=0.15)
        assert found.epochs.low <= found.epochs.mid <= found.epochs.high


@pytest.mark.parametrize("name", FALLING)
def test_spikes_and_values_that_are_no_numbers_change_little(name):
    curve = FALLING[name] + 1e-3 * np.random.default_rng(0).standard_normal(len(EPOCHS))
    broken = curve[:40].copy()
    broken[[3, 17]], broken[30], broken[[8, 21]] = math.nan, math.inf, (5.0, 3.0)
    target = float(FALLING[name][54])
    clean, found = forecast(curve[:40], target, best=0.0), forecast(broken, target, best=0.0)
    assert found.epochs.mid == pytest.approx(clean.epochs.mid, rel=0.15)


def test_a_rising_metric_is_the_mirror_image_of_a_falling_one():
    curve = FALLING["Weibull"]
    fall = forecast(curve[:30], 0.4, best=0.0)
    rise = forecast(1.0 - curve[:30], 0.6, falling=False, best=1.0)
    assert rise.epochs == fall.epochs
    assert rise.chance == pytest.approx(fall.chance)


def test_a_target_beyond_the_asymptote_is_never_reached():
    noise = 3e-3 * np.random.default_rng(0).standard_normal(40)
    found = forecast(np.exp(-EPOCHS[:40] / 5) + 0.5 + noise, 0.4)
    assert found.never
    assert found.chance < 0.05
    assert found.epochs.high == math.inf


def test_curves_that_do_not_fall_never_reach_a_target():
    for values in ([1.0] * 20, np.linspace(1.0, 2.0, 20), 1 + 0.01 * (-1.0) ** EPOCHS[:20]):
        assert forecast(values, 0.5, best=0.0).never


def test_a_target_that_was_reached_needs_no_prediction():
    assert forecast([3.0, 2.0, 1.0, 2.0, 0.5], 1.0) == expected(3.0)
    assert forecast([0.1, 0.9], 0.9, falling=False) == expected(2.0)


def test_too_few_epochs_predict_nothing():
    few = [3.0, 2.0, math.nan, 1.8]
    assert forecast(few, 1.0) is None
    assert forecast([], 1.0) is None
    assert forecast([*few, 1.7], 1.0) is not None
    assert FEWEST == 4


def test_more_epochs_narrow_the_interval():
    curve = FALLING["exponential"] + 2e-3 * np.random.default_rng(3).standard_normal(100)
    target = float(FALLING["exponential"][69])
    widths = [
        (found.epochs.high - found.epochs.low) / found.epochs.mid
        for found in (forecast(curve[:n], target, best=0.0) for n in (15, 30, 50))
    ]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.5


def test_real_trainings_are_foretold():
    """From 30 % of their epochs to where they are after half of them."""
    errors, covered = [], []
    for training in json.loads(CURVES.read_text(encoding="utf-8")):
        for metric, values in training["curves"].items():
            sign, best = (-1.0, 1.0) if metric == "accuracy" else (1.0, 0.0)
            y = sign * np.array(values, float)
            seen, half = math.ceil(0.3 * len(y)), len(y) // 2
            target = float(np.median(y[half - 5 : half]))
            reached = int(np.flatnonzero(y <= target)[0]) + 1
            if reached > seen:
                given = {"falling": sign > 0, "best": best}
                epochs = forecast(sign * y[:seen], sign * target, **given).epochs
                errors.append(abs(epochs.mid / reached - 1.0))
                covered.append(epochs.low <= reached <= epochs.high)
    assert len(errors) > 50
    assert np.median(errors) < 0.1
    assert 0.8 < np.mean(covered) <= 1.0


def test_the_same_curve_gives_the_same_forecast():
    curve = FALLING["Hill"][:25]
    assert forecast(curve, 0.1) == forecast(list(curve), 0.1)
    siblings = [FALLING["Hill"] + 0.1, FALLING["Weibull"]]
    again = forecast(curve, 0.1, siblings=[list(one) for one in siblings])
    assert forecast(curve, 0.1, siblings=siblings) == again


def decaying(scale, level, seed):
    """The rate of this training is divided after 50 epochs."""
    noise = 0.01 * np.random.default_rng(seed).standard_normal(len(EPOCHS))
    slow = np.exp(-EPOCHS / 80) + level
    return scale * np.where(EPOCHS > 50, 0.4, 1.0) * slow * np.exp(noise)


@pytest.mark.parametrize("best", [0.0, None])
def test_siblings_tell_of_a_rate_that_decays_later(best):
    siblings = [decaying(scale, 0.3, seed) for seed, scale in enumerate((0.7, 0.9, 1.2))]
    curve = decaying(1.0, 0.25, 7)
    target = 0.6 * float(curve[45])
    reached = float(np.flatnonzero(curve <= target)[0] + 1)
    alone = forecast(curve[:30], target, best=best)
    found = forecast(curve[:30], target, best=best, siblings=siblings)
    assert reached == 51
    assert alone.epochs.mid > 3.0 * reached
    assert found.epochs.mid == pytest.approx(reached, rel=0.2)
    assert found.epochs.low <= reached <= found.epochs.high


@pytest.mark.parametrize("name", FALLING)
@pytest.mark.parametrize(
    "strange",
    [
        [3.0 + 0.0 * EPOCHS],
        [0.01 * EPOCHS, 5.0 + 0.1 * EPOCHS],
        [1e6 / EPOCHS, 1e-6 / EPOCHS],
        list(np.random.default_rng(5).uniform(0.1, 2.0, (6, 100))),
    ],
    ids=["flat", "rising", "scales", "noise"],
)
def test_siblings_that_have_nothing_to_do_with_it_spoil_little(name, strange):
    curve = FALLING[name]
    found = forecast(curve[:30], float(curve[44]), best=0.0, siblings=strange)
    assert found.epochs.mid == pytest.approx(45, rel=0.2)
    assert found.epochs.low <= 45 <= found.epochs.high


@pytest.mark.parametrize("name", FALLING)
def test_a_sibling_that_took_the_same_course_tells_the_epoch(name):
    curve = FALLING[name]
    found = forecast(curve[:20], float(curve[69]), best=0.0, siblings=[curve])
    assert found.epochs.mid == pytest.approx(70, rel=0.1)


def test_siblings_may_have_any_length_and_gaps():
    siblings = [decaying(1.0 + 0.1 * seed, 0.3, seed) for seed in range(4)]
    whole = forecast(siblings[0][:30], 0.35, best=0.0, siblings=siblings[1:])
    siblings[1] = siblings[1][:70]
    siblings[2][[0, 11, 54]] = math.nan
    siblings[3][[3, 60]] = math.inf, -math.inf
    siblings.append(np.where((EPOCHS < 5) | (EPOCHS == 100), siblings[0], math.nan))
    broken = forecast(siblings[0][:30], 0.35, best=0.0, siblings=siblings[1:])
    assert broken.epochs.mid == pytest.approx(whole.epochs.mid, rel=0.1)


def test_siblings_that_know_nothing_of_what_is_ahead_change_nothing():
    curve = FALLING["Weibull"][:30]
    short = [[], [1.0, 0.9], curve, [*curve, math.nan, math.nan, math.nan, math.nan, math.nan]]
    few = [*[math.nan] * 60, 0.5, 0.4, 0.3]
    alone = forecast(curve, 0.4, best=0.0)
    assert forecast(curve, 0.4, best=0.0, siblings=[*short, few]) == alone


def test_siblings_count_that_began_most_alike():
    """Not the newest, and not those that began at the same level on another course."""
    curve = decaying(1.0, 0.3, 99)
    alike = [decaying(1.0 + 0.1 * seed, 0.3, seed) for seed in range(MOST)]
    given = {"target": 0.5, "best": 0.0}
    found = forecast(curve[:30], **given, siblings=alike)
    others = [curve[29] * (EPOCHS / 30.0) ** -power for power in (0.9, 1.0, 1.1, 1.2, 1.3, 1.4)]
    for siblings in ([*alike, *others], [*others, *alike]):
        assert forecast(curve[:30], **given, siblings=siblings) == found
    assert forecast(curve[:30], **given, siblings=others) != found


def test_trials_of_real_searches_are_foretold_better_with_their_siblings():
    """From 30 % of their epochs to where they end, for searches that no constant was chosen on."""
    alone, found, covered = [], [], []
    runs = json.loads(SEARCHES.read_text(encoding="utf-8"))
    for number in (*range(1, 16, 2), *range(16, 24)):
        search = [run["curves"] for run in runs if run["search"] == number]
        for metric in search[0]:
            sign, best = (-1.0, 1.0) if metric == "accuracy" else (1.0, 0.0)
            *siblings, values = [np.array(one[metric], float) for one in search]
            y = sign * values
            seen, target = math.ceil(0.3 * len(y)), float(np.median(y[-5:]))
            reached = int(np.flatnonzero(y <= target)[0]) + 1
            if reached > seen:
                given = {"falling": sign > 0, "best": best}
                one = forecast(values[:seen], sign * target, **given).epochs
                alone.append(abs(one.mid / reached - 1.0))
                one = forecast(values[:seen], sign * target, **given, siblings=siblings).epochs
                found.append(abs(one.mid / reached - 1.0))
                covered.append(one.low <= reached <= one.high)
    assert len(found) > 15
    assert np.median(found) < 0.8 * np.median(alone)
    assert np.mean(covered) > 0.8


@given(
    st.lists(st.floats(allow_nan=True, width=32), max_size=300),
    st.floats(-1e6, 1e6),
    st.booleans(),
    st.lists(st.lists(st.floats(allow_nan=True), max_size=60), max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_any_values_give_ordered_epochs_in_the_future(values, target, falling, siblings):
    found = forecast(values, target, falling=falling, siblings=siblings)
    if found is None:
        return
    epochs = found.epochs
    assert 0.0 < epochs.low <= epochs.mid <= epochs.high
    assert -1e-9 <= found.chance <= 1.0
    passed = [v <= target if falling else v >= target for v in values if math.isfinite(v)]
    assert any(passed) or epochs.low > len(values)


@pytest.mark.parametrize(
    ("before", "now", "delta", "news"),
    [
        (None, None, 0.1, False),
        (None, expected(10.0), 0.1, True),
        (expected(10.0), None, 0.1, True),
        (expected(100.0), expected(109.0), 0.1, False),
        (expected(100.0), expected(91.0), 0.1, False),
        (expected(100.0), expected(111.0), 0.1, True),
        (expected(100.0), expected(89.0), 0.1, True),
        (expected(100.0), expected(109.0), 0.05, True),
        (expected(math.inf), expected(100.0), 0.1, True),
        (expected(100.0), expected(math.inf), 0.1, True),
        (expected(math.inf), expected(math.inf), 0.1, False),
        (expected(100.0), expected(101.0, low=60.0, high=300.0), 0.1, False),
    ],
)
def test_a_forecast_that_moves_either_way_is_news(before, now, delta, news):
    assert moved(before, now, delta) is news


@pytest.mark.parametrize(
    ("given", "mistakes"),
    [
        ({"target": math.nan}, ["target must be a finite number, not nan"]),
        (
            {"target": math.inf, "best": math.nan},
            [
                "target must be a finite number, not inf",
                "best must be a finite number or None, not nan",
            ],
        ),
        (
            {"target": -0.5, "best": 0.0},
            ["target -0.5 is better than the best possible value, 0.0"],
        ),
        (
            {"target": 1.2, "best": 1.0, "falling": False},
            ["target 1.2 is better than the best possible value, 1.0"],
        ),
    ],
)
def test_targets_that_cannot_be_are_refused(given, mistakes):
    with pytest.raises(InvalidInput) as caught:
        forecast([1.0, 0.9, 0.8, 0.7], **given)
    assert list(caught.value.mistakes) == mistakes
