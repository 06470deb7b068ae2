"""A session outside any fleet: what it refuses, and that it trains as a plain loop would."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import smlt_tune as smlt
from smlt_tune.errors import InvalidInput, UsageError
from smlt_tune.runtime.position import sample_order
from smlt_tune.runtime.session import Session

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda s: s.prepare(), "prepare() needs at least one object, a model for example"),
        (
            lambda s: s.prepare(torch.nn.Linear(1, 1), 3, "x"),
            "prepare() cannot keep the state of a int: it has no state_dict() and "
            "load_state_dict()\n"
            "prepare() cannot keep the state of a str: it has no state_dict() and "
            "load_state_dict()",
        ),
        (lambda s: list(s.epochs(-1)), "epochs() needs a whole number of at least 0, got -1"),
        (lambda s: list(s.epochs(1.5)), "epochs() needs a whole number of at least 0, got 1.5"),
        (lambda s: list(s.epochs(True)), "epochs() needs a whole number of at least 0, got True"),
        (
            lambda s: list(s.batches((X, Y), 0)),
            "batch_size must be a whole number of at least 1, got 0",
        ),
        (
            lambda s: list(s.batches((X, Y), lambda epoch: "8")),
            "batch_size must be a whole number of at least 1, got '8'",
        ),
        (
            lambda s: list(s.batches((X, Y[:7]), 5)),
            "the arrays of a data set differ in length: [30, 7]",
        ),
        (
            lambda s: list(s.batches(iter([1, 2]), 5)),
            "batches() needs a data set with __len__ and __getitem__, a tuple of arrays, or the "
            "name of an uploaded one; got a list_iterator",
        ),
        (
            lambda s: list(s.batches("images", 5)),
            "no data set 'images' was uploaded to the fleet (uploaded: none); call "
            "fleet.upload('images', arrays) before submitting",
        ),
        (
            lambda s: s.report(),
            "report() needs at least one metric: session.report(accuracy=0.9)",
        ),
        (
            lambda s: s.report(a=1, b=[1], c=np.zeros(2)),
            "report(b=...): a list is no metric; give a number, a string or a boolean\n"
            "report(c=...): a ndarray is no metric; give a number, a string or a boolean",
        ),
    ],
)
def test_what_a_session_refuses(use, message):
    with pytest.raises(InvalidInput) as refused:
        use(Session())
    assert str(refused.value) == message


def test_a_mean_of_words_is_refused():
    with pytest.raises(InvalidInput, match="needs a number or an array of numbers"):
        Session().mean("many", 3)


def test_it_trains_as_a_plain_loop_does():
    def model_and_optimizer():
        torch.manual_seed(3)
        model = torch.nn.Linear(4, 3)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    session = smlt.session()
    model, optimizer = session.prepare(*model_and_optimizer())
    for _ in session.epochs(3):
        for x, y in session.batches((X, Y), 8):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    plain, plain_optimizer = model_and_optimizer()
    for epoch in range(3):
        order = torch.from_numpy(sample_order(30, seed=0, epoch=epoch, loop=1))
        for part in order.split(8):
            plain_optimizer.zero_grad()
            F.cross_entropy(plain(X[part]), Y[part]).backward()
            plain_optimizer.step()
    assert torch.equal(model.weight, plain.weight)
    assert torch.equal(model.bias, plain.bias)


def test_values_come_back_as_they_are():
    session = Session()
    assert session.mean(3, 4) == 0.75
    assert np.array_equal(session.mean(torch.tensor([2.0, 4.0]), 2), [1.0, 2.0])
    assert np.isnan(session.mean(0, 0))
    session.report(a=torch.tensor(1.5), b=np.float32(2), c="x", d=True, e=None)
    assert (session.rank, session.workers) == (0, 1)


def test_batches_cover_the_data_whatever_its_form():
    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, index):
            return X[index], int(Y[index])

    for data in ((X, Y), Pairs(), (X.numpy(), Y.numpy())):
        session = Session()
        session.prepare(torch.nn.Linear(1, 1))
        rows = [(x, y) for x, y in session.batches(data, 7)]
        assert [len(x) for x, _ in rows] == [7, 7, 7, 7, 2]
        assert all(isinstance(part, torch.Tensor) for row in rows for part in row)
        seen = torch.cat([x for x, _ in rows])
        assert torch.equal(seen.sort(0).values, X.sort(0).values)
    assert [len(x) for x in Session().batches(X, 7, shuffle=False, drop_last=True)] == [7] * 4


def test_a_nested_loop_must_not_train():
    session = Session()
    model = torch.nn.Linear(4, 3)
    model, optimizer = session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def run():
        for _ in session.batches((X, Y), 10):
            for x, y in session.batches((X, Y), 10):
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

    with pytest.raises(UsageError, match="a loop over batches inside another one must not train"):
        run()


def test_the_same_seed_gives_the_same_run():
    def draw(seed):
        session = Session(seed=seed)
        return [
            (float(torch.rand(())), np.random.rand(), x.tolist())  # noqa: NPY002
            for _ in session.epochs(2)
            for x in session.batches(X, 10)
        ]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
