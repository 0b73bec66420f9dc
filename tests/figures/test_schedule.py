"""The table of runs and its execution, on tiny notebooks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

from spear import paths
from spear.figures import gallery, schedule
from spear.figures.table import PROFILES, Run, load, parameters

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


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPEAR_FIGURES", raising=False)
    return Project(tmp_path)


# --- the table -------------------------------------------------------------------------------------------------------


def test_profiles_override_the_notebook(project: Project) -> None:
    project.add("00_tiny", profiles={"quick": {"count": 1}, "paper": {"text": "b", "names": []}, "test": {"rate": 2}})
    quick, paper, test = (load(project.table, profile)[0] for profile in PROFILES)
    assert (quick.parameters, paper.parameters, test.parameters) == (
        {"count": 1},
        {"text": "b", "names": []},
        {"rate": 2},
    )
    assert quick.files == ("00_tiny-plot.csv", "00_tiny-plot.png")
    assert quick.notebook == project.notebook("00_tiny")
    assert parameters(quick.notebook)["names"] == ["x", "y"]


def test_another_profile_or_data_set_has_folders_of_its_own(project: Project) -> None:
    project.add("00_tiny")
    project.add("01_tiny", parameters="dataset = 'photos'\ncount = 1")
    quick, paper = (load(project.table, profile) for profile in ("quick", "paper"))
    assert [run.variant for run in (*quick, *paper)] == ["", "", "paper", "paper"]
    (chosen,) = load(project.table, "quick", "digits")
    assert (chosen.name, chosen.parameters, chosen.variant) == ("01_tiny", {"dataset": "digits"}, "quick-digits")
    assert load(project.table, "paper", "digits")[0].variant == "paper-digits"
    assert schedule.fingerprint(chosen) != schedule.fingerprint(quick[1])


def test_no_notebook_with_a_data_set_to_choose_is_an_error(project: Project) -> None:
    project.add("00_tiny")
    with pytest.raises(ValueError, match="runs.yaml: no notebook has a parameter 'dataset'"):
        load(project.table, "quick", "digits")


def _quick(**values: object) -> dict:
    return {"profiles": {"quick": values, "paper": {}, "test": {}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"notebook": "09_none.ipynb"}, "run '00_tiny': unknown notebook '09_none.ipynb'"),
        (_quick(counts=3), "profile 'quick': 00_tiny.ipynb has no parameter 'counts'"),
        (_quick(rate="1e-3"), "rate is '1e-3', in 00_tiny.ipynb 0.5"),
        (_quick(count=True), "count is True, in 00_tiny.ipynb 3"),
        (_quick(text=None), "text is None, in 00_tiny.ipynb 'a'"),
        ({"timeout": 3}, "run '00_tiny': unknown key 'timeout'"),
        ({"profiles": {"quick": {}, "paper": {}, "test": {}, "slow": {}}}, "unknown profile 'slow'"),
        ({"profiles": {"quick": {}, "paper": {}}}, "profile 'test' is missing"),
        ({"profiles": {"quick": None, "paper": {}, "test": {}}}, "profile 'quick' is not a mapping"),
        ({"profiles": []}, "profiles is not a mapping"),
        ({"writes": ["00_tiny-plot"]}, "writes is not a mapping of figures to captions"),
        ({"writes": {"00_tiny-plot": " "}}, "figure '00_tiny-plot' has no caption"),
        ({"writes": {"00_tiny-plot": None}}, "figure '00_tiny-plot' has no caption"),
        ({"writes": {"plot": "A picture."}}, "figure 'plot' is not named '00_tiny-...' after its notebook"),
        ({"name": "../tiny"}, "run '../tiny': a name is made of letters"),
    ],
)
def test_a_wrong_entry_is_named(project: Project, changes: dict, message: str) -> None:
    project.add("00_tiny", **changes)
    with pytest.raises(ValueError, match="runs.yaml") as caught:
        project.load()
    assert message in str(caught.value)


def test_every_profile_is_checked_not_only_the_chosen(project: Project) -> None:
    project.add("00_tiny", profiles={"quick": {}, "paper": {"counts": 1}, "test": {}})
    with pytest.raises(ValueError, match="profile 'paper': 00_tiny.ipynb has no parameter 'counts'"):
        project.load()


def test_a_run_name_twice_is_an_error(project: Project) -> None:
    project.add("00_tiny")
    project.add("01_tiny", name="00_tiny")
    with pytest.raises(ValueError, match="run name '00_tiny' appears twice"):
        project.load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a list of runs"),
        ("name: x", "not a list of runs"),
        ("- 3", "3 is not a run"),
        ("- {name: x, notebook: x.ipynb, profiles: {}}", "run 'x': key 'writes' is missing"),
        ("- {name: x, name: y}", "a key is given twice"),
        ("- [", "while parsing"),
    ],
)
def test_a_file_that_is_no_table_is_named(project: Project, text: str, message: str) -> None:
    project.table.write_text(text)
    with pytest.raises(ValueError, match="runs.yaml") as caught:
        project.load()
    assert message in str(caught.value)


def test_no_table_and_no_profile(project: Project) -> None:
    with pytest.raises(FileNotFoundError, match="runs.yaml: no such file"):
        project.load()
    with pytest.raises(ValueError, match="unknown profile 'slow': use one of quick, paper, test"):
        load(project.table, "slow")


@pytest.mark.parametrize("line", ["count: int = 3", "count = 2 * n", "count, n = 1, 2", "import os", "count = len([])"])
def test_parameters_are_plain_assignments_of_literals(project: Project, line: str) -> None:
    project.add("00_tiny", parameters=line)
    with pytest.raises(ValueError, match="is not a plain assignment of a literal"):
        project.load()


# --- execution -------------------------------------------------------------------------------------------------------


def test_only_what_changed_is_run_again(project: Project) -> None:
    project.add("00_tiny")
    project.add("01_tiny", **_quick(text="b"))
    assert project.statuses() == ["done", "done"]
    threads = max(1, (os.cpu_count() or 1) // 2)
    assert project.figure("01_tiny-plot.csv").read_text().startswith(f"b {threads} ")
    assert project.statuses() == ["unchanged", "unchanged"]

    project.set(1, text="c")
    assert project.statuses() == ["unchanged", "done"]
    assert project.figure("01_tiny-plot.csv").read_text().startswith("c ")

    project.figure("00_tiny-plot.csv").write_text("edited by hand")
    assert [schedule.is_current(run) for run in project.load()] == [False, True]


def test_the_fingerprint_tells_what_matters(project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    project.add("00_tiny")
    run = project.load()[0]
    package = tmp_path / "package"
    (package / "cli").mkdir(parents=True)
    (package / "published").mkdir()
    (package / "cli" / "app.py").write_text("1")
    (package / "published" / "sampling.py").write_text("1")
    monkeypatch.setattr(schedule, "PACKAGE", package)
    first = schedule.fingerprint(run)

    def edited(change: Callable[[nbformat.NotebookNode], object]) -> str:
        notebook = nbformat.read(run.notebook, as_version=4)
        change(notebook)
        nbformat.write(notebook, run.notebook)
        return schedule.fingerprint(run)

    assert edited(lambda nb: nb.cells[0].update(source="# another title")) == first
    assert edited(lambda nb: nb.cells[2].update(outputs=[], execution_count=7)) == first
    (package / "cli" / "app.py").write_text("2")
    assert schedule.fingerprint(run) == first
    (package / "published" / "sampling.py").write_text("2")
    second = schedule.fingerprint(run)
    monkeypatch.setattr(schedule, "version", lambda name: "another")
    third = schedule.fingerprint(run)
    fourth = edited(lambda nb: nb.cells[2].update(source="1 + 1"))
    monkeypatch.setenv("SPEAR_DATA", str(tmp_path))
    (tmp_path / "mnist.npz").touch()
    fifth = schedule.fingerprint(run)
    assert len({first, second, third, fourth, fifth}) == 5


def test_a_failure_shows_its_cell_and_leaves_the_rest_alone(project: Project) -> None:
    project.add("00_tiny", **_quick(fails=True))
    project.add("01_tiny")
    failed, done = project.execute().values()
    assert (failed.status, done.status) == ("failed", "done")
    assert 'assert not fails, "this one fails"' in failed.detail.split("\n\n")[0]
    assert "AssertionError: this one fails" in failed.detail
    assert "\x1b" not in failed.detail
    assert sorted(path.name for path in paths.figures().iterdir()) == ["01_tiny-plot.csv", "01_tiny-plot.png"]
    assert [schedule.is_current(run) for run in project.load()] == [False, True]


def test_figures_other_than_declared_are_an_error(project: Project) -> None:
    project.add("00_tiny", writes={"00_tiny-other": "A picture."})
    outcome = project.execute()["00_tiny"]
    assert outcome.status == "failed"
    assert "runs.yaml declares 00_tiny-other.png, which was not written" in outcome.detail
    assert "runs.yaml does not declare 00_tiny-plot.csv, which was written" in outcome.detail
    assert not paths.figures().exists()


def test_a_kernel_that_does_not_start_is_tried_once_more(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = project.folder / "starts"
    script = (
        "import pathlib, runpy, sys; log = pathlib.Path(sys.argv.pop(1)); "
        "count = int(log.read_text()) if log.exists() else 0; log.write_text(str(count + 1)); "
        "sys.exit(3) if count < int(sys.argv.pop(1)) else runpy.run_module('ipykernel_launcher', run_name='__main__')"
    )
    for kernel, failures in (("flaky", 1), ("dead", 9)):
        folder = project.folder / "jupyter" / "kernels" / kernel
        folder.mkdir(parents=True)
        log = str(starts.with_suffix(f".{kernel}"))
        argv = [sys.executable, "-c", script, log, str(failures), "-f", "{connection_file}"]
        (folder / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": kernel, "language": "python"}))
        project.add(f"00_{kernel}", kernel=kernel)
    monkeypatch.setenv("JUPYTER_PATH", str(project.folder / "jupyter"))
    flaky, dead = project.execute().values()
    assert (flaky.status, dead.status) == ("done", "failed")
    assert "no cell was begun" in dead.detail
    assert [starts.with_suffix(suffix).read_text() for suffix in (".flaky", ".dead")] == ["2", "2"]


def test_ctrl_c_keeps_what_is_finished_and_nothing_else(project: Project) -> None:
    project.add("00_tiny")
    project.add("01_tiny", **_quick(wait=True))
    half = project.folder / "build" / "runs" / "quick" / "01_tiny" / "1" / "figures" / "01_tiny-plot.csv"
    command = [sys.executable, "-m", "spear", "figures", "--jobs", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            _until(lambda: half.is_file() and half.read_text().count(" ") == 2)
        finally:
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=300)
    kernel = int(half.read_text().split()[-1])
    assert process.returncode == 130
    assert "interrupted" in output
    assert errors == ""
    assert sorted(path.name for path in paths.figures().iterdir()) == ["00_tiny-plot.csv", "00_tiny-plot.png"]
    _until(lambda: not _alive(kernel))
    project.set(1)
    assert project.statuses() == ["unchanged", "done"]


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interruption_while_publishing_leaves_no_half_figure(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.add("00_tiny")
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        project.execute()
    assert list(paths.figures().iterdir()) == []
    monkeypatch.undo()
    monkeypatch.chdir(project.folder)
    assert project.statuses() == ["done"]


def test_a_figure_says_what_it_was_drawn_with_and_keeps_its_day_while_it_stays_the_same(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEAR_DATA", str(project.folder))
    given = "dataset = 'photos'\nothers = ['digits', 'mnist']\nsizes = {'b': [1, 2]}\nrate = 0.5"
    project.add("00_tiny", parameters=given, **_quick(rate=2))
    (run,) = load(project.table, "quick", "digits")
    drawn, place = project.folder / "drawn", project.figure("quick-digits/00_tiny-plot.png")
    drawn.mkdir()

    def published(day: int, shade: int, number: int) -> gallery.Origin | None:
        Image.new("L", (2, 2), shade).save(drawn / "00_tiny-plot.png")
        (drawn / "00_tiny-plot.csv").write_text(str(number))
        monkeypatch.setattr(schedule, "date", SimpleNamespace(today=lambda: date(2026, 1, day)))
        schedule.publish(run, drawn, "made of")
        assert (project.folder / "build" / "runs" / "quick-digits" / "00_tiny.json").is_file()
        return gallery.origin(place)

    first = published(1, 9, 9)
    values = {"dataset": "digits", "others": ["digits", "mnist"], "sizes": {"b": [1, 2]}, "rate": 2}
    assert first == gallery.Origin("quick", values, ["digits"], "2026-01-01")
    assert published(2, 9, 9) == first
    assert published(3, 8, 9).date == "2026-01-03"
    assert published(4, 8, 8).date == "2026-01-04"
    (project.folder / "mnist.npz").touch()
    assert published(5, 8, 8).data == ["digits", "mnist"]
