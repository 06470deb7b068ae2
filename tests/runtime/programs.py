"""Training functions that try everything a session has to get right. Each returns its weights.

Alone they also use random numbers; with several workers they must not (see harness).
"""

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import smlt_tune as smlt

X = torch.randn(44, 4, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)
DATA = (X, Y)


def net(seed=0):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def loss_of(session, model, x, y):
    if session.workers == 1:
        numpy = np.random.rand()  # noqa: NPY002 - what user code uses
        noise = random.random() + numpy + torch.rand(())
        x = F.dropout(x, 0.2) + 0.01 * noise
    return F.cross_entropy(model(x), y)


def step(session, model, optimizer, x, y):
    optimizer.zero_grad()
    loss = loss_of(session, model, x, y)
    loss.backward()
    optimizer.step()
    return loss


def accuracy(session, model, **options):
    training = model.training
    model.eval()
    correct = total = 0
    with torch.no_grad():
        for x, y in session.batches(DATA, options.pop("batch_size", 15), shuffle=False):
            correct += (model(x).argmax(1) == y).sum().item()
            total += len(y)
    model.train(training)
    return session.mean(correct, total)


def weights(*models):
    return [bytes(v.numpy().tobytes()) for m in models for v in m.state_dict().values()]


class Count:
    """A counter that is prepared like a model."""

    def __init__(self):
        self.value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def plain():
    session, model = smlt.session(), net()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    schedulers = [
        torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9),
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 6),
    ]
    model, optimizer, *schedulers = session.prepare(model, optimizer, *schedulers)
    for epoch in session.epochs(3):
        for x, y in session.batches(DATA, 10):
            step(session, model, optimizer, x, y)
            schedulers[1].step()
        schedulers[0].step()
        session.report(epoch=epoch, accuracy=accuracy(session, model))
    return weights(model)


def several_loops():
    """Two that train in every epoch, evaluation before, between and after, one of each outside."""
    session, model = smlt.session(), net()
    model = session.prepare(model)
    optimizer = session.prepare(torch.optim.SGD(model.parameters(), 0.05, momentum=0.9))
    session.report(before=accuracy(session, model))
    for x, y in session.batches(DATA, 20):
        step(session, model, optimizer, x, y)
    session.report(warm=accuracy(session, model))
    for epoch in session.epochs(2):
        session.report(epoch=epoch, first=accuracy(session, model))
        for x, y in session.batches(DATA, 20):
            step(session, model, optimizer, x, y)
        session.report(epoch=epoch, second=accuracy(session, model))
        for x, y in session.batches((X[:30], Y[:30]), 7, shuffle=False, drop_last=True):
            step(session, model, optimizer, x, y)
        session.report(epoch=epoch, third=accuracy(session, model))
    for x, y in session.batches(DATA, 20):
        step(session, model, optimizer, x, y)
    for epoch in session.epochs(2):
        for x, y in session.batches(DATA, 22):
            step(session, model, optimizer, x, y)
        session.report(again=epoch, accuracy=accuracy(session, model))
    for x, y in session.batches(DATA, 20):
        step(session, model, optimizer, x, y)
    session.report(end=accuracy(session, model))
    return weights(model)


def accumulation():
    """Over three iterations and the borders of epochs; counted by hand, as everybody does."""
    session, model = smlt.session(), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model, optimizer = session.prepare(model, optimizer)
    for _ in session.epochs(2):
        for i, (x, y) in enumerate(session.batches(DATA, 8)):
            loss_of(session, model, x, y).backward()
            if i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
    return weights(model)


def two_optimizers():
    """As a GAN; one accumulates over two iterations, and each reaches into the other."""
    session = smlt.session()
    one, two = net(1), net(2)
    steps = [torch.optim.Adam(m.parameters(), 0.05) for m in (one, two)]
    count = Count()
    one, two, *steps, count = session.prepare(one, two, *steps, count)
    for epoch in session.epochs(2):
        for x, y in session.batches(DATA, 9):
            loss_of(session, one, x, y).backward()
            steps[0].step()
            steps[0].zero_grad()
            (loss_of(session, two, x, y) + 0.1 * one(x).square().mean()).backward()
            count.value += 1
            if count.value % 2 == 0:
                steps[1].step()
                steps[1].zero_grad()
        session.report(epoch=epoch, count=count.value)
    return weights(one, two)


def by_hand():
    """Without an optimizer."""
    session = smlt.session()
    model = session.prepare(net())
    for epoch in session.epochs(2):
        for x, y in session.batches(DATA, 11):
            loss_of(session, model, x, y).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.05 * p.grad
                    p.grad = None
        session.report(epoch=epoch, accuracy=accuracy(session, model))
    return weights(model)


def early_scheduler():
    """What is prepared changes at the beginning of the epoch, and again before the loop."""
    session, model = smlt.session(), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 3], 0.5)
    model, optimizer, scheduler = session.prepare(model, optimizer, scheduler)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)  # initial weights, set after prepare()
    optimizer.step()  # quiets the scheduler
    for epoch in session.epochs(4):
        scheduler.step()
        with torch.no_grad():
            model[0].weight.mul_(0.99)
        session.report(epoch=epoch, lr=scheduler.get_last_lr()[0], first=accuracy(session, model))
        for x, y in session.batches(DATA, 20):
            step(session, model, optimizer, x, y)
    return weights(model)


def break_out():
    """Of loops and of epochs, and other epochs after that."""
    session, model = smlt.session(), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    count = Count()
    model, optimizer, count = session.prepare(model, optimizer, count)
    for epoch in session.epochs(100):
        for x, y in session.batches(DATA, 5):
            step(session, model, optimizer, x, y)
            count.value += 1
            if count.value % 4 == 0:
                break
        session.report(epoch=epoch, accuracy=accuracy(session, model), count=count.value)
        if count.value >= 8:
            break
    session.report(after=count.value)
    for epoch in session.epochs(2):
        for x, y in session.batches(DATA, 22):
            step(session, model, optimizer, x, y)
        session.report(epoch=epoch, accuracy=accuracy(session, model))
    return weights(model)


def no_epochs():
    session, model = smlt.session(), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer = session.prepare(model, optimizer)
    for _ in range(2):
        for x, y in session.batches(DATA, 11):
            step(session, model, optimizer, x, y)
        session.report(accuracy=accuracy(session, model))
    return weights(model)


def means_in_the_loop():
    """A mean and two reports in every iteration; means decide about the next step."""
    session, model = smlt.session(), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    model, optimizer, scheduler = session.prepare(model, optimizer, scheduler)
    for _ in session.epochs(2):
        for x, y in session.batches(DATA, 11):
            loss = step(session, model, optimizer, x, y)
            mean = session.mean(loss.detach() * len(y), len(y))
            session.report(loss=mean)
            scheduler.step(mean)
            session.report(lr=scheduler.get_last_lr()[0])
    return weights(model)


def evaluation_in_the_loop():
    """In mid-epoch, with batches smaller than some numbers of workers, and two in an iteration."""
    session, model = smlt.session(), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    count = Count()
    model, optimizer, count = session.prepare(model, optimizer, count)
    for _ in session.epochs(2):
        for x, y in session.batches(DATA, 11):
            step(session, model, optimizer, x, y)
            count.value += 1
            if count.value % 3 == 0:
                session.report(accuracy=accuracy(session, model))
                session.report(again=accuracy(session, model, batch_size=43))
    return weights(model)


def growing_batches():
    session, model = smlt.session(), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer = session.prepare(model, optimizer)
    for epoch in session.epochs(3):
        for x, y in session.batches(DATA, lambda e: 11 * 2**e):
            step(session, model, optimizer, x, y)
        session.report(epoch=epoch, accuracy=accuracy(session, model))
    return weights(model)


def outside_of_loops():
    """Backward passes and steps between the loops, and averaged weights at the end of epochs."""
    session, model = smlt.session(), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    average = torch.optim.swa_utils.AveragedModel(model)
    model, optimizer, average = session.prepare(model, optimizer, average)
    session.report(begins=True)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    for epoch in session.epochs(2):
        optimizer.zero_grad()
        F.cross_entropy(model(X[:20]), Y[:20]).backward()
        optimizer.step()
        session.report(epoch=epoch, first=accuracy(session, model))
        for x, y in session.batches(DATA, 15):
            step(session, model, optimizer, x, y)
        average.update_parameters(model)
        optimizer.zero_grad()
        F.cross_entropy(model(X[20:]), Y[20:]).backward()
        optimizer.step()
        session.report(epoch=epoch, last=accuracy(session, average))
    return weights(model, average)


def late_step():
    """Steps at the beginning of the next iteration, with the gradients of the last."""
    session, model = smlt.session(), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model, optimizer = session.prepare(model, optimizer)
    for epoch in session.epochs(2):
        for x, y in session.batches(DATA, 11):
            optimizer.step()
            optimizer.zero_grad()
            loss_of(session, model, x, y).backward()
        session.report(epoch=epoch, accuracy=accuracy(session, model))
    return weights(model)


def catches_everything():
    """User code that goes on whatever happens."""
    session, model = smlt.session(), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer = session.prepare(model, optimizer)
    for epoch in session.epochs(2):
        try:
            for x, y in session.batches(DATA, 11):
                step(session, model, optimizer, x, y)
                if epoch == 1:
                    raise ValueError("not today")
        except Exception:
            session.report(caught=epoch)
        session.report(epoch=epoch, accuracy=accuracy(session, model))
    return weights(model)


def unfreezes():
    session, model = smlt.session(), net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model, optimizer = session.prepare(model, optimizer)
    for epoch in session.epochs(3):
        model[0].requires_grad_(epoch >= 1)
        model[2].requires_grad_(epoch != 1)
        for x, y in session.batches(DATA, 11):
            step(session, model, optimizer, x, y)
        session.report(epoch=epoch, accuracy=accuracy(session, model))
    return weights(model)


PROGRAMS = {
    f.__name__: f
    for f in (
        plain,
        several_loops,
        accumulation,
        two_optimizers,
        by_hand,
        early_scheduler,
        break_out,
        no_epochs,
        means_in_the_loop,
        evaluation_in_the_loop,
        growing_batches,
        outside_of_loops,
        late_step,
        catches_everything,
        unfreezes,
    )
}
