"""The book builds without a warning, holds every notebook as it was committed, and needs nobody's server."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

LOADED = {"script": "src", "img": "src", "iframe": "src", "link": "href"}


class _Links(HTMLParser):
    """What a page loads, and where it leads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded, self.leads, self.formulas = [], [], 0
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.formulas += tag == "math"
        if tag in LOADED and given.get(LOADED[tag]):
            self.loaded.append(given[LOADED[tag]])
        if tag == "a" and given.get("href"):
            self.leads.append(given["href"])


@pytest.fixture(scope="module")
def book(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-c", "book", "-d", out / "doctrees", ".", out / "html"]
    built = subprocess.run([*map(str, command)], cwd=repository, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out / "html"


def _pages(book: Path) -> Iterator[tuple[Path, _Links]]:
    for page in sorted(book.rglob("*.html")):
        yield page, _Links(page)


def test_every_notebook_is_a_page_in_the_side_bar(book: Path, repository: Path) -> None:
    leads = _Links(book / "README.html").leads
    for notebook in (repository / "notebooks").glob("*.ipynb"):
        assert f"notebooks/{notebook.stem}.html" in leads


def test_outputs_are_those_committed(book: Path, repository: Path) -> None:
    for notebook in (repository / "notebooks").glob("*.ipynb"):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        pictures = sum("image/png" in out.get("data", {}) for cell in cells for out in cell.get("outputs", []))
        shown = [src for src in _Links(book / "notebooks" / f"{notebook.stem}.html").loaded if src.endswith(".png")]
        assert len(shown) >= pictures, notebook.name


def test_links_between_pages_lead_somewhere(book: Path) -> None:
    for page, links in _pages(book):
        for target in links.leads:
            path = re.split("[#?]", target)[0]
            if path and not re.match(r"[a-z]+:", path):
                assert (page.parent / path).exists(), f"{page.name} leads to {target}"


def test_nothing_is_loaded_from_elsewhere(book: Path) -> None:
    for page, links in _pages(book):
        assert [target for target in links.loaded if re.match(r"(?:[a-z]+:)?//", target)] == [], page.name


def test_formulas_are_drawn_by_the_browser(book: Path) -> None:
    assert _Links(book / "notebooks" / "01_theory.html").formulas


def test_the_search_knows_the_words_of_the_field(book: Path) -> None:
    index = (book / "searchindex.js").read_text(encoding="utf-8")
    assert all(f'"{word}"' in index or f"{word}:" in index for word in ("kernel", "relu"))


def test_the_folder_opens_on_the_first_page(book: Path) -> None:
    assert "README.html" in (book / "index.html").read_text(encoding="utf-8")
