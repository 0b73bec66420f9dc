"""Execute the runs of `notebooks/runs.yaml`: what changed, side by side, figures all or none.

A run works in a folder of its own under `build/runs`, its figures included (`spear.figures.attempt`), by an executor:
threads of this process, or a cluster. When the notebook has succeeded and has written what it declares, this process
takes the figures to their folder, each by one rename, and then, last, records what the run was made of. An interruption
or a lost worker leaves no half-written figure, nothing is published twice, and the next call redoes only what is not
recorded.
"""

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Literal

from spear import paths
from spear.data import known
from spear.figures import attempt, gallery, ingredients
from spear.figures.ingredients import Ingredients, digest
from spear.figures.table import Run, parameters


@dataclass(frozen=True)
class RunStatus:
    """What became of a run: `seconds` is its wall time, `detail` the failing cell and its error."""

    run: str
    status: Literal["running", "running again", "done", "unchanged", "failed", "interrupted"]
    seconds: float = 0.0
    detail: str = ""


def execute(
    runs: Sequence[Run],
    *,
    jobs: int,
    cell_timeout: int,
    executor: Executor | None = None,
    force: bool = False,
    report: Callable[[RunStatus], None],
) -> None:
    """Execute runs: `jobs` at a time, each with its share of the cores as BLAS threads, or all by `executor`, with one.

    A run whose record and figures are current is skipped unless `force`. `cell_timeout` is in seconds. `report` is
    called when a run starts and when it ends; one that fails does not stop the others. An exception, Ctrl-C among
    them, ends the processes first.
    """
    due = [run for run in runs if force or not is_current(run)]
    for run in runs:
        if run not in due:
            report(RunStatus(run.label, "unchanged"))
    threads = 1 if executor else max(1, (os.cpu_count() or 1) // max(1, min(jobs, len(due))))
    own = None if executor else ThreadPoolExecutor(jobs)
    active: list[_Job] = []
    try:
        active += [_Job(run, executor or own, threads, cell_timeout) for run in due]
        while active:
            for job in list(active):
                for outcome in job.news():
                    report(outcome)
                if job.future.done():
                    active.remove(job)
                    report(job.finish())
            time.sleep(0.05)
    finally:
        _call_off(active)
        for job in active:
            if job.began:
                report(RunStatus(job.run.label, "interrupted", time.monotonic() - job.began))
        if own:
            own.shutdown()


@contextmanager
def alone() -> Iterator[None]:
    """Hold this checkout's runs for one process; the lock ends with the process, however that ends.

    Raises `ValueError`, naming who holds them, where another process does.
    """
    path = paths.root() / "build" / "runs" / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(f"{holder} runs the notebooks of {paths.root()}: wait for it, or end it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def is_current(run: Run) -> bool:
    """Whether the run finished with what it is made of now, and its figures are still as it wrote them."""
    return not reasons(run)


def reasons(run: Run) -> list[str]:
    """Why the run is due, in words: it never ended, or what it is made of, or a figure, has changed. Empty: not due."""
    try:
        record = json.loads(run.record.read_text())
        made_of, figures = record["made of"], record["figures"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return ["never run"]
    return [*ingredients.of(run).changes(made_of), *_altered(run, figures)]


def _altered(run: Run, recorded: Mapping[str, str]) -> Iterator[str]:
    """What has become of a run's figures since it wrote them."""
    for name in run.files:
        path = run.folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif digest(path.read_bytes()) != recorded.get(name):
            yield f"{name} is not as it was written"
    yield from (f"{name} is no longer declared" for name in recorded if name not in run.files)


def publish(run: Run, folder: Path, made_of: Ingredients, seconds: float) -> None:
    """Take the figures of a run from `folder` to where they belong, stamped with their origin; record the run."""
    contents = {name: (folder / name).read_bytes() for name in run.files}
    for stem in run.captions:
        contents[f"{stem}.png"] = _stamped(run, stem, contents)
    paths.write({run.folder / name: content for name, content in contents.items()})
    figures = {name: digest(content) for name, content in contents.items()}
    record = {"seconds": round(seconds, 1), "made of": asdict(made_of), "figures": figures}
    paths.write({run.record: f"{json.dumps(record, indent=1)}\n".encode()})


def _stamped(run: Run, stem: str, contents: Mapping[str, bytes]) -> bytes:
    """The picture with its origin inside, of today; of its day where it is published already, with its numbers."""
    values = parameters(run.notebook) | dict(run.parameters)
    origin = gallery.Origin(run.profile, values, _data_sets(run, values), date.today().isoformat())
    numbers, picture = (run.folder / f"{stem}{suffix}" for suffix in (".csv", ".png"))
    if picture.is_file() and numbers.is_file() and numbers.read_bytes() == contents[numbers.name]:
        before = gallery.origin(picture)
        same = before and gallery.stamped(contents[picture.name], replace(origin, date=before.date))
        if same == picture.read_bytes():
            return same
    return gallery.stamped(contents[picture.name], origin)


def _data_sets(run: Run, values: Mapping[str, object]) -> list[str]:
    """The data sets that are named among a notebook's parameters and are at hand."""
    named = [name for value in values.values() for name in (value if isinstance(value, list) else [value])]
    words = dict.fromkeys(name for name in named if isinstance(name, str))
    names = (*known.names(), run.dataset)
    return [name for name in words if name in names and known.available(name)]


class _Job:
    """A run that an executor was given, and what is seen of it in its folder."""

    def __init__(self, run: Run, executor: Executor, threads: int, cell_timeout: int) -> None:
        self.run, self.made_of = run, ingredients.of(run)
        self.work = run.work
        self.began, self.attempts = 0.0, 0
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        options = {"threads": threads, "cell_timeout": cell_timeout}
        self.future = executor.submit(attempt.perform, run, self.work, paths.data_root(), **options)

    def news(self) -> Iterator[RunStatus]:
        """What to report of attempts that have begun since the last call."""
        attempts = len([*self.work.iterdir()])
        if attempts > self.attempts:
            self.began = self.began or time.monotonic()
            yield RunStatus(self.run.label, "running" if not self.attempts else "running again")
        self.attempts = attempts

    def finish(self) -> RunStatus:
        """Publish the figures of a run that succeeded; say why one failed."""
        try:
            folder, problem = self.future.result()
        except Exception as error:  # whatever became of a cluster's worker
            folder, problem = self.work, f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - (self.began or time.monotonic())
        if problem:
            return RunStatus(self.run.label, "failed", seconds, problem)
        publish(self.run, folder / "figures", self.made_of, seconds)
        return RunStatus(self.run.label, "done", seconds)


def _call_off(jobs: Sequence[_Job]) -> None:
    for job in jobs:
        (job.work / attempt.STOP).touch()
    wait([job.future for job in jobs if not job.future.cancel()])
