"""`spear audit`: what a model gives away, as words on the screen, an HTML page and JSON, with an exit status for CI."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from spear import paths
from spear.audit import report
from spear.audit import assessment
from spear.audit.assessment import Audit
from spear.audit.simulation import Tested
from spear.cli.shared import MiniBatch, Momentum, Rate, Samples, Steps, stderr
from spear.federated.update import SharedUpdate, difference
from spear.models import files
from spear.models.tensors import read_tensors


def audit(
    model: Annotated[str, typer.Argument(help="TorchScript or torch.export file, or PACKAGE.MODULE:FACTORY.")],
    update: Annotated[Path | None, typer.Argument(help="Gradients by parameter name, safetensors.")] = None,
    weights: Annotated[Path | None, typer.Option(help="The model's weights, safetensors.")] = None,
    before: Annotated[Path | None, typer.Option(help="Weights that the client received, safetensors.")] = None,
    after: Annotated[Path | None, typer.Option(help="Weights that it sent back, safetensors.")] = None,
    learning_rate: Rate = None,
    local_steps: Steps = None,
    mini_batch: MiniBatch = None,
    momentum: Momentum = None,
    samples: Samples = None,
    data: Annotated[str | None, typer.Option(help="Data set by name, or a folder of pictures by class.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Batch size of simulated clients; default 16.")] = None,
    layer: Annotated[str | None, typer.Option(help="Linear layer to attack; default the first.")] = None,
    input_shape: Annotated[str | None, typer.Option(help="Of one sample, as in 3,32,32.")] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds for the attack on the update.")] = 60,
    trial_limit: Annotated[float, typer.Option(help="Seconds for each simulated attack.")] = 5,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; default cpu.")] = None,
    page: Annotated[Path | None, typer.Option("--report", help="Write the report here, HTML.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here, JSON.")] = None,
) -> None:
    """Say which layers of a model leak, from how large a batch, and which defence stops it.

    Without UPDATE (or --before and --after) clients are simulated on --data. No file is unpickled or run; a factory
    is code that you name, and it is run.

    Exit status: 0 nothing was recovered, 1 something was, 2 the audit could not run.
    """
    for path in (page, json):
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: no such folder")
    _refuse_both(update, before, after, learning_rate)
    loaded = files.load(model, weights or before)
    told = {"learning_rate": learning_rate, "local_steps": local_steps, "mini_batch": mini_batch}
    told |= {"momentum": momentum, "count": samples}
    if update is None and after is None and any(value is not None for value in told.values()):
        raise ValueError("what a client disclosed needs its update: UPDATE, or --before and --after")
    if update is not None:
        shared = SharedUpdate.load(update).disclosing(**told)
    else:
        shared = _change(loaded.module, before, after, learning_rate).disclosing(**told) if after else None
    with stderr.status("audit") as status:
        result = assessment.audit(
            loaded.module,
            shared,
            name=Path(model).name,
            data=data,
            count=count,
            layer=layer,
            input_shape=_shape(input_shape) or loaded.input_shape,
            time_limit=time_limit,
            trial_limit=trial_limit,
            seed=seed,
            device=device,
            progress=lambda words: status.update(f"audit: {words}"),
        )
    _print(result)
    contents = {page: report.html, json: report.to_json}
    paths.write({path: write(result).encode() for path, write in contents.items() if path is not None})
    raise typer.Exit(result.status)


def _refuse_both(update: Path | None, before: Path | None, after: Path | None, rate: float | None) -> None:
    """One update at most, and all that its form needs."""
    given = [before is not None, after is not None]
    if update is not None and any(given):
        raise ValueError("give UPDATE, or --before, --after and --learning-rate, not both")
    if any(given) and not (all(given) and rate is not None):
        raise ValueError("the difference of two sets of weights needs --before, --after and --learning-rate")


def _change(model: nn.Module, before: Path, after: Path, learning_rate: float) -> SharedUpdate:
    (old, _), (new, _) = read_tensors(before), read_tensors(after)
    return difference(model, old, new, learning_rate=learning_rate)


def _shape(words: str | None) -> tuple[int, ...] | None:
    try:
        return None if words is None else tuple(int(size) for size in words.split(","))
    except ValueError as error:
        raise ValueError(f"--input-shape {words!r} is not of the form 3,32,32") from error


def _print(audit: Audit) -> None:
    print(report.verdict(audit))
    print(f"certificate: {report.certificate(audit)}")
    print(f"the attack ended: {audit.result.reason}")
    print(f"{audit.seconds:.0f} s, at most {audit.memory / 2**30:.1f} GiB; attacks below: {audit.trial_limit:g} s each")
    layers = [(x.name, f"{x.width}", x.gives_away, f"{x.limit or '-'}") for x in audit.layers]
    _table(("linear layer", "width", "its gradient gives away", "batches up to"), layers)
    reaches = [(r.method, f"{r.largest}", f"{r.failed}: {r.reason}" if r.failed else "-") for r in audit.reaches]
    _table(("method", "largest batch", "what ended it"), reaches)
    defences = [(t.name, _counts(t), t.verdict) for t in audit.defences]
    _table(("defence", "exact, recognisable", "verdict"), defences)


def _counts(tested: Tested) -> str:
    found = tested.outcome
    return "-" if found is None else f"{found.exact}, {found.recognised} of {found.sent}"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)
