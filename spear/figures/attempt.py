"""One run of a notebook by papermill, in a folder and a process of its own: here or on a worker of a cluster."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from spear.figures.notebook import Cell, code_cells
from spear.figures.table import Run

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
KERNEL_START = 120  # seconds
STOP = "stop"  # a file of this name in a run's folder calls the run off


def perform(run: Run, work: Path, data_root: Path, *, threads: int, cell_timeout: int) -> tuple[Path, str]:
    """Execute a run in a new folder under `work`; once more, in a further one, if its kernel did not start.

    `threads` are BLAS threads, `cell_timeout` is in seconds. Returns the last folder, with the executed notebook and
    `figures` in it, and what went wrong, in words. The file `STOP` in `work` ends the process. Where a worker that is
    killed leaves its process behind, that writes on into a folder of its own, which nobody reads.

    Raises `FileNotFoundError` where `work` or the notebook are not seen from here.
    """
    for path in (work, run.notebook):
        if not path.exists():
            where = socket.gethostname()
            raise FileNotFoundError(f"{path} is not seen from {where}: all workers need the same file system")
    attempt = _Attempt(run, _new_folder(work))
    attempt.execute(work / STOP, data_root, threads, cell_timeout)
    if attempt.failed_to_start():
        attempt = _Attempt(run, _new_folder(work))
        attempt.execute(work / STOP, data_root, threads, cell_timeout)
    return attempt.folder, attempt.failure() if attempt.status else attempt.wrong_figures()


def _new_folder(work: Path) -> Path:
    """The first of the folders 1, 2, ... that is not there yet, made."""
    number = 1
    while True:
        try:
            (work / str(number)).mkdir()
            return work / str(number)
        except FileExistsError:
            number += 1


class _Attempt:
    """One papermill process: `status` is its exit status."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.executed = folder / run.notebook.name
        self.figures = folder / "figures"
        self.status = 0

    def execute(self, stop: Path, data_root: Path, threads: int, cell_timeout: int) -> None:
        """Run papermill to its end, or until `stop` exists; the kernel it starts ends with it."""
        self.figures.mkdir()
        values = self.folder / "parameters.yaml"
        values.write_text(yaml.safe_dump(dict(self.run.parameters)))
        command = [sys.executable, "-m", "papermill", self.run.notebook, self.executed, "-f", values]
        command += ["--cwd", self.run.notebook.parent, "--no-progress-bar", "--start-timeout", KERNEL_START]
        command += ["--execution-timeout", cell_timeout]
        environment = os.environ | dict.fromkeys(THREADS, str(threads))
        environment |= {"SPEAR_FIGURES": str(self.figures), "SPEAR_DATA": str(data_root)}
        with open(self.folder / "papermill.log", "w") as log:
            process = subprocess.Popen([*map(str, command)], env=environment, stdout=log, stderr=log)
            self.status = _wait(process, stop)

    def failed_to_start(self) -> bool:
        """Whether papermill ended before any cell began, though nobody called it off."""
        return self.status > 0 and not list(self.begun_cells())

    def begun_cells(self) -> Iterator[Cell]:
        """Code cells of the executed notebook that papermill has begun."""
        if self.executed.is_file():
            for cell in code_cells(self.executed):
                if cell.metadata.get("papermill", {}).get("start_time"):
                    yield cell

    def failure(self) -> str:
        """Source and error of the cell that failed; the end of papermill's log where no cell tells."""
        begun = list(self.begun_cells())
        error = next((out for cell in begun[-1:] for out in cell.outputs if out["output_type"] == "error"), None)
        if error is not None:
            message = "\n".join(error["traceback"])
        else:
            message = "\n".join((self.folder / "papermill.log").read_text().splitlines()[-5:])
        source = begun[-1].source if begun else "no cell was begun"
        return f"{self.run.notebook.name}:\n{source}\n\n{_plain(message)}"

    def wrong_figures(self) -> str:
        """What the notebook wrote otherwise than the table declares, in words."""
        written, declared = {path.name for path in self.figures.iterdir()}, set(self.run.files)
        missing = [f"runs.yaml declares {name}, which was not written" for name in sorted(declared - written)]
        extra = [f"runs.yaml does not declare {name}, which was written" for name in sorted(written - declared)]
        return "\n".join(missing + extra)


def _wait(process: subprocess.Popen, stop: Path) -> int:
    """The exit status, negative where the process was ended because `stop` exists, or by anything else."""
    try:
        while not stop.exists():
            try:
                return process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            end(process)
    return -1


def end(process: subprocess.Popen) -> None:
    """End a process: asked first, then made to."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
