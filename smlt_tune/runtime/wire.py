"""The frozen messages between the end client and the workers.

Each is a dataclass with a version, encoded as JSON with a ``kind``. Decoding is strict: an unknown
kind, another version, or a missing or unknown field raises :class:`InvalidInput`, so that a worker
of another release says so instead of guessing. Nothing here is executable.
"""

import json
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, Self, TypeVar

from smlt_tune.errors import InvalidInput
from smlt_tune.runtime.stores.base import Buffer

#: Raised whenever a field changes its meaning. Client and workers must agree on it.
VERSION = 1

_KINDS: dict[str, type["Message"]] = {}
M = TypeVar("M", bound="Message")


@dataclass(frozen=True)
class Message:
    """Base of all messages."""

    kind: ClassVar[str] = ""

    def __init_subclass__(cls, *, kind: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = kind
        _KINDS[kind] = cls

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps({"v": VERSION, "kind": self.kind, **vars(self)}).encode()

    @classmethod
    def decode(cls, data: Buffer) -> Self:
        """A message of this class (or a subclass of it) from JSON.

        Raises:
            InvalidInput: It is none.
        """
        message = _decode(bytes(data))
        if not isinstance(message, cls):
            raise InvalidInput(f"expected a {cls.kind or 'message'}, got a {message.kind}")
        return message


def _decode(data: bytes) -> Message:
    try:
        raw = json.loads(data)
        version, kind = raw.pop("v"), raw.pop("kind")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"not a message of smlt_tune: {data[:80]!r}") from error
    if version != VERSION:
        raise InvalidInput(
            f"message of version {version}, this release speaks version {VERSION}: "
            "client and workers must run the same release of smlt_tune"
        )
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InvalidInput(f"unknown kind of message {kind!r}")
    cls = _KINDS[kind]
    known = _names(kind)
    if raw.keys() != known:
        raise InvalidInput(
            f"{kind}: missing {sorted(known - set(raw))}, unknown {sorted(set(raw) - known)}"
        )
    return cls(**raw)


@cache
def _names(kind: str) -> frozenset[str]:
    """Of the fields of a message."""
    return frozenset(f.name for f in fields(_KINDS[kind]))


@dataclass(frozen=True)
class WorkerSpec(Message, kind="worker"):
    """Everything one invocation needs to know. Travels in the payload, the only trusted channel.

    Attributes:
        fleet: Name of the fleet.
        job: Name of the job.
        generation: Number of the group of workers.
        rank: Which worker of the group.
        workers: Size of the group.
        incarnation: How many invocations of this rank of this generation came before.
        joining: The generation is under way: ask its survivors for the state.
        shards: Into how many shards gradients are cut (paper 3.3: m); 0 chooses by their size.
        seed: Of the job; everything random derives from it.
        function: SHA-256 of the pickled training function in the object store.
        config: SHA-256 of the pickled configuration in the object store.
        datasets: SHA-256 of uploaded data sets, by name.
        parameter_store: URL; holds a password.
        object_store: URL.
        store_options: Further arguments of the object store; may hold secrets.
        vcpus: Virtual CPUs of the function: decides the number of threads.
        timeout_s: The platform ends the function after this time.
        progress_s: How often a worker reports where it is.
        checkpoint_share: Largest share of the time that checkpoints may take.
        checkpoint_s: Shortest time between two regular checkpoints.
        max_puts: How often it may write to the object store (or list it); None for no limit.
        max_gets: How often it may read from the object store; None for no limit.
        gradient_store: URL of the parameter store that adds gradients up, if it is another one than
            that above, which carries everything else; holds a password.
        lockstep: Every report waits until the client has consumed it.
        fork: Key of the checkpoint of another job that this one begins with; empty for none.
    """

    fleet: str
    job: str
    generation: int
    rank: int
    workers: int
    incarnation: int
    joining: bool
    shards: int
    seed: int
    function: str
    config: str
    datasets: dict[str, str]
    parameter_store: str = field(repr=False)
    object_store: str
    store_options: dict[str, str] = field(repr=False)
    vcpus: float
    timeout_s: float
    progress_s: float = 0.5
    checkpoint_share: float = 0.005
    checkpoint_s: float = 0.25
    max_puts: int | None = None
    max_gets: int | None = None
    gradient_store: str = field(default="", repr=False)
    lockstep: bool = False
    fork: str = ""


@dataclass(frozen=True)
class Start(Message, kind="start"):
    """From where a generation begins; the value of its ``start`` key.

    Attributes:
        checkpoint: Key in the object store; None at the very beginning of a job.
    """

    checkpoint: str | None


@dataclass(frozen=True)
class Gift(Message, kind="gift"):
    """A survivor's answer to a replacement.

    Attributes:
        checkpoint: Key of the state at the beginning of the survivors' current iteration; None if
            they have not begun either, so that the replacement begins like them.
        leaving: The generation has agreed to hand over right there.
    """

    checkpoint: str | None
    leaving: bool


@dataclass(frozen=True)
class WorkerEvent(Message, kind="event"):
    """Base of what workers tell the scheduler. Repeats are harmless.

    Attributes:
        job: Which job.
        generation: Which group of workers.
        rank: Which worker.
        incarnation: Which invocation of that rank.
    """

    job: str
    generation: int
    rank: int
    incarnation: int


@dataclass(frozen=True)
class Ready(WorkerEvent, kind="ready"):
    """The worker has loaded everything and waits for the start."""


@dataclass(frozen=True)
class Progress(WorkerEvent, kind="progress"):
    """The worker is at work.

    Attributes:
        position: Encoded :class:`~smlt_tune.runtime.position.Position`; sorts in training order.
        iterations: Iterations done by this invocation.
        chunk: Training iterations since its last word that the two times below are means of; 0
            if there was none, or if they were disturbed (by a checkpoint, a start).
        iteration_s: Time per training iteration, synchronisation included.
        sync_s: Part of it that went into synchronisation.
        left: Training iterations that the job has still to do; None if that cannot be known.
        other_share: Time outside of training iterations over the time inside, of this invocation;
            None before the first epoch is over.
        slowest_s: Longest time between two signs of life so far.
        batch: Global batch size of the running loop, 0 outside.
        peak_mb: Highest resident memory of the worker's process.
        waiting: The worker waits for others.
    """

    position: str
    iterations: int
    chunk: int
    iteration_s: float
    sync_s: float
    left: int | None
    other_share: float | None
    slowest_s: float
    batch: int
    peak_mb: float
    waiting: bool


@dataclass(frozen=True)
class Workload(WorkerEvent, kind="workload"):
    """What the job computes. Rank 0 tells it as soon as it is known, and again when it changes.

    Attributes:
        parameters: See :class:`~smlt_tune.runtime.features.ModelFeatures`.
        gradient_bytes: The same.
        flops_per_sample: The same.
        activation_bytes: The same.
        batch: Global batch size, samples.
        iterations: Training iterations of the whole job; None if that cannot be known.
    """

    parameters: int
    gradient_bytes: int
    flops_per_sample: float
    activation_bytes: float
    batch: int
    iterations: int | None


@dataclass(frozen=True)
class Reported(WorkerEvent, kind="reported"):
    """``session.report`` was called.

    Attributes:
        index: How many reports of the job came before.
        metrics: What was reported.
        checkpoint: Key of the state at its boundary; None if none was saved for it.
    """

    index: int
    metrics: dict[str, Any]
    checkpoint: str | None = None


@dataclass(frozen=True)
class Saved(WorkerEvent, kind="saved"):
    """A checkpoint lies in the object store.

    Attributes:
        checkpoint: Its key.
    """

    checkpoint: str


@dataclass(frozen=True)
class Stuck(WorkerEvent, kind="stuck"):
    """A replacement asked for the state, but no survivor still has that of the iteration's start.

    The generation has to begin again at the last checkpoint.
    """


@dataclass(frozen=True)
class Requests(WorkerEvent, kind="requests"):
    """What an invocation has asked of an object store that charges for it; told at its end.

    Attributes:
        puts: Writes and listings.
        gets: Reads.
    """

    puts: int
    gets: int


@dataclass(frozen=True)
class HandedOver(WorkerEvent, kind="handed_over"):
    """The worker left at an agreed iteration; the state is safe.

    Attributes:
        checkpoint: Key of the state; None if it has none: who follows begins from the beginning.
    """

    checkpoint: str | None


@dataclass(frozen=True)
class Finished(WorkerEvent, kind="finished"):
    """The training function returned.

    Attributes:
        checkpoint: Key of the final state; None if nothing was prepared.
        value: What it returned, if that can be JSON; None otherwise.
        reports: Everything that was reported, so that none is lost with a parameter store.
        other_share: As in :class:`Progress`, with the last epoch.
        end_s: What it did after the last epoch, or after training ended in its midst: seconds,
            without waiting for the client; None if this invocation has not trained.
    """

    checkpoint: str | None
    value: Any
    reports: list[dict[str, Any]]
    other_share: float | None
    end_s: float | None


@dataclass(frozen=True)
class Failed(WorkerEvent, kind="failed"):
    """The training function raised, or the worker could not run it.

    Attributes:
        error: Type and message.
        traceback: Formatted traceback.
        by_user: Whether it was the training function's own error, not that of a store.
        retry: Whether trying again may help (a store that did not answer, say).
    """

    error: str
    traceback: str
    by_user: bool
    retry: bool
