"""Every key of every store. No other module puts a key together.

Parameter store (prefix ``smlt:<fleet>:``; everything carries a time to live)

| key | type | written by | read by | deleted |
|---|---|---|---|---|
| ``events`` | stream | workers | the scheduler | as it is read |
| ``<job>:g<G>:open`` | string | scheduler | workers: fenced off without it | end of generation |
| ``<job>:g<G>:start`` | string | scheduler | workers that wait to begin | end of generation |
| ``<job>:g<G>:leave`` | string | scheduler | rank 0 | end of generation |
| ``<job>:g<G>:init`` | string | rank 0 of a fresh job | the other ranks | end of generation |
| ``<job>:g<G>:gone`` | string | aggregator of shard 0 | late duplicates | end of generation |
| ``<job>:g<G>:want:<r>`` | string | a replacement of rank r | survivors | end of generation |
| ``<job>:g<G>:lock:<R>`` | string | one survivor | the other survivors | by expiry |
| ``<job>:g<G>:gift:<R>`` | string | that survivor | the replacement | by expiry |
| ``<job>:g<G>:s<S>:<J>:<r>`` | string | part of rank r of shard J | its aggregator | soon after |
| ``<job>:g<G>:s<S>:<J>`` | string | the shard's aggregator | every rank | soon after |
| ``<job>:g<G>:m<P>:<r>`` | string | part of rank r of a mean | every rank | by expiry |
| ``<job>:g<G>:reports`` | string | rank 0 | who saves or replaces it | end of generation |
| ``<job>:g<G>:end`` | string | rank 0 | the other ranks | end of generation |
| ``<job>:g<G>:away`` | string | rank 0, if it leaves by itself | the others | end of generation |
| ``<job>:g<G>:consumed`` | string | scheduler | workers of a job in lockstep | end of generation |
| ``<job>:g<G>:to<r>`` | stream | whoever wrote something for rank r | rank r | end of generation |
| ``shared/<search>/index`` | string | the client | workers: where shared tensors lie | by expiry |
| ``shared/<search>/t/<name>`` | string | the client | workers: a hot shared tensor | by expiry |

A generation whose allocation names another parameter store has ``s...``, ``m...``, ``gone`` and a
``to<r>`` of its own there, under the same names.

G generation, S number of the gradient synchronisation since the job began, J shard, r rank, P place
in the program, R name of a request. The generation in the name fences zombies off: what they write
lies where nobody reads any more.

Object store

| key | what |
|---|---|
| ``code/<sha256>`` | a pickled training function or configuration; the name is its content |
| ``data/<sha256>/<k>`` and ``data/<sha256>/index`` | shards of an uploaded data set |
| ``jobs/<job>/checkpoints/<position>-<crc32>.safetensors`` | checkpoints; sort like positions |
| ``kept/<key of a checkpoint>`` | a copy that outlives it, until the client deletes that |
| ``shared/<search>/updates/<job>.safetensors`` | what a job adds, until that is done |
| ``shared/<search>/tensors/<number>.safetensors`` | shared tensors; the newest one names all |
"""

import re
import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class FleetKeys:
    """Keys that belong to a whole fleet."""

    fleet: str

    @property
    def prefix(self) -> str:
        """What every key of the fleet in the parameter store starts with."""
        return f"smlt:{self.fleet}:"

    @property
    def events(self) -> str:
        """Stream of messages from the workers to the scheduler."""
        return f"{self.prefix}events"

    def shared(self, search: str) -> "SharedKeys":
        """Keys of the tensors that the jobs of one search share."""
        return SharedKeys(f"{self.prefix}shared/{search}/", f"shared/{search}/")

    def generation(self, job: str, generation: int) -> "GenerationKeys":
        """Keys of one generation of one job."""
        return GenerationKeys(f"{self.prefix}{job}:g{generation}:")


@dataclass(frozen=True)
class GenerationKeys:
    """Keys of one generation of one job; see the table at the top of the module."""

    prefix: str

    @property
    def open(self) -> str:
        """Exists for as long as the generation may write."""
        return f"{self.prefix}open"

    @property
    def start(self) -> str:
        """Says where the generation begins."""
        return f"{self.prefix}start"

    @property
    def leave(self) -> str:
        """Exists once the generation shall hand over."""
        return f"{self.prefix}leave"

    @property
    def init(self) -> str:
        """Names the checkpoint that holds rank 0's initial state."""
        return f"{self.prefix}init"

    @property
    def gone(self) -> str:
        """Number of the newest synchronisation whose values were deleted."""
        return f"{self.prefix}gone"

    @property
    def reports(self) -> str:
        """All reports that rank 0 has told the scheduler."""
        return f"{self.prefix}reports"

    def want(self, rank: int) -> str:
        """Name of the request of a replacement of a rank that needs the state."""
        return f"{self.prefix}want:{rank}"

    @property
    def end(self) -> str:
        """Names the last checkpoint of the generation, once it is safe."""
        return f"{self.prefix}end"

    @property
    def away(self) -> str:
        """Names the checkpoint with which rank 0 has left while it waited in a report."""
        return f"{self.prefix}away"

    @property
    def consumed(self) -> str:
        """How many reports of the job the client has consumed."""
        return f"{self.prefix}consumed"

    def lock(self, request: str) -> str:
        """Held by the one survivor that answers a request."""
        return f"{self.prefix}lock:{request}"

    def gift(self, request: str) -> str:
        """The answer to a request."""
        return f"{self.prefix}gift:{request}"

    def part(self, sync: int, shard: int, rank: int) -> str:
        """One rank's contribution to one shard of one synchronisation."""
        return f"{self.prefix}s{sync}:{shard}:{rank}"

    def shard(self, sync: int, shard: int) -> str:
        """One aggregated shard of one synchronisation."""
        return f"{self.prefix}s{sync}:{shard}"

    def mean(self, place: str, rank: int) -> str:
        """One rank's contribution to a mean."""
        return f"{self.prefix}m{place}:{rank}"

    def tokens(self, rank: int) -> str:
        """Stream that wakes one rank up."""
        return f"{self.prefix}to{rank}"


@dataclass(frozen=True)
class SharedKeys:
    """Keys of the tensors that the jobs of one search share; see the tables above.

    Attributes:
        prefix: Of all in the parameter store. No job has a ``/`` in its name.
        objects: Of all in the object store.
    """

    prefix: str
    objects: str

    @property
    def index(self) -> str:
        """Says where the tensors lie."""
        return f"{self.prefix}index"

    def hot(self, name: str) -> str:
        """The newest value of a tensor in the parameter store."""
        return f"{self.prefix}t/{name}"

    @property
    def updates(self) -> str:
        """Prefix of what jobs add."""
        return f"{self.objects}updates/"

    def update(self, job: str) -> str:
        """What one job adds."""
        return f"{self.updates}{job}.safetensors"

    def job_of(self, update: str) -> str:
        """Whose update it is."""
        return update.removeprefix(self.updates).removesuffix(".safetensors")

    @property
    def tensors(self) -> str:
        """Prefix of the values in the object store."""
        return f"{self.objects}tensors/"

    def values(self, number: int) -> str:
        """The values that were new at one time; sorts by that."""
        return f"{self.tensors}{number:010d}.safetensors"


def code(digest: str) -> str:
    """Key of a pickled function or configuration in the object store."""
    return f"code/{digest}"


def data_index(digest: str) -> str:
    """Key of the description of an uploaded data set."""
    return f"data/{digest}/index"


def data_shard(digest: str, shard: int) -> str:
    """Key of one shard of an uploaded data set."""
    return f"data/{digest}/{shard:06d}"


def checkpoints(job: str) -> str:
    """Prefix of a job's checkpoints in the object store."""
    return f"jobs/{job}/checkpoints/"


def checkpoint(job: str, position: str, content: bytes) -> str:
    """Key of a checkpoint: sorts by position, and carries a checksum of its content."""
    return f"{checkpoints(job)}{position}-{zlib.crc32(content):08x}.safetensors"


def kept_checkpoint(key: str) -> str:
    """Key of the copy of a checkpoint that outlives it."""
    return f"kept/{key}"


def checkpoint_crc(key: str) -> int:
    """The checksum that a checkpoint's key carries."""
    return int(key.rsplit("-", 1)[1].removesuffix(".safetensors"), 16)


def job_of_checkpoint(key: str) -> str | None:
    """The job whose checkpoint has that key; None if it is no key of a checkpoint."""
    found = re.fullmatch(r"jobs/([^/]+)/checkpoints/[^/]+-[0-9a-f]{8}\.safetensors", key)
    return found[1] if found else None
