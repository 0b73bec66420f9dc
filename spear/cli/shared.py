"""What the commands share: the application, consoles, and options that say what a client disclosed of its training.

What is imported here and in the modules of the commands is imported by `spear --help` too: nothing that needs torch,
nor any other package that takes long. Each command imports what it works with when it is called.
"""

from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="What a federated learning client's update gives away, exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console, stderr = Console(), Console(stderr=True)
# What a client disclosed of its training, for updates that do not say it themselves.
Rate = Annotated[float | None, typer.Option(help="The update is a change of weights by SGD with this rate.")]
Steps = Annotated[int | None, typer.Option(help="Local steps behind the change of weights; default 1.")]
MiniBatch = Annotated[int | None, typer.Option(help="Samples of each local step.")]
Momentum = Annotated[float | None, typer.Option(help="Of the local SGD; default 0.")]
WeightDecay = Annotated[float | None, typer.Option(help="Of the client's SGD; default: read off the update.")]
Loss = Annotated[str | None, typer.Option(help="cross_entropy (the default), binary_cross_entropy or squared_error.")]
Control = Annotated[Path | None, typer.Option(help="What SCAFFOLD's client added, c - c_i, safetensors.")]
Samples = Annotated[
    int | None,
    typer.Option(
        help="How many samples the client says it used; unless this or the update says it, nothing is certified."
    ),
]
InputShape = Annotated[str | None, typer.Option(help="Of one sample, as in 3,32,32.")]
RunCode = Annotated[
    bool, typer.Option("--run-code", help="Code of the model may run: a factory's, or a TorchScript archive's.")
]


def printable(text: str) -> str:
    """Text that may quote a stranger's file, without the characters that a terminal obeys."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def shape_of(words: str | None) -> tuple[int, ...] | None:
    """The shape that `--input-shape` says. Raises `ValueError` for another form."""
    try:
        return None if words is None else tuple(int(size) for size in words.split(","))
    except ValueError as error:
        raise ValueError(f"--input-shape {words!r} is not of the form 3,32,32") from error


def executor_of(scheduler: str | None) -> AbstractContextManager[Executor | None]:
    """An executor that works by the dask scheduler at this address; without one, none: work is done here."""
    if scheduler is None:
        return nullcontext()
    from spear import executors

    return executors.connect(scheduler)
