"""What the commands share: the application, its consoles, what a client disclosed of its training."""

from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated

import typer
from rich.console import Console

from spear import executors

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
Samples = Annotated[int | None, typer.Option(help="How many samples the client says it used.")]


def executor_of(scheduler: str | None) -> AbstractContextManager[Executor | None]:
    return nullcontext() if scheduler is None else executors.connect(scheduler)
