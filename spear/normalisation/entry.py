"""What a model does to the data themselves in training mode, before its first layer: BatchNorm, or dropout.

No gradient goes on behind it, so each sample's own is that of a fixed map of each entry. BatchNorm with the batch's
statistics from the buffers is one in evaluation mode, x -> γ (x - μ)/σ + η. Without these, x̂ = (x - μ)/σ comes back,
and its variance, 1 - ε/σ², tells σ: samples less their mean, of which nothing depends on μ. Of dropout, what it left of
each sample comes back.
"""

import copy
import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spear.certificate import SAFETY, norms
from spear.federated.update import SharedUpdate
from spear.models.normalised import Entry, entry
from spear.normalisation.opening import Told, told_statistics
from spear.normalisation.statistics import EITHER
from spear.reconstruction import Reconstruction

BLACK = 1e-9  # of the largest entry: what is zero


class Known(nn.Module):
    """BatchNorm at a known mean and variance, over vectors, or over the channels of pictures."""

    def __init__(self, norm: nn.Module, mean: Float[Tensor, " m"], variance: Float[Tensor, " m"]) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.sides = (-1, 1, 1) if isinstance(norm, nn.BatchNorm2d) else (-1,)
        like = mean if norm.weight is None else norm.weight.detach()
        for name, value in {"mean": mean, "size": (variance + norm.eps).sqrt()}.items():
            self.register_buffer(name, value.to(like).reshape(self.sides))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.size
        x = x if self.weight is None else x * self.weight.reshape(self.sides)
        return x if self.bias is None else x + self.bias.reshape(self.sides)


class Left(nn.Module):
    """Dropout of what it left already."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.share = 1 - drop

    def forward(self, x: Tensor) -> Tensor:
        return x / self.share


def with_entry(model: nn.Module, update: SharedUpdate) -> tuple[nn.Module, Entry | None]:
    """The model with BatchNorm or dropout of the data in evaluation mode, and what that was; `None` where it has none.

    BatchNorm is at the batch's mean and variance, where the running statistics tell them, else at 0 and 1: what comes
    back is normalised then. Parameters are shared.
    """
    found = entry(model, update.input_shape) if update.local_steps == 1 else None
    if found is None:
        return model, None
    made = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    part, norm = made.get_submodule(found.name), found.norm
    if norm is None:
        made.set_submodule(found.name, Left(found.drop))
        return made, found
    told, zero = _told(model, update, found), torch.zeros(part.num_features, dtype=torch.float64)
    known = (zero, 1 - norm.eps + zero) if told is None else (told.mean, told.variance * _biased(update, told))
    made.set_submodule(found.name, Known(part, *known))
    return made, found


def _told(model: nn.Module, update: SharedUpdate, found: Entry) -> Told | None:
    """The batch's statistics, where the running ones and the number of samples tell them."""
    if not update.buffers or not update.count:
        return None
    return told_statistics(found.norm, dict(model.named_buffers()), update.buffers)


def _biased(update: SharedUpdate, told: Told) -> float:
    """The mean square as a share of the variance that running statistics take, over one less than the entries."""
    pixels = math.prod(update.input_shape or ()) // len(told.mean)
    return 1 - 1 / (update.count * max(pixels, 1))


def confirmed(model: nn.Module, update: SharedUpdate, result: Reconstruction, found: Entry | None) -> Reconstruction:
    """The result in the samples' own units, as far as these are told, and that in words."""
    if found is None or not len(result.inputs):
        return result
    if found.norm is None:
        return _left(result, found)
    told = _told(model, update, found)
    return _scaled(result, found) if told is None else _with_statistics(update, result, found, told)


def _with_statistics(update: SharedUpdate, result: Reconstruction, found: Entry, told: Told) -> Reconstruction:
    """The result, uncertified where the samples do not have the variance that was sent.

    BatchNorm's epsilon shows in the variance of what it gives: in these units that is off by ε times the relative error
    of σ² + ε. Torch takes the running variance over one less than the entries, others over all of them: whichever the
    samples show, and neither where rounding hides it.
    """
    eps, unbiased = found.norm.eps, told.variance.clamp_min(0)
    variance, own = unbiased * _biased(update, told), _variance(result, len(unbiased))
    if len(own) != len(unbiased):
        return _uncertified(result, "what was found is not of the form of the data that were normalised")
    off, more = (own - variance) / eps, (unbiased - variance) / (unbiased + eps)
    exact = float(result.error_bound.max()) + torch.finfo(torch.float64).eps
    size = (variance + told.mean**2).sqrt()
    noise = SAFETY * (told.variance_error + 2 * exact * size * variance.sqrt()).clamp_min(1e-300) / eps
    share = float((off * more / noise**2).sum() / (more / noise).square().sum().clamp_min(1e-300))
    sure = float((more / noise).square().sum().sqrt()) > 2  # the two are told apart
    biased = sure and share > 1 / 2
    fits = bool(((off - more * biased).abs() <= noise).all())
    if not fits or not math.isfinite(exact):
        why = "the samples do not have the variance that the running statistics tell, or only a part was found"
        return _uncertified(result, why)
    said = f"the batch's mean and variance at {found.name} are those that its running statistics tell"
    scale, wide = told.variance_error / (2 * (variance + eps)), ((unbiased + eps) / (variance + eps)).sqrt()
    if not sure:
        said, scale = f"{said}: {EITHER}, {float(wide.max()) - 1:.0e} apart", scale + wide - 1
    x, sides = result.inputs.double(), _sides(result.inputs, len(scale))
    mean, scale, wide, error = (v.reshape(sides) for v in (told.mean, scale, wide, told.mean_error))
    x = mean + (x - mean) * (wide if biased else 1)
    moved = torch.hypot((x - mean) * scale, error.expand_as(x)).flatten(1).norm(dim=1)
    made = replace(result, inputs=x.to(result.inputs), reason=f"{result.reason}; {said}")
    return made.less_certain(moved / norms(x.flatten(1)))


def _sides(x: Float[Tensor, "b *shape"], features: int) -> tuple[int, ...]:
    """The shape in which values of features, or channels, fit samples."""
    return (features, *[1] * (x.ndim - 2)) if features == x.shape[1] else tuple(x.shape[1:])


def _scaled(result: Reconstruction, found: Entry) -> Reconstruction:
    """Normalised samples times the deviation that their variance tells; their mean, which nothing tells, is zero."""
    eps, x = found.norm.eps, result.inputs.double()
    rest = (1 - _variance(result, len(found.norm.scale))).clamp_min(torch.finfo(x.dtype).eps)
    size = (eps / rest).sqrt()
    error = 2 * result.error_bound + float(((result.error_bound.max() + torch.finfo(x.dtype).eps) / rest).max())
    whole = result.complete and bool(result.certified.all())
    said = f"no gradient depends on the mean of the data before {found.name}: it is set to zero; their deviations are"
    made = _uncertified(result, f"{said} those that epsilon tells")
    inputs = (x * size.reshape(_sides(x, len(size)))).to(result.inputs)
    return replace(made, inputs=inputs, difference_bound=error if whole else None)


def _left(result: Reconstruction, found: Entry) -> Reconstruction:
    """What dropout left of samples: none of them is certain."""
    zero = float((result.inputs.abs() < BLACK * result.inputs.abs().max()).double().mean())
    exact = "every other one is certain" if bool(result.certified.all()) else "the others are those that entered"
    took = f"dropout {found.name} (p = {found.drop:g}) took entries of the samples before the first layer"
    return _uncertified(result, f"{took}: they are zero, {zero:.1%} are; {exact}")


def _variance(result: Reconstruction, features: int) -> Float[Tensor, " m"]:
    """That of each feature, or channel, over the batch."""
    x = result.inputs.double()
    over = [0, *range(2, x.ndim)] if features == x.shape[1] and x.ndim > 2 else [0]
    return x.var(over, unbiased=False).flatten()


def _uncertified(result: Reconstruction, why: str) -> Reconstruction:
    none, endless = torch.zeros_like(result.certified), torch.full_like(result.error_bound, torch.inf)
    return replace(result, certified=none, error_bound=endless, complete=False, reason=f"{result.reason}; {why}")
