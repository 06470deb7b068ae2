"""What earlier clients have left of a sweep that is continued, by the fleet's journal."""

from smlt_tune.backend.sweeps.board import Past, Point, Row, Spending
from smlt_tune.backend.watching.snapshot import JobView, Snapshot


def past_of(shot: Snapshot, metric: str, *, now_at: float) -> Past:
    """For the board of a sweep.

    Args:
        shot: The fleet as its last client has left it.
        metric: What trials are compared by.
        now_at: Seconds since the Unix epoch.
    """
    return Past(
        elapsed_s=0.0 if shot.began_at is None else max(0.0, now_at - shot.began_at),
        spending=[
            Spending(one.time_s, one.settled, one.reserved, one.settled) for one in shot.spending
        ],
        jobs={job.job_id: _row(job, metric) for job in shot.jobs},
    )


def _row(job: JobView, metric: str) -> Row:
    row = Row(-1, {}, seconds=job.time_s, cost_usd=job.cost_usd, began_s=job.submitted_s)
    if job.allocation is not None:
        row.workers, row.memory_mb = job.allocation.workers, job.allocation.memory_mb
    for one in job.reports:
        at_s = (job.started_s or 0.0) + one.time_s
        row.points.append(Point(at_s, one.time_s, one.cost_usd, one.number(metric)))
        row.metrics = dict(one.metrics)
    return row
