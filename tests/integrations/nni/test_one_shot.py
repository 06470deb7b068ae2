"""NNI's own one-shot strategies as one job."""

import nni
import pytest
import torch
from nni.nas import strategy as nas
from nni.nas.evaluator.pytorch import Classification, DataLoader
from nni.nas.nn.pytorch import LayerChoice, ModelSpace
from torch import nn
from torch.utils.data import TensorDataset

from smlt_tune.integrations.nni import search_one_shot


class Blind(nn.Module):
    """Sees nothing of its input."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return torch.zeros(len(x), 8) + self.bias


class Layers(ModelSpace):
    def __init__(self):
        super().__init__()
        self.first = LayerChoice([nn.Linear(4, 8), Blind()], label="first")
        self.second = nn.Linear(8, 2)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def search(config):
    torch.manual_seed(0)
    x = torch.randn(512, 4)
    data = nni.trace(TensorDataset)(x, (x[:, 0] > x[:, 1]).long())
    evaluator = Classification(
        learning_rate=0.02,
        train_dataloaders=DataLoader(data, batch_size=32),
        val_dataloaders=DataLoader(data, batch_size=32),
        max_epochs=config["epochs"],
        num_classes=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    strategy = getattr(nas, config["strategy"])(**config["options"])
    return search_one_shot(Layers(), evaluator, strategy)


@pytest.mark.parametrize(
    ("strategy", "options", "found"),
    [
        ("ENAS", {"reward_metric_name": "val_acc"}, [0, 1]),  # a sample of its controller
        ("DARTS", {}, [0]),
    ],
)
def test_a_one_shot_search_is_one_job(fleet, strategy, options, found):
    config = {"strategy": strategy, "options": options, "epochs": 4}
    value = fleet.submit(search, config, workers=1, memory_mb=1769).result(300).value
    assert list(value) == ["first"]
    assert value["first"] in found
