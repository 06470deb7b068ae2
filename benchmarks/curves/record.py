"""Records the curves of real trainings for ``bench_loss_curves.py``.

Logistic regressions, perceptrons and small convolutional networks, with several rates, widths and
batch sizes; on Fashion-MNIST (2,000 and 12,000 images), digits, and two tables of scikit-learn. Of
each epoch: the mean training loss, loss and accuracy (if there are classes) on samples held out. A
training whose loss is no number any more ends there.

    python benchmarks/curves/record.py [folder of Fashion-MNIST]

writes ``curves.json`` beside it, in some minutes of one core.
"""

import itertools
import json
import math
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from sklearn import datasets
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import fashion

OUT = Path(__file__).parent / "curves.json"
#: Samples of Fashion-MNIST to train on (few: the networks come to know them by heart), and to
#: evaluate on.
FEW, MANY, HELD_OUT = 2000, 12_000, 1000
#: Significant digits that are kept.
DIGITS = 5


@cache
def images(samples):
    if not fashion.FASHION.is_dir():
        raise SystemExit(f"no {fashion.FASHION}: apt-get install dataset-fashion-mnist")
    return fashion.load_images(samples, HELD_OUT)[:2]


def table(load):
    """A data set of scikit-learn, standardised; every fourth sample is held out."""
    found = load()
    x = found.data.astype(np.float32)
    x = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-6)
    y = found.target
    if y.dtype.kind == "f":
        y = ((y - y.mean()) / y.std()).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(x))
    held = np.zeros(len(x), bool)
    held[order[::4]] = True
    return (x[~held], y[~held]), (x[held], y[held])


DATA = {
    "fashion": lambda: images(FEW),
    "fashion 12,000": lambda: images(MANY),
    "digits": lambda: table(datasets.load_digits),
    "cancer": lambda: table(datasets.load_breast_cancer),
    "diabetes": lambda: table(datasets.load_diabetes),
}


def trainings():
    """(data, model, width, rate, batch size, epochs, optimizer, schedule of the rate)."""
    constant = "constant"
    yield from itertools.product(
        ["fashion"], ["linear"], [0], [0.003, 0.03], [32, 256], [80], ["sgd"], [constant]
    )
    yield from itertools.product(
        ["fashion"], ["mlp"], [16, 128], [0.01, 0.05], [32, 128], [60], ["sgd"], [constant]
    )
    yield from itertools.product(
        ["fashion"], ["mlp"], [32], [2e-4, 2e-3], [64], [60], ["adam"], [constant, "cosine"]
    )
    yield from itertools.product(
        ["fashion"], ["cnn"], [4, 8], [0.02, 0.1], [64], [40], ["sgd"], [constant]
    )
    yield from itertools.product(
        ["fashion"], ["cnn"], [8], [5e-4], [64], [40], ["adam"], [constant, "cosine"]
    )
    yield from itertools.product(
        ["digits"], ["linear"], [0], [0.01, 0.1], [32], [100], ["sgd"], [constant]
    )
    yield from itertools.product(
        ["digits"], ["mlp"], [16, 64], [0.01, 0.1], [32, 128], [80], ["sgd"], [constant]
    )
    yield from itertools.product(
        ["digits"], ["mlp"], [32], [5e-4], [64], [60], ["adam"], [constant, "cosine"]
    )
    yield from itertools.product(
        ["cancer"], ["linear", "mlp"], [8], [0.01, 0.1], [32], [100], ["sgd"], [constant]
    )
    yield from itertools.product(
        ["diabetes"], ["linear", "mlp"], [16], [1e-3, 1e-2], [32], [100], ["sgd"], [constant]
    )
    yield from itertools.product(
        ["fashion 12,000"], ["linear"], [0], [0.001, 0.01], [32, 256], [60], ["sgd"], [constant]
    )
    yield from itertools.product(
        ["fashion 12,000"], ["mlp"], [8, 64], [0.003, 0.02], [64], [60], ["sgd"], [constant]
    )
    yield from itertools.product(
        ["fashion 12,000"], ["mlp"], [16], [3e-4], [64], [60], ["adam"], [constant, "cosine"]
    )
    yield from itertools.product(
        ["fashion 12,000"], ["cnn"], [4], [0.005], [64], [40], ["sgd"], [constant, "cosine"]
    )


def network(model, width, x, outputs):
    inputs = math.prod(x.shape[1:])
    if model == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))
    if model == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs)
        )
    return fashion.Network(depth=2, width=width, kernel=3, size=x.shape[-1])


def train(one, seed):
    """The curves of one training."""
    data, model, width, rate, batch, epochs, kind, schedule = one
    torch.manual_seed(seed)
    (x, y), (held_x, held_y) = (tuple(map(torch.from_numpy, part)) for part in DATA[data]())
    classes = not y.dtype.is_floating_point
    net = network(model, width, x, int(y.max()) + 1 if classes else 1)
    optimizer = {
        "sgd": lambda: torch.optim.SGD(net.parameters(), rate, momentum=0.9),
        "adam": lambda: torch.optim.Adam(net.parameters(), rate),
    }[kind]()
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    def loss_of(outputs, targets):
        if classes:
            return functional.cross_entropy(outputs, targets)
        return functional.mse_loss(outputs[:, 0], targets)

    curves = {"loss": [], "held_out_loss": []} | ({"accuracy": []} if classes else {})
    for _ in range(epochs):
        total = 0.0
        for part in torch.randperm(len(x)).split(batch):
            loss = loss_of(net(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(part)
        if schedule == "cosine":
            decay.step()
        with torch.no_grad():
            outputs = net(held_x)
        if not math.isfinite(total):
            break
        curves["loss"].append(total / len(x))
        curves["held_out_loss"].append(float(loss_of(outputs, held_y)))
        if classes:
            curves["accuracy"].append(float((outputs.argmax(1) == held_y).float().mean()))
    names = ("data", "model", "width", "rate", "batch", "epochs", "optimizer", "schedule")
    digits = {
        k: [float(f"{v:.{DIGITS}g}") if math.isfinite(v) else None for v in c]
        for k, c in curves.items()
    }
    return dict(zip(names, one, strict=True)) | {"seed": seed, "curves": digits}


def main():
    torch.set_num_threads(1)
    if sys.argv[1:]:
        fashion.FASHION = Path(sys.argv[1])
    found, begun = [], time.process_time()
    for seed, one in enumerate(trainings()):
        found.append(train(one, seed))
        print(f"{time.process_time() - begun:6.1f} s", *one, flush=True)
    lines = ",\n".join(json.dumps(each, separators=(",", ":")) for each in found)
    OUT.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
