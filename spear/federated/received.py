"""An update as the server received it: checked against the model, its rounding, where to compute with it."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spear.federated.naming import check_there
from spear.federated.update import Lazy, SharedUpdate, computed_in
from spear.models.streaming import CHUNK
from spear.reconstruction import Refusal

PRECISIONS = (torch.float32, torch.float64)
EXTREME = 1e100  # entries whose products are still numbers: up to this, and down to its inverse
FREE, COPIES = 2**24, 16  # entries of a batch: so many whatever the update, and for each number that it holds
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


def compute_device(device: str | torch.device | None) -> torch.device:
    """The device of the float64 linear algebra: the one asked for, or the CPU where that has no float64."""
    try:
        device = torch.empty(0, device=device or "cpu").device
    except (RuntimeError, AssertionError) as error:  # no such device, or a build of torch without it
        raise ValueError(f"device {str(device)!r} is not available here") from error
    if device.type == "meta":
        raise ValueError("device 'meta' has no values to compute with")
    return torch.device("cpu") if device.type == "mps" else device


def check_gradients(model: nn.Module, update: SharedUpdate) -> Mapping[str, Tensor]:
    """The gradients of an update, each checked against the model's parameter of its name.

    Of the change of the weights by one step the gradient is what remains without the learning rate.
    """
    if update.local_steps != 1:
        raise Refusal(f"an update of {update.local_steps} local steps is not the gradient of one batch")
    parameters = dict(model.named_parameters())
    check_weights(model)
    for name, g in update.gradients.items():
        if name not in parameters:
            raise ValueError(f"the update has a gradient for {name!r}, which the model does not have")
        if g.shape != parameters[name].shape:
            expected = tuple(parameters[name].shape)
            raise ValueError(f"the gradient of {name} has shape {tuple(g.shape)}, the model's parameter {expected}")
        if g.dtype not in PRECISIONS or parameters[name].dtype not in PRECISIONS:
            dtype = str(g.dtype if g.dtype not in PRECISIONS else parameters[name].dtype).removeprefix("torch.")
            raise Refusal(f"{name} is {dtype}: exact recovery needs float32 or float64")
        if not is_finite(g):
            _refuse_unknown(name, g)
            raise ValueError(f"the gradient of {name} holds NaN or infinite values")
    scale = update.loss_scale * (update.learning_rate or 1.0)
    received = update.gradients
    largest = max(float(part.abs().max()) for g in received.values() for part in g.flatten().split(CHUNK)) / scale
    if largest and not 1 / EXTREME < largest < EXTREME:
        raise ValueError(f"the gradients are out of range: their largest entry is {largest:.0e}")
    return received if scale == 1 else Lazy(tuple(received), lambda name: received[name] / scale)


def _refuse_unknown(name: str, g: Tensor) -> None:
    """Raises `Refusal` for a gradient of which some entries are numbers, and the others NaN: not known."""
    unknown = int(g.isnan().sum())
    if unknown < g.numel() and not bool(g.isinf().any()):
        raise Refusal(f"{unknown:,} of {g.numel():,} entries of the gradient of {name} are not known")


def check_weights(model: nn.Module) -> None:
    """Raises `ValueError` for parameters or buffers that hold no finite numbers, or none at all."""
    check_there(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not is_finite(tensor):
            raise ValueError(f"{name} of the model holds NaN or infinite values")


def is_finite(tensor: Tensor) -> bool:
    """Whether every entry is a finite number, as it is where their sum is one; looked at in parts."""
    parts = tensor.detach().flatten().split(CHUNK)
    return all(bool(part.sum().isfinite()) or bool(part.isfinite().all()) for part in parts)


def rounding_unit(model: nn.Module, update: SharedUpdate) -> float:
    """The relative spacing of the gradients as they came; of a change of weights, a tenth of theirs against it.

    The rounding of many weights is noise of a fifth of their spacing, and spreads over all singular values: far below
    `lowrank.VISIBLE` times what is returned.
    """
    eps = torch.finfo(_single(model, update)).eps
    if isinstance(update.gradients, Lazy):
        eps = max(eps, update.gradients.rounding)
    if update.learning_rate is None:
        return eps
    parameters = dict(model.named_parameters())
    sizes = [(_size(parameters[name]), _size(g)) for name, g in update.gradients.items()]
    return min(eps * max([1.0, *(0.1 * weights / change for weights, change in sizes if change)]), COARSEST)


def coarsest(model: nn.Module, update: SharedUpdate) -> torch.dtype:
    """The dtype of least precision among the weights and what the gradients were computed in."""
    return _coarser({*(p.dtype for p in model.parameters()), _single(model, update)})


def _coarser(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _single(model: nn.Module, update: SharedUpdate) -> torch.dtype:
    """What the gradients were computed in; half precision, once it is widened, counts as single.

    A change of weights is as coarse as these, whatever it is stored in.
    """
    stored = {g.dtype for g in update.gradients.values()}
    if update.learning_rate is not None:
        return _coarser(stored | {p.dtype for p in model.parameters()})
    found = computed_in(update)
    return found if found in stored or found in PRECISIONS else torch.float32


def _size(tensor: Tensor) -> float:
    parts = [float(torch.linalg.vector_norm(part.detach().double())) for part in tensor.flatten().split(CHUNK)]
    return math.hypot(*parts)


def check_count(count: int | None) -> None:
    """Raises `ValueError` for fewer than one sample."""
    if count is not None and count < 1:
        raise ValueError(f"a batch has at least 1 sample, not {count}")


def check_size(count: int | None, n: int, update: SharedUpdate) -> None:
    """Raises `Refusal` for more samples of n entries than could be returned in a multiple of the update's own size."""
    held = sum(g.numel() for g in update.gradients.values())
    if count is not None and count * n > FREE + COPIES * held:
        raise Refusal(f"a batch of {count:,} samples is out of proportion to an update of {held:,} numbers")


def check_width(count: int | None, m: int, name: str) -> None:
    """Raises `Refusal` for as many samples as layer `name` has neurons, m, or more: none can be told apart."""
    if count is not None and count >= m:
        raise Refusal(f"a batch of rank {count} needs a layer wider than {count}; {name} has {m}")


def check_inputs(count: int | None, n: int, name: str) -> None:
    """Raises `Refusal` for more samples than one layer `name` has inputs, n; several layers may tell them apart."""
    if count is not None and count > n:
        raise Refusal(f"a batch of rank {count} needs at least {count} inputs; {name} has {n}")


def input_shape(name: str, n: int, update: SharedUpdate) -> tuple[int, ...]:
    """The shape of one of layer `name`'s inputs of n entries: the disclosed one, or a vector."""
    if update.input_shape is None:
        return (n,)
    if math.prod(update.input_shape) != n:
        raise ValueError(f"the disclosed input shape {update.input_shape} does not make the {n} inputs of {name}")
    return update.input_shape
