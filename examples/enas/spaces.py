"""The three search spaces of ENAS (Pham et al., 2018), small enough for two cores.

All have a width as well, so that their candidates differ in size by more than ten times.
"""

import nni
import torch
from nni.nas.nn.pytorch import (
    Cell,
    InputChoice,
    LayerChoice,
    ModelSpace,
    MutableBatchNorm2d,
    MutableConv2d,
    MutableEmbedding,
    MutableLinear,
)
from torch import nn

WIDTHS = [4, 8, 16, 32]


def convolution(width, kernel):
    """ReLU, convolution, batch normalisation."""
    return nn.Sequential(
        nn.ReLU(),
        MutableConv2d(width, width, kernel, padding=kernel // 2, bias=False),
        MutableBatchNorm2d(width),
    )


def separable(width, kernel):
    """The same with a depthwise and a pointwise convolution."""
    return nn.Sequential(
        nn.ReLU(),
        MutableConv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False),
        MutableConv2d(width, width, 1, bias=False),
        MutableBatchNorm2d(width),
    )


def stem(width):
    """From images with one channel of at least 8 x 8 to half their edge."""
    return nn.Sequential(
        MutableConv2d(1, width, 3, padding=1, bias=False),
        MutableBatchNorm2d(width),
        nn.MaxPool2d(2),
    )


def operations(width):
    """What a layer or a node may compute."""
    return {
        "conv3": convolution(width, 3),
        "conv5": convolution(width, 5),
        "sep3": separable(width, 3),
        "sep5": separable(width, 5),
        "max": nn.MaxPool2d(3, 1, 1),
        "average": nn.AvgPool2d(3, 1, 1),
    }


class Macro(ModelSpace):
    """A whole network: the operation of every layer, and which earlier layers are added to it."""

    def __init__(self, layers=6, classes=10, widths=WIDTHS):
        super().__init__()
        width = nni.choice("width", list(widths))
        self.stem = stem(width)
        numbers = range(layers)
        self.layers = nn.ModuleList(
            LayerChoice(operations(width), label=f"layer{i}") for i in numbers
        )
        self.skips = nn.ModuleList(InputChoice(i + 1, None, label=f"skip{i}") for i in numbers)
        self.norms = nn.ModuleList(MutableBatchNorm2d(width) for _ in numbers)
        self.halve = nn.MaxPool2d(2)
        self.halved = {layers // 3 - 1, 2 * layers // 3 - 1}
        self.classifier = MutableLinear(width, classes)

    def forward(self, images):
        outputs = [self.stem(images)]
        for i, (layer, skip, norm) in enumerate(
            zip(self.layers, self.skips, self.norms, strict=True)
        ):
            output, added = layer(outputs[-1]), skip(outputs)
            outputs.append(norm(output if added is None else output + added))
            if i in self.halved and outputs[-1].shape[-1] >= 4:
                outputs = [self.halve(each) for each in outputs]
        return self.classifier(outputs[-1].mean((2, 3)))


class Micro(ModelSpace):
    """Two kinds of cells, of which the network is stacked: one that keeps and one that halves."""

    def __init__(self, nodes=3, classes=10):
        super().__init__()
        width = nni.choice("width", WIDTHS)
        self.stem = stem(width)
        self.cells = nn.ModuleList(
            Cell(operations(width), nodes, 2, 2, label=kind) for kind in ("keep", "halve", "keep")
        )
        self.joins = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                MutableConv2d(width * nodes, width, 1, bias=False),
                MutableBatchNorm2d(width),
            )
            for _ in self.cells
        )
        self.halve = nn.MaxPool2d(2)
        self.classifier = MutableLinear(width, classes)

    def forward(self, images):
        before = last = self.stem(images)
        for number, (cell, join) in enumerate(zip(self.cells, self.joins, strict=True)):
            if number == 1:
                before, last = self.halve(before), self.halve(last)
            before, last = last, join(cell(before, last))
        return self.classifier(last.mean((2, 3)))


class Edge(nn.Module):
    """A recurrent cell's way from an earlier node to another: a gated (highway) connection."""

    def __init__(self, source, width):
        super().__init__()
        self.source = source
        self.gate = MutableLinear(width, width)
        self.state = MutableLinear(width, width)

    def forward(self, nodes, activation):
        before = nodes[self.source]
        gate = torch.sigmoid(self.gate(before))
        return gate * activation(self.state(before)) + (1 - gate) * before


class Recurrent(ModelSpace):
    """A recurrent cell: from which node each node comes, through which function."""

    def __init__(self, symbols=64, nodes=4):
        super().__init__()
        width = nni.choice("width", [16, 32, 64, 128])
        functions = [nn.Tanh, nn.ReLU, nn.Sigmoid, nn.Identity]
        self.embedding = MutableEmbedding(symbols, width)
        self.input, self.hidden = MutableLinear(width, width), MutableLinear(width, width)
        self.functions = nn.ModuleList(
            LayerChoice([kind() for kind in functions], label=f"function{i}")
            for i in range(nodes + 1)
        )
        self.edges = nn.ModuleList(
            LayerChoice([Edge(source, width) for source in range(i + 1)], label=f"source{i}")
            for i in range(nodes)
        )
        self.classifier = MutableLinear(width, symbols)

    def forward(self, text):
        inputs = self.input(self.embedding(text))  # (samples, time, width)
        state, outputs = torch.zeros_like(inputs[:, 0]), []
        for step in range(inputs.shape[1]):
            nodes = [self.functions[0](inputs[:, step] + self.hidden(state))]
            for edge, function in zip(self.edges, self.functions[1:], strict=True):
                nodes.append(edge(nodes, function))
            state = torch.stack(nodes[1:]).mean(0)
            outputs.append(state)
        return self.classifier(torch.stack(outputs, 1)).flatten(0, 1)


SPACES = {"macro": Macro, "micro": Micro, "recurrent": Recurrent}
