"""A small convolutional network whose architecture is searched.

The images are Fashion-MNIST where Debian's package `dataset-fashion-mnist` is installed, and
scikit-learn's handwritten digits otherwise. Nothing is downloaded.

    python examples/fashion.py          # one training in this process, as in a debugger
    smlt sweep examples/sweep.yaml      # the search
"""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import smlt_tune as smlt

FASHION = Path("/usr/share/datasets/fashion-mnist")
DIGITS = "datasets/data/digits.csv.gz"


class Network(nn.Module):
    """`depth` convolutions, the channels doubling where the image is halved, then a classifier.

    Args:
        depth: Number of convolutions.
        width: Channels of the first.
        kernel: Edge of the filters, pixels; odd.
        size: Edge of the images, pixels.
    """

    def __init__(self, depth, width, kernel, size):
        super().__init__()
        layers, channels = [], 1
        for layer in range(depth):
            out = width * 2 ** min(layer, 2)
            layers += [nn.Conv2d(channels, out, kernel, padding=kernel // 2), nn.ReLU()]
            if size >= 4:
                layers.append(nn.MaxPool2d(2))
                size //= 2
            channels = out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * size * size, 10)

    def forward(self, images):
        return self.classifier(self.features(images).flatten(1))


def load_images(train_samples=None, test_samples=None):
    """(images, labels) to train on, to choose the architecture by, and to test it on.

    Images are float32 of shape (n, 1, edge, edge).
    """
    if FASHION.is_dir():
        test_samples = test_samples or 10_000
        train_samples = min(train_samples or 60_000, 60_000 - test_samples)
        images, labels = read_fashion("train", train_samples + test_samples)
        test = read_fashion("t10k", test_samples)
    else:
        test_samples = min(test_samples or 360, 360)
        images, labels = read_digits()
        test = images[-test_samples:], labels[-test_samples:]
        images, labels = images[:-360], labels[:-360]
        train_samples = min(train_samples or len(images), len(images) - test_samples)
    validation = slice(train_samples, train_samples + test_samples)
    train = images[:train_samples], labels[:train_samples]
    return train, (images[validation], labels[validation]), test


def read_fashion(part, samples):
    """The first samples of one part of Fashion-MNIST."""
    with gzip.open(FASHION / f"{part}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(16 + samples * 784), np.uint8, offset=16)
    with gzip.open(FASHION / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(8 + samples), np.uint8, offset=8)
    images = pixels.reshape(-1, 1, 28, 28).astype(np.float32)
    return (images - 73.0) / 90.0, labels.astype(np.int64)


def read_digits():
    """All digits, in a fixed random order. Only the data file of scikit-learn is used."""
    sklearn = find_spec("sklearn")
    if sklearn is None:
        raise RuntimeError(
            "no images: apt-get install dataset-fashion-mnist, or pip install scikit-learn"
        )
    with gzip.open(Path(sklearn.origin).parent / DIGITS, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    table = np.random.default_rng(0).permutation(table)
    images = table[:, :-1].reshape(-1, 1, 8, 8)
    return (images - 5.0) / 6.0, table[:, -1].astype(np.int64)


def evaluate(session, model, images_and_labels):
    """Share of the images that are classified right, over all workers."""
    correct = total = 0
    model.eval()
    with torch.no_grad():
        for images, labels in session.batches(images_and_labels, batch_size=512, shuffle=False):
            correct += int((model(images).argmax(1) == labels).sum())
            total += len(labels)
    model.train()
    return session.mean(correct, total)


def train(config):
    """Trains one architecture. The same code for one worker and for many."""
    training, validation, test = load_images(
        config.get("train_samples"), config.get("test_samples")
    )
    session = smlt.session()
    model = Network(config["depth"], config["width"], config["kernel"], size=training[0].shape[-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
    model, optimizer = session.prepare(model, optimizer)
    parameters = sum(weights.numel() for weights in model.parameters())
    for epoch in session.epochs(config["epochs"]):
        loss_sum = samples = 0
        for images, labels in session.batches(training, batch_size=config["batch_size"]):
            loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += float(loss.detach()) * len(labels)
            samples += len(labels)
        metrics = {
            "epoch": epoch + 1,
            "accuracy": evaluate(session, model, validation),
            "loss": session.mean(loss_sum, samples),
            "parameters": parameters,
        }
        if epoch + 1 == config["epochs"]:  # nothing is chosen by these images
            metrics["test_accuracy"] = evaluate(session, model, test)
        session.report(**metrics)


if __name__ == "__main__":
    from smlt_tune.runtime.session import Session

    class Printing(Session):
        """Prints its reports."""

        def report(self, **metrics):
            print(metrics)

    with Printing():
        train({"depth": 2, "width": 16, "kernel": 3, "lr": 2e-3, "batch_size": 64, "epochs": 5})
