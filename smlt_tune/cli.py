"""The ``smlt`` command.

Exit codes: 0 the sweep ended (also when its budget or deadline ended it), 1 no trial finished or
something failed, 2 what was asked for is wrong or, so says its plan, out of reach, 129, 130 and 143
a signal ended it.
"""

import argparse
import json
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import smlt_tune
from smlt_tune.errors import InvalidInput, SmltError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from smlt_tune.backend.fleet import Fleet
    from smlt_tune.backend.platforms.base import Platform
    from smlt_tune.backend.sweeps.board import Board
    from smlt_tune.backend.sweeps.folder import Folder
    from smlt_tune.backend.sweeps.sweep import Sweep
    from smlt_tune.backend.watching.metrics import Metric
    from smlt_tune.backend.watching.snapshot import Snapshot

_EXTRAS = {"optuna": "optuna", "scipy": "gp", "threadpoolctl": "gp", "torch": "torch"}

#: Width of tables where the output is no terminal, characters.
_LOG_WIDTH = 160


class Stopped(BaseException):
    """A signal asked the command to end.

    Attributes:
        signal: Which.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments after the command's name; the process's own by default.

    Returns:
        The exit code.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except InvalidInput as error:
        for mistake in error.mistakes:
            print(f"smlt: {mistake}", file=sys.stderr)
        return 2
    except SmltError as error:
        if trace := getattr(error, "worker_traceback", ""):
            print(trace, end="", file=sys.stderr)
        print(f"smlt: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="smlt", description="Every trial of a search as a serverless, distributed training."
    )
    version = f"smlt {smlt_tune.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sweep = commands.add_parser("sweep", help="run the search that a file describes")
    sweep.set_defaults(run=_sweep)
    sweep.add_argument("file", metavar="FILE", help="YAML; see examples/sweep.yaml")
    sweep.add_argument("--budget", metavar="USD", type=_checked("positive"), help="hard limit")
    sweep.add_argument(
        "--deadline", metavar="TIME", type=_checked("duration"), help="such as 90s, 10m or 8h"
    )
    sweep.add_argument("--trials", metavar="N", type=_checked("count"), help="how many trials")
    sweep.add_argument("--seed", metavar="N", type=_checked("natural"), help="of everything random")
    sweep.add_argument(
        "--path", metavar="DIR", type=Path,
        help="folder that keeps everything: to watch the sweep, and to resume it",
    )  # fmt: skip
    sweep.add_argument(
        "--out", metavar="DIR", type=Path,
        help="folder of the report (NAME-report, or report in the folder that keeps everything)",
    )  # fmt: skip
    sweep.add_argument(
        "--project", metavar="DIR", type=Path,
        help="folder in which measurements are kept, for later sweeps and plans",
    )  # fmt: skip
    sweep.add_argument(
        "--project-budget", metavar="USD", type=_checked("positive"),
        help="hard limit for all sweeps of the project together",
    )  # fmt: skip
    resume = commands.add_parser(
        "resume", help="go on with a sweep whose process ended, however it ended"
    )
    resume.set_defaults(run=_resume)
    resume.add_argument("path", metavar="DIR", type=Path, help="as given to smlt sweep --path")
    resume.add_argument("--out", metavar="DIR", type=Path, help="folder of the report")
    _add_plan(commands)
    _add_calibrate(commands)
    _add_watching(commands)
    explain = commands.add_parser("explain", help="tell why jobs had the allocations they had")
    explain.set_defaults(run=_explain)
    explain.add_argument("job", metavar="JOB", nargs="?", help="all jobs in short without it")
    explain.add_argument(
        "--path", metavar="DIR", type=Path, default=Path(), help="folder of the fleet (.)"
    )
    explain.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    return parser


def _add_plan(commands: Any) -> None:
    from smlt_tune.backend.platforms import PLATFORMS

    plan = commands.add_parser(
        "plan",
        help="predict time and cost of a training function or a sweep, without running it",
        description="Predicts time and cost. Exit code 2: the goal is not expected to be reached.",
    )
    plan.set_defaults(run=_plan)
    plan.add_argument(
        "target", metavar="TARGET", help="sweep.yaml, file.py:function or package.module:function"
    )
    plan.add_argument("--config", metavar="JSON", help="of the function, such as '{\"lr\": 0.1}'")
    plan.add_argument(
        "--data", metavar="NAME=FILE", action="append", default=[],
        help="a .npy or .npz file for session.batches(NAME); may be given again",
    )  # fmt: skip
    plan.add_argument("--goal", choices=["cheapest", "fastest"], help="of each training")
    plan.add_argument(
        "--deadline", metavar="TIME", type=_checked("duration"), help="such as 90s, 10m or 8h"
    )
    plan.add_argument("--budget", metavar="USD", type=_checked("positive"), help="what it may cost")
    for name, what in (
        ("--workers", "pins the number of functions"),
        ("--memory-mb", "pins the memory of a function"),
        ("--max-workers", "most functions to choose"),
    ):
        plan.add_argument(name, metavar="N", type=_checked("count"), help=what)
    plan.add_argument("--platform", choices=sorted(PLATFORMS), help="where functions run (local)")
    plan.add_argument(
        "--project", metavar="DIR", type=Path, help="folder with measurements of earlier jobs"
    )
    plan.add_argument(
        "--out", metavar="FILE", type=Path, action="append", default=[],
        help="a picture (.png, .svg, .pdf) or everything (.json); may be given again",
    )  # fmt: skip
    plan.add_argument(
        "--dry-run-timeout", metavar="TIME", type=_checked("duration"), default=120.0,
        help="how long the function may take to the end of its first iteration (2m)",
    )  # fmt: skip
    plan.add_argument(
        "--simulate", action="store_true",
        help="run a sweep in virtual time too, to see what budget and deadline make of it",
    )  # fmt: skip


def _add_calibrate(commands: Any) -> None:
    from smlt_tune.backend.platforms import PLATFORMS

    calibrate = commands.add_parser(
        "calibrate", help="measure a platform, so that predictions start from what is true of it"
    )
    calibrate.set_defaults(run=_calibrate)
    which = calibrate.add_mutually_exclusive_group()
    which.add_argument(
        "file", metavar="FILE", nargs="?", help="sweep file: its platform, with its options"
    )
    which.add_argument(
        "--platform", choices=sorted(PLATFORMS), help="this one with default options (local)"
    )
    calibrate.add_argument(
        "--home", metavar="DIR", type=Path, help="where to keep it (SMLT_HOME, or ~/.smlt)"
    )
    calibrate.add_argument(
        "--seconds", metavar="N", type=_checked("positive"), default=60.0, help="how long, about"
    )
    calibrate.add_argument(
        "--parameter-store", metavar="URL", action="append", default=[],
        help="measure this one instead of one made for the purpose; may be given for each kind",
    )  # fmt: skip


def _add_watching(commands: Any) -> None:
    about = argparse.ArgumentParser(add_help=False)
    about.add_argument("path", metavar="PATH", type=Path, help="folder of the fleet")
    about.add_argument("--metric", metavar="NAME", help="what jobs are compared by")
    about.add_argument("--mode", choices=["max", "min"], help="which way the metric is better")
    status = commands.add_parser("status", parents=[about], help="show a fleet in the terminal")
    status.set_defaults(run=_status)
    how = status.add_mutually_exclusive_group()
    how.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")
    how.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    report = commands.add_parser("report", parents=[about], help="write about a fleet as HTML")
    report.set_defaults(run=_report)
    report.add_argument("--out", metavar="FILE", type=Path, help="(report.html)")
    report.add_argument(
        "--tensorboard", metavar="DIR", type=Path,
        help="write event files for tensorboard --logdir DIR, and HTML only with --out",
    )  # fmt: skip
    dashboard = commands.add_parser(
        "dashboard", parents=[about], help="show a fleet on a web page that updates itself"
    )
    dashboard.set_defaults(run=_dashboard)
    dashboard.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1",
        help="where to listen (127.0.0.1); one that others can reach gets a token",
    )  # fmt: skip
    dashboard.add_argument(
        "--port", metavar="N", type=_checked("natural"), default=0, help="(any free one)"
    )


def _checked(converter: str) -> Any:
    """A converter of sweep files for arguments."""

    def convert(text: str) -> Any:
        from smlt_tune.backend.sweeps import convert as converters

        value: Any = text
        if converter in ("count", "natural") and text.lstrip("-").isdigit():
            value = int(text)
        try:
            return getattr(converters, converter)(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _sweep(arguments: argparse.Namespace) -> int:
    """``smlt sweep``."""
    from smlt_tune.backend.sweeps.folder import Folder
    from smlt_tune.backend.sweeps.sweep import load

    project = arguments.project
    sweep = load(
        arguments.file,
        budget_usd=arguments.budget,
        deadline=arguments.deadline,
        trials=arguments.trials,
        seed=arguments.seed,
        project=None if project is None else str(project.absolute()),
        project_budget_usd=arguments.project_budget,
    )
    _require_search(sweep)
    folder = None if arguments.path is None else Folder(arguments.path)
    if folder is not None:
        folder.keep(sweep)
    report = folder.report if folder else Path(f"{sweep.name}-report")
    return _run(sweep, folder, arguments.out or report)


def _resume(arguments: argparse.Namespace) -> int:
    """``smlt resume``."""
    from smlt_tune.backend.sweeps.folder import Folder

    folder = Folder(arguments.path)
    sweep = folder.sweep()
    _require_search(sweep)
    return _run(sweep, folder, arguments.out or folder.report)


def _run(sweep: "Sweep", folder: "Folder | None", out: Path) -> int:
    """Runs the sweep, frees everything whatever happens, then tells how it went."""
    from smlt_tune.backend.sweeps.board import Board, best
    from smlt_tune.backend.sweeps.report import write
    from smlt_tune.backend.sweeps.terminal import Terminal
    from smlt_tune.backend.watching.past import past_of
    from smlt_tune.runtime.clock import SYSTEM_CLOCK

    ended: Exception | Stopped | None = None
    kept = None if folder is None else folder.path
    with _Signals(kept) as signals, closing(sweep.open_platform()) as platform:
        shot = _shot(folder)
        fleet = _fleet(sweep, platform, folder, shot)
        now_at = SYSTEM_CLOCK.wall()
        past = None if shot is None else past_of(shot, sweep.metric, now_at=now_at)
        board = Board(sweep, fleet, past=past)
        terminal = Terminal(board, fleet)
        notes: list[str] = []
        try:
            with fleet, terminal.live(), signals.heard():
                notes += _search(sweep, fleet, board, folder, terminal.say)
        except (Exception, Stopped) as error:  # noqa: BLE001 - raised again below
            ended = error
        board.close("interrupted" if isinstance(ended, Stopped) else "the sweep ended")
        terminal.leaderboard()
        terminal.bill()
        missing = write(board, fleet, out)
        for line in (*notes, *_halted(folder), f"report  {out / 'report.html'}", *missing):
            terminal.say(line)
    if isinstance(ended, Stopped):
        terminal.say(f"ended by {ended.signal.name}")
        return 128 + ended.signal
    if ended is not None:
        raise ended
    return 0 if best(board.snapshot(), maximize=sweep.maximize) else 1


def _search(
    sweep: "Sweep",
    fleet: "Fleet",
    board: "Board",
    folder: "Folder | None",
    say: Callable[[str], None],
) -> Sequence[str]:
    """All trials that are not over. Returns what the user should know."""
    if sweep.stages is not None:
        from smlt_tune.backend.sweeps.staged import run_stages

        return run_stages(sweep, fleet, board, say=say)
    from smlt_tune.integrations.optuna.sweeps import run_sweep

    run_sweep(sweep, fleet, board, None if folder is None else folder.journal, say)
    return ()


def _shot(folder: "Folder | None") -> "Snapshot | None":
    """What an earlier client has left of the fleet; None if there was none."""
    from smlt_tune.backend.watching.reading import Watch

    return None if folder is None or not folder.has_fleet else Watch(folder.path).snapshot()


def _halted(folder: "Folder | None") -> list[str]:
    """What was cut when money or time ran out."""
    from smlt_tune.backend.watching.halt_report import halt_report

    shot = _shot(folder)
    return [] if shot is None else halt_report(shot).lines()


def _fleet(
    sweep: "Sweep", platform: "Platform", folder: "Folder | None", shot: "Snapshot | None"
) -> "Fleet":
    """A new one, or the one that an earlier client has left, with the time that is left."""
    from smlt_tune.backend.fleet import Fleet
    from smlt_tune.runtime.clock import SYSTEM_CLOCK

    deadline_s = sweep.deadline_s
    if deadline_s is not None and shot is not None and shot.began_at is not None:
        deadline_s = max(0.001, shot.began_at + deadline_s - SYSTEM_CLOCK.wall())
    options: dict[str, Any] = {
        "platform": platform,
        "budget_usd": sweep.budget_usd,
        "deadline_s": deadline_s,
        "project": sweep.project,
        "project_budget_usd": sweep.project_budget_usd,
    }
    if sweep.stages is None:
        options |= {"metric": sweep.metric, "mode": "max" if sweep.maximize else "min"}
    # Stages spend as they have planned: most of their trials are not meant to be finished.
    if folder is None:
        return Fleet(**options)
    return (Fleet.open if shot else Fleet)(path=folder.path, **options)


def _require_search(sweep: "Sweep") -> None:
    """Refuses to begin without what the search needs."""
    needed = {"qmc": ["scipy"], "gp": ["torch", "scipy"]}.get(sweep.sampler.name, [])
    _require("smlt sweep", *([] if sweep.stages else ["optuna"]), *needed)


def _plan(arguments: argparse.Namespace) -> int:
    """``smlt plan``."""
    from smlt_tune.backend.late_policy import NEEDED

    _require("smlt plan", *NEEDED)
    from smlt_tune.backend.platform_tables import user_home
    from smlt_tune.backend.sweeps.plan_command import Request, plan

    given = vars(arguments).copy()
    del given["run"]
    request = Request(**given, home=user_home())
    found = plan(request, progress=lambda text: print(f"smlt: {text}", file=sys.stderr))
    print("\n".join(found.lines))
    for table in found.tables:
        print()
        _console().print(table)
    print()
    for note in found.notes:
        print(f"note: {note}")
    for path in found.written:
        print(f"wrote {path}")
    return 0 if found.feasible else 2


def _explain(arguments: argparse.Namespace) -> int:
    """``smlt explain``."""
    from smlt_tune.backend import explain_text
    from smlt_tune.backend.explain import explain, explain_all
    from smlt_tune.backend.history import read_history

    events = read_history(arguments.path)
    one = explain(events, arguments.job) if arguments.job else None
    jobs = [one] if one else explain_all(events)
    if arguments.json:
        told = [asdict(job) for job in jobs]
        print(json.dumps(told[0] if one else told, indent=1))
    elif one:
        print("\n".join(explain_text.told(one)))
    elif jobs:
        _console().print(explain_text.table(jobs))
    else:
        print("no job was submitted to this fleet")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    """``smlt status``."""
    from rich.live import Live

    from smlt_tune.backend.watching.reading import Watch
    from smlt_tune.backend.watching.status import picture
    from smlt_tune.runtime.clock import SYSTEM_CLOCK

    watch, console = Watch(arguments.path), _console()

    def now() -> "RenderableType":
        shot = watch.snapshot()
        most = max(5, console.height - 12) if arguments.watch else 50
        return picture(shot, _metric(shot, arguments), most=most)

    if arguments.json:
        print(json.dumps(watch.snapshot().to_json(), allow_nan=False, indent=1))
    elif arguments.watch:
        with Live(now(), console=console, auto_refresh=False) as live:
            while True:
                SYSTEM_CLOCK.sleep(1.0)
                live.update(now(), refresh=True)
    else:
        console.print(now())
    return 0


def _report(arguments: argparse.Namespace) -> int:
    """``smlt report``."""
    from smlt_tune.backend.watching import tensorboard
    from smlt_tune.backend.watching.reading import Watch
    from smlt_tune.backend.watching.report_page import write

    shot = Watch(arguments.path).snapshot()
    out, events = arguments.out, arguments.tensorboard
    if events is not None:
        runs = tensorboard.write(shot, events)
        print(f"wrote {runs} runs: tensorboard --logdir {events}")
    if out is not None or events is None:
        out = out or Path("report.html")
        write(shot, _metric(shot, arguments), out)
        print(f"wrote {out}")
    return 0


def _metric(shot: "Snapshot", arguments: argparse.Namespace) -> "Metric":
    """What jobs are compared by: as the user says, else as the sweep does."""
    from smlt_tune.backend.sweeps.folder import Folder
    from smlt_tune.backend.watching.metrics import choose

    name, mode = arguments.metric, arguments.mode
    if name is None:
        of_sweep, direction = Folder(arguments.path).metric()
        if any(job.last(of_sweep) is not None for job in shot.jobs):
            name, mode = of_sweep, mode or direction
    return choose(shot.jobs, name, mode)


def _dashboard(arguments: argparse.Namespace) -> int:
    """``smlt dashboard``."""
    from smlt_tune.backend.watching.dashboard import Dashboard, is_loopback
    from smlt_tune.backend.watching.reading import Watch

    def metric(shot: "Snapshot") -> "Metric":
        return _metric(shot, arguments)

    watch = Watch(arguments.path)
    metric(watch.snapshot())
    token = None if is_loopback(arguments.host) else secrets.token_urlsafe(24)
    with Dashboard(
        watch, metric, host=arguments.host, port=arguments.port, token=token
    ) as dashboard:
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        secret = f"?token={token}" if token else ""
        print(f"http://{host}:{dashboard.port}/{secret}", flush=True)
        if token:
            print("anyone who sees this address may read; the connection is not encrypted")
        dashboard.serve()
    return 0


def _console() -> "Console":
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    return console


def _calibrate(arguments: argparse.Namespace) -> int:
    """``smlt calibrate``."""
    _require("smlt calibrate", "torch")
    from rich.table import Table

    from smlt_tune.backend.calibration import calibrate, comparison
    from smlt_tune.backend.platform_tables import (
        check_home,
        keep_table,
        shipped_table,
        user_home,
    )

    console = _console()
    urls = {f"number {k + 1}": url for k, url in enumerate(arguments.parameter_store)}
    with closing(_platform_to_calibrate(arguments)) as platform:
        console.print(platform.fingerprint, markup=False)
        home = arguments.home or user_home()
        check_home(home)
        say = partial(console.print, soft_wrap=True, markup=False)
        table = calibrate(platform, parameter_stores=urls, seconds=arguments.seconds, say=say)
        path = keep_table(table, home)
        shown = Table("figure", "measured", "shipped", "difference")
        for column in shown.columns[1:]:
            column.justify = "right"
        for row in comparison(table, shipped_table(platform)):
            shown.add_row(*row)
    console.print(shown)
    console.print(f"kept in {path}", soft_wrap=True, markup=False)
    return 0


def _platform_to_calibrate(arguments: argparse.Namespace) -> "Platform":
    from smlt_tune.backend.platforms import open_platform
    from smlt_tune.backend.sweeps.sweep import load

    if arguments.file is None:
        return open_platform(arguments.platform or "local")
    return load(arguments.file).open_platform()


def _require(what: str, *modules: str) -> None:
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        extras = ",".join(dict.fromkeys(_EXTRAS[module] for module in missing))
        raise InvalidInput(
            f"{what} needs {' and '.join(missing)}: pip install 'smlt-tune[{extras}]'"
        )


class _Signals:
    """The first Ctrl-C, SIGTERM or hang-up raises :class:`Stopped`, where that can be dealt with.

    While the fleet starts and while everything is freed and written down, it has to wait. Later
    ones change nothing.

    A sweep that can be resumed ends as it would by SIGKILL instead, with no trial being over that
    is not: its functions end with it, and nothing that it knows is lost.

    Args:
        resumable: The folder of such a sweep.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, resumable: Path | None) -> None:
        self._resumable = resumable
        self._received = 0
        self._heard = False

    def __enter__(self) -> Self:
        self._before = [signal.signal(number, self._handle) for number in self.NUMBERS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(self.NUMBERS, self._before, strict=True):
            signal.signal(number, handler)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Inside, the first signal raises; one that came before raises at once."""
        self._heard = True
        try:
            if self._received:
                raise Stopped(self._received)
            yield
        finally:
            self._heard = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._resumable is not None:
            name = signal.Signals(number).name
            text = f"\nended by {name}; smlt resume {self._resumable} goes on\n"
            show_cursor = "\x1b[?25h" if sys.stdout.isatty() else ""
            os.write(sys.stdout.fileno(), (show_cursor + text).encode())
            os._exit(128 + number)
        if not self._received:
            self._received = number
            if self._heard:
                raise Stopped(number)


if __name__ == "__main__":
    sys.exit(main())
