"""Which trials may ask the fleet for functions, and which stay pending in Tune."""

from collections.abc import Iterable

from smlt_tune.integrations.ray.virtual_trial import VirtualTrial

#: So many trials at most are on their way to the fleet: each waits for the disk several times.
AT_ONCE = 8


class Entrance:
    """Lets in one trial after the other, or several at once while there are functions enough.

    Population-based training takes turns with trials that are pending, so no more may enter than
    can run.
    """

    def __init__(self) -> None:
        self._entering: list[VirtualTrial] = []

    @property
    def queued(self) -> bool:
        """Whether one of them has asked the fleet for functions, which has none free."""
        return any(trial.queued for trial in self._entering)

    def open(self, inside: Iterable[VirtualTrial]) -> bool:
        """Whether one more may enter.

        Args:
            inside: All that have entered and not left.
        """
        self._entering = [trial for trial in self._entering if trial.entering]
        if not self._entering:
            return True
        if len(self._entering) >= AT_ONCE or self.queued:
            return False
        limit = self._entering[0].fleet.platform.limits.functions
        return sum(trial.workers for trial in inside) < limit

    def enter(self, trial: VirtualTrial) -> None:
        """It is on its way to the fleet."""
        self._entering.append(trial)
