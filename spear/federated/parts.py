"""A square part of a layer's update and of its weights: enough to tell what was done to all of it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from spear.federated.update import SharedUpdate

SIDES = (128, 512)  # of a part of a layer: it shows batches of up to half as many, the small one for less
SPARE = 4  # times as many rows and columns are looked at for those that hold anything


@dataclass(frozen=True)
class Part:
    """Random rows and columns of a layer: what came of it, and its weights, in float64 on the CPU."""

    received: Float[Tensor, "k k"]
    weights: Float[Tensor, "k k"]
    eps: float
    """The relative spacing of what came."""

    def __len__(self) -> int:
        return len(self.weights)


def widest_part(model: nn.Module, update: SharedUpdate, most: int) -> Part | None:
    """A part of the layer that allows the largest, of at most `most` rows and columns with any entry but zero.

    `None` where no matrix came.
    """
    parameters = dict(model.named_parameters())
    sides = {n: min(min(parameters[n].shape), SIDES[-1]) for n in update.gradients if parameters[n].ndim == 2}
    name = max(sides, key=lambda n: (sides[n], -parameters[n].numel()), default="")
    if not name:
        return None
    generator = Generator().manual_seed(0)
    sides = [torch.randperm(side, generator=generator)[: SPARE * most] for side in parameters[name].shape]
    live = _block(update.gradients[name], *sides) != 0
    rows, columns = (side[live.any(k).nonzero()[:, 0]] for k, side in zip((1, 0), sides, strict=True))
    size = min(len(rows), len(columns), most)
    whole = update.gradients[name], parameters[name].detach()
    parts = (_block(x, rows[:size], columns[:size]).double() for x in whole)
    return Part(*parts, torch.finfo(whole[0].dtype).eps)


def _block(x: Float[Tensor, "m n"], rows: Int[Tensor, " r"], columns: Int[Tensor, " c"]) -> Float[Tensor, "r c"]:
    return x[rows.to(x.device)[:, None], columns.to(x.device)].cpu()
