"""Checkpoints: the one form in which state is handed over (invariant 3).

A checkpoint is one safetensors object. Whether it was written for a new generation, for the
replacement of a dead worker, for the day the parameter store is lost, or as the result of the job,
it has the same content and the same name, which sorts by position and carries a checksum. Because
training is deterministic, whoever writes the checkpoint of a position writes a valid one, zombies
included; nothing has to be fenced.
"""

import zlib

from smlt_tune.errors import ObjectDamaged, ObjectNotFound
from smlt_tune.runtime import keys
from smlt_tune.runtime.position import Position
from smlt_tune.runtime.stores.base import ObjectStore

#: A job in lockstep keeps the checkpoints of so many of its last reports: others may begin there.
KEEP_OF_REPORTS = 3


class Checkpoints:
    """The checkpoints of one job.

    Args:
        store: Where they lie.
        job: Whose they are.
        keep: How many of those that this object saved stay; older ones are deleted.
    """

    def __init__(self, store: ObjectStore, job: str, *, keep: int = 3) -> None:
        self._store = store
        self._job = job
        self._keep = keep
        self._saved: list[str] = []

    def save(self, position: Position, content: bytes) -> str:
        """Stores a checkpoint and returns its key. It exists as a whole or not at all."""
        key = keys.checkpoint(self._job, position.encode(), content)
        self._store.put(key, content)
        if key not in self._saved:
            self._saved.append(key)
        if len(self._saved) > self._keep:
            self._store.delete([self._saved.pop(0)])
        return key

    def load(self, key: str) -> bytes:
        """The content of a checkpoint.

        Raises:
            ObjectNotFound: There is none under that key.
            ObjectDamaged: Its bytes are not those that were written.
        """
        content = self._store.get(key)
        if zlib.crc32(content) != keys.checkpoint_crc(key):
            raise ObjectDamaged(
                f"checkpoint {key} is damaged: its checksum does not match; delete it, and the "
                "job continues from the one before"
            )
        return content

    def latest(self) -> str | None:
        """Key of the newest checkpoint that is whole, or None."""
        names = self._store.list(keys.checkpoints(self._job))
        while names:
            key = names.pop()
            try:
                self.load(key)
            except ObjectDamaged:
                continue
            except ObjectNotFound:  # its worker has saved newer ones since and deleted it
                now = self._store.list(keys.checkpoints(self._job))
                names = now if now and now[-1] > key else names
                continue
            return key
        return None
