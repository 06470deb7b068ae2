import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import smlt_tune as smlt
from smlt_tune.errors import InvalidInput, UsageError
from smlt_tune.runtime.dry_run import SAMPLES, DryRun, dry_run, model_features
from smlt_tune.runtime.features import ModelFeatures
from tests.runtime.programs import DATA, PROGRAMS, X, Y, net

CONFIG = {"width": 5, "batch": 16, "epochs": 3}


def model_of(config):
    return nn.Sequential(
        nn.Linear(4, config["width"]),
        nn.BatchNorm1d(config["width"]),
        nn.Linear(config["width"], 3),
    )


class Trace:
    """A training function, and what it has come to."""

    def __init__(self, *, dataset=DATA, batch=lambda config: config["batch"]):
        self.dataset, self.batch = dataset, batch
        self.sizes, self.after = [], []

    def __call__(self, config):
        session, model = smlt.session(), model_of(config)
        model, optimizer = session.prepare(model, torch.optim.Adam(model.parameters()))
        for _ in session.epochs(config["epochs"]):
            for x, y in session.batches(self.dataset, self.batch(config)):
                self.sizes.append(len(x))
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            self.after.append("epoch")
        self.after.append("end")


def test_it_knows_model_batch_and_iterations_after_one_iteration_on_a_few_samples():
    train = Trace()
    found = dry_run(train, CONFIG)
    alike = model_features(model_of(CONFIG), torch.ones(SAMPLES, 4))
    features = ModelFeatures(
        alike.parameters,
        alike.gradient_bytes,
        alike.flops_per_sample,
        found.features.activation_bytes,  # of the loss too
    )
    assert found == DryRun(features, batch=16, samples=44, epochs=3, iterations=9)
    assert found.features.activation_bytes >= alike.activation_bytes
    assert (train.sizes, train.after) == ([SAMPLES], [])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (lambda config: 1000, (44, 3)),
        (lambda config: 1, (1, 3 * 44)),
        (lambda config: lambda epoch: 11 * (epoch + 1), (11, 4 + 2 + 2)),
        (lambda config: lambda epoch: 11 if epoch == 0 else 1 / 0, (11, None)),
    ],
)
def test_batch_sizes(batch, expected):
    def train(config):
        session, model = smlt.session(), nn.Linear(4, 3)
        model, optimizer = session.prepare(model, torch.optim.SGD(model.parameters()))
        for _ in session.epochs(3):
            for x, y in session.batches(DATA, batch(config)):
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

    found = dry_run(train, None)
    assert (found.batch, found.iterations) == expected


@pytest.mark.parametrize("name", sorted(set(PROGRAMS) - {"outside_of_loops", "late_step"}))
def test_programs_of_all_kinds(name):
    found = dry_run(lambda config: PROGRAMS[name](), None)
    assert found.features.flops_per_sample > 0
    assert found.features.activation_bytes > 0
    assert found.batch <= found.samples == 44


def test_the_same_is_found_each_time_and_no_session_is_left_behind():
    first, second = dry_run(Trace(), CONFIG), dry_run(Trace(), CONFIG)
    assert first == second
    session = smlt.session()
    assert session is not smlt.session()


def test_data_sets_that_are_asked_for_by_name_are_given():
    arrays = (X.numpy(), Y.numpy())
    found = dry_run(Trace(dataset="points"), CONFIG, datasets={"points": arrays})
    assert (found.samples, found.iterations) == (44, 9)
    with pytest.raises(
        InvalidInput,
        match=r"^the training function asks for the data set 'points', which was not given "
        r"\(given: other\): datasets=\{'points': arrays\}$",
    ):
        dry_run(Trace(dataset="points"), CONFIG, datasets={"other": np.ones(3)})


def test_samples_are_fetched_no_more_than_needed():
    class Slow:
        fetched = 0

        def __len__(self):
            return 10**9

        def __getitem__(self, index):
            Slow.fetched += 1
            return torch.ones(4), 1

    found = dry_run(Trace(dataset=Slow()), CONFIG)
    assert found.iterations == 3 * 10**9 // 16
    assert Slow.fetched == SAMPLES


def never_prepares(config):
    for x, _y in smlt.session().batches(DATA, 11):
        assert len(x)


def never_trains(config):
    session = smlt.session()
    model = session.prepare(net())
    with torch.no_grad():
        for x, _y in session.batches(DATA, 11):
            model(x)


def raises(config):
    for _ in smlt.session().batches(DATA, 11):
        raise KeyError("mine")


def multiplies_sparse_matrices(config):
    session, model = smlt.session(), net()
    model, optimizer = session.prepare(model, torch.optim.SGD(model.parameters()))
    for x, _y in session.batches(DATA, 11):
        model(torch.sparse.mm(torch.eye(len(x)).to_sparse(), x)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("train", "kind", "message"),
    [
        (lambda config: None, UsageError, "it never called session.prepare"),
        (never_prepares, UsageError, "it never called session.prepare"),
        (never_trains, UsageError, "no backward pass reached"),
        (raises, KeyError, "^'mine'$"),
        (multiplies_sparse_matrices, UsageError, "cannot be measured"),
    ],
)
def test_functions_that_cannot_be_run_dry(train, kind, message):
    with pytest.raises(kind, match=message):
        dry_run(train, None)


def test_a_function_that_catches_everything_ends_all_the_same():
    def train(config):
        try:
            Trace()(config)
        except BaseException:
            Trace()(config)  # and begins again

    assert dry_run(train, CONFIG).iterations == 9


def test_what_would_be_compiled_is_measured_and_not_compiled():
    def train(config):
        session, model = smlt.session(), net()
        compiled = torch.compile(model, backend="eager")
        model, optimizer = session.prepare(model, torch.optim.SGD(model.parameters()))
        for x, y in session.batches(DATA, 11):
            F.cross_entropy(compiled(x), y).backward()
            optimizer.step()

    assert dry_run(train, None).features.flops_per_sample == 2 * 2 * 4 * 5 + 3 * 2 * 5 * 3
