"""What the baselines work with: the server's copy of the model, the gradients to be matched, a trial and its clock."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from spear.federated.received import check_gradients
from spear.federated.update import SharedUpdate
from spear.reconstruction import Progress, Reconstruction, Stats


@dataclass(frozen=True)
class Server:
    """What gradient matching works with: the server's own copy of the model, and the gradients to be matched.

    `observed` are the update's gradients in the order of `parameters`; `count` samples of shape `input_shape` are
    sought, whose losses join by `reduction`.
    """

    model: nn.Module
    parameters: tuple[Tensor, ...]
    observed: tuple[Tensor, ...]
    count: int
    input_shape: tuple[int, ...]
    reduction: str

    def gradients(self, inputs: Float[Tensor, "b *input_shape"], targets: Tensor) -> tuple[Tensor, ...]:
        """The gradients that a batch would give, differentiable; `targets` are labels (b,) or soft labels (b, C)."""
        loss = F.cross_entropy(self.model(inputs), targets, reduction=self.reduction)
        return torch.autograd.grad(loss, self.parameters, create_graph=True, materialize_grads=True)

    def squared_distance(self, inputs: Float[Tensor, "b *input_shape"], targets: Tensor) -> Float[Tensor, ""]:
        """|g - g*|^2 / |g*|^2 between a batch's gradients g and the observed ones g*, all layers together."""
        g = self.gradients(inputs, targets)
        difference = [one - seen for one, seen in zip(g, self.observed, strict=True)]
        return dot(difference, difference) / dot(self.observed, self.observed)

    def cosine_distance(self, inputs: Float[Tensor, "b *input_shape"], targets: Tensor) -> Float[Tensor, ""]:
        """1 - <g, g*> / (|g| |g*|), all layers together."""
        g = self.gradients(inputs, targets)
        return 1 - dot(g, self.observed) / (dot(g, g) * dot(self.observed, self.observed)).sqrt()

    def noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Standard normal numbers in the model's dtype, the same on every device."""
        like = self.parameters[0]
        return torch.randn(*shape, generator=generator, dtype=like.dtype).to(like.device)


@dataclass(frozen=True)
class Trial:
    """Where one start ended: the batch, its labels, and how far its gradients are from those observed."""

    inputs: Float[Tensor, "b *input_shape"]
    labels: Int[Tensor, " b"]
    distance: float


class Clock:
    """Counts steps, tells `progress` of each, and knows when the time is up."""

    def __init__(self, count: int, limit: float | int | None, progress: Callable[[Progress], None] | None):
        self.started, self.steps = time.monotonic(), 0
        self.count, self.limit, self.progress = count, limit, progress

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def late(self) -> bool:
        return self.limit is not None and self.seconds >= self.limit

    def ticks(self, steps: int) -> Iterator[int]:
        """Up to `steps` steps, fewer where the time is up: the first is always taken."""
        for step in range(steps):
            yield step
            self.steps += 1
            if self.progress is not None:
                self.progress(Progress("gradient matching", 0, self.count, self.steps, self.seconds))
            if self.late:
                return


def server_of(
    model: nn.Module,
    update: SharedUpdate,
    batch_size: int | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
) -> Server:
    """The server's copy of the model, in evaluation mode, beside the gradients it received."""
    gradients = check_gradients(model, update)
    like = next(model.parameters())
    where, kind = (like.device if device is None else device), dtype or like.dtype
    model = copy.deepcopy(model).to(where, kind).eval().requires_grad_(True)
    parameters = dict(model.named_parameters())
    observed = tuple(gradients[name].to(where, kind) for name in gradients)
    chosen = tuple(parameters[name] for name in gradients)
    return Server(model, chosen, observed, batch_size_of(update, batch_size), input_shape_of(update), update.reduction)


def batch_size_of(update: SharedUpdate, batch_size: int | None) -> int:
    count = update.count if batch_size is None else batch_size
    if count is None:
        raise ValueError("the update does not disclose its batch size: give batch_size")
    if count < 1:
        raise ValueError(f"a batch has at least 1 sample, not {count}")
    return count


def input_shape_of(update: SharedUpdate) -> tuple[int, ...]:
    if update.input_shape is None:
        raise ValueError("the update does not disclose the shape of a sample, which is needed to begin with one")
    return update.input_shape


@torch.no_grad()
def prior_softmax(model: nn.Module, update: SharedUpdate) -> Float[Tensor, " C"]:
    """The mean softmax of the model for 64 samples of normal noise."""
    like = next(model.parameters())
    noise = torch.randn(64, *input_shape_of(update), generator=torch.Generator().manual_seed(0), dtype=like.dtype)
    return copy.deepcopy(model).eval()(noise.to(like.device)).softmax(1).mean(0)


def uncertified(trial: Trial, how: str, stats: Stats) -> Reconstruction:
    """A baseline's result: nothing shows the server which of its samples are true."""
    count = len(trial.inputs)
    residuals = torch.full((count,), math.inf, dtype=torch.float64)
    nothing = torch.zeros(count, dtype=torch.bool)
    return Reconstruction(trial.inputs, trial.labels, count, residuals, nothing, False, f"not certified: {how}", stats)


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, ""]:
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))
