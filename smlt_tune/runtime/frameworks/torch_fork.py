"""A job that begins with another job's state, but with its own configuration.

What was learnt comes from the other job: weights, momenta, how far schedules have come. What was
chosen stays as the new program has set it: everything in an optimizer's ``param_groups`` but the
parameters, and the settings of schedulers. A learning rate that a scheduler drives is the new
initial one times the share of its own that the other job's schedule had reached.
"""

from collections.abc import Iterable, Mapping
from typing import Any

#: What PyTorch's schedulers count; everything else in their state is a setting.
_COUNTERS = frozenset(
    {"last_epoch", "_step_count", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i"}
)


def load_fork(thing: Any, state: Any) -> None:
    """Restores a prepared object from another job's state, without that job's settings."""
    import torch

    if isinstance(thing, torch.optim.Optimizer):
        own = [{k: v for k, v in g.items() if k != "params"} for g in thing.param_groups]
        thing.load_state_dict(state)
        for group, settings in zip(thing.param_groups, own, strict=True):
            other, initial = group["lr"], group.get("initial_lr")
            group.update(settings)
            if initial and "initial_lr" in settings:
                group["lr"] = settings["initial_lr"] * (other / initial)
    elif isinstance(thing, torch.optim.lr_scheduler.LRScheduler):
        thing.load_state_dict(_schedule(thing.state_dict(), state))
    else:
        thing.load_state_dict(state)


def follow_schedules(objects: Iterable[Any]) -> None:
    """Schedulers also remember the learning rates that they have set last."""
    from torch.optim.lr_scheduler import LRScheduler

    for thing in objects:
        if isinstance(thing, LRScheduler) and hasattr(thing, "_last_lr"):
            thing._last_lr = [group["lr"] for group in thing.optimizer.param_groups]


def _schedule(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's own settings with the counters of another one."""
    counted = {name: other[name] for name in _COUNTERS & own.keys() & other.keys()}
    nested = "_schedulers"  # of those that are made of several
    if nested in own:
        counted[nested] = [
            _schedule(*pair) for pair in zip(own[nested], other[nested], strict=True)
        ]
    return {**own, **counted}
