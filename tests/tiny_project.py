"""A checkout with tiny notebooks, for the tests of figures."""

from pathlib import Path

import nbformat
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from spear.figures import schedule
from spear.figures.table import Run, load

PARAMETERS = """\
text = "a"
count = 3
rate = 0.5
names = ["x", "y"]
wait = False
fails = False
"""
BODY = """\
import os, pathlib, time
import PIL.Image
folder = pathlib.Path(os.environ["SPEAR_FIGURES"])
_ = (folder / f"{STEM}-plot.csv").write_text(f"{text} {os.environ['OMP_NUM_THREADS']} {os.getpid()}")
while wait:
    time.sleep(0.1)
assert not fails, "this one fails"
PIL.Image.new("L", (count, 1)).save(folder / f"{STEM}-plot.png")
"""


class Project:
    """A checkout with nothing but notebooks and their table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[dict] = []
        (folder / "notebooks").mkdir()

    def add(self, stem: str, *, parameters: str = PARAMETERS, kernel: str = "python3", **changes: object) -> None:
        """A notebook with one run of its own name; `changes` replace keys of its entry in the table."""
        cells = [new_markdown_cell(f"# {stem}"), new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        cells.append(new_code_cell(f"STEM = {stem!r}\n{BODY}"))
        metadata = {"kernelspec": {"name": kernel, "display_name": kernel, "language": "python"}}
        nbformat.write(new_notebook(cells=cells, metadata=metadata), self.notebook(stem))
        profiles = {"quick": {}, "paper": {}, "test": {}}
        writes = {f"{stem}-plot": "A picture."}
        entry = {"name": stem, "notebook": f"{stem}.ipynb", "profiles": profiles, "writes": writes}
        self.entries.append(entry | changes)
        self.write()

    def notebook(self, stem: str) -> Path:
        return self.folder / "notebooks" / f"{stem}.ipynb"

    def set(self, index: int, **parameters: object) -> None:
        """Values of the quick profile of one entry."""
        self.entries[index]["profiles"]["quick"] = parameters
        self.write()

    def write(self) -> None:
        self.table.write_text(yaml.safe_dump(self.entries))

    @property
    def table(self) -> Path:
        return self.folder / "notebooks" / "runs.yaml"

    def load(self) -> tuple[Run, ...]:
        return load(self.table, "quick")

    def execute(self, jobs: int = 2) -> dict[str, schedule.RunStatus]:
        """Execute the quick profile; the last outcome of each run."""
        outcomes: dict[str, schedule.RunStatus] = {}
        schedule.execute(self.load(), jobs=jobs, cell_timeout=300, report=lambda o: outcomes.update({o.run: o}))
        return outcomes

    def statuses(self) -> list[str]:
        return [outcome.status for outcome in self.execute().values()]

    def figure(self, name: str) -> Path:
        return self.folder / "figures" / name


def quick_profile(**values: object) -> dict:
    """Changes of an entry: values of its quick profile."""
    return {"profiles": {"quick": values, "paper": {}, "test": {}}}
