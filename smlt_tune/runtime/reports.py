"""What a job has reported, as one of its workers knows it.

Reports are named by their place in the program, so that those made before a restart are not made
again. Rank 0 tells them; the client takes each number once.

In *lockstep* the client consumes every report before the job goes on. Whoever begins tells it once
more whatever it has not consumed: then nothing is lost, whatever has happened in between.
"""

from typing import Any

from smlt_tune.runtime import wire
from smlt_tune.runtime.handover import Membership


class Reports:
    """The reports of one job.

    Args:
        membership: Connection to the others; None for a session that runs alone.
        rank: Of this worker.
        workers: How many there are.
        lockstep: The client consumes every report before the job goes on.

    Attributes:
        made: Metrics by place in the program, in order.
        consumed: How many the client has consumed, as far as this worker knows.
    """

    def __init__(
        self,
        membership: Membership | None,
        rank: int = 0,
        workers: int = 1,
        *,
        lockstep: bool = False,
    ) -> None:
        self._membership = membership
        self._rank = rank
        self._workers = workers
        self._lockstep = lockstep and membership is not None
        self._told = 0
        self._at_boundary = 0
        self.made: dict[str, dict[str, Any]] = {}
        self.consumed = 0

    def __len__(self) -> int:
        return len(self.made)

    def add(self, place: str, metrics: dict[str, Any]) -> None:
        """A report was made; it is told at once, unless the client has to consume it."""
        if place not in self.made:
            self.made[place] = metrics
            if not self._lockstep:
                self.tell()

    def add_next(self, metrics: dict[str, Any]) -> None:
        """The same, by a program that begins anew after a restart; the caller tells it."""
        self.made[f"report {len(self)}"] = metrics

    @property
    def untold(self) -> bool:
        """Whether the client has yet to be told of one that it has to consume."""
        return self._lockstep and self._rank == 0 and self._told < len(self)

    @property
    def unconsumed(self) -> bool:
        """Whether the client has yet to consume one before the job may go on."""
        return self._lockstep and self.consumed < len(self)

    @property
    def waits(self) -> bool:
        """Whether there is something to tell or to wait for."""
        return self.untold or self.unconsumed

    def tell(self, checkpoint: str | None = None) -> None:
        """Tells the scheduler what it was not told yet, and leaves it to who may follow."""
        if self._membership is None or self._rank != 0 or self._told == len(self):
            return
        for index, metrics in list(enumerate(self.made.values()))[self._told :]:
            self._membership.tell(
                wire.Reported, index=index, metrics=metrics, checkpoint=checkpoint
            )
        self._told = len(self)
        if self._workers > 1:
            self._membership.keep_reports(self.made)

    def reach_boundary(self) -> None:
        """Those made up to now belong to the state."""
        self._at_boundary = len(self)

    def to_save(self) -> tuple[dict[str, dict[str, Any]], int]:
        """The reports up to the boundary, and how many of the last ones nobody may have told.

        Those that come after the boundary are made again. What rank 0 has told counts. It may have
        died before it could tell the last ones: then the values of this worker stand for them.
        """
        mine = dict(list(self.made.items())[: self._at_boundary])
        if self._rank == 0 or self._membership is None:
            return mine, max(0, len(mine) - self._told)
        told = self._membership.kept_reports() or {}
        untold = {place: metrics for place, metrics in mine.items() if place not in told}
        return {**told, **untold}, len(untold)

    def restore(
        self, made: dict[str, dict[str, Any]], untold: int, *, fork: bool, key: str
    ) -> None:
        """Takes over those of a checkpoint.

        Args:
            made: By place.
            untold: How many of the last ones nobody may have told.
            fork: It is the checkpoint of another job, which has told them all.
            key: Of the checkpoint.
        """
        self.made = made
        self._at_boundary = self._told = len(made)
        if fork:
            self.consumed = len(made)
            return
        self._told -= untold
        if self._lockstep and self._membership is not None:
            self.consumed = self._membership.consumed()
            self._told = min(self.consumed, self._told)
        self.tell(key if self._lockstep else None)
