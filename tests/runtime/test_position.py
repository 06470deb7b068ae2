import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from smlt_tune.runtime.position import NO_EPOCH, Position, entropy, part, sample_order

positions = st.builds(
    Position, st.integers(NO_EPOCH, 10**5), st.integers(0, 10**4), st.integers(0, 10**9)
)


@given(positions)
def test_a_position_survives_its_name(position):
    assert Position.decode(position.encode()) == position
    assert Position.decode(f"{position.encode()}-0123abcd.safetensors") == position


@given(st.lists(positions, max_size=8))
def test_names_sort_like_positions(several):
    assert sorted(p.encode() for p in several) == [p.encode() for p in sorted(several)]


def test_positions_sort_in_training_order():
    order = [Position(), Position(NO_EPOCH, 1, 7), Position(0), Position(0, 1, 9), Position(0, 2)]
    assert sorted(reversed(order)) == order


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 130))
def test_parts_make_up_the_whole(start, size, workers):
    parts = [part(start, start + size, rank=r, workers=workers) for r in range(workers)]
    assert parts[0][0] == start
    assert parts[-1][1] == start + size
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    lengths = [end - begin for begin, end in parts]
    assert max(lengths) - min(lengths) <= 1
    assert lengths[0] == max(lengths)


@given(st.integers(1, 300), st.integers(), st.integers(-1, 9), st.integers(0, 9))
def test_the_order_is_a_permutation_that_depends_on_its_arguments_alone(size, seed, epoch, loop):
    order = sample_order(size, seed=seed, epoch=epoch, loop=loop)
    random.seed(3)
    again = sample_order(size, seed=seed, epoch=epoch, loop=loop)
    assert sorted(order) == list(range(size))
    assert order.tolist() == again.tolist()


def test_every_epoch_loop_and_seed_has_an_order_of_its_own():
    orders = [
        sample_order(100, seed=s, epoch=e, loop=k).tolist()
        for s in range(2)
        for e in range(2)
        for k in range(2)
    ]
    assert len({tuple(order) for order in orders}) == 8


def test_entropy_is_the_same_in_every_process_and_release():
    assert entropy("order", 0, 1, 2) == 6603187774341211940
    assert entropy("a", "b") != entropy("b", "a")
    assert 0 <= entropy() < 2**64
