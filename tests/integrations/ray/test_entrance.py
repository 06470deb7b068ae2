"""Trials enter the fleet several at once only while there are functions for all of them."""

from types import SimpleNamespace

import pytest

pytest.importorskip("ray.tune")

from smlt_tune.integrations.ray.entrance import AT_ONCE, Entrance


def trial(functions, workers=1):
    platform = SimpleNamespace(limits=SimpleNamespace(functions=functions))
    fleet = SimpleNamespace(platform=platform)
    return SimpleNamespace(fleet=fleet, workers=workers, entering=True, queued=False)


@pytest.mark.parametrize(
    ("functions", "running", "entered"),
    [(1, 0, 1), (3, 0, 3), (3, 2, 1), (3, 3, 1), (1000, 0, AT_ONCE), (1000, 500, AT_ONCE)],
)
def test_no_more_enter_at_once_than_can_run(functions, running, entered):
    entrance, inside = Entrance(), [trial(functions, workers=1) for _ in range(running)]
    while entrance.open(inside) and len(inside) < 2000:
        inside.append(trial(functions))
        entrance.enter(inside[-1])
    assert len(inside) == running + entered


def test_while_one_waits_for_functions_nobody_else_enters():
    entrance, first = Entrance(), trial(10)
    entrance.enter(first)
    assert entrance.open([first])
    first.queued = True
    assert not entrance.open([first])
    first.entering = first.queued = False
    assert entrance.open([first])
