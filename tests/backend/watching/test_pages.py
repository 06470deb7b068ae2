"""Pages and tables show the truth and never obey what names and messages say."""

import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from smlt_tune.backend.history import HistoryEvent
from smlt_tune.backend.watching import page, report_page, status
from smlt_tune.backend.watching.charts import Dot, Line, chart
from smlt_tune.backend.watching.metrics import choose
from smlt_tune.backend.watching.page import pareto
from smlt_tune.backend.watching.snapshot import Client, take
from tests.backend.watching.journals import repeated, simulated

NOBODY = Client()
EVIL = "</title></pre><script>alert(1)</script><img src=x onerror='alert(2)'>\" \x1b[31m"


class Tags(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def checked(html):
    """A page that is well formed, runs nothing and loads nothing."""
    found = Tags(html)
    assert found.open == []
    assert not {"script", "img", "iframe", "object", "form"} & set(found.tags)
    for _, name, value in found.attributes:
        assert not name.startswith("on")
        assert name != "style"
        assert name != "src"
        assert name != "href" or value == "data:,"
    return found


def shown(shot, *, most=20, width=120):
    """A fleet in a terminal."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(status.picture(shot, choose(shot.jobs), most=most))
    return console.file.getvalue()


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    configs = [
        {"name": "good", "best": 0.9, "metric": EVIL + "accuracy"},
        {"name": "long", "epochs": 400},
        {"name": "broken", "broken": EVIL},
    ]
    folder = tmp_path_factory.mktemp("journal") / "fleet"
    return simulated(folder, configs, budget_usd=0.01, crashes_per_hour=60)


def hostile():
    """Every text of a journal is somebody's trick."""
    small = {"workers": 1, "memory_mb": 512, "store": EVIL}
    bodies = [
        ("fleet", "", {"name": EVIL, "budget_usd": 1.0}),
        ("job", EVIL, {}),
        ("decision", EVIL, {"allocation": small, "reason": EVIL, "occasion": EVIL, "time_s": 0.0,
                            "evidence": {"goal": EVIL, "prediction": {"cost_usd": [1, 2, 3],
                                         "time_s": [1, 2, 3]}, "alternatives": [
                                             {**small, "time_s": 4, "cost_usd": 1}]}}),
        ("generation", EVIL, {**small, "generation": 0, "reason": EVIL, "time_s": 0.0}),
        ("ledger", "", {"entry_id": EVIL, "job": "", "what": EVIL, "reserved_usd": 0.1}),
        ("report", EVIL, {"index": 0, "time_s": 1.0, "cost_usd": 0.1, "metrics": {EVIL: 1.0}}),
        ("invocation", EVIL, {"ending": EVIL, "detail": f"{EVIL}\n{EVIL}"}),
        ("ended", EVIL, {"status": EVIL, "reason": EVIL, "cost_usd": 0.1, "duration_s": 2.0}),
    ]  # fmt: skip
    return [HistoryEvent(k, float(k), *one) for k, one in enumerate(bodies)]


def test_hostile_names_and_messages_are_only_shown(journal):
    shot = take(hostile(), client=NOBODY, now_at=9.0)
    metric = choose(shot.jobs)
    assert checked(report_page.render(shot, metric)).text.count(EVIL) > 5
    one = page.document(EVIL, "", page.job(shot.jobs[0], metric, [EVIL]))
    assert EVIL in "".join(checked(one).text)
    links = Tags(page.fleet(shot, metric, links=True))
    assert "script" not in links.tags
    assert all(v.startswith("/jobs/%3C") for _, name, v in links.attributes if name == "href")
    for terminal in (shown(shot), shown(take(journal, client=NOBODY, now_at=0))):
        assert "\x1b" not in terminal
        assert "</title>" in terminal


def test_the_report_tells_best_cut_failures_and_bill(tmp_path):
    configs = [{"name": f"job-{k}", "best": 0.5 + k / 10} for k in range(3)]
    configs += [{"name": "long", "epochs": 400}, {"name": "broken", "broken": "no such layer"}]
    events = simulated(tmp_path / "fleet", configs, budget_usd=0.01, crashes_per_hour=60)
    shot = take(events, client=NOBODY, now_at=0)
    path = tmp_path / "report.html"
    report_page.write(shot, choose(shot.jobs), path)
    text = " ".join(checked(path.read_text()).text)
    assert re.search(r"best accuracy +0\.6562 +job-2", text)
    assert "1 of 5 jobs: 1 budget" in text
    assert "ZeroDivisionError: no such layer" in text
    assert f"${shot.money.settled:.9f}" in text
    terminal = shown(shot)
    assert "3 finished, 1 stopped, 1 failed" in terminal
    assert "best     accuracy 0.6562  job-2" in terminal


def test_an_empty_fleet_and_a_dead_one_are_told_apart(journal):
    empty = take([], client=NOBODY, now_at=0)
    assert "No job was submitted." in "".join(checked(page.document("", "", page.fleet(
        empty, choose(()), links=False))).text)  # fmt: skip
    assert "closed  no job was submitted" in shown(empty)
    half = [one for one in journal if one.at <= journal[0].at + 4]
    dead = take(half, client=NOBODY, now_at=0)
    html = page.fleet(dead, choose(dead.jobs), links=False)
    assert "2 jobs are unfinished" in html
    assert "Fleet.open" in html
    assert "its client ended without closing it" in shown(dead)
    alive = take(half, client=Client(5), now_at=half[-1].at)
    assert "4 workers" in shown(alive)
    assert "unfinished" not in page.fleet(alive, choose(alive.jobs), links=False)


def test_of_a_thousand_jobs_all_are_listed_and_what_is_left_out_is_said(journal):
    shot = take(repeated(journal, 334), client=NOBODY, now_at=0)
    html = report_page.render(shot, choose(shot.jobs))
    found = checked(html)
    jobs = html[html.index("<h2>Jobs") : html.index("<h2>Allocation")]
    assert jobs.count("<tr") == 1 + 1002
    assert ": 200 of " in "".join(found.text)
    assert "(100 of " in "".join(found.text)
    assert len(html) < 1_000_000
    assert "and 982 more" in shown(shot)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(0.0, 0.0)],
        [(5.0, -3.0)],
        [(0.0, 1e-9), (1e5, 1e-9)],
        [(k, k * 1e9) for k in range(999)],
    ],
)
def test_charts_hold_any_numbers(points):
    found = checked(
        chart("a", [Line("b", points, "c"), Line("d", points, "e", True)], x="x", y=str)
    )
    places = [value for _, name, value in found.attributes if name in ("d", "x", "y", "x1", "y1")]
    numbers = [float(n) for place in places for n in re.findall(r"-?[\d.]+", place)]
    assert all(0 <= number <= 560 for number in numbers)
    assert bool(points) == bool(numbers)


def test_the_front_is_what_nothing_beats_in_both():
    dots = [Dot("", x, y, "") for x, y in [(3, 1), (1, 3), (2, 2), (2, 4), (3, 3), (4, 1)]]
    assert pareto(dots) == [(1, 3), (2, 2), (3, 1)]
