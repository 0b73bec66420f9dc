"""Runs executed, on tiny notebooks: what is due, side by side, figures all or none."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny_project import Project, quick_profile

from spear import paths
from spear.figures import gallery, ingredients, schedule
from spear.figures.table import load


def test_only_what_changed_is_run_again(project: Project) -> None:
    project.add("00_tiny")
    project.add("01_tiny", **quick_profile(text="b"))
    assert project.statuses() == ["done", "done"]
    threads = max(1, (os.cpu_count() or 1) // 2)
    assert project.figure("01_tiny-plot.csv").read_text().startswith(f"b {threads} ")
    assert project.statuses() == ["unchanged", "unchanged"]

    project.set(1, text="c")
    assert project.statuses() == ["unchanged", "done"]
    assert project.figure("01_tiny-plot.csv").read_text().startswith("c ")

    project.figure("00_tiny-plot.csv").write_text("edited by hand")
    assert [schedule.is_current(run) for run in project.load()] == [False, True]


def test_a_run_that_is_due_says_why(project: Project, tmp_path: Path) -> None:
    project.add("00_tiny")
    (run,) = project.load()
    assert schedule.reasons(run) == ["never run"]
    for name in run.files:
        Image.new("L", (2, 2)).save(tmp_path / name, "png")
    schedule.publish(run, tmp_path, ingredients.of(run), 1.0)
    assert schedule.reasons(run) == []
    project.figure(run.files[0]).write_text("edited by hand")
    project.figure(run.files[1]).unlink()
    why = ["00_tiny-plot.csv is not as it was written", "00_tiny-plot.png is missing"]
    assert schedule.reasons(run) == why
    project.set(0, count=4)
    assert schedule.reasons(project.load()[0]) == ["parameters: count", *why]
    project.entries[0]["writes"] = {}
    project.write()
    gone = [f"{name} is no longer declared" for name in run.files]
    assert schedule.reasons(project.load()[0]) == ["parameters: count", *gone]
    (tmp_path / "build" / "runs" / "quick" / "00_tiny.json").write_text('{"fingerprint": "of an older version"}')
    assert schedule.reasons(run) == ["never run"]


def test_what_a_full_size_run_was_made_of_travels_with_its_figures(project: Project, tmp_path: Path) -> None:
    project.add("00_tiny")
    runs = [project.load()[0], load(project.table, "paper")[0]]
    for run in runs:
        for name in run.files:
            Image.new("L", (2, 2)).save(tmp_path / name, "png")
        schedule.publish(run, tmp_path, ingredients.of(run), 1.0)
    shutil.rmtree(project.folder / "build")
    assert [schedule.reasons(run) for run in runs] == [["never run"], []]


def test_a_failure_shows_its_cell_and_leaves_the_rest_alone(project: Project) -> None:
    project.add("00_tiny", **quick_profile(fails=True))
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
    project.add("01_tiny", **quick_profile(wait=True))
    half = project.folder / "build" / "runs" / "quick" / "01_tiny" / "1" / "figures" / "01_tiny-plot.csv"
    command = [sys.executable, "-m", "spear", "figures", "--jobs", "1"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=heard, **pipes) as process:
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
    project.add("00_tiny", parameters=given, **quick_profile(rate=2))
    (run,) = load(project.table, "quick", "digits")
    drawn, place = project.folder / "drawn", project.figure("quick/digits/00_tiny-plot.png")
    drawn.mkdir()

    def published(day: int, shade: int, number: int) -> gallery.Origin | None:
        Image.new("L", (2, 2), shade).save(drawn / "00_tiny-plot.png")
        (drawn / "00_tiny-plot.csv").write_text(str(number))
        monkeypatch.setattr(schedule, "date", SimpleNamespace(today=lambda: date(2026, 1, day)))
        schedule.publish(run, drawn, ingredients.of(run), 1.0)
        assert (project.folder / "build" / "runs" / "quick" / "digits" / "00_tiny.json").is_file()
        return gallery.origin(place)

    first = published(1, 9, 9)
    values = {"dataset": "digits", "others": ["digits", "mnist"], "sizes": {"b": [1, 2]}, "rate": 2}
    assert first == gallery.Origin("quick", values, ["digits"], "2026-01-01")
    assert published(2, 9, 9) == first
    assert published(3, 8, 9).date == "2026-01-03"
    assert published(4, 8, 8).date == "2026-01-04"
    (project.folder / "mnist.npz").touch()
    assert published(5, 8, 8).data == ["digits", "mnist"]
