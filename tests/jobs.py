"""Training functions for tests, and what tests need to disturb them."""

import hashlib
import os
import signal
import time
from pathlib import Path

import smlt_tune as smlt


def digest(model):
    """SHA-256 of all weights and buffers, in order."""
    sha = hashlib.sha256()
    for value in model.state_dict().values():
        sha.update(value.numpy().tobytes())
    return sha.hexdigest()


def weights(model):
    """All weights as one list."""
    return [float(v) for p in model.state_dict().values() for v in p.double().reshape(-1)]


def note(config, line):
    """Appends a line to the worker's own file in the test's folder, if there is one."""
    if config.get("notes"):
        path = Path(config["notes"]) / f"{os.getpid()}.txt"
        with path.open("a") as file:
            file.write(line + "\n")


def notes(folder):
    """All lines of all workers."""
    return [line for f in sorted(Path(folder).glob("*.txt")) for line in f.read_text().splitlines()]


def pids(folder):
    """Processes that have worked for the test, alive or not."""
    return [int(f.stem) for f in Path(folder).glob("*.txt")]


def alive(pid):
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def kill_one(folder, chooser, *, timeout_s=30):
    """Kills one living worker of the test with SIGKILL; returns its pid."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        living = [pid for pid in pids(folder) if alive(pid)]
        if living:
            victim = chooser(sorted(living))
            os.kill(victim, signal.SIGKILL)
            return victim
        time.sleep(0.01)
    raise TimeoutError("no living worker")


def train(config):
    """A small network with dropout, batch norm, augmentation, two schedulers and evaluation.

    Configuration: epochs, batch, pause (seconds per iteration), notes (folder).
    """
    import random

    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional as F

    session = smlt.session()
    data = torch.Generator().manual_seed(1)
    x_all = torch.randn(config.get("size", 500), 16, generator=data)
    y_all = x_all[:, :4].argmax(1)
    ids = torch.arange(len(x_all))
    model = nn.Sequential(
        nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 4)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 10)
    model, optimizer, scheduler, warmup = session.prepare(model, optimizer, scheduler, warmup)
    note(config, "began")
    for epoch in session.epochs(config["epochs"]):
        model.train()
        for x, y, i in session.batches((x_all, y_all, ids), batch_size=config.get("batch", 50)):
            note(config, f"saw {epoch} {' '.join(map(str, i.tolist()))}")
            noise = random.random() + np.random.rand() + float(torch.rand(()))  # noqa: NPY002
            time.sleep(config.get("pause", 0.0))
            loss = F.cross_entropy(model(x + 0.1 * noise * torch.randn_like(x)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warmup.step()
        scheduler.step()
        model.eval()
        correct = total = 0
        with torch.no_grad():
            for x, y in session.batches((x_all, y_all), batch_size=100, shuffle=False):
                correct += (model(x).argmax(1) == y).sum().item()
                total += len(y)
        session.report(
            epoch=epoch, accuracy=session.mean(correct, total), lr=warmup.get_last_lr()[0]
        )
    return {"digest": digest(model), "weights": weights(model)}
