"""What a function does for one candidate of an architecture search."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nni.nas.space import SimplifiedModelSpace

from smlt_tune.integrations.nni.channel import begin_with_parameters, trial_api

#: NNI keeps the architecture that is being built per process, not per thread: threads that build at
#: the same time (the driver measures models; the inline platform trains in it) would get parts of
#: each other's architecture.
BUILDING = threading.Lock()


@dataclass(frozen=True)
class TrainCandidate:
    """The training function of all candidates of a search.

    Its fields are part of its content: what has the same is a close sibling, in a later process
    too.

    Attributes:
        space: Name of the model space.
        evaluator: Name of what trains a model of it.
    """

    space: str
    evaluator: str

    def __call__(self, config: Mapping[str, Any]) -> None:
        """Builds the model and has the evaluator train it.

        Args:
            config: What :func:`config_of` gave.
        """
        model = _Candidate._load(**config)
        with trial_api(model):
            begin_with_parameters()
            model.execute()


class _Candidate(SimplifiedModelSpace):  # type: ignore[misc]
    def executable_model(self) -> Any:
        with BUILDING:
            return super().executable_model()


def function_of(model: SimplifiedModelSpace) -> TrainCandidate:
    """The training function for a frozen model."""
    evaluator = model.evaluator
    trainer = getattr(evaluator, "function", None) or getattr(
        evaluator, "trace_symbol", type(evaluator)
    )
    return TrainCandidate(_name(model.model.trace_symbol), _name(trainer))


def config_of(model: SimplifiedModelSpace) -> dict[str, Any]:
    """What a function needs to build and train a frozen model, without its metrics."""
    config: dict[str, Any] = model._dump()
    del config["metrics"]
    return config


def _name(thing: Any) -> str:
    owner = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{owner.__module__}.{owner.__qualname__}"
