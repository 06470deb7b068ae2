"""What rank 0 tells the scheduler of the job: what it computes, its times, what is left."""

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import smlt_tune as smlt
from smlt_tune.runtime import wire
from smlt_tune.runtime.session import Home, Session
from smlt_tune.runtime.stores.redis_store import RedisStore
from tests.runtime.programs import DATA, PROGRAMS, X, Y, accuracy, net, step, weights

# Of programs.net: linear 4 to 5, batch norm, linear 5 to 3. The batch needs no gradient.
PARAMETERS = 4 * 5 + 5 + 2 * 5 + 5 * 3 + 3
#: And two buffers of batch norm, with a flag each.
GRADIENT_BYTES = 4 * (PARAMETERS + 2 * 5 + 2)
FLOPS = 2 * 2 * 4 * 5 + 3 * 2 * 5 * 3


pytestmark = pytest.mark.usefixtures("one_thread")


def train(*, epochs=3, batch_size=11, around=None, wrap=lambda model: model):
    """A program; ``around`` is a context of its loop, ``wrap`` makes what is called."""

    def program():
        session, model = smlt.session(), net()
        called = wrap(model)
        model, optimizer = session.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
        for _ in session.epochs(epochs):
            accuracy(session, model)
            for x, y in session.batches(DATA, batch_size):
                step(session, called, optimizer, x, y)
        return weights(model)

    def within():
        with around():
            return program()

    return within if around else program


def workloads(job):
    return job.events(wire.Workload)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_rank_0_tells_once_what_the_job_computes(job, workers):
    job.run(train(), workers)
    [told] = workloads(job)
    assert (told.rank, told.batch, told.iterations) == (0, 11, 12)
    assert (told.parameters, told.gradient_bytes) == (PARAMETERS, GRADIENT_BYTES)
    assert told.flops_per_sample == FLOPS
    # Inputs, labels, what the layers keep.
    assert 4 * (4 + 2 * 5 + 3) <= told.activation_bytes <= 4 * (4 + 2 * 5 + 5 * 3 + 20)


def test_it_is_told_before_the_first_training_iteration_is(job):
    job.run(train())
    kinds = [e for e in job.events() if isinstance(e, wire.Workload | wire.Progress)]
    first = next(i for i, e in enumerate(kinds) if isinstance(e, wire.Workload))
    assert all(e.left is None for e in kinds[:first])
    assert (kinds[first + 1].left, kinds[-1].left) == (11, 0)


def test_a_new_batch_size_is_told_before_its_first_iteration(job):
    sizes = [10, 10, 22, 44]
    job.run(train(epochs=4, batch_size=lambda epoch: sizes[epoch]))
    batch, told = 0, []
    for event in job.events():
        if isinstance(event, wire.Workload):
            batch = event.batch
            told.append((event.batch, event.iterations))
        elif isinstance(event, wire.Progress) and event.left is not None and batch:
            epoch = int(event.position[1:7]) - 1
            in_loop = event.position[8:14] == "l00002"
            assert not in_loop or batch == sizes[epoch]
    assert told == [(10, 13), (22, 13), (44, 13)]


def test_with_a_new_batch_size_comes_what_is_left(job):
    sizes = [10, 10, 22, 44]
    job.run(train(epochs=4, batch_size=lambda epoch: sizes[epoch]))
    events = [e for e in job.events() if isinstance(e, wire.Workload | wire.Progress)]
    after = [b for a, b in pairwise(events) if isinstance(a, wire.Workload)]
    assert [event.left for event in after] == [12, 3, 1]  # the first is known once it has trained


def test_unfrozen_parameters_are_told(job):
    job.run(PROGRAMS["unfreezes"])
    sizes = [told.parameters for told in workloads(job)]
    assert len(sizes) == 3
    assert sizes[1] == sizes[0] + 4 * 5 + 5 - (5 * 3 + 3)
    assert sizes[2] == sizes[0] + 4 * 5 + 5


def test_every_generation_tells_the_same(job):
    _, generations = job.run_with_leaves(train(), lambda generation: 1 + generation % 2)
    told = workloads(job)
    assert len({t.generation for t in told}) >= generations - 1  # the first leaves untrained
    assert len({(t.flops_per_sample, t.activation_bytes, t.batch) for t in told}) == 1
    assert {t.iterations for t in told} == {12}
    left = [e.left for e in job.events(wire.Progress) if e.left is not None and e.rank == 0]
    assert left == sorted(left, reverse=True)
    assert {4, 8} <= set(left)


def prepares_nothing():
    session = smlt.session()
    for _ in session.epochs(2):
        for x, _y in session.batches(DATA, 11):
            assert len(x)


def only_evaluates():
    session = smlt.session()
    model = session.prepare(net())
    for _ in session.epochs(2):
        accuracy(session, model)


@pytest.mark.parametrize("program", [prepares_nothing, only_evaluates])
def test_of_a_function_that_does_not_train_nothing_is_known(job, program):
    job.run(program)
    assert workloads(job) == []
    assert {(e.chunk, e.left) for e in job.events(wire.Progress)} == {(0, None)}


def alone(program):
    with Session(seed=1):
        return program()


class TestMeasuring:
    """Never disturbs a program: the worst is that nothing is known."""

    def compiled(self, model):
        return torch.compile(model, backend="eager")

    def per_sample_gradients(self, model):
        def call(x):
            scale = torch.func.grad(lambda w: (w * w).sum())(torch.ones(3))
            return model(x) * scale

        return call

    def sparse(self, model):
        return lambda x: model(torch.sparse.mm(torch.eye(len(x)).to_sparse(), x))

    @pytest.mark.parametrize(
        ("options", "known"),
        [
            ({"wrap": "per_sample_gradients"}, True),
            ({"wrap": "compiled"}, False),
            ({"wrap": "sparse"}, False),
            ({"around": FlopCounterMode}, False),
        ],
    )
    def test_of_exotic_programs(self, job, options, known):
        torch.compiler.reset()
        options = {k: getattr(self, v) if isinstance(v, str) else v for k, v in options.items()}
        if "around" in options:
            options["around"] = lambda: FlopCounterMode(display=False)
        program = train(**options)
        expected = alone(program)
        torch.compiler.reset()
        [work] = job.run(program)
        assert work.value == expected
        [told] = workloads(job)
        assert told.parameters == PARAMETERS
        assert (told.flops_per_sample > 0) == (told.activation_bytes > 0) == known

    def test_a_loop_that_is_left_and_an_error_leave_no_meter_behind(self, job):
        def program():
            session, model = smlt.session(), net()
            model, optimizer = session.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
            for x, y in session.batches(DATA, 11):
                step(session, model, optimizer, x, y)
                break
            assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
            for _ in session.batches(DATA, 11):
                raise KeyError

        job.begin(program)
        [work] = job.join()
        assert isinstance(work.error, KeyError)


class Clock:
    """Stands still unless the program lets time pass."""

    def __init__(self):
        self.now_s = 1000.0

    def monotonic(self):
        return self.now_s

    def wall(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds


def test_times_of_training_iterations(job):
    """Iterations of 2 s, an evaluation of 6 s in each epoch of 4 iterations, 1 s at its end.

    Another evaluation after the last epoch takes 5 s.
    """
    clock = Clock()

    def program():
        session, model = smlt.session(), net()
        model, optimizer = session.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
        for _ in session.epochs(3):
            for x, y in session.batches(DATA, 11):
                step(session, model, optimizer, x, y)
                clock.sleep(2.0)
            for _ in session.batches((X, Y), 44, shuffle=False):
                clock.sleep(6.0)
            clock.sleep(1.0)
        for _ in session.batches((X, Y), 22, shuffle=False):
            clock.sleep(2.5)

    job.generation = 0
    job.store.put({job.names.open: b"1", job.names.start: wire.Start(None).encode()}, ttl_s=600)
    # Checkpoints are made by the clock; they take no time of it.
    store = RedisStore(job.url)
    home = Home(job.spec(0, 1, progress_s=5.0, checkpoint_s=3.0), store, job.objects)
    with Session(home, clock=clock) as session:
        session.finish(program())
    store.close()
    told = [e for e in job.events(wire.Progress) if e.chunk]
    assert {(e.iteration_s, e.sync_s) for e in told} == {(2.0, 0.0)}
    assert 0 < sum(e.chunk for e in told) < 12
    assert [e.other_share for e in job.events(wire.Progress) if e.other_share is not None]
    assert {e.batch for e in job.events(wire.Workload)} == {11}
    [last] = job.events(wire.Finished)
    assert (last.other_share, last.end_s) == (pytest.approx(7 / 8), 5.0)
