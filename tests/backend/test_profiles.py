"""Profiles on disk: what is kept, what is returned, what is refused."""

import logging
import math
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest

from smlt_tune.backend.history import History
from smlt_tune.backend.profiles import FILE, SCHEMA_VERSION, ProfileStore, open_profiles
from smlt_tune.backend.resource_manager.observations import Allocation, Profile, Workload
from smlt_tune.errors import FleetClosed, InvalidInput, ObjectDamaged, StorageFull
from smlt_tune.runtime.features import ModelFeatures

HERE, ELSEWHERE = "local:cgroup1:2cores", "local:watchdog:4cores"
WORKLOAD = Workload(ModelFeatures(106_000, 424_000, 1.1e7, 5.5e4), 192, 400, "f" * 64)
PROFILE = Profile(
    "fleet.job-0", WORKLOAD, Allocation(4, 1769, "default"), 30, 0.1 + 0.2, 0.1, 0.05, 1.5, 350.5
)


def of_job(number, **changes):
    return replace(PROFILE, job_id=f"fleet.job-{number}", **changes)


def test_profiles_come_back_exactly_oldest_first(tmp_path):
    known = [
        PROFILE,
        replace(PROFILE, allocation=Allocation(2, 512, "größer")),
        replace(PROFILE, workload=replace(WORKLOAD, batch=384, iterations=None)),
        of_job(1, iterations=1, iteration_s=0.0, sync_s=0.0, out_of_memory=True),
    ]
    folder = tmp_path / "new" / "folder"
    with ProfileStore(folder) as store:
        assert store.profiles(HERE) == []
        for profile in known:
            store.add(profile, HERE)
        assert store.profiles(HERE) == known
    with ProfileStore(folder) as store:
        assert store.profiles(HERE) == known
        assert store.profiles(HERE, newest=2) == known[2:]


def test_a_newer_profile_of_the_same_takes_the_place_of_the_older(tmp_path):
    with ProfileStore(tmp_path) as store:
        newer = replace(PROFILE, iterations=90, iteration_s=0.25)
        for profile in (PROFILE, of_job(1), newer):
            store.add(profile, HERE)
        assert store.profiles(HERE) == [of_job(1), newer]


def test_profiles_of_another_platform_are_kept_and_not_returned(tmp_path):
    with ProfileStore(tmp_path) as store:
        store.add(PROFILE, HERE)
        store.add(of_job(1), ELSEWHERE)
        assert store.profiles(HERE) == [PROFILE]
        assert store.profiles(ELSEWHERE) == [of_job(1)]
        assert store.profiles("nowhere") == []


FEATURES = WORKLOAD.features


@pytest.mark.parametrize(
    ("profile", "fingerprint", "mistakes"),
    [
        (
            replace(PROFILE, job_id="", iterations=0, iteration_s=math.nan, sync_s=-1.0),
            "",
            [
                "iterations must be a whole number of at least 1, not 0",
                "iteration_s must be a finite number of at least 0, not nan",
                "sync_s must be a finite number of at least 0, not -1.0",
                "job_id must not be empty",
                "fingerprint must not be empty",
            ],
        ),
        (replace(PROFILE, iteration_s=0.0, sync_s=0.0), HERE, ["iteration_s must be above 0"]),
        (
            replace(PROFILE, sync_s=0.5, iteration_s=0.25),
            HERE,
            ["sync_s=0.5 is part of iteration_s=0.25 and cannot be more"],
        ),
        (
            replace(PROFILE, workload=replace(WORKLOAD, batch=0, iterations=0)),
            HERE,
            [
                "batch must be a whole number of at least 1, not 0",
                "workload.iterations must be a whole number of at least 1, not 0",
            ],
        ),
        (
            replace(
                PROFILE,
                peak_mb=math.inf,
                other_share="half",
                workload=replace(WORKLOAD, features=replace(FEATURES, parameters=-1)),
            ),
            HERE,
            [
                "parameters must be a finite number of at least 0, not -1",
                "other_share must be a finite number of at least 0, not 'half'",
                "peak_mb must be a finite number of at least 0, not inf",
            ],
        ),
    ],
)
def test_what_cannot_have_been_measured_is_refused(tmp_path, profile, fingerprint, mistakes):
    with ProfileStore(tmp_path) as store:
        with pytest.raises(InvalidInput) as refused:
            store.add(profile, fingerprint)
        assert list(refused.value.mistakes) == [
            f"profile of {profile.job_id!r}: {m}" for m in mistakes
        ]
        assert store.profiles(HERE) == []


WRITER = """
import sys
from dataclasses import replace
from smlt_tune.backend.profiles import ProfileStore
from tests.backend.test_profiles import HERE, of_job
folder, first, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.stdin.read()
for k in range(first, first + number):
    with ProfileStore(folder) as store:
        store.add(of_job(k), HERE)
    print(k, flush=True)
"""


def start(folder, first, number):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(first), str(number)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_open_and_write_side_by_side(tmp_path):
    """All wait until all are there, then make the file at the same time."""
    writers = [start(tmp_path, 100 * k, 20) for k in range(4)]
    for writer in writers:
        writer.stdin.close()
        writer.stdin = None
    for writer in writers:
        writer.communicate(timeout=60)
    assert [writer.returncode for writer in writers] == [0] * 4
    with ProfileStore(tmp_path) as store:
        jobs = {profile.job_id for profile in store.profiles(HERE)}
    assert jobs == {f"fleet.job-{100 * k + i}" for k in range(4) for i in range(20)}


def test_what_was_added_survives_a_killed_process(tmp_path):
    with start(tmp_path, 0, 10**6) as writer:
        writer.stdin.close()
        writer.stdin = None
        told = [writer.stdout.readline() for _ in range(20)]
        writer.kill()
        told += writer.stdout.readlines()
        assert writer.wait(30) == -signal.SIGKILL
    with ProfileStore(tmp_path) as store:
        known = {profile.job_id for profile in store.profiles(HERE)}
    assert known >= {f"fleet.job-{int(line)}" for line in told}


def filled(folder, number=60):
    with ProfileStore(folder) as store:
        for k in range(number):
            store.add(of_job(k), HERE)
    return (folder / FILE).read_bytes()


def read(folder):
    with ProfileStore(folder) as store:
        return store.profiles(HERE)


def test_no_page_can_be_lost_unnoticed(tmp_path, caplog):
    """Whatever page is lost: the truth, or an error that says what to do; never other figures."""
    content = filled(tmp_path / "whole")
    truth = read(tmp_path / "whole")
    folder = tmp_path / "spoilt"
    folder.mkdir()
    noticed = 0
    for start in range(0, len(content), 4096):
        for junk in (b"\0" * 4096, b"\xa5" * 4096):
            spoilt = content[:start] + junk + content[start + 4096 :]
            (folder / FILE).write_bytes(spoilt)
            try:
                assert read(folder) == truth
            except ObjectDamaged as error:
                noticed += 1
                assert re.search(r"Nothing was deleted: move the file away", str(error))  # noqa: PT017
                assert (folder / FILE).read_bytes() == spoilt
                assert open_profiles(folder, HERE) == (None, [])
    assert noticed >= 2 * len(content) // 4096 - 2  # at most a page that holds nothing


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"no database" * 500,
        lambda content: content[: len(content) // 2],
        lambda content: content[: len(content) - 4096],
        lambda content: content.replace(b'"iterations":30', b'"iterations":90'),
        lambda content: content.replace(b"fleet.job-7", b"\xff\xfe\xfdet.job"),
    ],
    ids=["other file", "cut", "last page cut", "figure changed", "text broken"],
)
def test_a_damaged_file_is_told_left_alone_and_can_be_done_without(tmp_path, spoil, caplog):
    spoilt = spoil(filled(tmp_path))
    (tmp_path / FILE).write_bytes(spoilt)
    with pytest.raises(ObjectDamaged, match=r"is damaged \(.*\)\. Nothing was deleted: move the f"):
        read(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert open_profiles(tmp_path, HERE) == (None, [])
    assert "going on without the profiles of earlier jobs: " in caplog.text
    assert (tmp_path / FILE).read_bytes() == spoilt


def test_a_sound_store_is_opened_with_what_it_knows(tmp_path):
    filled(tmp_path, 3)
    store, known = open_profiles(tmp_path, HERE)
    with store:
        assert known == [of_job(k) for k in range(3)]


def other_version(folder):
    filled(folder, 1)
    with closing(sqlite3.connect(folder / FILE)) as db:
        db.execute("PRAGMA user_version = 7")


def other_program(folder):
    with closing(sqlite3.connect(folder / FILE)) as db:
        db.execute("CREATE TABLE studies (x)")


def history_of_a_fleet(folder):
    History(folder).close()
    (folder / "history.sqlite3").rename(folder / FILE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_version, rf"has version 7; this .* version {SCHEMA_VERSION}\. Open it with the ver"),
        (other_program, r"was not written by smlt_tune; it was left as it is$"),
        (history_of_a_fleet, r"was not written by smlt_tune; it was left as it is$"),
    ],
)
def test_what_another_has_written_is_refused_and_left_alone(tmp_path, make, message):
    make(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    for opener in (ProfileStore, lambda folder: open_profiles(folder, HERE)):
        with pytest.raises(InvalidInput, match=message):
            opener(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match=r"^cannot use the folder .*file: File exists$"):
        ProfileStore(tmp_path / "file")


def test_a_full_disk_loses_nothing_that_was_added(tmp_path):
    with ProfileStore(tmp_path) as store:
        store.add(PROFILE, HERE)
        store._connection.execute("PRAGMA max_page_count = 1")
        with pytest.raises(StorageFull, match=rf"^no space is left to write .*{FILE}$"):
            store.add(of_job("x" * 10**6), HERE)
        assert store.profiles(HERE) == [PROFILE]


def test_a_closed_store_says_so(tmp_path):
    store = ProfileStore(tmp_path)
    store.close()
    store.close()
    for verb in (lambda: store.profiles(HERE), lambda: store.add(PROFILE, HERE)):
        with pytest.raises(FleetClosed, match=rf"{FILE} was closed$"):
            verb()


def test_a_large_history_is_read_through_its_index(tmp_path):
    filled(tmp_path, 1)
    with closing(sqlite3.connect(tmp_path / FILE)) as db:
        plan = db.execute(
            "EXPLAIN QUERY PLAN SELECT body FROM profiles WHERE fingerprint = ? "
            "ORDER BY seq DESC LIMIT ?",
            ("x", 1),
        ).fetchall()
    assert "USING INDEX by_age" in str(plan)
    assert "TEMP B-TREE" not in str(plan)
