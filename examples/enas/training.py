"""How a candidate trains: for a moment while it is searched, from scratch once it is chosen."""

import json
import zlib
from functools import cache
from pydoc_data.topics import topics

import nni
import numpy as np
import torch
from nni.nas.space import model_context
from torch.nn import functional

import smlt_tune as smlt
from examples.enas.spaces import SPACES
from examples.fashion import load_images
from smlt_tune.integrations.nni.enas import SharedWeights
from smlt_tune.runtime.clock import SYSTEM_CLOCK

#: Characters that are told apart in the text; all others are the last one.
SYMBOLS = "\n !\"'()*+,-./0123456789:;=>ABCDEFGHIJLMNOPRSTUW[]_`abcdefghijklmnopqrstuvwxyz{}"[:63]
#: Characters that a recurrent network sees at once.
LENGTH = 24


@cache
def load_data(kind, samples, test_samples):
    """((inputs, labels) to train on, to search by, to test on), as tensors.

    The text is the documentation that Python's ``help()`` shows; labels are the next characters.
    """
    if kind != "recurrent":
        parts = load_images(samples, test_samples)
        return [tuple(map(torch.from_numpy, part)) for part in parts]
    numbers = {symbol: number for number, symbol in enumerate(SYMBOLS)}
    text = "".join(topics[topic] for topic in sorted(topics))
    codes = torch.tensor([numbers.get(symbol, len(SYMBOLS)) for symbol in text])
    windows = codes[: len(codes) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(windows)))
    inputs, labels = windows[order, :-1], windows[order, 1:]
    test_samples = min(test_samples, len(windows) // 4)
    parts = [(0, test_samples), (test_samples, test_samples), (2 * test_samples, samples)]
    test, search, train = ((inputs[a : a + n], labels[a : a + n]) for a, n in parts)
    return train, search, test


def some_of(data, number, key):
    """So many of the samples, others for other keys: candidates together see all of them."""
    first = zlib.crc32(key.encode()) % max(1, len(data[0]) - number + 1)
    return tuple(part[first : first + number] for part in data)


def search_candidate(model, kind, samples, of_samples, test_samples, batch_size):
    """What one job of the search does: inherit, train on a few samples, pass on, be judged."""
    session = smlt.session()
    train, search, _ = load_data(kind, of_samples, test_samples)
    sample = nni.get_current_parameter().sample
    train = some_of(train, samples, json.dumps(sample, sort_keys=True))
    weights = SharedWeights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    session.prepare(model, optimizer, weights)
    for _ in session.epochs(1):
        began_s = SYSTEM_CLOCK.monotonic()
        train_epoch(session, model, optimizer, train, batch_size)
        speed = len(train[0]) / (SYSTEM_CLOCK.monotonic() - began_s)
        weights.push()
        session.report(accuracy=accuracy(session, model, search), samples_per_s=speed)


def train_from_scratch(config):
    """The whole training of the architecture that was chosen."""
    session = smlt.session()
    train, _, test = load_data(config["kind"], config["of_samples"], config["test_samples"])
    with model_context(config["sample"]):
        model = SPACES[config["kind"]]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["epochs"])
    session.prepare(model, optimizer, schedule)
    for epoch in session.epochs(config["epochs"]):
        train_epoch(session, model, optimizer, train, config["batch_size"])
        schedule.step()
        session.report(epoch=epoch + 1, accuracy=accuracy(session, model, test))


def train_epoch(session, model, optimizer, data, batch_size):
    """Visits every sample once."""
    for inputs, labels in session.batches(data, batch_size):
        loss = functional.cross_entropy(model(inputs), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def accuracy(session, model, data):
    """Share of the labels that are predicted right, over all workers."""
    model.eval()
    right = count = 0
    with torch.no_grad():
        for inputs, labels in session.batches(data, 256, shuffle=False):
            right += int((model(inputs).argmax(1) == labels.flatten()).sum())
            count += labels.numel()
    model.train()
    return session.mean(right, count)
