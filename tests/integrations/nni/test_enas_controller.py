import math
import random
import statistics

import nni
import pytest
from nni.mutable import Categorical, CategoricalMultiple, Numerical

from smlt_tune.errors import InvalidInput
from smlt_tune.integrations.nni.enas.choices import AnyOf, Choice, SomeOf, choices_of
from smlt_tune.integrations.nni.enas.controller import Controller


def space():
    return [
        Choice("op", ["conv", "pool", "none"]),
        AnyOf("skip", [0, 1]),
        SomeOf("inputs", ["a", "b", "c", "d"], 2),
    ]


def architectures():
    pairs = [(a, b) for a in "abcd" for b in "abcd" if a < b]
    skips = [[], [0], [1], [0, 1]]
    return [
        {"op": op, "skip": skip, "inputs": list(pair)}
        for op in ["conv", "pool", "none"]
        for skip in skips
        for pair in pairs
    ]


def score(sample):
    right = (sample["op"] == "pool") + (sample["skip"] == [1]) + (sample["inputs"] == ["b", "d"])
    return right / 3


def probability(controller, sample):
    return math.exp(sum(controller.log_probabilities(sample)))


def test_every_value_has_its_decisions():
    for sample in architectures():
        for choice in space():
            decided = choice.decisions(sample[choice.label])
            assert len(decided) == len(choice.options)
            assert choice.value(decided) == sample[choice.label]


def test_the_probabilities_of_all_architectures_add_up_and_begin_almost_equal():
    controller = Controller(space(), seed=1)
    known = [probability(controller, sample) for sample in architectures()]
    assert sum(known) == pytest.approx(1)
    assert min(known) > 0.4 / len(known)
    assert max(known) < 2 / len(known)


def test_samples_are_architectures_of_the_space_as_often_as_they_are_likely():
    controller = Controller(space(), seed=1)
    samples = [controller.sample() for _ in range(300)]
    assert all(sample in architectures() for sample in samples)
    share = statistics.mean(sample["op"] == "pool" for sample in samples)
    assert 0.2 < share < 0.5


def test_a_reward_above_the_average_makes_an_architecture_likelier_one_below_less_likely():
    good, bad = architectures()[5], architectures()[40]
    controller = Controller(space(), seed=1)
    controller.learn(architectures()[20], 0.5)
    before = probability(controller, good), probability(controller, bad)
    controller.learn(good, 0.9)
    assert probability(controller, good) > before[0]
    before = probability(controller, good), probability(controller, bad)
    controller.learn(bad, 0.1)
    assert probability(controller, bad) < before[1]


@pytest.mark.parametrize("late", [1, 8])
def test_it_finds_what_is_good_also_with_rewards_late_and_out_of_order(late):
    order = random.Random(1)
    controller = Controller(space(), learning_rate=5e-3, hidden=16, seed=1)
    waiting, scores = [], []
    for _ in range(150):
        waiting.append(controller.sample())
        scores.append(score(waiting[-1]))
        if len(waiting) == late:
            sample = waiting.pop(order.randrange(late))
            controller.learn(sample, score(sample))
    assert statistics.mean(scores[-50:]) > statistics.mean(scores[:50]) + 0.25
    assert statistics.mean(scores[-50:]) > 0.75


def test_it_continues_from_its_state():
    one, other = Controller(space(), seed=1), Controller(space(), seed=2)
    for number in range(5):
        one.learn(one.sample(), number / 5)
    other.load_state_dict(one.state_dict())
    for _ in range(5):
        sample = one.sample()
        assert other.sample() == sample
        one.learn(sample, 0.7)
        other.learn(sample, 0.7)
    assert probability(one, sample) == probability(other, sample)


@pytest.mark.parametrize(
    ("mutables", "messages"),
    [
        ({}, ["no choices"]),
        (
            {
                "rate": Numerical(0, 1, label="rate"),
                "op": Categorical([1, 2], label="op"),
                "size": Numerical(1, 2, label="size"),
            },
            ["'rate', a Numerical", "'size', a Numerical"],
        ),
    ],
)
def test_a_space_that_it_cannot_search_is_refused_with_all_reasons(mutables, messages):
    with pytest.raises(InvalidInput) as error:
        choices_of(mutables)
    assert len(error.value.mistakes) == len(messages)
    for mistake, message in zip(error.value.mistakes, messages, strict=True):
        assert message in mistake


def test_choices_of_a_simplified_space():
    choice = nni.choice("width", [1, 2])
    some = CategoricalMultiple([1, 2, 3], n_chosen=2, label="some")
    any_of = CategoricalMultiple([1, 2, 3], label="any")
    found = choices_of({"width": choice, "some": some, "any": any_of})
    assert [(type(c), c.label, c.options) for c in found] == [
        (Choice, "width", [2]),
        (SomeOf, "some", [3, 3]),
        (AnyOf, "any", [2, 2, 2]),
    ]
