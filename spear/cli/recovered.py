"""What `spear attack` recovered, as words, as a file and as a picture."""

import io
import math
import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save

from spear import paths, plots
from spear.reconstruction import Reconstruction


def words(result: Reconstruction) -> str:
    """A line for each figure of the result."""
    facts = {
        "rank": result.rank,
        "recovered": len(result.inputs),
        "certified": int(result.certified.sum()),
        "method": result.method,
        "reason": result.reason,
    }
    return "\n".join(f"{name:<10} {fact}" for name, fact in facts.items())


def shaped(result: Reconstruction, shape: tuple[int, ...] | None) -> Reconstruction:
    """The samples in the shape that the model's file says, where the update says none and they have as many entries."""
    flat = result.inputs.ndim == 2 and not result.features_of
    if shape is None or not flat or math.prod(shape) != result.inputs.shape[1]:
        return result
    return replace(result, inputs=result.inputs.unflatten(1, shape))


def write(result: Reconstruction, output: Path | None, picture: Path | None) -> None:
    """Write the samples to a safetensors file and draw them, where either is asked for."""
    if output is not None:
        paths.write({output: _serialized(result)})
    if picture is not None:
        _draw(result, picture)


def _serialized(result: Reconstruction) -> bytes:
    tensors = {name: getattr(result, name) for name in ("inputs", "residuals", "certified", "error_bound")}
    tensors |= {name: found for name in ("labels", "targets") if (found := getattr(result, name)) is not None}
    told = {"rank": str(result.rank), "complete": str(result.complete), "reason": result.reason}
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, told)


def _draw(result: Reconstruction, picture: Path) -> None:
    if result.inputs.ndim != 4 or result.inputs.shape[1] not in (1, 3) or not len(result.inputs):
        print(f"spear: no picture: inputs of shape {tuple(result.inputs.shape)} are no images", file=sys.stderr)
        return
    content = io.BytesIO()
    plots.grid(result.inputs).savefig(content, format="png")
    paths.write({picture: content.getvalue()})
