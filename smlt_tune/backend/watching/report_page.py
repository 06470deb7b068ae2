"""The report of a fleet: one HTML file that needs nothing else, for the morning after."""

from pathlib import Path

from smlt_tune.backend.watching import page
from smlt_tune.backend.watching.metrics import Metric
from smlt_tune.backend.watching.snapshot import Snapshot
from smlt_tune.errors import InvalidInput

#: A browser that opens the file runs and loads nothing, whatever names and messages it holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def render(shot: Snapshot, metric: Metric) -> str:
    """The report as HTML."""
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<style>{page.STYLE}</style>"
    )
    return page.document(f"Fleet {shot.name}", head, page.fleet(shot, metric, links=False))


def write(shot: Snapshot, metric: Metric, path: Path) -> None:
    """Writes the report; replaces an earlier one.

    Raises:
        InvalidInput: The file cannot be written.
    """
    try:
        path.write_text(render(shot, metric), encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror}") from error
