"""`spear figures`: the notebooks run as notebooks/runs.yaml says, tables and gallery written anew."""

import signal
import sys
from concurrent.futures import Executor
from typing import Annotated

import typer
from rich.table import Table

from spear import paths
from spear.cli.shared import console, executor_of
from spear.data import known
from spear.figures import gallery, markdown, schedule
from spear.figures.table import Run, load

CELL_TIMEOUTS = {"quick": 900, "paper": 6 * 3600}  # seconds, of the profiles that figures come from


def figures(
    profile: Annotated[str, typer.Option(help="quick (minutes, offline) or paper (hours, full size).")] = "quick",
    dataset: Annotated[str | None, typer.Option(help="Data set for every notebook that has one to choose.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of a run; may be given again.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Notebooks at a time; they share the cores.")] = 2,
    scheduler: Annotated[str | None, typer.Option(help="Address of a dask scheduler, whose workers run them.")] = None,
    force: Annotated[bool, typer.Option(help="Run also what has not changed.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Only show the runs: which are due, and why.")] = False,
    pages: Annotated[bool, typer.Option("--pages", help="Only write tables and gallery anew.")] = False,
) -> None:
    """Regenerate figures, tables and gallery: run the notebooks as notebooks/runs.yaml says, those that changed.

    Figures go to figures/, those of the profile paper to figures/paper/, those of a chosen data set, or of a run that
    the table repeats for several, to a folder named after both. A data set that is not there is left out. With a
    scheduler, one notebook runs in each thread of its workers, whose machines
    must share this folder.

    Exit status: 0 all figures are there, 1 a run failed, 2 the table or the call is wrong, 130 interrupted.
    """
    if profile not in CELL_TIMEOUTS:
        raise ValueError(f"unknown profile {profile!r}: use one of {', '.join(CELL_TIMEOUTS)}")
    if dataset is not None:
        from spear.data import catalog

        catalog.classes(dataset)  # says what is wrong with it
    table = load(paths.notebooks() / "runs.yaml", profile, dataset)
    chosen = _with_data(_chosen(table, only or []))
    if list_:
        _show_due(chosen)
        return
    with executor_of(scheduler) as executor, schedule.alone():
        outcomes = {} if pages else _execute(chosen, jobs, CELL_TIMEOUTS[profile], executor, force)
        _write_pages(table)
    failed = [outcome for outcome in outcomes.values() if outcome.status == "failed"]
    for outcome in failed:
        print(f"\n{outcome.run} failed: {outcome.detail}", file=sys.stderr)
    raise typer.Exit(1 if failed else 0)


def _chosen(table: tuple[Run, ...], names: list[str]) -> list[Run]:
    there = [*dict.fromkeys(run.name for run in table)]
    for name in names:
        if name not in there:
            raise ValueError(f"unknown run {name!r}: use one of {', '.join(there)}")
    return [run for run in table if not names or run.name in names]


def _with_data(runs: list[Run]) -> list[Run]:
    """Those of the runs whose data set is at hand; says which are not."""
    absent = [run for run in runs if run.dataset and not known.available(run.dataset)]
    for run in absent:
        message = f"{run.label}: left out, the data set is not there: spear data fetch {run.dataset}"
        console.print(message, highlight=False)
    return [run for run in runs if run not in absent]


def _execute(
    chosen: list[Run], jobs: int, cell_timeout: int, executor: Executor | None, force: bool
) -> dict[str, schedule.RunStatus]:
    """Execute runs and show how they come along; SIGTERM ends them as Ctrl-C does."""
    outcomes: dict[str, schedule.RunStatus] = {}

    def report(outcome: schedule.RunStatus) -> None:
        outcomes[outcome.run] = outcome
        console.print(f"{outcome.run}: {outcome.status}", highlight=False)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = {"jobs": jobs, "cell_timeout": cell_timeout, "executor": executor, "force": force}
    try:
        schedule.execute(chosen, **options, report=report)
    finally:
        _show_statuses([outcomes[run.label] for run in chosen if run.label in outcomes])
    return outcomes


def _write_pages(table: tuple[Run, ...]) -> None:
    """Write the tables of both README pages and the gallery beside the figures of these runs anew."""
    folder, page = paths.figures() / table[0].variant, paths.root() / "README.md"
    beside = folder / "README.md"
    before = beside.read_text() if beside.is_file() else gallery.EMPTY_PAGE
    contents = {beside: gallery.render(table, folder, before)}
    if page.is_file():
        contents[page] = page.read_text()
    paths.write({path: markdown.render(text, paths.root()).encode() for path, text in contents.items()})


def _show_due(runs: list[Run]) -> None:
    """Show which runs are due, and why."""
    table = Table("run", "status", "why", "writes")
    for run in runs:
        why = schedule.reasons(run)
        table.add_row(run.label, "due" if why else "unchanged", "\n".join(why), "\n".join(run.captions))
    console.print(table)


def _show_statuses(statuses: list[schedule.RunStatus]) -> None:
    """Show what became of the runs."""
    table = Table("run", "status", "seconds")
    for status in statuses:
        table.add_row(status.run, status.status, f"{status.seconds:.1f}")
    console.print(table)
