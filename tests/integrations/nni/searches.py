"""A small space, evaluators that tell what they were given, and searches over them."""

import os
import time
from pathlib import Path

import nni
import numpy as np
import torch
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.experiment import NasExperimentConfig
from nni.nas.nn.pytorch import LayerChoice, ModelSpace, MutableLinear
from torch import nn

import smlt_tune as smlt
from smlt_tune.integrations.nni import SmltNasExperiment

ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.Sigmoid]


class Space(ModelSpace):
    """24 architectures."""

    def __init__(self, broken_width=0):
        super().__init__()
        width = nni.choice("width", [2, 3, 4, 5, 6, 7, 8, 9])
        self.hidden = MutableLinear(4, width)
        if self.hidden.out_features == broken_width:
            raise ValueError(f"no model has {broken_width} units")
        self.activation = LayerChoice([kind() for kind in ACTIVATIONS], label="activation")
        self.out = MutableLinear(width, 2)

    def forward(self, x):
        return self.out(self.activation(self.hidden(x)))


def architecture(model):
    """The sample of a built model."""
    return {
        "width": model.hidden.out_features,
        "activation": ACTIVATIONS.index(type(model.activation)),
    }


def tell(model, folder="", together=1):
    """Reports what was built, once so many candidates have begun; notes its time."""
    began, built = time.monotonic(), architecture(model)
    if folder:
        (Path(folder) / f"began-{os.getpid()}-{began}").touch()
        until = time.monotonic() + 60
        while len(list(Path(folder).glob("began-*"))) < together and time.monotonic() < until:
            time.sleep(0.01)
    for step in range(2):
        nni.report_intermediate_result(built["width"] + step / 10)
    assert nni.get_current_parameter().sample == built
    nni.report_final_result({"default": score(built), **built})
    if folder:
        ended = time.monotonic()
        (Path(folder) / f"span-{os.getpid()}-{began}").write_text(f"{began} {ended}")


def score(sample):
    """What :func:`tell` reports of an architecture."""
    return sample["width"] + 0.5 * sample["activation"]


def odd(model):
    """Ends in another way for each width."""
    width = model.hidden.out_features
    if width == 2:
        nni.report_intermediate_result(float("nan"))
        nni.report_final_result(float("nan"))
    elif width == 3:
        nni.report_intermediate_result(np.float32(0.5))
        nni.report_final_result(torch.tensor(0.25))
    elif width == 4:
        nni.report_final_result({"default": np.float64(4.0), "loss": 0.1, "kind": "dictionary"})
    elif width == 5:
        nni.report_final_result({"accuracy": 1.0})
    elif width == 6:
        raise ValueError("six is refused")
    elif width == 7:
        return
    else:
        nni.report_final_result(width)


def slow(model, folder, seconds):
    """Trains for a while with checkpoints, and notes every epoch that it begins."""
    session = smlt.session()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.prepare(model, optimizer)
    built = architecture(model)
    for epoch in session.epochs(4):
        with open(f"{folder}/{built['width']}-{built['activation']}", "a") as notes:
            notes.write(f"{epoch}\n")
        for x, y in session.batches((torch.ones(8, 4), torch.zeros(8, 2)), batch_size=4):
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        time.sleep(seconds / 4)
        nni.report_intermediate_result(float(epoch))
    nni.report_final_result(score(built))


def native(model):
    """Reports to the session, and is right for any number of workers."""
    session = smlt.session()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.prepare(model, optimizer)
    for epoch in session.epochs(2):
        for x, y in session.batches((torch.ones(8, 4), torch.zeros(8, 2)), batch_size=4):
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        session.report(accuracy=0.5 + epoch, workers=session.workers)


def experiment(
    strategy, evaluate, folder, *, fleet=None, space=None, trials=20, concurrency=4, id=None,
    arguments=None, **engine,
):  # fmt: skip
    """An experiment whose candidates have one function each, unless told otherwise."""
    config = NasExperimentConfig(
        "smlt", "simplified", max_trial_number=trials, trial_concurrency=concurrency,
        experiment_working_directory=str(folder),
    )  # fmt: skip
    for name, value in {"workers": 1, "memory_mb": 1769, **engine}.items():
        setattr(config.execution_engine, name, value)
    evaluator = FunctionalEvaluator(evaluate, **(arguments or {}))
    return SmltNasExperiment(space or Space(), evaluator, strategy, config, id, fleet=fleet)


def run(*arguments, **options):
    """Runs an experiment to its end and stops it."""
    made = experiment(*arguments, **options)
    try:
        made.run()
    finally:
        made.stop()
    return made
