"""The README says what the files beside it say, and its first snippet prints what it shows."""

import re
import subprocess
import sys

import pytest

from spear.figures.readme import render


def test_tables_are_those_of_the_csv_files(repository):
    text = (repository / "README.md").read_text()
    assert "<!-- table figures/" in text
    assert render(text, repository) == text


def test_the_first_snippet_prints_what_the_readme_shows(repository):
    text = (repository / "README.md").read_text()
    snippet, output = re.search(r"```python\n(.*?)```\n+```text\n(.*?)```", text, re.DOTALL).groups()
    ran = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=repository, check=True)
    assert ran.stdout == output
    assert len(snippet.splitlines()) <= 12


def test_links_and_pictures_exist(repository):
    text = (repository / "README.md").read_text()
    local = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert local
    assert [link for link in local if not (repository / link).exists()] == []


def test_a_table_is_rendered(tmp_path):
    (tmp_path / "a.csv").write_text("set,b,error,missing\nmnist,16,1.23456e-13,\ncifar10,1200,0.5,7\n")
    text = "x\n<!-- table a.csv: set, b, error, missing -->\nold\n<!-- end -->\ny"
    head, rule = "| set | b | error | missing |\n", "| --- | --- | --- | --- |\n"
    expected = head + rule + "| mnist | 16 | 1.23e-13 |  |\n| cifar10 | 1,200 | 0.5 | 7 |\n"
    assert expected in render(text, tmp_path)
    assert render(render(text, tmp_path), tmp_path) == render(text, tmp_path)
    assert "| set | b | error | missing |" in render(text.replace(": set, b, error, missing", ""), tmp_path)


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.csv"):
        render("<!-- table a.csv -->\n<!-- end -->", tmp_path)
    (tmp_path / "a.csv").write_text("set\nmnist\n")
    with pytest.raises(ValueError, match="a.csv has no column b; it has set"):
        render("<!-- table a.csv: set, b -->\n<!-- end -->", tmp_path)
