"""Hygiene of every committed notebook."""

import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from spear.figures import table

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_LINES = 15
PLACES = re.compile(r"/(?:home|root|tmp|work|Users|private|mnt|opt)/\w|[A-Z]:\\")
SECTIONS = ("What you will be able to explain", "Takeaways")
PAPER = re.compile(
    r"NeurIPS 2024|arXiv|SPEAR,? (?:Section|Theorem|Equation|Lemma|Algorithm|Appendix|Figure|Table)", re.I
)

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _cells(path: Path, kind: str) -> list[NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def test_there_are_notebooks_and_each_has_a_run() -> None:
    assert NOTEBOOKS
    listed = {run.notebook.name for profile in table.PROFILES for run in table.load(FOLDER / "runs.yaml", profile)}
    assert listed == {path.name for path in NOTEBOOKS}


@every_notebook
def test_valid_and_portable(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert re.fullmatch(r"\d\d[a-z]?_[a-z0-9_]+", path.stem)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "papermill" not in notebook.metadata


@every_notebook
def test_one_parameters_cell_of_plain_assignments(path: Path) -> None:
    assert table.parameters(path)


@every_notebook
def test_cells_are_short(path: Path) -> None:
    for cell in _cells(path, "code"):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) < MAX_LINES, f"{len(lines)} lines:\n{cell.source}"


@every_notebook
def test_a_sentence_before_each_cell(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    for before, cell in pairwise(cells):
        assert cell.cell_type != "code" or before.cell_type == "markdown", f"no sentence before:\n{cell.source}"


@every_notebook
def test_it_was_run_in_order_and_without_errors(path: Path) -> None:
    cells = [cell for cell in _cells(path, "code") if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert [output for output in outputs if output.output_type == "error"] == []
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []


@every_notebook
def test_no_places_of_one_machine(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        texts = [cell.source]
        for output in cell.get("outputs", []):
            texts += [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
        for text in texts:
            assert not PLACES.search(text), text


@every_notebook
def test_checked_outputs_hold_no_times_or_long_numbers(path: Path) -> None:
    for cell in _cells(path, "code"):
        if "nbval-check-output" in cell.metadata.get("tags", []):
            for output in cell.outputs:
                assert output.get("name") != "stderr"
                assert not re.search(r"\d\.\d{7,}|0x[0-9a-f]{6,}|cuda|mps", str(output.get("text", output.get("data"))))


@every_notebook
def test_it_shows_its_figures_at_full_size(path: Path) -> None:
    text = "\n".join(cell.source for cell in _cells(path, "markdown"))
    small, full = (table.load(FOLDER / "runs.yaml", profile) for profile in ("quick", "paper"))
    small = {run.name: run for run in small}
    for run in (run for run in full if run.notebook == path):
        place = Path("..", "figures", run.variant)
        for stem in run.captions if run.parameters != small[run.name].parameters else ():
            there = (path.parent / place / f"{stem}.png").is_file()
            assert (f"]({place / stem}.png)" in text) == there, f"{place / stem}.png"


@every_notebook
def test_it_reads_as_a_chapter(path: Path) -> None:
    text = "\n".join(cell.source for cell in _cells(path, "markdown"))
    first, last = (_cells(path, "markdown")[i].source for i in (0, -1))
    assert re.match(rf"# {path.stem.split('_')[0]} \w[\w ]*: \S", first), "the title is '# NN Topic: what it says'"
    for section in SECTIONS:
        assert re.search(rf"^##+ {section}", text, re.M | re.I), f"no section '{section}'"
    assert PAPER.search(text), "the section of the paper is not named"
    later = [other.name for other in NOTEBOOKS if other.name > path.name]
    if later:
        assert f"]({later[0]})" in last, f"the last cell does not link to {later[0]}"


@every_notebook
def test_a_figure_is_followed_by_its_interpretation(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    for cell, after in zip(cells, [*cells[1:], NotebookNode(cell_type="none")], strict=True):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            assert after.cell_type == "markdown" or "Interpretation" in cell.source, f"no text after:\n{cell.source}"
