"""`spear attack`: the batch behind an update, as words, a file and a picture."""

import io
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save

from spear import inversion, paths, plots, reconstruction
from spear.cli.shared import MiniBatch, Momentum, Rate, Samples, Steps, executor_of, stderr
from spear.federated.update import SharedUpdate
from spear.models import files

BAR = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("{task.fields[proposals]:,} proposals"),
    TimeElapsedColumn(),
)


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
    shared = SharedUpdate.load(update).disclosing(**told, momentum=momentum, count=samples)
    module = files.load(model, weights).module
    progress = Progress(*BAR, console=stderr, transient=True, disable=not stderr.is_terminal)
    with executor_of(scheduler) as executor, progress as bar:
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


def _print(result: reconstruction.Reconstruction) -> None:
    print(f"rank       {result.rank}")
    print(f"recovered  {len(result.inputs)}")
    print(f"certified  {int(result.certified.sum())}")
    print(f"reason     {result.reason}")


def _serialized(result: reconstruction.Reconstruction) -> bytes:
    tensors = {"inputs": result.inputs, "residuals": result.residuals, "certified": result.certified}
    if result.labels is not None:
        tensors["labels"] = result.labels
    words = {"rank": str(result.rank), "complete": str(result.complete), "reason": result.reason}
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, words)


def _draw(result: reconstruction.Reconstruction, picture: Path) -> None:
    if result.inputs.ndim != 4 or result.inputs.shape[1] not in (1, 3) or not len(result.inputs):
        print(f"spear: no picture: inputs of shape {tuple(result.inputs.shape)} are no images", file=sys.stderr)
        return
    content = io.BytesIO()
    plots.grid(result.inputs).savefig(content, format="png")
    paths.write({picture: content.getvalue()})
