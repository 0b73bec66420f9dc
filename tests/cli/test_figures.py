"""`spear figures`: the pages, and one call at a time."""

import os
from pathlib import Path

import nbformat
import pytest
import yaml
from command_line import run
from PIL import Image

from spear.figures import schedule


@pytest.fixture
def project(folder: Path) -> Path:
    """A working folder with one notebook and its run."""
    cell = nbformat.v4.new_code_cell("seed = 0", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "notebooks" / "00_tiny.ipynb")
    profiles = {"quick": {}, "paper": {}, "test": {}}
    entry = {"name": "tiny", "notebook": "00_tiny.ipynb", "profiles": profiles, "writes": {"00_tiny-a": "What it is."}}
    (folder / "notebooks" / "runs.yaml").write_text(yaml.safe_dump([entry]))
    return folder


def test_the_gallery_alone_is_written_anew(project: Path, capsys: pytest.CaptureFixture) -> None:
    (project / "figures").mkdir()
    Image.new("L", (2, 2)).save(project / "figures" / "00_tiny-a.png")
    assert run("figures", "--pages") == 0
    page = (project / "figures" / "README.md").read_text()
    assert "## [tiny](../notebooks/00_tiny.ipynb)" in page
    assert "![00_tiny-a](00_tiny-a.png)\n\nWhat it is." in page


def test_a_second_call_says_who_runs_the_notebooks(project: Path, capsys: pytest.CaptureFixture) -> None:
    with schedule.alone():
        assert run("figures") == 2
        assert run("figures", "--list") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"spear: error: process {os.getpid()} on ")
    assert run("figures", "--pages") == 0
