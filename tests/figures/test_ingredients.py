"""What a run is made of: every change that matters to its figures is seen and told, no other."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import nbformat
import pytest
from tiny_project import Project

from spear.figures import imports, ingredients, schedule
from spear.figures.ingredients import Ingredients

MODULES = {
    "__init__": "",
    "published/__init__": "",
    "published/sampling": "from spear.paths import root",
    "paths": "root = None",
    "audit/__init__": "",
    "audit/report": "from spear.published import sampling",
}
BODY = "from spear.published import sampling\nnames = ['digits', 'mnist']"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the same name, of a few lines."""
    for name, source in MODULES.items():
        path = tmp_path / "spear" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.setattr(ingredients, "Package", lambda: imports.Package(tmp_path / "spear"))
    monkeypatch.setenv("SPEAR_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "spear"


@pytest.fixture
def change(project: Project, package: Path) -> Callable[..., list[str]]:
    """What a change does, in words, to the run of a notebook that samples."""
    project.add("04_tiny")
    _edit(project, lambda notebook: notebook.cells[2].update(source=BODY))

    def changes(make: Callable[[], object]) -> list[str]:
        before = json.loads(json.dumps(asdict(ingredients.of(project.load()[0]))))
        make()
        return list(ingredients.of(project.load()[0]).changes(before))

    return changes


def _edit(project: Project, change: Callable[[nbformat.NotebookNode], object]) -> None:
    path = project.notebook("04_tiny")
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def test_nothing_else_matters(project: Project, package: Path, change: Callable[..., list[str]]) -> None:
    data = package.parent / "data"
    assert change(lambda: None) == []
    assert change(lambda: _edit(project, lambda nb: nb.cells[0].update(source="# another title"))) == []
    assert change(lambda: _edit(project, lambda nb: nb.cells[2].update(outputs=[], execution_count=7))) == []
    assert change(lambda: (package / "audit" / "report.py").write_text("2")) == []
    assert change(lambda: (data / "cifar10.npz").write_text("not named by the notebook")) == []
    assert change(lambda: project.set(0)) == []


def test_words_in_the_package_do_not_matter_and_code_does(package: Path, change: Callable[..., list[str]]) -> None:
    module = package / "paths.py"
    assert change(lambda: module.write_text('"""What it is."""\n\nroot = None  # why\n')) == []
    module.write_text('def root():\n    """Where."""\n    return "here"\n')
    assert change(lambda: module.write_text('def root():\n    """There."""\n    return "here"\n')) == []
    assert change(lambda: module.write_text('def root():\n    """There."""\n    return "there"\n')) != []
    assert change(lambda: module.write_text('def root():\n    "a" + "string"\n    return "there"\n')) != []
    assert change(lambda: module.write_text("not code")) == ["modules: spear.paths"]


def test_code_that_the_notebook_reaches_matters(package: Path, change: Callable[..., list[str]]) -> None:
    assert change(lambda: (package / "published" / "sampling.py").write_text("from spear.paths import root as b")) == [
        "modules: spear.published.sampling"
    ]
    assert change(lambda: (package / "paths.py").write_text("root = 1")) == ["modules: spear.paths"]
    assert change(lambda: (package / "paths.txt").write_text("a template")) == ["modules: spear.paths"]
    assert change(lambda: (package / "published" / "sampling.py").write_text("")) == [
        "modules: spear.paths, spear.published.sampling"
    ]


def test_cells_parameters_versions_and_data_matter(
    project: Project, package: Path, change: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = package.parent / "data"
    assert change(lambda: _edit(project, lambda nb: nb.cells[2].update(source=f"{BODY}\n1 + 1"))) == ["cells: 1 new"]
    assert change(lambda: _edit(project, lambda nb: nb.cells.pop())) == [
        "cells: moved or removed",
        "modules: spear, spear.paths, spear.published, spear.published.sampling",
    ]
    assert change(lambda: project.set(0, count=4, text="cifar10")) == ["parameters: count, text"]
    assert change(lambda: (data / "cifar10.npz").write_text("named by a parameter")) == ["data: cifar10"]
    assert change(lambda: (data / "cifar10.npz").write_text("other")) == ["data: cifar10"]
    assert change(lambda: (data / "cifar10.npz").unlink()) == ["data: cifar10"]
    assert change(lambda: monkeypatch.setattr(ingredients, "version", lambda name: f"another {name}")) == [
        f"versions: {', '.join(sorted(ingredients.VERSIONS)[:4])} and {len(ingredients.VERSIONS) - 4} more"
    ]


def test_a_table_of_benchmarks_matters_where_it_is_named(project: Project, change: Callable[..., list[str]]) -> None:
    tables = project.folder / "benchmarks"
    tables.mkdir()
    (tables / "speed.csv").write_text("seconds\n1\n")
    assert change(lambda: (tables / "other.csv").write_text("seconds\n1\n")) == []
    _edit(project, lambda notebook: notebook.cells[2].update(source=f'{BODY}\n"speed.csv"'))
    before = json.loads(json.dumps(asdict(ingredients.of(project.load()[0]))))
    (tables / "speed.csv").write_text("seconds\n2\n")
    assert list(ingredients.of(project.load()[0]).changes(before)) == ["data: benchmarks/speed.csv"]


def test_so_does_the_table_of_another_figure(project: Project, change: Callable[..., list[str]]) -> None:
    table = project.folder / "figures" / "paper" / "other.csv"
    table.parent.mkdir(parents=True)
    table.write_text("share\n1\n")
    assert change(lambda: table.write_text("share\n0\n")) == []
    _edit(project, lambda notebook: notebook.cells[2].update(source=f'{BODY}\n"figures/paper/other.csv"'))
    assert change(lambda: table.write_text("share\n1\n")) == ["data: figures/paper/other.csv"]


def test_the_record_gives_back_what_was_recorded(project: Project, package: Path) -> None:
    project.add("04_tiny", writes={})
    (run,) = project.load()
    made_of = ingredients.of(run)
    assert isinstance(made_of, Ingredients)
    assert schedule.reasons(run) == ["never run"]
    schedule.publish(run, package, made_of, 1.0)
    assert schedule.reasons(run) == []
