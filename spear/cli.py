"""The command line, `spear` or `python -m spear`.

Every mistake of the user is one line on stderr that names the cause, and exit status 2.
"""

import io
import signal
import sys
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from safetensors.torch import save

from spear import cluster, data, gallery, inversion, loading, paths, plots, readme, runner, runs
from spear.cli_audit import MiniBatch, Momentum, Rate, Samples, Steps, audit
from spear.federated import SharedUpdate

BAR = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("{task.fields[proposals]:,} proposals"),
    TimeElapsedColumn(),
)
CELL_TIMEOUTS = {"quick": 900, "paper": 6 * 3600}  # seconds, of the profiles that figures come from

app = typer.Typer(
    help="What a federated learning client's update gives away, exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console, stderr = Console(), Console(stderr=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line on `arguments` (the process's own by default); a user's mistake exits with status 2."""
    try:
        app(arguments)
    except (ValueError, OSError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    print(f"spear: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


@app.command()
def figures(
    profile: Annotated[str, typer.Option(help="quick (minutes, offline) or paper (hours, full size).")] = "quick",
    dataset: Annotated[str | None, typer.Option(help="Data set for every notebook that has one to choose.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of a run; may be given again.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Notebooks at a time; they share the cores.")] = 2,
    scheduler: Annotated[str | None, typer.Option(help="Address of a dask scheduler, whose workers run them.")] = None,
    force: Annotated[bool, typer.Option(help="Run also what has not changed.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Only show the runs, and which of them are due.")] = False,
    pages: Annotated[bool, typer.Option("--pages", help="Only write README tables and gallery anew.")] = False,
) -> None:
    """Regenerate figures, README tables and gallery: run the notebooks as notebooks/runs.yaml says, those that changed.

    Figures go to figures/, those of the profile paper to figures/paper/, those of a chosen data set to a folder named
    after both, which git ignores. With a scheduler, one notebook runs in each thread of its workers, whose machines
    must share this folder.

    Exit status: 0 all figures are there, 1 a run failed, 2 the table or the call is wrong, 130 interrupted.
    """
    if profile not in CELL_TIMEOUTS:
        raise ValueError(f"unknown profile {profile!r}: use one of {', '.join(CELL_TIMEOUTS)}")
    if dataset is not None:
        data.classes(dataset)  # says what is wrong with it
    table = runs.load(paths.notebooks() / "runs.yaml", profile, dataset)
    chosen = _chosen(table, only or [])
    if list_:
        _table("run", "writes", [(run.name, _due(run), " ".join(run.captions)) for run in chosen])
        return
    with _executor(scheduler) as executor:
        outcomes = {} if pages else _execute(chosen, jobs, CELL_TIMEOUTS[profile], executor, force)
    _write_pages(table)
    failed = [outcome for outcome in outcomes.values() if outcome.status == "failed"]
    for outcome in failed:
        print(f"\n{outcome.run} failed: {outcome.detail}", file=sys.stderr)
    raise typer.Exit(1 if failed else 0)


def _chosen(table: tuple[runs.Run, ...], names: list[str]) -> list[runs.Run]:
    known = [run.name for run in table]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown run {name!r}: use one of {', '.join(known)}")
    return [run for run in table if not names or run.name in names]


def _executor(scheduler: str | None) -> AbstractContextManager[Executor | None]:
    return nullcontext() if scheduler is None else cluster.connect(scheduler)


def _execute(
    chosen: list[runs.Run], jobs: int, cell_timeout: int, executor: Executor | None, force: bool
) -> dict[str, runner.Outcome]:
    """Execute runs and show how they come along; SIGTERM ends them as Ctrl-C does."""
    outcomes: dict[str, runner.Outcome] = {}

    def report(outcome: runner.Outcome) -> None:
        outcomes[outcome.run] = outcome
        console.print(f"{outcome.run}: {outcome.status}", highlight=False)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = {"jobs": jobs, "cell_timeout": cell_timeout, "executor": executor, "force": force}
    try:
        runner.execute(chosen, **options, report=report)
    finally:
        shown = [outcomes[run.name] for run in chosen if run.name in outcomes]
        _table("run", "seconds", [(o.run, o.status, f"{o.seconds:.1f}") for o in shown])
    return outcomes


def _write_pages(table: tuple[runs.Run, ...]) -> None:
    """Write README tables and the gallery beside the figures of these runs anew."""
    folder, page = paths.figures() / table[0].variant, paths.root() / "README.md"
    contents = {folder / "README.md": gallery.render(table, folder)}
    if page.is_file():
        contents[page] = readme.render(page.read_text(), paths.root())
    paths.write({path: text.encode() for path, text in contents.items()})


def _due(run: runs.Run) -> str:
    return "unchanged" if runner.is_current(run) else "due"


def _table(first: str, last: str, rows: list[tuple[str, str, str]]) -> None:
    table = Table(first, "status", last)
    for row in rows:
        table.add_row(*row)
    console.print(table)


@app.command()
def attack(
    model: Annotated[str, typer.Argument()],
    update: Annotated[Path, typer.Argument()],
    weights: Annotated[Path | None, typer.Option(help="The model's weights, safetensors.")] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(inversion.METHODS)}.")] = "auto",
    layer: Annotated[str | None, typer.Option(help="Linear layer to attack; default the first.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default: read off the gradient's rank.")] = None,
    learning_rate: Rate = None,
    local_steps: Steps = None,
    mini_batch: MiniBatch = None,
    momentum: Momentum = None,
    samples: Samples = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; default cpu.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a dask scheduler, whose workers sample.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the recovered samples here, safetensors.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the recovered images here, PNG.")] = None,
) -> None:
    """Recover the batch behind a client's update.

    MODEL is a TorchScript or torch.export file, or PACKAGE.MODULE:FACTORY, where calling FACTORY without arguments
    gives the torch module; the working directory is importable. UPDATE is a safetensors file of gradients by parameter
    name.

    Exit status: 0 nothing was recovered, 1 something was, 2 the attack could not run.
    """
    for path in (output, picture):
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: no such folder")
    told = {"learning_rate": learning_rate, "local_steps": local_steps, "mini_batch": mini_batch}
    shared = SharedUpdate.load(update).telling(**told, momentum=momentum, count=samples)
    module = loading.load(model, weights).module
    progress = Progress(*BAR, console=stderr, transient=True, disable=not stderr.is_terminal)
    with _executor(scheduler) as executor, progress as bar:
        task = bar.add_task("sampling", total=None, proposals=0)
        result = inversion.attack(
            module,
            shared,
            method=method,
            layer=layer,
            batch_size=batch_size,
            time_limit=time_limit,
            device=device,
            progress=lambda p: bar.update(task, completed=p.found, total=p.rank, proposals=p.proposals),
            executor=executor,
        )
    _print(result)
    if output is not None:
        paths.write({output: _serialized(result)})
    if picture is not None:
        _draw(result, picture)
    raise typer.Exit(1 if len(result.inputs) else 0)


def _print(result: inversion.Reconstruction) -> None:
    print(f"rank       {result.rank}")
    print(f"recovered  {len(result.inputs)}")
    print(f"certified  {int(result.certified.sum())}")
    print(f"reason     {result.reason}")


def _serialized(result: inversion.Reconstruction) -> bytes:
    tensors = {"inputs": result.inputs, "residuals": result.residuals, "certified": result.certified}
    if result.labels is not None:
        tensors["labels"] = result.labels
    words = {"rank": str(result.rank), "complete": str(result.complete), "reason": result.reason}
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, words)


def _draw(result: inversion.Reconstruction, picture: Path) -> None:
    if result.inputs.ndim != 4 or result.inputs.shape[1] not in (1, 3) or not len(result.inputs):
        print(f"spear: no picture: inputs of shape {tuple(result.inputs.shape)} are no images", file=sys.stderr)
        return
    content = io.BytesIO()
    plots.grid(result.inputs).savefig(content, format="png")
    paths.write({picture: content.getvalue()})


app.command()(audit)
data_app = typer.Typer(help="Data sets: which are here, download, sample packs.", no_args_is_help=True)
app.add_typer(data_app, name="data")
Root = Annotated[Path | None, typer.Option(help="Data root; default $SPEAR_DATA or data/.")]


@data_app.command("list")
def list_data(root: Root = None) -> None:
    """Show the data sets known by name, and whether they are here."""
    table = Table("data set", "here")
    for name in data.names():
        table.add_row(name, "yes" if data.available(name, root) else "no")
    console.print(table)


@data_app.command("fetch")
def fetch_data(name: str, root: Root = None) -> None:
    """Download a data set, checked by its digest; an interrupted download is resumed."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        place = data.fetch(name, root, lambda done, total: bar.update(task, completed=done, total=total or None))
    print(place)


@data_app.command("pack")
def pack_data(source: Path, name: str, root: Root = None) -> None:
    """Make the sample pack NAME of SOURCE, a folder with one sub-folder of pictures for each class."""
    print(data.pack(source, name, root))
