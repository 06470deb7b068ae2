"""The web page over real HTTP: who may read, what they get, and that it follows the fleet."""

import json
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager
from http.client import HTTPConnection

import pytest

from smlt_tune.backend.history import History
from smlt_tune.backend.watching.dashboard import Dashboard
from smlt_tune.backend.watching.metrics import choose
from smlt_tune.backend.watching.reading import Watch
from smlt_tune.errors import InvalidInput
from tests.backend.watching.journals import simulated, write
from tests.conftest import eventually

TOKEN = "a-token-of-the-tests"
EVIL = "<script>document.title='owned'</script>"


@contextmanager
def serving(folder, **options):
    dashboard = Dashboard(Watch(folder), lambda shot: choose(shot.jobs), **options)
    with dashboard:
        thread = threading.Thread(target=dashboard.serve)
        thread.start()
        try:
            yield dashboard
        finally:
            dashboard.stop()
            thread.join()


def get(dashboard, path, *, method="GET", **headers):
    """Status, headers, body."""
    connection = HTTPConnection("127.0.0.1", dashboard.port, timeout=60)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=named)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    configs = [{"name": "good", "best": 0.9}, {"name": "broken", "broken": EVIL}]
    folder = tmp_path_factory.mktemp("fleets")
    events = simulated(folder / "simulated", configs, budget_usd=0.01, crashes_per_hour=60)
    return write(folder / "fleet", events)


@pytest.fixture(scope="module")
def local(folder):
    with serving(folder) as dashboard:
        yield dashboard


def test_it_shows_the_fleet_and_its_jobs(local):
    assert 'src="/live.js"' in get(local, "/")[2]
    status, headers, view = get(local, "/view")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert '<a href="/jobs/good">good</a>' in view
    assert EVIL not in view
    assert "1 finished, 1 failed" in view
    status, _, job = get(local, "/jobs/good")
    assert status == 200
    assert "Allocations, and why" in job
    assert "2 x 1769 MB" in job
    told = json.loads(get(local, "/api/fleet")[2])
    assert [job["status"] for job in told["jobs"]] == ["finished", "failed"]
    assert told["money"]["budget"] == 0.01


def test_what_has_not_changed_is_not_sent_again(local):
    _, headers, _ = get(local, "/view")
    status, _, body = get(local, "/view", If_None_Match=headers["ETag"])
    assert (status, body) == (304, "")
    status, headers, body = get(local, "/view", method="HEAD")
    assert (status, body) == (200, "")
    assert int(headers["Content-Length"]) > 1000


@pytest.mark.parametrize("path", ["/", "/view", "/api/fleet", "/live.js", "/jobs/good", "/nothing"])
def test_every_answer_forbids_what_a_page_does_not_need(local, path):
    _, headers, _ = get(local, path)
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Server"].strip() == "smlt"


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/jobs/none", "/jobs/../view", "/jobs/%2e%2e/%2e%2e/etc/passwd", "/%00"],
)
def test_there_are_no_other_pages(local, path):
    assert get(local, path)[0] == 404


def test_it_only_reads(local, folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for method in ("POST", "PUT", "DELETE"):
        assert get(local, "/view", method=method)[0] == 501
    get(local, "/view")
    assert {path: path.read_bytes() for path in folder.iterdir() if path in before} == before


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[", "10.0.0.1:80"])
def test_a_name_of_another_site_that_leads_here_gets_nothing(local, host):
    status, _, body = get(local, "/view", Host=host)
    assert status == 421
    assert "good" not in body


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:80"])
def test_names_of_this_machine_are_answered(local, host):
    assert get(local, "/view", Host=host)[0] == 200


def test_who_can_be_anybody_has_to_bring_the_token(folder):
    with serving(folder, host="0.0.0.0", token=TOKEN) as dashboard:
        for path in ("/", "/view", "/api/fleet", "/style.css", "/?token=wrong-wrong-wrong"):
            status, headers, body = get(dashboard, path)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
            assert TOKEN not in body
        status, headers, _ = get(dashboard, f"/?token={TOKEN}", Host="any.example")
        assert (status, headers["Location"]) == (303, "/")  # and out of the address
        cookie = headers["Set-Cookie"]
        assert "HttpOnly; SameSite=Strict" in cookie
        assert get(dashboard, "/view", Cookie=cookie.partition(";")[0])[0] == 200
        assert get(dashboard, "/view", Authorization=f"Bearer {TOKEN}")[0] == 200
        for wrong in ("Bearer x", f"Basic {TOKEN}", "Bearer", "", "Bearer \xff"):
            assert get(dashboard, "/view", Authorization=wrong)[0] == 401
        assert get(dashboard, "/view", Cookie="smlt-1=x; =;;")[0] == 401


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "needs a token"),
        ({"host": "::"}, "needs a token"),
        ({"host": "0.0.0.0", "token": ""}, "at least 16 letters"),
        ({"host": "0.0.0.0", "token": "a; Domain=evil.example\r\n"}, "at least 16 letters"),
        ({"host": "192.0.2.1", "token": TOKEN}, "cannot listen on 192.0.2.1"),
        ({"port": 65536 + 80}, "cannot listen on 127.0.0.1"),
    ],
)
def test_what_would_be_open_to_others_is_refused(folder, options, message):
    with pytest.raises(InvalidInput, match=message):
        Dashboard(Watch(folder), lambda shot: choose(shot.jobs), **options)


def test_it_follows_the_fleet_and_says_if_it_cannot(tmp_path):
    with History(tmp_path) as history, serving(tmp_path) as dashboard:
        assert "No job was submitted." in get(dashboard, "/view")[2]
        history.append("job", "a", {})
        eventually(lambda: "1 queued" in get(dashboard, "/view")[2])
        (tmp_path / "history.sqlite3").rename(tmp_path / "elsewhere")
        eventually(lambda: get(dashboard, "/view")[0] == 503)
        assert "there is no fleet in" in get(dashboard, "/view")[2]
        assert get(dashboard, "/")[0] == 200
        (tmp_path / "elsewhere").rename(tmp_path / "history.sqlite3")


@pytest.mark.slow
def test_a_browser_shows_it_runs_its_script_and_nothing_else(local, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000", "--dump-dom"]
    address = f"http://127.0.0.1:{local.port}/"
    done = subprocess.run(
        [*command, address], capture_output=True, text=True, timeout=120, check=True
    )
    assert "1 finished, 1 failed" in done.stdout  # fetched and put there by the script
    assert "<title>Fleet</title>" in done.stdout  # nothing of the journal ran
    assert done.stdout.count("<figure>") == 5
    assert not re.search(r"CONSOLE.*(Refused|violates|Error)", done.stderr)
