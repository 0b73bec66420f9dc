"""Execute the runs of `notebooks/runs.yaml` by papermill: what changed, in separate processes, figures all or none.

A run works in `build/runs/NAME`, its figures included; when the notebook has succeeded and has written what it
declares, they go to the figures folder, each by one rename. Then, last, `build/runs/NAME.json` records what the run was
made of: an interruption at any point leaves no half-written figure, and the next call redoes only what is not recorded.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import nbformat
import yaml

from spear import data, gallery, paths
from spear.runs import Run, parameters

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
VERSIONS = ("torch", "torchvision", "numpy", "scipy", "matplotlib")
NOT_HASHED = ("__main__.py", "cli.py", "gallery.py", "readme.py", "runs.py", "runner.py")  # no notebook imports them
KERNEL_START = 120  # seconds


@dataclass(frozen=True)
class Outcome:
    """What became of a run: `seconds` is its wall time, `detail` the failing cell and its error."""

    run: str
    status: Literal["running", "kernel did not start, again", "done", "unchanged", "failed", "interrupted"]
    seconds: float = 0.0
    detail: str = ""


def execute(
    runs: Sequence[Run], *, jobs: int, cell_timeout: int, force: bool = False, report: Callable[[Outcome], None]
) -> None:
    """Execute runs, at most `jobs` processes at a time, each with its share of the cores as BLAS threads.

    A run whose record and figures are current is skipped unless `force`. `cell_timeout` is in seconds. `report` is
    called when a run starts and when it ends; one that fails does not stop the others. An exception, Ctrl-C among
    them, ends the processes first.
    """
    waiting, active = deque(runs), []
    threads = max(1, (os.cpu_count() or 1) // max(1, min(jobs, len(runs))))
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.popleft()
                if not force and is_current(run):
                    report(Outcome(run.name, "unchanged"))
                else:
                    active.append(_Job(run, threads, cell_timeout))
                    report(Outcome(run.name, "running"))
            for job in [job for job in active if job.process.poll() is not None]:
                if job.may_retry():
                    job.start()
                    report(Outcome(job.run.name, "kernel did not start, again"))
                else:
                    active.remove(job)
                    report(job.finish())
            time.sleep(0.05)
    finally:
        _end([job.process for job in active])
        for job in active:
            report(Outcome(job.run.name, "interrupted", time.monotonic() - job.began))


def is_current(run: Run) -> bool:
    """Whether the run finished with what its fingerprint is made of now, and its figures are still as it wrote them."""
    try:
        record = json.loads(_record(run).read_text())
        figures = {name: _digest((paths.figures() / name).read_bytes()) for name in run.files}
    except (FileNotFoundError, ValueError):
        return False
    return record == {"fingerprint": fingerprint(run), "figures": figures}


def fingerprint(run: Run) -> str:
    """Hash of everything a run depends on: cells without outputs, parameters, the package, versions, data present."""
    cells = nbformat.read(run.notebook, as_version=4).cells
    modules = [p for p in sorted(Path(__file__).parent.glob("*.py")) if p.name not in NOT_HASHED]
    parts = {
        "cells": [cell.source for cell in cells if cell.cell_type == "code"],
        "parameters": run.parameters,
        "modules": {path.name: _digest(path.read_bytes()) for path in modules},
        "versions": [sys.version_info[:2], *map(version, VERSIONS)],
        "data": [name for name in data.names() if data.available(name)],
    }
    return _digest(json.dumps(parts, sort_keys=True).encode())


def data_sets(values: Mapping[str, object]) -> list[str]:
    """The data sets that are named among a notebook's parameters and are at hand."""
    named = [name for value in values.values() for name in (value if isinstance(value, list) else [value])]
    return [name for name in dict.fromkeys(named) if name in data.names() and data.available(name)]


class _Job:
    """A run in progress: one papermill process at a time, at most two in all."""

    def __init__(self, run: Run, threads: int, cell_timeout: int) -> None:
        self.run, self.threads, self.cell_timeout = run, threads, cell_timeout
        self.fingerprint = fingerprint(run)
        self.began, self.attempts = time.monotonic(), 0
        self.folder = _record(run).with_suffix("")
        self.executed = self.folder / run.notebook.name
        self.figures = self.folder / "figures"
        self.start()

    def start(self) -> None:
        """Start papermill in an empty folder; the kernel it starts ends with it."""
        self.attempts += 1
        shutil.rmtree(self.folder, ignore_errors=True)
        self.figures.mkdir(parents=True)
        values = self.folder / "parameters.yaml"
        values.write_text(yaml.safe_dump(dict(self.run.parameters)))
        command = [sys.executable, "-m", "papermill", self.run.notebook, self.executed, "-f", values]
        command += ["--cwd", self.run.notebook.parent, "--no-progress-bar", "--start-timeout", KERNEL_START]
        command += ["--execution-timeout", self.cell_timeout]
        environment = os.environ | dict.fromkeys(THREADS, str(self.threads)) | {"SPEAR_FIGURES": str(self.figures)}
        with open(self.folder / "papermill.log", "w") as log:
            self.process = subprocess.Popen([*map(str, command)], env=environment, stdout=log, stderr=log)

    def may_retry(self) -> bool:
        """Whether the process failed before any cell began, for the first time: the kernel did not start."""
        return self.process.returncode != 0 and self.attempts == 1 and not list(self.begun_cells())

    def begun_cells(self) -> Iterator[nbformat.NotebookNode]:
        """Code cells of the executed notebook that papermill has begun."""
        if self.executed.is_file():
            for cell in nbformat.read(self.executed, as_version=4).cells:
                if cell.cell_type == "code" and cell.metadata.get("papermill", {}).get("start_time"):
                    yield cell

    def finish(self) -> Outcome:
        """Publish the figures of a run that succeeded and record it; say why one failed."""
        problem = self.failure() if self.process.returncode else self.wrong_figures()
        seconds = time.monotonic() - self.began
        if problem:
            return Outcome(self.run.name, "failed", seconds, problem)
        contents = {name: (self.figures / name).read_bytes() for name in self.run.files}
        for stem in self.run.captions:
            contents[f"{stem}.png"] = self.stamped(stem, contents)
        paths.write({paths.figures() / name: content for name, content in contents.items()})
        figures = {name: _digest(content) for name, content in contents.items()}
        paths.write({_record(self.run): json.dumps({"fingerprint": self.fingerprint, "figures": figures}).encode()})
        return Outcome(self.run.name, "done", seconds)

    def stamped(self, stem: str, contents: Mapping[str, bytes]) -> bytes:
        """The picture with its origin inside, of today; of its day where it is published already, with its numbers."""
        values = parameters(self.run.notebook) | dict(self.run.parameters)
        origin = gallery.Origin(self.run.profile, values, data_sets(values), date.today().isoformat())
        numbers, picture = (paths.figures() / f"{stem}{suffix}" for suffix in (".csv", ".png"))
        if picture.is_file() and numbers.is_file() and numbers.read_bytes() == contents[numbers.name]:
            before = gallery.origin(picture)
            same = before and gallery.stamped(contents[picture.name], replace(origin, date=before.date))
            if same == picture.read_bytes():
                return same
        return gallery.stamped(contents[picture.name], origin)

    def wrong_figures(self) -> str:
        """What the notebook wrote otherwise than the table declares, in words."""
        written, declared = {path.name for path in self.figures.iterdir()}, set(self.run.files)
        missing = [f"runs.yaml declares {name}, which was not written" for name in sorted(declared - written)]
        extra = [f"runs.yaml does not declare {name}, which was written" for name in sorted(written - declared)]
        return "\n".join(missing + extra)

    def failure(self) -> str:
        """Source and error of the cell that failed; the end of papermill's log where no cell tells."""
        begun = list(self.begun_cells())
        error = next((out for cell in begun[-1:] for out in cell.outputs if out.output_type == "error"), None)
        if error is not None:
            message = "\n".join(error.traceback)
        else:
            message = "\n".join((self.folder / "papermill.log").read_text().splitlines()[-5:])
        source = begun[-1].source if begun else "no cell was begun"
        return f"{self.run.notebook.name}:\n{source}\n\n{_plain(message)}"


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()


def _record(run: Run) -> Path:
    return paths.root() / "build" / "runs" / f"{run.name}.json"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
