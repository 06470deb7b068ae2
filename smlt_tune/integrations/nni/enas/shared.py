"""Weights that the candidates of a search inherit and pass on, by their names in the space."""

import logging
from typing import Any

import nni
import torch
from torch import nn

import smlt_tune as smlt
from smlt_tune.errors import UsageError
from smlt_tune.integrations.nni.candidate import BUILDING
from smlt_tune.integrations.nni.enas.names import model_space, supernet_names
from smlt_tune.runtime.shared import SharedTensor, SharedTensors, TensorUpdate

_LOG = logging.getLogger(__name__)


class SharedWeights(nn.Module):
    """The weights that a candidate has in common with others of its space.

        def train(model):
            session = smlt.session()
            weights = SharedWeights(model)              # the model inherits
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            model, optimizer, weights = session.prepare(model, optimizer, weights)
            ...                                         # training as always
            weights.push()                              # others inherit

    Prepare it together with the model: it remembers what the model began with, which is part of the
    job's state. Parameters are shared, as float32; of a layer that is larger in other candidates
    its leading part. Buffers are not: running statistics are those of one architecture, and spoil
    others. Parameters that the space lacks when it is built without choices are not shared either.
    Outside of a fleet, a model neither inherits nor passes on.

    Args:
        model: What the evaluator's function was given.
        candidate: What it was built from; None for ``nni.get_current_parameter()``.

    Raises:
        UsageError: There is no candidate; or a tensor has another number of dimensions than others
            of its name.
    """

    def __init__(self, model: nn.Module, candidate: Any = None) -> None:
        super().__init__()
        candidate = nni.get_current_parameter() if candidate is None else candidate
        if candidate is None:
            raise UsageError(
                "SharedWeights(model) was called outside of a trial of NNI: pass the candidate too"
            )
        with BUILDING:
            space = model_space(candidate)
        names = supernet_names(model, space, candidate.sample)
        # Not a submodule: the model is prepared, and saved, by itself.
        self._by_name = {
            names[name]: tensor for name, tensor in model.named_parameters() if name in names
        }
        self._shared = SharedTensors.of(smlt.session())
        found = self._shared.read(list(self._by_name)) if self._shared else {}
        self._inherit(found)
        # Frozen parameters, not buffers: they never change, so workers need not keep copies.
        self.before = nn.ParameterList(
            nn.Parameter(tensor.detach().clone(), requires_grad=False)
            for tensor in self._by_name.values()
        )
        versions = [found[name].version if name in found else 0 for name in self._by_name]
        self.versions: torch.Tensor
        self.register_buffer("versions", torch.tensor(versions, dtype=torch.int64))

    @property
    def names(self) -> list[str]:
        """What is shared, by its names in the space."""
        return list(self._by_name)

    def push(self) -> bool:
        """Passes on what the model has learnt. Call it on every worker, once training is over.

        Only the first push of a job counts, whoever repeats it after a restart.

        Returns:
            Whether this one counts. A model with values that are not finite passes nothing on.
        """
        session = smlt.session()
        if self._shared is None or session.rank != 0:
            return False
        updates = {}
        for number, (name, tensor) in enumerate(self._by_name.items()):
            if not torch.isfinite(tensor).all():
                _LOG.warning("%s is not finite: the candidate's weights are not passed on", name)
                return False
            before, version = self.before[number], int(self.versions[number])
            updates[name] = TensorUpdate(_array(before), _array(tensor), version)
        return self._shared.push(updates)

    @torch.no_grad()
    def _inherit(self, found: dict[str, SharedTensor]) -> None:
        mistakes = [
            f"{name} has {tensor.dim()} dimensions here and {found[name].value.ndim} in other "
            "candidates: what a choice changes so much needs a LayerChoice"
            for name, tensor in self._by_name.items()
            if name in found and found[name].value.ndim != tensor.dim()
        ]
        if mistakes:
            raise UsageError("\n".join(mistakes))
        for name, shared in found.items():
            tensor = self._by_name[name]
            value = torch.from_numpy(shared.value).to(tensor.dtype)
            sizes = zip(value.shape, tensor.shape, strict=True)
            both: Any = (*(slice(min(pair)) for pair in sizes), ...)
            mine, theirs = tensor[both], value[both]
            mine.copy_(torch.where(theirs.isnan(), mine, theirs))


def _array(tensor: torch.Tensor) -> Any:
    return tensor.detach().float().cpu().contiguous().numpy()
