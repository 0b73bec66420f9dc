"""`spear audit`: what a model gives away, as words on the screen, an HTML page and JSON, with an exit status for CI."""

from pathlib import Path
from typing import Annotated

import typer

from spear import paths
from spear.cli.shared import (
    Control,
    InputShape,
    Loss,
    MiniBatch,
    Momentum,
    Rate,
    RunCode,
    Samples,
    Steps,
    WeightDecay,
    shape_of,
)


def audit(
    model: Annotated[str, typer.Argument(help="File of torch.export; with --run-code also PACKAGE.MODULE:FACTORY.")],
    update: Annotated[Path | None, typer.Argument(help="Gradients by parameter name, safetensors.")] = None,
    weights: Annotated[Path | None, typer.Option(help="The model's weights, safetensors.")] = None,
    before: Annotated[Path | None, typer.Option(help="Weights that the client received, safetensors.")] = None,
    after: Annotated[Path | None, typer.Option(help="Weights that it sent back, safetensors.")] = None,
    learning_rate: Rate = None,
    local_steps: Steps = None,
    mini_batch: MiniBatch = None,
    momentum: Momentum = None,
    weight_decay: WeightDecay = None,
    loss: Loss = None,
    samples: Samples = None,
    control: Control = None,
    data: Annotated[str | None, typer.Option(help="Data set by name, or a folder of pictures by class.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Batch size of simulated clients; default 16.")] = None,
    layer: Annotated[str | None, typer.Option(help="Linear layer to attack; default the first.")] = None,
    input_shape: InputShape = None,
    time_limit: Annotated[float, typer.Option(help="Seconds for the attack on the update.")] = 60,
    trial_limit: Annotated[float, typer.Option(help="Seconds for each simulated attack.")] = 5,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; default cpu.")] = None,
    page: Annotated[Path | None, typer.Option("--report", help="Write the report here, HTML.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here, JSON.")] = None,
    run_code: RunCode = False,
) -> None:
    """Say which layers of a model leak, from how large a batch, and which defence stops it.

    Without UPDATE (or --before and --after) clients are simulated on --data. Nothing in a file is unpickled or run. A
    factory, or a TorchScript archive, is a program: it is run only with --run-code.

    Exit status: 0 nothing was recovered, 1 something was, 2 the audit could not run.
    """
    from spear.audit import assessment, report
    from spear.cli import findings, given
    from spear.cli.display import Display
    from spear.models import files

    paths.check_outputs((page, json), (Path(model), update, weights, before, after, control))
    given.refuse_both(update, before, after, learning_rate)
    told = {"learning_rate": learning_rate, "local_steps": local_steps, "mini_batch": mini_batch}
    told |= {"weight_decay": weight_decay, "loss": loss}
    told |= {"momentum": momentum, "count": samples}
    with Display("audit") as display:
        display.part(f"loading {model}")
        loaded = files.load(model, weights or before, run_code=run_code)
        result = assessment.audit(
            loaded.module,
            given.update(loaded.module, update, before, after, told, control),
            name=Path(model).name,
            data=data,
            count=count,
            layer=layer,
            input_shape=shape_of(input_shape) or loaded.input_shape,
            time_limit=time_limit,
            trial_limit=trial_limit,
            seed=seed,
            device=device,
            progress=display.part,
        )
    findings.show(result)
    contents = {page: report.html, json: report.to_json}
    paths.write({path: write(result).encode() for path, write in contents.items() if path is not None})
    raise typer.Exit(result.status)
