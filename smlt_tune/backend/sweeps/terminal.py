"""A sweep in the terminal: a live table, or lines of a log; then the leaderboard and the bill."""

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from smlt_tune.backend.sweeps import words
from smlt_tune.backend.sweeps.board import Board, Row, best, ranked

if TYPE_CHECKING:
    from smlt_tune.backend.fleet import Fleet

_COLOURS = {
    "waiting": "dim",
    "running": "cyan",
    "finished": "green",
    "pruned": "yellow",
    "stopped": "magenta",
    "failed": "red",
}
_BAR = 30

#: Width of tables where the output is no terminal, characters.
_LOG_WIDTH = 160


@dataclass(frozen=True, eq=False)
class _Column:
    """One column of a table; the ``rank`` says how soon it is left out where space is scarce."""

    name: str
    cells: list[str]
    rank: int

    @property
    def head(self) -> str:
        """The name, in two lines if it is long and can be."""
        return self.name.replace("_", "_\n", 1) if len(self.name) > 8 else self.name

    @property
    def width(self) -> int:
        return 2 + max(len(text) for text in (*self.head.splitlines(), *self.cells))


class Terminal:
    """Shows one sweep.

    Args:
        board: What to show.
        fleet: Whose money.
        console: Where; the standard output by default.
    """

    def __init__(self, board: Board, fleet: "Fleet", console: Console | None = None) -> None:
        self._board, self._fleet = board, fleet
        if console is None:
            console = Console(file=sys.stdout, highlight=False)
            if not console.is_terminal:
                console.width = _LOG_WIDTH
        self.console = console

    def live(self) -> AbstractContextManager[Any]:
        """While it is entered, the sweep is shown."""
        if not self.console.is_terminal:
            self._board.listen(self._log)
            return nullcontext()
        return Live(
            console=self.console,
            get_renderable=self.picture,
            refresh_per_second=4,
            transient=True,
        )

    def say(self, text: str) -> None:
        """One line of plain text."""
        self.console.print(Text(text), soft_wrap=True)

    def picture(self) -> RenderableType:
        """The sweep at this moment."""
        rows = self._board.snapshot()
        return Group(self._headline(rows), self._budget_bar(), *self._tables(rows))

    def _tables(self, rows: list[Row]) -> list[RenderableType]:
        running = [row for row in rows if not row.over]
        over = [row for row in rows if row.over]
        tables: list[RenderableType] = []
        if running:
            tables += [Text(), self._live_table(running, "running", ranks=False)]
        if over:
            top = ranked(over, maximize=self._board.sweep.maximize)[:5]
            tables += [Text(), self._live_table(top, "best so far", ranks=True)]
        return tables

    def _live_table(self, rows: list[Row], title: str, *, ranks: bool) -> Table:
        columns = [*self._names(rows, ranks=ranks), *self._results(rows)]
        return self._table(rows, title, self._fitting([*columns, *self._configurations(rows)]))

    def _headline(self, rows: list[Row]) -> Text:
        sweep = self._board.sweep
        over = sum(row.over for row in rows)
        line = Text.assemble((sweep.name, "bold"), f"  {over} of {sweep.trials} trials done")
        line.append(f"  {words.seconds(self._board.elapsed_s)}")
        leader = best(rows, maximize=sweep.maximize)
        if leader:
            line.append(f"  best {sweep.metric} {words.value(leader.value)}", "green")
        return line

    def _budget_bar(self) -> Text:
        """What is spent (running functions too), what more is reserved, and what is left."""
        money, budget = self._board.money(), self._fleet.budget_usd
        text = f"spent {words.usd(money.spent_usd)}  reserved {words.usd(money.held_usd)}"
        if not budget:
            return Text(f"{text}  no budget set")
        full = min(_BAR, round(_BAR * money.spent_usd / budget))
        half = min(_BAR - full, round(_BAR * money.held_usd / budget))
        return Text.assemble(
            ("█" * full, "green"),
            ("▒" * half, "yellow"),
            ("·" * (_BAR - full - half), "dim"),
            f"  {text}  of {words.usd(budget)}",
        )

    def _table(self, rows: list[Row], title: str, columns: list["_Column"]) -> Table:
        table = Table(box=None, padding=(0, 1), title=title, title_justify="left", pad_edge=False)
        table.title_style = "bold"
        for column in columns:
            table.add_column(
                column.head,
                justify="left" if column.name == "state" else "right",
                vertical="bottom",
                style="bold" if column.name == self._board.sweep.metric else "",
                no_wrap=True,
            )
        for place, row in enumerate(rows):
            cells = [column.cells[place] for column in columns]
            table.add_row(
                *(Text(cell, _COLOURS[row.state]) if cell == row.state else cell for cell in cells)
            )
        return table

    def _fitting(self, columns: list["_Column"]) -> list["_Column"]:
        """As many of them as fit, the most important ones."""
        kept = list(columns)
        while not self._fit(kept):
            least = max(kept, key=lambda one: one.rank)
            if least.rank == 0:
                break
            kept.remove(least)
        return kept

    def _fit(self, columns: list["_Column"]) -> bool:
        return sum(one.width for one in columns) <= self.console.width

    def _names(self, rows: list[Row], *, ranks: bool) -> list["_Column"]:
        numbers = [str(rank) for rank in range(1, len(rows) + 1)]
        columns = [_Column("#", numbers, 0)] if ranks else []
        return [*columns, _Column("trial", [str(row.trial) for row in rows], 0)]

    def _results(self, rows: list[Row]) -> list["_Column"]:
        sweep, board = self._board.sweep, self._board
        shown = [
            _Column(name, [words.value(row.metrics.get(name)) for row in rows], 2)
            for name in sweep.show
        ]
        return [
            _Column("state", [row.state for row in rows], 0),
            _Column(sweep.metric, [words.value(row.value) for row in rows], 0),
            *shown,
            _Column("reports", [str(len(row.points)) for row in rows], 4),
            _Column("workers", [str(row.workers or "-") for row in rows], 0),
            _Column("MB", [str(row.memory_mb or "-") for row in rows], 3),
            _Column("time", [words.seconds(board.seconds_of(row)) for row in rows], 0),
            _Column("cost", [words.usd(row.cost_usd) for row in rows], 0),
        ]

    def _configurations(self, rows: list[Row]) -> list["_Column"]:
        return [
            _Column(name, [words.value(row.params.get(name)) for row in rows], 1)
            for name in self._board.sweep.parameters
        ]

    def _log(self, event: str, row: Row) -> None:
        metric, value = self._board.sweep.metric, words.value(row.value)
        where = f"[{words.seconds(self._board.elapsed_s):>6}] trial {row.trial:>3}"
        cost = words.usd(row.cost_usd)
        if event == "began":
            text = f"began     {words.settings(row.params)}"
        elif event == "reported":
            text = f"report {len(row.points):<2} {metric} {value}  {row.workers} workers  {cost}"
        else:
            why = f"  ({row.why.splitlines()[0]})" if row.why else ""
            text = f"{row.state:<9} {metric} {value}  {words.seconds(row.seconds)}  {cost}{why}"
        self.say(f"{where}  {text}")

    def leaderboard(self) -> None:
        """All trials, best first, with why some did not run to their end."""
        rows = ranked(self._board.snapshot(), maximize=self._board.sweep.maximize)
        if not rows:
            self.say("no trial was started")
            return
        self.console.print()
        names, results = self._names(rows, ranks=True), self._results(rows)
        configurations = self._configurations(rows)
        whole = [*names, *results, *configurations]
        if self._fit(whole):
            self.console.print(self._table(rows, "leaderboard", whole))
        else:
            columns = self._fitting([*names, *results])
            self.console.print(self._table(rows, "leaderboard", columns))
            self.console.print()
            columns = self._fitting([*names, *configurations])
            self.console.print(self._table(rows, "configurations", columns))
        cut = [row for row in rows if row.why]
        if cut:
            self.console.print()
        for row in sorted(cut, key=lambda row: row.trial):
            why = row.why.strip().splitlines()[0]
            line = Text.assemble(f"trial {row.trial:>3}  ", (row.state, _COLOURS[row.state]))
            self.console.print(line.append(f"  {why}"), soft_wrap=True)

    def bill(self) -> None:
        """What was spent, and what is left of the budget."""
        rows = self._board.snapshot()
        settled, budget = self._fleet.settled_usd, self._fleet.budget_usd
        counts = [f"{sum(row.state == s for row in rows)} {s}" for s in _COLOURS]
        self.console.print()
        self.say(f"trials  {', '.join(one for one in counts if not one.startswith('0 '))}")
        self.say(
            f"bill    {words.usd(settled)} settled"
            + (f" of {words.usd(budget)} ({settled / budget:.0%})" if budget else "")
            + f", {words.usd(self._fleet.reserved_usd)} still reserved"
            + f"; {words.seconds(self._board.elapsed_s)}"
        )
