"""README.md and figures/README.md say what the files beside them say, and the first snippet prints what it shows."""

import re
import subprocess
import sys

import pytest

from spear.figures.markdown import render

PAGES = pytest.mark.parametrize("page", ["README.md", "figures/README.md"])


@PAGES
def test_tables_are_those_of_the_csv_files(repository, page):
    text = (repository / page).read_text()
    assert "<!-- table figures/" in text
    assert render(text, repository) == text


def test_the_first_snippet_prints_what_the_readme_shows(repository):
    text = (repository / "README.md").read_text()
    snippet, output = re.search(r"```python\n(.*?)```\n+```text\n(.*?)```", text, re.DOTALL).groups()
    ran = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=repository, check=True)
    assert ran.stdout == output
    assert len(snippet.splitlines()) <= 12


@PAGES
def test_links_and_pictures_exist(repository, page):
    text = (repository / page).read_text()
    local = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert local
    assert [link for link in local if not ((repository / page).parent / link).exists()] == []


def test_modules_and_folders_named_in_the_readme_exist(repository):
    text = (repository / "README.md").read_text()
    modules = {name.replace(".", "/") for name in re.findall(r"`(spear(?:\.[a-z_]+)+)`", text)}
    files = {f"spear/{name}" for name in re.findall(r"`((?:\w+/)*(?:\w+\.py|\w+/))`", text) if name != "spear/"}
    assert modules
    assert files
    places = [repository / name for name in sorted(modules | files)]
    assert [place for place in places if not (place.exists() or place.with_suffix(".py").is_file())] == []
