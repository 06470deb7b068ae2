"""What the parameters of a candidate are called in the model space that it comes from.

The candidate and a copy of the whole space, which has no content, are walked together. Wherever the
space has a choice of layers, the walk goes on in the one that the candidate has; so the name of
each parameter is the one that ``named_parameters()`` of the space gives it, and two candidates have
a name in common exactly if they have that layer in common.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from nni.nas.nn.pytorch import LayerChoice, Repeat
from torch import nn

from smlt_tune.errors import UsageError


def model_space(candidate: Any) -> nn.Module:
    """The space that a candidate was frozen from, without memory for its tensors.

    Args:
        candidate: Frozen, in NNI's ``simplified`` format.

    Raises:
        UsageError: It is none.
    """
    recipe: Any = getattr(candidate, "model", None)
    if getattr(candidate, "sample", None) is None or not hasattr(recipe, "trace_copy"):
        raise UsageError(
            f"a {type(candidate).__name__} does not tell its model space: weights are shared "
            "between frozen candidates in the format 'simplified' (model_format='simplified')"
        )
    with torch.device("meta"):
        space: nn.Module = recipe.trace_copy().get(traceable=False)
    return space


def supernet_names(model: nn.Module, space: nn.Module, sample: Mapping[str, Any]) -> dict[str, str]:
    """By name in the candidate, the name of every parameter in the space.

    Args:
        model: The candidate.
        space: The space, as :func:`model_space` gives it.
        sample: What was chosen, by label.

    Returns:
        Parameters that only the candidate has are left out.
    """
    names = {}
    for here, there, module, twin in _walk("", "", model, space, sample):
        for name, parameter in module._parameters.items():
            if parameter is not None and twin._parameters.get(name) is not None:
                names[here + name] = there + name
    return names


def _walk(
    here: str, there: str, module: nn.Module, twin: nn.Module, sample: Mapping[str, Any]
) -> Iterator[tuple[str, str, nn.Module, nn.Module]]:
    """Modules of the candidate with those of the space, and what their names begin with."""
    if isinstance(twin, LayerChoice):
        chosen = sample[twin.label]
        yield from _walk(here, f"{there}{chosen}.", module, twin[chosen], sample)
        return
    if isinstance(twin, Repeat):
        there, twin = f"{there}blocks.", twin.blocks
    yield here, there, module, twin
    for name, child in module.named_children():
        other = twin._modules.get(name)
        if other is not None:
            yield from _walk(f"{here}{name}.", f"{there}{name}.", child, other, sample)
