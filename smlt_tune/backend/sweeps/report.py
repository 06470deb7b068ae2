"""The report folder of a sweep: one HTML file that needs nothing else, CSV, JSON, logs."""

import csv
import json
import math
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smlt_tune.backend.sweeps import plots, words
from smlt_tune.backend.sweeps.board import Board, Row, best, ranked

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1320px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem 2.2rem; margin: 1rem 0 0; }
.facts div { min-width: 6rem; } .facts b { display: block; font-size: 1.25rem; }
.facts span { color: #666; font-size: .85rem; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { flex: 1 1 440px; margin: 0; padding: .6rem .8rem; border: 1px solid #e3e3e3;
         border-radius: 6px; }
figcaption { font-weight: 600; margin-bottom: .2rem; } figure svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #eaeaea;
         white-space: nowrap; }
th { color: #666; font-weight: 600; } td.l, th.l { text-align: left; }
td.why { white-space: normal; min-width: 12rem; color: #666; } tr.best td { background: #eef7f2; }
.state { color: #fff; border-radius: 3px; padding: 0 .45em; font-size: .85em; }
"""


def write(board: Board, fleet: "Fleet", folder: Path) -> list[str]:
    """Writes ``report.html``, ``trials.csv``, ``trials.json`` and the logs of failed trials.

    Args:
        board: The sweep, which is over.
        fleet: For the bill.
        folder: Made if it does not exist; files of an earlier report are replaced.

    Returns:
        What the user should know about it; empty if everything was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = ranked(board.snapshot(), maximize=board.sweep.maximize)
    _write_csv(board, rows, folder / "trials.csv")
    _write_json(board, fleet, rows, folder / "trials.json")
    for trial, logs in board.logs.items():
        for worker, text in logs.items():
            name = "".join(c if c.isalnum() or c in "-_." else "-" for c in worker)
            (folder / f"trial-{trial}-{name}.log").write_text(text, encoding="utf-8")
    pictures = plots.draw(board) if plots.available() else {}
    (folder / "report.html").write_text(_html(board, fleet, rows, pictures), encoding="utf-8")
    return [] if pictures else [plots.MISSING]


def _columns(board: Board, rows: list[Row]) -> list[str]:
    metrics = {name for row in rows for name in row.metrics} - {board.sweep.metric}
    return sorted(metrics)


def _write_csv(board: Board, rows: list[Row], path: Path) -> None:
    parameters = board.sweep.parameters
    metrics = _columns(board, rows)
    fixed = ["rank", "trial", "state", "why", board.sweep.metric]
    took = ["workers", "memory_mb", "seconds", "cost_usd", "reports"]
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow([*fixed, *took, *parameters, *metrics])
        for rank, row in enumerate(rows, 1):
            out.writerow(
                [rank, row.trial, row.state, row.why, row.value]
                + [row.workers, row.memory_mb, row.seconds, row.cost_usd, len(row.points)]
                + [row.params.get(name) for name in parameters]
                + [row.metrics.get(name) for name in metrics]
            )


def _write_json(board: Board, fleet: "Fleet", rows: list[Row], path: Path) -> None:
    sweep = board.sweep
    leader = best(rows, maximize=sweep.maximize)
    content = {
        "sweep": sweep.name,
        "train": sweep.train_name,
        "metric": sweep.metric,
        "direction": sweep.direction,
        "seed": sweep.seed,
        "best_trial": leader and leader.trial,
        "elapsed_s": board.elapsed_s,
        "budget_usd": fleet.budget_usd,
        "settled_usd": fleet.settled_usd,
        "reserved_usd": fleet.reserved_usd,
        "trials": [{"value": row.value, **asdict(row)} for row in rows],
        "spending": [asdict(one) for one in board.spending],
    }
    text = json.dumps(_plain(content), indent=1, default=str, allow_nan=False)
    path.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _html(board: Board, fleet: "Fleet", rows: list[Row], pictures: dict[str, str]) -> str:
    name = escape(board.sweep.name)
    figures = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"
        for title, svg in pictures.items()
    )
    shown = f'<div class="plots">{figures}</div>' if figures else f"<p>{escape(plots.MISSING)}</p>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{name}</h1>{_facts(board, fleet, rows)}<h2>How it went</h2>{shown}"
        f'<h2>Leaderboard</h2><div class="wide">{_table(board, rows)}</div></body></html>\n'
    )


def _facts(board: Board, fleet: "Fleet", rows: list[Row]) -> str:
    sweep = board.sweep
    leader = best(rows, maximize=sweep.maximize)
    counts = [f"{sum(row.state == state for row in rows)} {state}" for state in plots.COLOURS]
    budget = fleet.budget_usd
    share = f"of {words.usd(budget)} ({fleet.settled_usd / budget:.0%})" if budget else "no budget"
    facts = {
        f"best {sweep.metric}": (words.value(leader.value), f"trial {leader.trial}")
        if leader
        else ("-", "no trial finished"),
        "trials": (str(len(rows)), ", ".join(c for c in counts if not c.startswith("0 "))),
        "bill": (words.usd(fleet.settled_usd), share),
        "reserved": (words.usd(fleet.reserved_usd), "at the end"),
        "time": (words.seconds(board.elapsed_s), f"{sweep.parallel} trials at once"),
        "search": (sweep.search, f"seed {sweep.seed}"),
        "code": (sweep.train_name, f"on {sweep.platform}"),
    }
    cells = (
        f"<div><span>{escape(what)}</span><b>{escape(value)}</b><span>{escape(more)}</span></div>"
        for what, (value, more) in facts.items()
    )
    return f'<div class="facts">{"".join(cells)}</div>'


def _table(board: Board, rows: list[Row]) -> str:
    sweep = board.sweep
    parameters = sweep.parameters
    heads = ["#", "trial", "state", sweep.metric, *sweep.show, "reports", "workers", "MB"]
    heads += ["time", "cost", *parameters]
    head = "".join(f"<th>{escape(one)}</th>" for one in heads) + '<th class="l">why</th>'
    leader = best(rows, maximize=sweep.maximize)
    body = []
    for rank, row in enumerate(rows, 1):
        colour = plots.COLOURS[row.state]
        badge = f'<span class="state" style="background:{colour}">{row.state}</span>'
        numbers = [words.value(row.value), *(words.value(row.metrics.get(n)) for n in sweep.show)]
        numbers += [str(len(row.points)), str(row.workers), str(row.memory_mb)]
        numbers += [words.seconds(row.seconds), words.usd(row.cost_usd)]
        numbers += [words.value(row.params.get(name)) for name in parameters]
        cells = "".join(f"<td>{escape(one)}</td>" for one in numbers)
        kind = ' class="best"' if row is leader else ""
        body.append(
            f"<tr{kind}><td>{rank}</td><td>{row.trial}</td><td>{badge}</td>{cells}"
            f'<td class="l why">{escape(row.why)}</td></tr>'
        )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
