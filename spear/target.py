"""What every attack begins with: the server's view of one layer, checked and decomposed."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from spear.federated import Lazy, SharedUpdate
from spear.filtering import Observed
from spear.lowrank import LowRank, decompose, rank_under_noise
from spear.streaming import CHUNK, Blocks, Streamed, streamed
from spear.tracing import Layer, find_layer

MOST_UNDER_NOISE = 0.4  # of the smaller side: the share of a gradient's singular values that may rise above noise
PRECISIONS = (torch.float32, torch.float64)
COARSEST = 1e-3  # rounding, relative to a gradient, above which only noise is left to see


@dataclass(frozen=True)
class Widened(Mapping[str, Tensor]):
    """Gradients by name in float64 on one device, each converted when it is asked for: together they may be too large.

    The tensors of a safetensors file are read from disk no sooner than that.
    """

    received: Mapping[str, Tensor]
    device: torch.device

    def __getitem__(self, name: str) -> Tensor:
        return self.received[name].to(self.device, torch.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self.received)

    def __len__(self) -> int:
        return len(self.received)


@dataclass(frozen=True)
class Target:
    """One layer prepared for an attack: the server's copy of it and the gradients by name, in float64 on one device.

    `disclosed` is the number of samples in the loss, where it is known, `eps` the rounding unit of the update as it
    came, `input_shape` the shape of one input of the layer.
    """

    layer: Layer
    gradients: Widened
    low: LowRank
    observed: Observed
    disclosed: int | None
    eps: float
    scale: float
    input_shape: tuple[int, ...]
    loss: str = "cross_entropy"

    @property
    def count(self) -> int:
        """The number of samples in the loss: the disclosed one, or else the rank."""
        return self.low.rank if self.disclosed is None else self.disclosed


def prepare(
    model: nn.Module,
    update: SharedUpdate,
    *,
    layer: str | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
) -> Target:
    """Check model and update against each other, and factorise the gradient of one layer.

    Linear algebra runs in float64 on `device`, or on the CPU where the device has no float64 (MPS).

    Raises `ValueError` as `spear.attack` does.
    """
    found = find_layer(model, layer)
    gradients = check_gradients(model, update)
    m, n = found.linear.weight.shape
    disclosed = update.count if batch_size is None else batch_size
    _check_count(disclosed, m, n, found.name)
    device = compute_device(device)
    tail = None if found.tail is None else streamed(found.tail, device)
    found = replace(found, linear=Streamed(found.linear, device), tail=tail)
    eps = rounding_unit(model, update)
    gradients = Widened(gradients, device)
    low, observed = observe(found, gradients, batch_size, eps)
    count = low.rank if disclosed is None else disclosed
    scale = 1 / count if update.reduction == "mean" else 1.0
    return Target(found, gradients, low, observed, disclosed, eps, scale, _input_shape(found, update), update.loss)


def observe(layer: Layer, gradients: Widened, rank: int | None, eps: float) -> tuple[LowRank, Observed]:
    """The factorisation of a layer's gradient, and the server's view of the layer in its coordinates."""
    linear, n = layer.linear, layer.linear.in_features
    low = decompose(_jacobian(layer, gradients), rank, eps=eps)
    B = Blocks(linear.weight, linear.bias, low.R).times(low.R.mT)
    d = None if linear.bias is None else low.R[:, n]
    tolerance = min(max(1e-9, 10 * max(low.noise, eps * low.largest) / low.smallest), 1e-2)
    return low, Observed(low.L, low.R[:, :n], B, d, tolerance)


def _jacobian(layer: Layer, gradients: Widened) -> Blocks:
    """J = [dL/dW | dL/dbeta] as `augment` makes it, or dL/dW alone where the layer has no bias; read block by block."""
    dW = _required(gradients.received, f"{layer.name}.weight")
    dbeta = None if layer.linear.bias is None else _required(gradients, f"{layer.name}.bias")
    return Blocks(dW, dbeta, torch.empty(0, dtype=torch.float64, device=gradients.device))


def under_noise(target: Target) -> Target | None:
    """The same layer seen at the rank that rises above noise, entries of G counting as zero under the noise's size.

    The noise level is estimated from the singular values beyond the rank. `None` where no rank rises, or where what
    rises is too much of the layer to be told from noise.
    """
    J = _jacobian(target.layer, target.gradients).whole()
    m, n = J.shape
    s = torch.linalg.svdvals(J)
    rank = rank_under_noise(s, (m, n))
    if not 0 < rank <= MOST_UNDER_NOISE * min(m, n):
        return None
    low, observed = observe(target.layer, target.gradients, rank, target.eps)
    # Each entry of L = J V S^-1 carries noise sigma / s: four deviations, relative to a column of G of m entries.
    sigma = low.noise / (math.sqrt(m) + math.sqrt(n))
    tolerance = min(4 * sigma * math.sqrt(m) / low.smallest, 0.3)
    return replace(target, low=low, observed=replace(observed, tolerance=tolerance))


def compute_device(device: str | torch.device | None) -> torch.device:
    """The device of the float64 linear algebra: the one asked for, or the CPU where that has no float64."""
    try:
        device = torch.empty(0, device=device or "cpu").device
    except (RuntimeError, AssertionError) as error:  # no such device, or a build of torch without it
        raise ValueError(f"device {str(device)!r} is not available here") from error
    return torch.device("cpu") if device.type == "mps" else device


def check_gradients(model: nn.Module, update: SharedUpdate) -> Mapping[str, Tensor]:
    """The gradients of an update, each checked against the model's parameter of its name.

    Of the change of the weights by one step the gradient is what remains without the learning rate.
    """
    if update.local_steps != 1:
        raise ValueError(f"an update of {update.local_steps} local steps is not the gradient of one batch")
    parameters = dict(model.named_parameters())
    for name, g in update.gradients.items():
        if name not in parameters:
            raise ValueError(f"the update has a gradient for {name!r}, which the model does not have")
        if g.shape != parameters[name].shape:
            expected = tuple(parameters[name].shape)
            raise ValueError(f"the gradient of {name} has shape {tuple(g.shape)}, the model's parameter {expected}")
        if g.dtype not in PRECISIONS or parameters[name].dtype not in PRECISIONS:
            dtype = str(g.dtype if g.dtype not in PRECISIONS else parameters[name].dtype).removeprefix("torch.")
            raise ValueError(f"{name} is {dtype}: exact recovery needs float32 or float64")
        if not all(part.isfinite().all() for part in g.flatten().split(CHUNK)):
            raise ValueError(f"the gradient of {name} holds NaN or infinite values")
    scale = update.loss_scale * (update.learning_rate or 1.0)
    received = update.gradients
    return received if scale == 1 else Lazy(tuple(received), lambda name: received[name] / scale)


def rounding_unit(model: nn.Module, update: SharedUpdate) -> float:
    """The relative spacing of the gradients as they came; of a change of weights, a tenth of theirs against it.

    The rounding of many weights is noise of a fifth of their spacing, and spreads over all singular values: far below
    `lowrank.VISIBLE` times what is returned.
    """
    eps = max(torch.finfo(g.dtype).eps for g in update.gradients.values())
    if update.learning_rate is None:
        return eps
    parameters = dict(model.named_parameters())
    sizes = [(_size(parameters[name]), _size(g)) for name, g in update.gradients.items()]
    return min(eps * max([1.0, *(0.1 * weights / change for weights, change in sizes if change)]), COARSEST)


def _size(tensor: Tensor) -> float:
    parts = [float(torch.linalg.vector_norm(part.detach().double())) for part in tensor.flatten().split(CHUNK)]
    return math.hypot(*parts)


def _required(gradients: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in gradients:
        raise ValueError(f"the update has no gradient for {name}; it has {', '.join(gradients)}")
    return gradients[name]


def _check_count(count: int | None, m: int, n: int, name: str) -> None:
    if count is None:
        return
    if count < 1:
        raise ValueError(f"a batch has at least 1 sample, not {count}")
    if count >= m:
        raise ValueError(f"a batch of rank {count} needs a layer wider than {count}; {name} has {m}")
    if count > n:
        raise ValueError(f"a batch of rank {count} needs at least {count} inputs; {name} has {n}")


def _input_shape(layer: Layer, update: SharedUpdate) -> tuple[int, ...]:
    n = layer.linear.in_features
    return input_shape(layer.name, n, update) if layer.from_data else (n,)


def input_shape(name: str, n: int, update: SharedUpdate) -> tuple[int, ...]:
    """The shape of one of layer `name`'s inputs of n entries: the disclosed one, or a vector."""
    if update.input_shape is None:
        return (n,)
    if math.prod(update.input_shape) != n:
        raise ValueError(f"the disclosed input shape {update.input_shape} does not make the {n} inputs of {name}")
    return update.input_shape
