"""States that other trials may start from, for as long as they may.

A job keeps the checkpoints of its last reports only. Population-based training chooses a donor by a
report that may lie further back, so the newest state that was saved for that is held here, one per
trial. Tune's own folders would not do: it deletes them as ``num_to_keep`` says.
"""

from smlt_tune.backend.fleet import Fleet


class Donations:
    """The states, in memory."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[str, bytes]] = {}

    def keep(self, trial_id: str, url: str, content: bytes) -> None:
        """Holds a trial's checkpoint until the trial saves the next one."""
        self._held[trial_id] = url, content

    def give(self, fleet: Fleet, url: str) -> None:
        """Puts a checkpoint back where it was, if it is held."""
        for held, content in self._held.values():
            if held == url:
                key = url.removeprefix(f"{fleet._objects.url}/")
                fleet._objects.put(key, content, if_absent=True)
