"""`spear data`: which data sets are here, downloads, sample packs."""

from pathlib import Path
from typing import Annotated

import typer

from spear.cli.shared import console, stderr
from spear.data import known

data_app = typer.Typer(help="Data sets: which are here, download, sample packs.", no_args_is_help=True)
Root = Annotated[Path | None, typer.Option(help="Data root; default $SPEAR_DATA or data/.")]


@data_app.command("list")
def list_data(root: Root = None) -> None:
    """Show the data sets known by name, and whether they are here."""
    from rich.table import Table

    table = Table("data set", "here")
    for name in known.names():
        table.add_row(name, "yes" if known.available(name, root) else "no")
    console.print(table)


@data_app.command("fetch")
def fetch_data(name: str, root: Root = None) -> None:
    """Download a data set, checked by its digest; an interrupted download is resumed."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from spear.data import catalog

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        place = catalog.fetch(name, root, lambda done, total: bar.update(task, completed=done, total=total or None))
    print(place)


@data_app.command("pack")
def pack_data(source: Path, name: str, root: Root = None) -> None:
    """Make the sample pack NAME of SOURCE, a folder with one sub-folder of pictures for each class."""
    from spear.data import catalog

    print(catalog.pack(source, name, root))
