"""Resources of a trial that gets no actor."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.tune import PlacementGroupFactory

#: What users write; also the name of the one resource that stands for all others in Tune's tables.
SMLT = "smlt"

_sending = threading.local()


class TrialRequest(PlacementGroupFactory):
    """What a trial asks a fleet for.

    Attributes:
        options: Arguments of ``Fleet.submit``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__([{SMLT: 1}])
        self.options = options

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrialRequest) and self.options == other.options

    def __hash__(self) -> int:
        return hash(str(self.options))

    def __reduce_ex__(self, protocol: Any) -> Any:
        if getattr(_sending, "to_functions", False):
            return dict, ()
        return super().__reduce_ex__(protocol)


@contextmanager
def sending_to_functions() -> Iterator[None]:
    """While it lasts, requests are left out of what this thread pickles.

    ``tune.with_resources`` leaves them on the user's function, and a function that travels with
    one would have to import Ray.
    """
    _sending.to_functions = True
    try:
        yield
    finally:
        _sending.to_functions = False
