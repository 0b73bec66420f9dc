"""`spear figures`: the pages."""

from pathlib import Path

import nbformat
import pytest
import yaml
from command_line import run
from PIL import Image


def test_the_gallery_alone_is_written_anew(folder: Path, capsys: pytest.CaptureFixture) -> None:
    cell = nbformat.v4.new_code_cell("seed = 0", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "notebooks" / "00_tiny.ipynb")
    profiles = {"quick": {}, "paper": {}, "test": {}}
    entry = {"name": "tiny", "notebook": "00_tiny.ipynb", "profiles": profiles, "writes": {"00_tiny-a": "What it is."}}
    (folder / "notebooks" / "runs.yaml").write_text(yaml.safe_dump([entry]))
    (folder / "figures").mkdir()
    Image.new("L", (2, 2)).save(folder / "figures" / "00_tiny-a.png")
    assert run("figures", "--pages") == 0
    page = (folder / "figures" / "README.md").read_text()
    assert "## [tiny](../notebooks/00_tiny.ipynb)" in page
    assert "![00_tiny-a](00_tiny-a.png)\n\nWhat it is." in page
