"""Copy the notebooks with the small parameters of the profile `test`, for nbval to run cell by cell.

usage: python tests/prepare_notebooks.py FOLDER
"""

import shutil
import sys
from pathlib import Path

from papermill import execute_notebook

from spear import paths
from spear.figures import table


def prepare(folder: Path) -> None:
    """Write one notebook for each run into `folder`, emptied before; nothing is executed."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "figures").mkdir(parents=True)
    for run in table.load(paths.notebooks() / "runs.yaml", "test"):
        copy = folder / f"{run.name}.ipynb"
        execute_notebook(run.notebook, copy, dict(run.parameters), prepare_only=True, progress_bar=False)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
