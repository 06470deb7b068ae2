"""Model spaces of every kind whose tensors have to be named and shared."""

import nni
import torch
from nni.nas.nn.pytorch import (
    Cell,
    InputChoice,
    LayerChoice,
    ModelSpace,
    MutableBatchNorm1d,
    MutableBatchNorm2d,
    MutableConv2d,
    MutableLinear,
    Repeat,
)
from torch import nn


class Nested(ModelSpace):
    """A choice of layers whose candidates are choices and sequences."""

    def __init__(self):
        super().__init__()
        inner = LayerChoice({"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 3)}, label="inner")
        deep = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 5))
        self.stem = nn.Conv2d(1, 4, 3)
        self.block = LayerChoice([inner, nn.Identity(), deep], label="outer")


class Inputs(ModelSpace):
    """Skip connections, and a parameter of the space itself."""

    def __init__(self):
        super().__init__()
        self.ops = nn.ModuleList(
            LayerChoice([nn.Linear(4, 4), nn.Linear(4, 4, bias=False)], label=f"op{i}")
            for i in range(3)
        )
        self.skips = nn.ModuleList(InputChoice(i + 1, None, label=f"skip{i}") for i in range(3))
        self.scale = nn.Parameter(torch.ones(3))


class Deep(ModelSpace):
    """Repeated blocks: made by a function, and copied."""

    def __init__(self):
        super().__init__()

        def block(index):
            two = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
            return LayerChoice([nn.Linear(4, 4), two], label=f"block{index}")

        self.blocks = Repeat(block, (1, 4), label="depth")
        self.copies = Repeat(nn.Linear(4, 4), nni.choice("copies", [1, 2]))


class Cells(ModelSpace):
    """Cells whose operations are modules, and made by functions."""

    def __init__(self):
        super().__init__()
        ops = {"one": nn.Linear(4, 4), "two": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))}
        self.cell = Cell(ops, 3, 2, 2, label="cell")
        made = [lambda *_: nn.Linear(4, 4), lambda *_: nn.Identity()]
        self.made = Cell(made, 2, 1, 2, "loose_end", label="made")


class Widths(ModelSpace):
    """Layers of different widths."""

    def __init__(self):
        super().__init__()
        width = nni.choice("width", [2, 4, 8])
        self.conv = MutableConv2d(1, width, 3)
        self.norm = MutableBatchNorm2d(width)
        self.out = MutableLinear(width * 4, 10)


class Tied(ModelSpace):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.op = LayerChoice([nn.Linear(4, 4), nn.Identity()], label="op")


class Small(ModelSpace):
    """Trains in milliseconds: a width, a choice of layers, running statistics."""

    def __init__(self):
        super().__init__()
        width = nni.choice("width", [2, 4, 8])
        self.hidden = MutableLinear(4, width)
        ops = {"norm": MutableBatchNorm1d(width), "none": nn.Identity()}
        self.op = LayerChoice(ops, label="op")
        self.out = MutableLinear(width, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.op(self.hidden(x))))
