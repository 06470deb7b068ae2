"""Records the curves of real trainings for ``bench_loss_curves.py``.

Logistic regressions, perceptrons and small convolutional networks on Fashion-MNIST (2,000 and
12,000 images), digits, and two tables of scikit-learn. Of each epoch: the mean training loss, loss
and accuracy (if there are classes) on samples held out. A training whose loss is no number any more
ends there.

    python benchmarks/curves/record.py curves|searches|repeats [folder of Fashion-MNIST]

writes one of three files beside it: ``curves.json`` has trainings that have little to do with each
other; ``searches.json`` has searches, of random configurations of one training function each, in
the order in which they were drawn (most of an hour of one core, the others some minutes);
``repeats.json`` has the first trainings of the searches once more, with other seeds.
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

HERE = Path(__file__).parent
#: Samples of Fashion-MNIST to train on (few: the networks come to know them by heart), and to
#: evaluate on.
FEW, MANY, HELD_OUT = 2000, 12_000, 1000
#: Significant digits that are kept.
DIGITS = 5
#: Of each file: trials of a search; the first seed.
TRIALS = {"searches": 48, "repeats": 12}
SEEDS = {"curves": 0, "searches": 5000, "repeats": 1000}
#: What is drawn: (least, most) of the rate, and of the width.
RATES = {"sgd": (2e-3, 0.2), "adam": (1e-4, 1e-2)}
WIDTHS = {"linear": (1, 1), "mlp": (8, 128), "cnn": (3, 10)}


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


#: (data, model, optimizer, schedule of the rate, epochs, whether there is regularisation).
SEARCHES = (
    ("fashion", "mlp", "sgd", "constant", 60, False),
    ("fashion", "mlp", "adam", "cosine", 60, False),
    ("digits", "mlp", "sgd", "steps", 80, False),
    ("fashion 12,000", "mlp", "sgd", "steps", 40, False),
    ("fashion 12,000", "mlp", "adam", "constant", 40, True),
    ("digits", "mlp", "adam", "constant", 60, False),
    ("cancer", "mlp", "adam", "cosine", 80, True),
    ("cancer", "linear", "sgd", "constant", 80, False),
    ("fashion", "cnn", "sgd", "constant", 40, False),
    ("fashion", "cnn", "adam", "cosine", 40, True),
    ("diabetes", "mlp", "sgd", "cosine", 80, False),
    ("diabetes", "mlp", "adam", "steps", 80, True),
    ("fashion 12,000", "linear", "sgd", "cosine", 40, False),
    ("fashion", "linear", "adam", "constant", 60, True),
    ("digits", "cnn", "adam", "steps", 60, True),
    ("digits", "cnn", "sgd", "cosine", 60, False),
)
#: Those that were added when nothing was chosen any more; not repeated.
LATER = (
    ("fashion", "cnn", "sgd", "steps", 40, True),
    ("fashion", "mlp", "adam", "constant", 60, True),
    ("fashion 12,000", "mlp", "sgd", "cosine", 40, False),
    ("fashion 12,000", "linear", "adam", "steps", 40, False),
    ("digits", "mlp", "sgd", "constant", 80, False),
    ("digits", "cnn", "adam", "cosine", 60, False),
    ("cancer", "mlp", "sgd", "cosine", 80, False),
    ("diabetes", "linear", "sgd", "constant", 80, False),
)


def searches(settings, trials):
    """What ``trainings`` yields, and more, drawn at random for every search."""
    for number, (data, model, kind, schedule, epochs, regularised) in enumerate(settings):
        rng = np.random.default_rng(number)
        for _ in range(trials):
            log_rate, log_width = (rng.uniform(*np.log(b)) for b in (RATES[kind], WIDTHS[model]))
            yield {
                "search": number,
                "data": data,
                "model": model,
                "width": round(math.exp(log_width)),
                "rate": float(f"{math.exp(log_rate):.3g}"),
                "batch": int(rng.choice([16, 32, 64, 128, 256])),
                "epochs": epochs,
                "optimizer": kind,
                "schedule": schedule,
                "momentum": round(rng.uniform(0.5, 0.95), 2),
                "dropout": round(regularised * rng.uniform(0.0, 0.6), 2),
                "weight_decay": float(f"{regularised * 10 ** rng.uniform(-6.0, -2.0):.2g}"),
            }


def trainings():
    """Trainings that have little to do with each other."""
    names = ("data", "model", "width", "rate", "batch", "epochs", "optimizer", "schedule")
    for one in grids():
        yield dict(zip(names, one, strict=True))


def grids():
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


def network(one, x, outputs):
    inputs, width, dropout = math.prod(x.shape[1:]), one["width"], one.get("dropout", 0.0)
    if one["model"] == "linear":
        layers = [nn.Flatten(), nn.Linear(inputs, outputs)]
    elif one["model"] == "mlp":
        layers = [nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs)]
    else:
        convolutions = fashion.Network(depth=2, width=width, kernel=3, size=x.shape[-1])
        layers = [convolutions.features, nn.Flatten(), convolutions.classifier]
    if dropout:
        layers.insert(-1, nn.Dropout(dropout))
    return nn.Sequential(*layers)


def optimizer_and_schedule(one, net):
    rate, epochs, decay = one["rate"], one["epochs"], one.get("weight_decay", 0.0)
    if one["optimizer"] == "sgd":
        momentum = one.get("momentum", 0.9)
        optimizer = torch.optim.SGD(net.parameters(), rate, momentum, weight_decay=decay)
    else:
        optimizer = torch.optim.Adam(net.parameters(), rate, weight_decay=decay)
    schedules = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        "steps": lambda: torch.optim.lr_scheduler.MultiStepLR(
            optimizer, [epochs // 2, 3 * epochs // 4], 0.2
        ),
    }
    return optimizer, schedules[one["schedule"]]()


def train(one, seed):
    """The curves of one training."""
    torch.manual_seed(seed)
    (x, y), (held_x, held_y) = (tuple(map(torch.from_numpy, p)) for p in DATA[one["data"]]())
    if one["model"] == "cnn" and x.ndim == 2:  # the digits of scikit-learn are flat
        x, held_x = (part.reshape(-1, 1, 8, 8) for part in (x, held_x))
    classes = not y.dtype.is_floating_point
    net = network(one, x, int(y.max()) + 1 if classes else 1)
    optimizer, schedule = optimizer_and_schedule(one, net)

    def loss_of(outputs, targets):
        if classes:
            return functional.cross_entropy(outputs, targets)
        return functional.mse_loss(outputs[:, 0], targets)

    curves = {"loss": [], "held_out_loss": []} | ({"accuracy": []} if classes else {})
    for _ in range(one["epochs"]):
        total = 0.0
        net.train()
        for part in torch.randperm(len(x)).split(one["batch"]):
            loss = loss_of(net(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(part)
        schedule.step()
        net.eval()
        with torch.no_grad():
            outputs = net(held_x)
        if not math.isfinite(total):
            break
        curves["loss"].append(total / len(x))
        curves["held_out_loss"].append(float(loss_of(outputs, held_y)))
        if classes:
            curves["accuracy"].append(float((outputs.argmax(1) == held_y).float().mean()))
    digits = {
        k: [float(f"{v:.{DIGITS}g}") if math.isfinite(v) else None for v in c]
        for k, c in curves.items()
    }
    return one | {"seed": seed, "curves": digits}


def main():
    torch.set_num_threads(1)
    kinds = {
        "curves": trainings(),
        "searches": searches(SEARCHES + LATER, TRIALS["searches"]),
        "repeats": searches(SEARCHES, TRIALS["repeats"]),
    }
    if sys.argv[1:2] not in ([kind] for kind in kinds):
        raise SystemExit(f"say what to record: {' or '.join(kinds)}")
    if sys.argv[2:]:
        fashion.FASHION = Path(sys.argv[2])
    found, begun = [], time.process_time()
    for seed, one in enumerate(kinds[sys.argv[1]], SEEDS[sys.argv[1]]):
        found.append(train(one, seed))
        print(f"{time.process_time() - begun:6.1f} s", *one.values(), flush=True)
    lines = ",\n".join(json.dumps(each, separators=(",", ":")) for each in found)
    (HERE / f"{sys.argv[1]}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
