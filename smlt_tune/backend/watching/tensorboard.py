"""A fleet as event files of TensorBoard: one run for each job, one for the money."""

from pathlib import Path
from typing import TYPE_CHECKING

from smlt_tune.backend.watching.snapshot import JobView, Snapshot
from smlt_tune.errors import InvalidInput

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

MISSING = "event files need torch and tensorboard: pip install torch tensorboard"


def write(shot: Snapshot, folder: Path) -> int:
    """Writes ``folder/JOB/events...`` for ``tensorboard --logdir folder``.

    Steps are numbers of reports, from 1; those of the money are seconds since the fleet began.

    Args:
        shot: The fleet.
        folder: Made if it does not exist.

    Returns:
        How many runs were written.

    Raises:
        InvalidInput: TensorBoard is missing, or the folder holds runs or cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InvalidInput(MISSING) from error
    try:
        if any(folder.glob("*/events.out.tfevents.*")):
            raise InvalidInput(f"{folder} holds event files: TensorBoard would show them twice")
        began_at = shot.began_at or 0.0
        for job in shot.jobs:
            with SummaryWriter(str(folder / job.job_id)) as run:
                _write_job(run, job, began_at)
        with SummaryWriter(str(folder / "(fleet)")) as run:
            for one in shot.spending:
                for name in ("settled", "reserved"):
                    at, usd = began_at + one.time_s, getattr(one, name)
                    run.add_scalar(f"fleet/{name}_usd", usd, round(one.time_s), walltime=at)
    except OSError as error:
        raise InvalidInput(f"cannot write to {folder}: {error.strerror}") from error
    return len(shot.jobs) + 1


def _write_job(run: "SummaryWriter", job: JobView, began_at: float) -> None:
    for step, report in enumerate(job.reports, 1):
        at = began_at + (job.started_s or 0.0) + report.time_s
        for name in sorted(report.metrics):
            number = report.number(name)
            if number is not None:
                run.add_scalar(name, number, step, walltime=at)
        run.add_scalar("job/cost_usd", report.cost_usd, step, walltime=at)
        run.add_scalar("job/time_s", report.time_s, step, walltime=at)
