"""BatchNorm on the data themselves: with the batch's statistics from the buffers, it is one in evaluation mode.

No gradient goes on behind it, so each sample's own is that of a fixed map of each entry, x -> γ (x - μ)/σ + η.
"""

import copy
import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spear.federated.update import SharedUpdate
from spear.models.normalised import entry
from spear.normalisation.opening import Told, told_statistics
from spear.reconstruction import Reconstruction

EPSILON_SHOWS = 0.01  # share of ε/σ² by which a variance may be off, where rounding lets that be seen
SAME = 1e-9  # relative distance of a batch's variance from that which was sent, at which they are the same


class Known(nn.Module):
    """BatchNorm at a known mean and variance, over vectors, or over the channels of pictures."""

    def __init__(self, norm: nn.Module, mean: Float[Tensor, " m"], variance: Float[Tensor, " m"]) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.sides = (-1, 1, 1) if isinstance(norm, nn.BatchNorm2d) else (-1,)
        size = (variance + norm.eps).sqrt()
        for name, value in {"mean": mean, "size": size}.items():
            self.register_buffer(name, value.to(norm.running_mean.dtype).reshape(self.sides))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.size
        x = x if self.weight is None else x * self.weight.reshape(self.sides)
        return x if self.bias is None else x + self.bias.reshape(self.sides)


def with_statistics(model: nn.Module, update: SharedUpdate) -> tuple[nn.Module, str]:
    """The model with BatchNorm of the data in evaluation mode, at the batch's mean and variance, and that in words.

    The model itself, and nothing, where it has none, or the update does not tell them: how many samples there are, and
    the running statistics after the step. Parameters are shared.
    """
    found = entry(model, update.input_shape) if update.buffers and update.count and update.local_steps == 1 else None
    if found is None:
        return model, ""
    told = told_statistics(found, dict(model.named_buffers()), update.buffers)
    if told is None:
        return model, ""
    made = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    name = found.mean_name.removesuffix(".running_mean")
    made.set_submodule(name, Known(made.get_submodule(name), told.mean, told.variance * _biased(update, told)))
    return made, f"the batch's mean and variance at {name} are those that its running statistics tell"


def _biased(update: SharedUpdate, told: Told) -> float:
    """The mean square as a share of the variance that running statistics take, over one less than the entries."""
    pixels = math.prod(update.input_shape or ()) // len(told.mean)
    return 1 - 1 / (update.count * max(pixels, 1))


def confirmed(model: nn.Module, update: SharedUpdate, result: Reconstruction, said: str) -> Reconstruction:
    """The result, uncertified where the samples do not have the variance that was sent; `said` is added to its reason.

    BatchNorm's epsilon shows in the variance of what it gives: a wrong σ is not confirmed.
    """
    if not said or not len(result.inputs):
        return result
    found = entry(model, update.input_shape)
    told = told_statistics(found, dict(model.named_buffers()), update.buffers)
    variance = told.variance * _biased(update, told)
    x = result.inputs.double()
    over = [0, *range(2, x.ndim)] if len(variance) == x.shape[1] and x.ndim > 2 else [0]
    own = x.var(over, unbiased=False).flatten()
    off = (own - variance).abs() > EPSILON_SHOWS * found.eps + SAME * variance + told.variance_error
    if len(own) == len(variance) and not bool(off.any()):
        return replace(result, reason=f"{result.reason}; {said}")
    none = torch.zeros_like(result.certified)
    why = "the samples do not have the variance that the running statistics tell, or only a part was found"
    endless = torch.full_like(result.error_bound, torch.inf)
    return replace(result, certified=none, error_bound=endless, complete=False, reason=f"{result.reason}; {why}")
