import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/**/*.md")])

FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|(?:src|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#+\s+(.*?)\s*#*$", re.MULTILINE)
MACHINE_PATH = re.compile(r"(?<![\w.$}>-])/(?:work|home|root|Users|mnt|tmp)/[\w.-]+")


def name(page):
    return str(page.relative_to(ROOT))


def links(page):
    """Targets of the page's links, without those that lead elsewhere."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = ["".join(groups) for groups in LINK.findall(text)]
    return [target for target in found if not re.match(r"[a-z][a-z0-9+.-]*:", target)]


def anchors(page):
    """What a heading is called in a link, as GitHub makes it."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(text))
    return {heading.replace(" ", "-") for heading in plain}


def broken(page):
    result = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        missing = path.startswith("/") or not there.exists()
        if missing or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            result.append(target)
    return result


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_somewhere(page):
    assert broken(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_page_names_a_path_of_somebodys_machine(page):
    assert MACHINE_PATH.findall(page.read_text(encoding="utf-8")) == []


def test_the_checks_see_what_they_shall_see(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# What `it` is, in short\n")
    page.write_text(
        "[a](other.md) [b](other.md#what-it-is-in-short) [c](https://example.org/x) [d](#top)\n"
        '[e](gone.md) [f](other.md#gone) <img src="gone.png"> [g](/other.md "title")\n'
        "# Top\n```\n[h](in-code.md)\n```\n"
    )
    assert broken(page) == ["gone.md", "other.md#gone", "gone.png", "/other.md"]
    assert MACHINE_PATH.findall("see /home/jane/x, https://host/home/jane and ./tmp/x") == [
        "/home/jane"
    ]
