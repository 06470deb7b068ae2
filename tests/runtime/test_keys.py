import re

from smlt_tune.runtime import keys


def generation_keys(of):
    singles = [of.open, of.start, of.leave, of.init, of.gone, of.end, of.reports]
    singles += [of.away, of.consumed]
    ranked = [make(r) for make in (of.want, of.tokens) for r in range(12)]
    requests = [make(f"{r}.{i}") for make in (of.lock, of.gift) for r in (1, 11) for i in (0, 1)]
    shards = [of.shard(s, j) for s in (1, 11) for j in (1, 11)]
    parts = [of.part(s, j, r) for s in (1, 11) for j in (1, 11) for r in (1, 11)]
    means = [of.mean(p, r) for p in ("0.1.after.1", "0.1.1.11") for r in (1, 11)]
    return [*singles, *ranked, *requests, *shards, *parts, *means]


def test_no_two_keys_are_equal():
    fleet = keys.FleetKeys("f")
    every = [fleet.events]
    for search in ("j", "j1"):
        of = fleet.shared(search)
        every += [of.index, of.hot("index"), of.hot("x"), of.update("j"), of.values(1)]
    for job in ("j", "j1", "shared"):
        for generation in (0, 1, 11):
            every += generation_keys(fleet.generation(job, generation))
    assert len(every) == len(set(every))


def test_what_a_generation_writes_can_be_deleted_by_its_prefix_and_nothing_else_with_it():
    fleet = keys.FleetKeys("f")
    one = fleet.generation("j", 1)
    assert all(key.startswith(one.prefix) for key in generation_keys(one))
    others = [fleet.generation("j", 11), fleet.generation("j1", 1), fleet.generation("j", 0)]
    assert not any(k.startswith(one.prefix) for g in others for k in generation_keys(g))
    assert not fleet.events.startswith(one.prefix)
    assert not fleet.events.startswith(keys.FleetKeys("").prefix)


def test_every_key_of_a_generation_is_in_the_table():
    shown = set(re.findall(r"``<job>:g<G>:([^`]*)``", keys.__doc__))
    of = keys.FleetKeys("f").generation("j", 0)
    named = [of.open, of.start, of.leave, of.init, of.gone, of.end, of.reports]
    named += [of.away, of.consumed]
    made = {key.removeprefix(of.prefix) for key in named}
    made |= {"want:<r>", "lock:<R>", "gift:<R>", "s<S>:<J>:<r>", "s<S>:<J>", "m<P>:<r>", "to<r>"}
    assert made == shown


def test_names_in_the_object_store():
    assert keys.code("ab") == "code/ab"
    assert keys.data_index("ab") == "data/ab/index"
    assert keys.data_shard("ab", 7) == "data/ab/000007"
    key = keys.checkpoint("j", "e0", b"content")
    assert key.startswith(keys.checkpoints("j"))
    assert keys.checkpoint_crc(key) == keys.checkpoint_crc(keys.checkpoint("k", "e1", b"content"))
    assert keys.checkpoint_crc(key) != keys.checkpoint_crc(keys.checkpoint("j", "e0", b"other"))


def test_names_of_shared_tensors():
    of = keys.FleetKeys("f").shared("s")
    assert of.index.startswith(of.prefix)
    assert of.hot("a.b").startswith(of.prefix)
    assert of.job_of(of.update("s-1")) == "s-1"
    assert of.values(9) < of.values(10)
    assert not keys.FleetKeys("f").generation("shared", 0).prefix.startswith(of.prefix)
