import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing

import pytest

from smlt_tune.backend.history import SCHEMA_VERSION, History, HistoryEvent, read_history
from smlt_tune.errors import FleetClosed, InvalidInput, ObjectDamaged, StorageFull

FILE = "history.sqlite3"


class Hand:
    """A clock that is set by hand."""

    now = 100.0

    def wall(self):
        return self.now

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def run(code, *arguments, **options):
    """Starts another client."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "fleet"


@pytest.mark.parametrize("in_memory", [True, False])
def test_events_are_read_as_they_were_appended(folder, in_memory):
    clock = Hand()
    with History(None if in_memory else folder, clock=clock) as history:
        assert history.read() == []
        history.append("submitted", "job-1", {"workers": 2, "config": {"lr": [0.1, None, True]}})
        clock.now = 101.5
        history.append("closed", "", {})
        assert history.read() == [
            HistoryEvent(
                1, 100.0, "submitted", "job-1", {"workers": 2, "config": {"lr": [0.1, None, True]}}
            ),
            HistoryEvent(2, 101.5, "closed", "", {}),
        ]


def test_a_history_goes_on_where_it_ended(folder):
    for k in range(3):
        with History(folder) as history:
            assert [event.seq for event in history.read()] == list(range(1, k + 1))
            history.append("opened", "", {"k": k})
    assert [event.body for event in read_history(folder)] == [{"k": k} for k in range(3)]


def test_figures_come_back_exactly(folder):
    body = {"loss": math.nan, "best": math.inf, "usd": 0.1 + 0.2, "name": "Größe ≤ 3\x00\n\ud800"}
    with History(folder) as history:
        history.append("report", "job-1", body)
        (event,) = history.read()
    assert repr(dict(event.body)) == repr(body)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", 1j])
def test_what_json_cannot_hold_is_refused(value):
    with History(None) as history:
        with pytest.raises(InvalidInput, match=r"^a report event cannot be written as JSON: "):
            history.append("report", "job-1", {"x": value})
        assert history.read() == []


def test_threads_append_side_by_side(folder):
    with History(folder) as history:

        def work(number):
            for k in range(30):
                history.append("tick", f"job-{number}", {"k": k})

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        events = history.read()
    assert [event.seq for event in events] == list(range(1, 121))
    for number in range(4):
        mine = [event.body["k"] for event in events if event.job == f"job-{number}"]
        assert mine == list(range(30))


def test_a_closed_history_says_so(folder):
    history = History(folder)
    history.close()
    history.close()
    for verb in (history.read, lambda: history.append("tick", "", {})):
        with pytest.raises(FleetClosed, match=rf"{FILE} was closed$"):
            verb()


def test_two_clients_cannot_open_one_fleet(folder):
    code = (
        "import sys; from smlt_tune.backend.history import History\n"
        "history = History(sys.argv[1]); history.append('opened', '', {})\n"
        "print('open', flush=True); sys.stdin.read(); history.close()"
    )
    with run(code, folder, stdin=subprocess.PIPE) as other:
        assert other.stdout.readline() == "open\n"
        message = (
            f"the fleet in {folder} is open in process {other.pid}; "
            "close it there, or end that process"
        )
        with pytest.raises(InvalidInput, match=f"^{re.escape(message)}$"):
            History(folder)
        assert [event.kind for event in read_history(folder)] == ["opened"]
        other.stdin.close()
        assert other.wait(30) == 0
    History(folder).close()


def test_nor_can_one_client_twice(folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    with History(folder) as history:
        for name in (folder, link):
            with pytest.raises(InvalidInput, match=rf"is open in process {os.getpid()};"):
                History(name)
        history.append("still", "", {})
        code = "import sys; from smlt_tune.backend.history import History; History(sys.argv[1])"
        with run(code, folder) as other:  # the lock survived the attempts above
            assert f"is open in process {os.getpid()};" in other.communicate(timeout=30)[1]
            assert other.returncode == 1


def test_what_was_appended_survives_a_killed_client(folder):
    code = (
        "import sys; from smlt_tune.backend.history import History\n"
        "history = History(sys.argv[1])\n"
        "for k in range(10**6):\n"
        "    history.append('tick', 'job-1', {'k': k}); print(k, flush=True)"
    )
    with run(code, folder) as client:
        for line in client.stdout:
            if int(line) >= 50:
                break
        client.kill()
        told = [50, *map(int, client.stdout.read().split())]
        assert client.wait(30) == -signal.SIGKILL
    seen = [event.body["k"] for event in read_history(folder)]
    assert seen == list(range(len(seen)))
    assert len(seen) > max(told)
    with History(folder) as history:
        assert [event.body["k"] for event in history.read()] == seen


def test_a_child_that_outlives_the_client_does_not_keep_the_folder(folder):
    code = (
        "import os, sys, time; from smlt_tune.backend.history import History\n"
        "history = History(sys.argv[1]); child = os.fork()\n"
        "if not child: os.close(1); os.close(2); time.sleep(60)\n"
        "print(child, flush=True); os.kill(os.getpid(), 9)"
    )
    with run(code, folder) as client:
        child = int(client.stdout.readline())
        client.wait(30)
    try:
        History(folder).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_history_of_another_version_is_refused_and_left_alone(folder):
    History(folder).close()
    with closing(sqlite3.connect(folder / FILE)) as db:
        db.execute("PRAGMA user_version = 7")
    before = (folder / FILE).read_bytes()
    message = (
        f"{folder / FILE} has version 7; this smlt_tune reads and writes version {SCHEMA_VERSION}. "
        "Open it with the version that wrote it, or choose another folder"
    )
    for opener in (History, read_history):
        with pytest.raises(InvalidInput, match=f"^{re.escape(message)}$"):
            opener(folder)
    assert (folder / FILE).read_bytes() == before


def test_the_database_of_another_program_is_refused_and_left_alone(folder):
    folder.mkdir()
    with closing(sqlite3.connect(folder / FILE)) as db:
        db.execute("CREATE TABLE studies (x)")
    before = (folder / FILE).read_bytes()
    with pytest.raises(InvalidInput, match=r"was not written by smlt_tune; it was left as it is$"):
        History(folder)
    assert (folder / FILE).read_bytes() == before


def filled(folder):
    with History(folder) as history:
        for k in range(200):
            history.append("tick", "job-1", {"k": k, "text": "x" * 100})
    return (folder / FILE).read_bytes()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"no database" * 500,
        lambda content: content[: len(content) // 2],
        lambda content: content[:4096] + b"\xff" * 4096 + content[8192:],
        lambda content: content.replace(b'{"k":150', b'{"k":950'),
        lambda content: content.replace(b"tick", b"\xff\xfe\xfdk"),
    ],
    ids=["other file", "cut", "page lost", "figure changed", "text broken"],
)
def test_a_damaged_history_is_told_and_left_alone(folder, spoil):
    spoilt = spoil(filled(folder))
    (folder / FILE).write_bytes(spoilt)

    def open_and_read(folder):
        with History(folder) as history:
            return history.read()

    for opener in (open_and_read, read_history):
        with pytest.raises(ObjectDamaged, match=r"is damaged \(.*\)\. Nothing was deleted: move "):
            opener(folder)
    assert (folder / FILE).read_bytes() == spoilt


def test_a_client_that_died_before_it_made_anything_is_no_harm(folder):
    folder.mkdir()
    (folder / FILE).touch()
    assert read_history(folder) == []
    with History(folder) as history:
        history.append("tick", "", {})
        assert len(history.read()) == 1


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match=r"^cannot use the folder .*file: File exists$"):
        History(tmp_path / "file")
    with pytest.raises(InvalidInput, match=rf"^there is no fleet in .*none: it holds no {FILE}$"):
        read_history(tmp_path / "none")


def test_a_full_disk_loses_nothing_that_was_appended(folder):
    with History(folder) as history:
        history.append("tick", "", {"k": 0})
        history._connection.execute("PRAGMA max_page_count = 1")
        with pytest.raises(StorageFull, match=rf"^no space is left to write .*{FILE}$"):
            history.append("tick", "", {"text": "x" * 10**6})
        assert [event.body for event in history.read()] == [{"k": 0}]
