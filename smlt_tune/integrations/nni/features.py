"""What a candidate computes, found out in the driver before it costs anything."""

from typing import Any

import torch
from nni.nas.space import SimplifiedModelSpace

import smlt_tune as smlt
from smlt_tune.errors import SmltError, UsageError
from smlt_tune.integrations.nni.candidate import BUILDING
from smlt_tune.integrations.nni.config import SmltEngineConfig
from smlt_tune.integrations.nni.metrics import LOG


class CannotBuild(SmltError):
    """The constructor of the model space raised for a candidate's architecture."""


def workload_of(model: SimplifiedModelSpace, config: SmltEngineConfig) -> smlt.Workload | None:
    """What training a frozen model takes; None if that cannot be measured.

    Args:
        model: The candidate.
        config: Tells the shape of a batch.

    Raises:
        CannotBuild: There is no such model.
    """
    if config.dummy_input is None:
        return None
    try:
        features = _features(model, config)
    except CannotBuild:
        raise
    except Exception as error:  # noqa: BLE001 - of any kind, in the user's model
        LOG.warning(
            "a candidate cannot be measured with dummy_input=%s, and starts on the allocation of "
            "an average one: %s: %s",
            config.dummy_input,
            type(error).__name__,
            error,
        )
        return None
    return smlt.Workload(features, config.dummy_input[0], config.iterations)


def _features(model: SimplifiedModelSpace, config: SmltEngineConfig) -> smlt.ModelFeatures:
    def measure(device: str) -> smlt.ModelFeatures:
        assert config.dummy_input is not None
        batch = torch.empty(config.dummy_input, dtype=getattr(torch, config.dummy_dtype))
        return smlt.model_features(_built(model, device), batch.to(device))

    try:
        return measure("meta")  # neither time nor memory of the real size
    except (CannotBuild, UsageError):
        return measure("cpu")  # it looks at values


def _built(model: SimplifiedModelSpace, device: str) -> Any:
    with BUILDING, torch.random.fork_rng(devices=[]), torch.device(device):
        try:
            return model.executable_model()
        except Exception as error:
            raise CannotBuild(
                f"the model of {model.sample} cannot be built: {type(error).__name__}: {error}"
            ) from error
