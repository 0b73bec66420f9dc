"""`spear attack`: the batch behind an update, as words, a file and a picture."""

from concurrent.futures import Executor
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
    executor_of,
    printable,
    shape_of,
)

METHODS = "auto, the strongest fit; or sampling, guided, dictionary, layer (one layer), block (two), network (all)."


def attack(
    model: Annotated[str, typer.Argument()],
    update: Annotated[Path, typer.Argument()],
    weights: Annotated[Path | None, typer.Option(help="The model's weights, safetensors.")] = None,
    method: Annotated[str, typer.Option(help=METHODS)] = "auto",
    layer: Annotated[str | None, typer.Option(help="Linear layer to attack; default the first.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default: read off the gradient's rank.")] = None,
    learning_rate: Rate = None,
    local_steps: Steps = None,
    mini_batch: MiniBatch = None,
    momentum: Momentum = None,
    weight_decay: WeightDecay = None,
    loss: Loss = None,
    samples: Samples = None,
    control: Control = None,
    input_shape: InputShape = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds; default no limit.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; default cpu.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a dask scheduler, whose workers sample.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the recovered samples here, safetensors.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the recovered images here, PNG.")] = None,
    run_code: RunCode = False,
) -> None:
    """Recover the batch behind a client's update.

    MODEL is a file of torch.export: nothing in it is run. With --run-code it may be code: PACKAGE.MODULE:FACTORY, where
    calling FACTORY without arguments gives the torch module (the working directory is importable), or a TorchScript
    archive. UPDATE is a safetensors file of gradients by parameter name,
    as `SharedUpdate.save` or any other program writes it.

    Exit status: 0 nothing was recovered, 1 something was, 2 the attack could not run.
    """
    from spear import inversion
    from spear.cli import given, recovered
    from spear.cli.display import Display
    from spear.federated.update import SharedUpdate
    from spear.models import files

    paths.check_outputs((output, picture), (Path(model), update, weights, control))
    told = {"learning_rate": learning_rate, "local_steps": local_steps, "mini_batch": mini_batch}
    told |= {"weight_decay": weight_decay, "loss": loss}
    with executor_of(scheduler) as executor, Display("attack") as display:
        display.part(f"loading {update}")
        shared = SharedUpdate.load(update).disclosing(**told, momentum=momentum, count=samples)
        shared = given.shaped(given.without_control(shared, control), shape_of(input_shape))
        display.part(f"loading {model}")
        loaded = files.load(model, weights, run_code=run_code)
        display.part(f"method {method}")
        result = inversion.attack(
            loaded.module,
            shared,
            method=_with_executor(method, executor),
            layer=layer,
            batch_size=batch_size,
            time_limit=time_limit,
            device=device,
            progress=display.progress,
        )
    print(printable(recovered.words(result)))
    recovered.write(recovered.shaped(result, loaded.input_shape), output, picture)
    raise typer.Exit(1 if len(result.inputs) else 0)


def _with_executor(method: str, executor: Executor | None) -> object:
    """The method with an executor for its rounds of sampling, where there is one."""
    from spear.inversion import Auto
    from spear.published.algorithm import Sampling
    from spear.published.guided import Guided

    if executor is None:
        return method
    sampling = Sampling(executor=executor)
    able = {"auto": Auto(sampling), "sampling": sampling, "guided": Guided(executor=executor)}
    if method not in able:
        raise ValueError(f"a scheduler computes rounds of sampling: method {method!r} has none; use {', '.join(able)}")
    return able[method]
