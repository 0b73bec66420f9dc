"""What starts at once: packages that take long to import stay out until something needs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from spear.figures import ingredients, schedule
from spear.figures.table import load

HEAVY = (
    "torch",
    "torchvision",
    "torchmetrics",
    "scipy.stats",
    "scipy.optimize",
    "skimage.metrics",
    "sklearn",
    "pandas",
    "matplotlib",
    "nbformat",
    "papermill",
    "distributed",
)
COMMAND = "from spear.cli.app import main\ntry: main({arguments})\nexcept SystemExit as end: assert not end.code, end"
TOUCHED = "spear.attack, spear.data.load, spear.federated.gradient, spear.models.fcnn, spear.metrics.evaluate"


def heavy_modules(script: str, folder: Path) -> list[str]:
    """Those of `HEAVY` that a new interpreter has imported once it has run the script in `folder`."""
    ask = f"import json, sys\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    command, environment = [sys.executable, "-c", f"{script}\n{ask}"], os.environ | {"SPEAR_DATA": str(folder)}
    environment.pop("SPEAR_FIGURES", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of one notebook, whose run is recorded as done."""
    cell = {"cell_type": "code", "source": "seed = 0", "metadata": {"tags": ["parameters"]}, "outputs": []}
    profiles = {"quick": {}, "paper": {}, "test": {}}
    entry = {"name": "tiny", "notebook": "00_tiny.ipynb", "profiles": profiles, "writes": {}}
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_tiny.ipynb").write_text(json.dumps({"cells": [cell]}))
    (tmp_path / "notebooks" / "runs.yaml").write_text(yaml.safe_dump([entry]))
    (tmp_path / "README.md").write_text("<!-- table a.csv -->\n<!-- end -->\n")
    (tmp_path / "a.csv").write_text("batch,seconds\n1,0.5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPEAR_DATA", str(tmp_path))
    monkeypatch.delenv("SPEAR_FIGURES", raising=False)
    (run,) = load(tmp_path / "notebooks" / "runs.yaml", "quick")
    schedule.publish(run, tmp_path, ingredients.of(run), 1.0)
    return tmp_path


@pytest.mark.parametrize("arguments", [["--help"], ["data", "list"], ["data", "--help"], ["attack", "--help"]])
def test_help_and_lists_need_no_heavy_package(arguments: list[str], tmp_path: Path) -> None:
    assert heavy_modules(COMMAND.format(arguments=arguments), tmp_path) == []


@pytest.mark.parametrize("arguments", [["figures"], ["figures", "--list"], ["figures", "--pages"]])
def test_figures_with_nothing_due_need_no_heavy_package(arguments: list[str], project: Path) -> None:
    assert heavy_modules(COMMAND.format(arguments=arguments), project) == []
    assert not (project / "build" / "runs" / "quick" / "tiny").exists()  # no run was begun
    assert "| 1 | 0.5 |" in (project / "README.md").read_text() or arguments == ["figures", "--list"]


@pytest.mark.parametrize(
    ("script", "imported"),
    [
        ("import spear", []),
        ("import spear; spear.data.names()", []),
        (f"import spear; {TOUCHED}", ["torch"]),
    ],
)
def test_the_package_imports_no_more_than_torch(script: str, imported: list[str], tmp_path: Path) -> None:
    assert heavy_modules(script, tmp_path) == imported
