"""What a job takes from the one that it begins with, and what it keeps of its own."""

import pytest
import torch
from torch.optim import lr_scheduler

from smlt_tune.runtime.frameworks.torch import TorchObjects

SCHEDULES = {
    "step": lambda o, k: lr_scheduler.StepLR(o, 2 * k, 0.5),
    "lambda": lambda o, k: lr_scheduler.LambdaLR(o, lambda epoch: 0.9 ** (k * epoch)),
    "cosine": lambda o, k: lr_scheduler.CosineAnnealingLR(o, 10 * k),
    "restarts": lambda o, k: lr_scheduler.CosineAnnealingWarmRestarts(o, 3 * k),
    "plateau": lambda o, k: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "sequential": lambda o, k: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[2],
    ),
    "chained": lambda o, k: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def made(lr, schedule=None, *, scale=1, steps=0, **options):
    """(objects, model, optimizer, scheduler) after so many steps."""
    torch.manual_seed(int(1000 * lr))
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr, **options)
    scheduler = SCHEDULES[schedule](optimizer, scale) if schedule else None
    objects = TorchObjects()
    objects.add(tuple(o for o in (model, optimizer, scheduler) if o is not None))
    advance(model, optimizer, scheduler, steps)
    return objects, model, optimizer, scheduler


def advance(model, optimizer, scheduler, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler:
            scheduler.step()


def fork(donor, objects):
    """As a session does: when the objects are prepared, and when the program arrives."""
    content = donor.save({}, kept=False)
    for whole in (False, True):
        objects.load(content, 0, whole=whole, fork=True)


def test_the_state_is_the_donors_and_the_settings_are_its_own():
    donor, model, optimizer, _ = made(0.1, steps=3, weight_decay=0.2)
    objects, mine, own, _ = made(0.7, betas=(0.5, 0.6), amsgrad=False)
    fork(donor, objects)
    assert torch.equal(mine.weight, model.weight)
    for parameter, other in zip(mine.parameters(), model.parameters(), strict=True):
        for name, value in optimizer.state[other].items():
            assert torch.equal(own.state[parameter][name], value)
    [group] = own.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.7, (0.5, 0.6), 0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_schedule_that_differs_by_its_first_rate_only_differs_by_that_ever_after(schedule, steps):
    donor, model, optimizer, scheduler = made(0.1, schedule, steps=steps)
    objects, mine, own, follows = made(0.3, schedule)
    fork(donor, objects)
    for _ in range(6):
        rate, other = own.param_groups[0]["lr"], optimizer.param_groups[0]["lr"]
        if schedule != "plateau" or steps == 0:
            assert rate == pytest.approx(3 * other)
        assert follows.get_last_lr() == [rate]
        advance(model, optimizer, scheduler, 1)
        advance(mine, own, follows, 1)


def test_a_schedule_keeps_its_own_length():
    donor, *_ = made(0.1, "cosine", steps=5)
    objects, *_, follows = made(0.1, "cosine", scale=2)
    fork(donor, objects)
    assert (follows.T_max, follows.last_epoch) == (20, 5)


def test_a_donor_that_had_come_to_a_rate_of_zero():
    donor, *_ = made(0.1, "cosine", steps=10)
    objects, _, own, _ = made(0.3, "cosine", scale=2)
    fork(donor, objects)
    assert own.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
