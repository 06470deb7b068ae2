import json
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlt_tune.errors import InvalidInput
from smlt_tune.runtime import wire

SPEC = wire.WorkerSpec(
    fleet="f",
    job="j",
    generation=1,
    rank=2,
    workers=3,
    incarnation=0,
    joining=False,
    shards=0,
    seed=7,
    function="aa",
    config="bb",
    datasets={"mnist": "cc"},
    parameter_store="redis://:hunter2@host:1/0",
    object_store="s3://bucket",
    store_options={"secret_key": "hunter3"},
    vcpus=1.5,
    timeout_s=900.0,
)
WHO = {"job": "j", "generation": 1, "rank": 2, "incarnation": 3}
MESSAGES = [
    SPEC,
    wire.Start(None),
    wire.Start("key"),
    wire.Gift("key", leaving=True),
    wire.Ready(**WHO),
    wire.Progress(
        **WHO,
        position="e000000-l00000-i0000000000",
        iterations=5,
        chunk=4,
        iteration_s=0.3,
        sync_s=0.1,
        left=7,
        other_share=None,
        slowest_s=0.2,
        batch=256,
        peak_mb=99.5,
        waiting=True,
    ),
    wire.Workload(
        **WHO,
        parameters=10,
        gradient_bytes=40,
        flops_per_sample=60.0,
        activation_bytes=80.0,
        batch=256,
        iterations=None,
    ),
    wire.Reported(**WHO, index=0, metrics={"accuracy": 0.1, "name": "ü", "ok": True, "no": None}),
    wire.Reported(**WHO, index=1, metrics={}, checkpoint="key"),
    wire.Saved(**WHO, checkpoint="key"),
    wire.Stuck(**WHO),
    wire.Requests(**WHO, puts=1, gets=2),
    wire.HandedOver(**WHO, checkpoint="key"),
    wire.HandedOver(**WHO, checkpoint=None),
    wire.Finished(
        **WHO,
        checkpoint=None,
        value={"a": [1, None]},
        reports=[{"x": 1}],
        other_share=0.1,
        end_s=None,
    ),
    wire.Failed(**WHO, error="ValueError: x", traceback="...", by_user=True, retry=False),
]


def kinds(cls=wire.Message):
    for each in cls.__subclasses__():
        yield each
        yield from kinds(each)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m.kind)
def test_a_message_comes_back_as_it_was(message):
    for data in (message.encode(), bytearray(message.encode()), memoryview(message.encode())):
        assert wire.Message.decode(data) == message
        assert type(message).decode(data) == message


def test_every_message_is_tried():
    assert {type(m) for m in MESSAGES} == set(kinds()) - {wire.WorkerEvent}


numbers = st.floats(allow_nan=False) | st.integers() | st.booleans() | st.none() | st.text()


@given(st.dictionaries(st.text(), numbers))
def test_metrics_come_back_to_the_bit(metrics):
    message = wire.Reported(**WHO, index=0, metrics=metrics)
    assert wire.Message.decode(message.encode()) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m.kind)
def test_messages_are_frozen(message):
    with pytest.raises(FrozenInstanceError):
        setattr(message, fields(message)[0].name, 1)


def refused(data, cls=wire.Message):
    with pytest.raises(InvalidInput) as caught:
        cls.decode(data)
    return str(caught.value)


def changed(message, **changes):
    raw = json.loads(message.encode()) | changes
    return json.dumps({k: v for k, v in raw.items() if v is not ...}).encode()


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"[]", b"{}", b"3", b'{"v": 1}', b'{"kind": "gift"}']
)
def test_what_is_no_message(data):
    assert refused(data) == f"not a message of smlt_tune: {data!r}"


def test_only_the_beginning_of_rubbish_is_repeated():
    assert len(refused(b"x" * 10_000)) < 200


def test_another_release_is_told_so():
    assert refused(changed(SPEC, v=wire.VERSION + 1)) == (
        f"message of version {wire.VERSION + 1}, this release speaks version {wire.VERSION}: "
        "client and workers must run the same release of smlt_tune"
    )


def test_an_unknown_kind():
    assert refused(changed(SPEC, kind="letter")) == "unknown kind of message 'letter'"
    assert "unknown kind of message" in refused(changed(SPEC, kind=["worker"]))


def test_missing_and_unknown_fields():
    data = changed(wire.Gift("key", leaving=True), leaving=..., colour="red", size=1)
    assert refused(data) == "gift: missing ['leaving'], unknown ['colour', 'size']"


def test_fields_with_a_default_are_not_optional_on_the_way():
    assert refused(changed(SPEC, progress_s=...)) == "worker: missing ['progress_s'], unknown []"


def test_a_message_of_another_kind():
    assert refused(wire.Start(None).encode(), wire.Gift) == "expected a gift, got a start"
    assert refused(wire.Start(None).encode(), wire.WorkerEvent) == "expected a event, got a start"


def test_secrets_are_in_no_representation():
    for text in (repr(SPEC), str(SPEC), f"{SPEC}"):
        assert "hunter" not in text
        assert "job='j'" in text
