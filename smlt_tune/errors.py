"""Every error that smlt_tune raises.

SmltError
├── InvalidInput              what was asked for is wrong; lists every mistake  (also a ValueError)
├── UsageError                the training function uses the session wrongly
├── BudgetExhausted           the ledger cannot reserve what the next step may cost
├── FleetClosed               the fleet was closed; nothing more can be asked of it
├── StoreError
│   ├── StoreUnavailable      the store did not answer within the retry bound
│   ├── ObjectNotFound        no object lies under that key
│   ├── StorageFull           no space left; nothing was damaged
│   └── ObjectDamaged         the bytes read are not the bytes written
├── PlatformError
│   └── Throttled             the platform's concurrency limit is reached; try again later
└── JobError                  one job ended without finishing; other jobs go on
    ├── TrainingFunctionError the user's function raised; carries the worker's traceback
    ├── OutOfMemory           a worker exceeded its memory; carries the peak
    └── FunctionLost          workers kept dying or hanging at the same place

Adapters translate the errors of redis, boto3 and the operating system into these where they call
them, ``from`` the original, so that nothing above an adapter knows a vendor's exception.
"""

from collections.abc import Sequence


class SmltError(Exception):
    """Base of every error of this package."""


class InvalidInput(SmltError, ValueError):
    """What was asked for is wrong. The message lists every mistake, one a line.

    Attributes:
        mistakes: One sentence for each mistake, in the order found.
    """

    def __init__(self, mistakes: str | Sequence[str]) -> None:
        self.mistakes = (mistakes,) if isinstance(mistakes, str) else tuple(mistakes)
        super().__init__("\n".join(self.mistakes))

    def __reduce__(self) -> tuple[type["InvalidInput"], tuple[tuple[str, ...]]]:
        return type(self), (self.mistakes,)


class UsageError(SmltError):
    """The training function uses the session in a way that cannot work."""


class BudgetExhausted(SmltError):
    """The rest of the budget does not cover the worst case of the next step."""


class FleetClosed(SmltError):
    """The fleet was closed; submit to a new one or reopen its folder with ``Fleet.open``."""


class StoreError(SmltError):
    """A parameter store or object store failed."""


class StoreUnavailable(StoreError):
    """The store did not answer within the retry bound."""


class ObjectNotFound(StoreError):
    """No object lies under that key."""


class StorageFull(StoreError):
    """There is no space left to write; what was there before is undamaged."""


class ObjectDamaged(StoreError):
    """The bytes that were read are not the bytes that were written."""


class PlatformError(SmltError):
    """The platform could not run a function."""


class Throttled(PlatformError):
    """The platform's concurrency limit is reached; the invocation was not accepted."""


class JobError(SmltError):
    """One job ended without finishing. Other jobs of the fleet go on.

    Attributes:
        job_id: The job that ended.
    """

    def __init__(self, message: str, *, job_id: str = "") -> None:
        self.job_id = job_id
        super().__init__(message)


class TrainingFunctionError(JobError):
    """The user's function raised.

    Attributes:
        worker_traceback: The traceback as it was formatted inside the worker.
    """

    def __init__(self, message: str, *, job_id: str = "", worker_traceback: str = "") -> None:
        self.worker_traceback = worker_traceback
        super().__init__(message, job_id=job_id)


class OutOfMemory(JobError):
    """A worker exceeded its memory limit.

    Attributes:
        peak_mb: Highest resident memory that was seen, in MB.
        limit_mb: The limit that applied, in MB.
    """

    def __init__(
        self, message: str, *, job_id: str = "", peak_mb: float = 0.0, limit_mb: int = 0
    ) -> None:
        self.peak_mb = peak_mb
        self.limit_mb = limit_mb
        super().__init__(message, job_id=job_id)


class FunctionLost(JobError):
    """Workers of the job kept dying or hanging without getting any further."""
