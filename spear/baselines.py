"""What was known before SPEAR: gradient matching (DLG, iDLG, Inverting Gradients), and the closed form for one sample.

Each takes what `spear.attack` takes, a model and an update, and returns the same `Reconstruction`, so that one judge
serves all. What gradient matching returns is approximate, and nothing vouches for it: no sample is ever certified.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from spear import theory
from spear.federated import SharedUpdate
from spear.reconstruction import Reconstruction, Stats
from spear.search import Progress
from spear.target import check_gradients, compute_device, input_shape
from spear.tracing import linear_layers

RATE = 0.1  # step length of Inverting Gradients, divided by ten after each of these shares of its steps
DECAY = (3 / 8, 5 / 8, 7 / 8)


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
        return _dot(difference, difference) / _dot(self.observed, self.observed)

    def cosine_distance(self, inputs: Float[Tensor, "b *input_shape"], targets: Tensor) -> Float[Tensor, ""]:
        """1 - <g, g*> / (|g| |g*|), all layers together."""
        g = self.gradients(inputs, targets)
        return 1 - _dot(g, self.observed) / (_dot(g, g) * _dot(self.observed, self.observed)).sqrt()

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
                self.progress(Progress(0, self.count, self.steps, self.seconds))
            if self.late:
                return


def dlg(
    model: nn.Module,
    update: SharedUpdate,
    *,
    labels: Int[Tensor, " b"] | None = None,
    steps: int = 300,
    restarts: int = 1,
    batch_size: int | None = None,
    time_limit: float | int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Reconstruction:
    """Deep Leakage from Gradients (Zhu, Liu, Han, NeurIPS 2019): inputs and labels whose gradients match, by L-BFGS.

    Dummy inputs and labels, standard normal at first, move until the squared distance of their gradients is least; a
    label is the softmax of its variables. With `labels` given, or inferred by `infer_labels`, these stay fixed: that is
    iDLG (Zhao, Mopuri, Bilen 2020). The authors' settings: 300 steps of torch's L-BFGS, of up to 20 iterations each, at
    learning rate 1. The distance is relative here, or L-BFGS would stop early where gradients are small.

    The nearest of `restarts` starts is kept: from some the method diverges. `time_limit` (seconds) ends it after the
    step in progress. `dtype` is the model's unless given. `rank` of the result is the batch size that was assumed: the
    update's, or `batch_size`.

    Raises `ValueError` where batch size or input shape are not known, for labels of another number, for fewer than one
    step or restart, and for gradients that do not fit the model.
    """
    server = _server(model, update, batch_size, device, dtype)
    fixed = None if labels is None else _fitting(labels, server)

    def trial(generator: torch.Generator, clock: Clock) -> Trial:
        x = server.noise(server.count, *server.input_shape, generator=generator).requires_grad_(True)
        y = server.noise(*server.model(x).shape, generator=generator).requires_grad_(True)
        return _match(server, x, y, fixed, clock.ticks(steps))

    return _nearest(server, trial, steps, restarts, seed, Clock(server.count, time_limit, progress))


def _match(server: Server, x: Tensor, y: Tensor, fixed: Tensor | None, ticks: Iterator[int]) -> Trial:
    """L-BFGS from one start; the nearest of its steps, as it may diverge afterwards."""
    variables = [x, y] if fixed is None else [x]
    optimizer = torch.optim.LBFGS(variables, tolerance_grad=0, tolerance_change=0)

    def distance() -> Tensor:
        return server.squared_distance(x, y.softmax(1) if fixed is None else fixed)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = distance()
        value.backward(inputs=variables)
        return value

    best = Trial(x.detach().clone(), y.argmax(1) if fixed is None else fixed, math.inf)
    for _ in ticks:
        optimizer.step(closure)
        reached = distance().item()
        if not math.isfinite(reached):
            break
        if reached < best.distance:
            best = Trial(x.detach().clone(), y.argmax(1) if fixed is None else fixed, reached)
    return best


def inverting_gradients(
    model: nn.Module,
    update: SharedUpdate,
    *,
    labels: Int[Tensor, " b"] | None = None,
    steps: int = 24_000,
    restarts: int = 1,
    total_variation: float | int = 1e-4,
    bounds: tuple[Tensor, Tensor] | None = None,
    batch_size: int | None = None,
    time_limit: float | int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Reconstruction:
    """Inverting Gradients (Geiping, Bauermeister, Dröge, Moeller, NeurIPS 2020): cosine distance and total variation.

    Images (b, C, H, W), standard normal at first, follow Adam on the *signs* of the gradient of

        1 - cos(g(x), g*) + total_variation * TV(x),    TV = mean |x_right - x| + mean |x_below - x|,

    at a step length of 0.1 that falls tenfold after 3/8, 5/8 and 7/8 of the steps, each step followed by a projection
    on `bounds` (least and greatest value, as `(0 - mean) / std` and `(1 - mean) / std` of pixels). Steps and weights
    are those of the authors' experiments. The paper takes labels as known, since they can be read off the gradient:
    without `labels` this is done (`infer_labels`).

    The nearest of `restarts` starts is kept. Budgets, result and errors as for `dlg`.
    """
    server = _server(model, update, batch_size, device, dtype)
    known = _fitting(infer_labels(model, update, batch_size=server.count) if labels is None else labels, server)
    if total_variation and len(server.input_shape) < 2:
        raise ValueError(f"total variation is of images, not of samples of shape {server.input_shape}: set it to 0")

    def cost(x: Tensor) -> Tensor:
        distance = server.cosine_distance(x, known)
        return distance + total_variation * variation(x) if total_variation else distance

    def trial(generator: torch.Generator, clock: Clock) -> Trial:
        x = server.noise(server.count, *server.input_shape, generator=generator)
        x = _descend(x, cost, clock.ticks(steps), steps, bounds)
        return Trial(x, known, server.cosine_distance(x, known).item())

    return _nearest(server, trial, steps, restarts, seed, Clock(server.count, time_limit, progress))


def _descend(
    x: Tensor, cost: Callable[[Tensor], Tensor], ticks: Iterator[int], steps: int, bounds: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Adam on the signs of the gradient of `cost`, from x."""
    x = x.requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=RATE)
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(share * steps) for share in DECAY], gamma=0.1)
    for _ in ticks:
        x.grad = torch.autograd.grad(cost(x), x)[0].sign()
        optimizer.step()
        decay.step()
        if bounds is not None:
            x.data.clamp_(bounds[0].to(x), bounds[1].to(x))
    return x.detach()


def variation(x: Float[Tensor, "*batch H W"]) -> Float[Tensor, ""]:
    """Mean absolute difference between neighbours, across plus down: the anisotropic form of Inverting Gradients."""
    return (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


def closed_form(
    model: nn.Module, update: SharedUpdate, *, layer: str | None = None, device: str | torch.device | None = None
) -> Reconstruction:
    """One sample by one division, a row of dL/dW over its entry of dL/dbeta (Phong et al. 2018; Geiping et al. 2020).

    Exact for b = 1, and for it alone (`spear.theory.single_sample`). `layer` names a linear layer with a bias, whatever
    follows it; the default is the first that reads the data.

    Raises `ValueError` for more than one sample, for a layer that does not exist or has no bias, and for gradients that
    do not fit the model.
    """
    started = time.monotonic()
    gradients = check_gradients(model, update)
    chosen = [x for x in linear_layers(model) if (x.name == layer if layer else x.from_data)]
    if not chosen or not {f"{chosen[0].name}.weight", f"{chosen[0].name}.bias"} <= gradients.keys():
        raise ValueError(
            f"the closed form needs the gradients of weight and bias of {layer or 'a layer that reads data'}"
        )
    name = chosen[0].name
    dW, dbeta = (gradients[f"{name}.{part}"].to(compute_device(device)) for part in ("weight", "bias"))
    x = theory.single_sample(dW, dbeta)
    shape = input_shape(name, len(x), update) if chosen[0].from_data else (len(x),)
    one = Trial(x.reshape(1, *shape), infer_labels(model, update, batch_size=1), 0.0)
    return _uncertified(one, f"one division in {name}", Stats(time.monotonic() - started))


def infer_labels(model: nn.Module, update: SharedUpdate, *, batch_size: int | None = None) -> Int[Tensor, " b"]:
    """The labels of a batch, in ascending order, from the gradient of the last layer's bias.

    It is the mean of p, the softmax, less counts / b. A class of a negative entry occurs for certain; at b = 1 that is
    the label (iDLG, Zhao et al. 2020). The others join one by one where b mean(p) - b dL/dbeta exceeds their count
    most, with the model's p for normal noise in place of the batch's: nearly right before training, a guess after it
    (after Wainakh et al. 2022, label leakage from gradients).

    Raises `ValueError` where the batch size is not known, or the last layer has no bias.
    """
    gradients, count = check_gradients(model, update), _count(update, batch_size)
    last = linear_layers(model)[-1]
    if f"{last.name}.bias" not in gradients:
        raise ValueError(f"labels are inferred from the bias gradient of {last.name}, which the update does not have")
    g = gradients[f"{last.name}.bias"].double() * (count if update.reduction == "mean" else 1)
    due = count * _prior(model, update).to(g) - g
    counts = (g < 0).long() if int((g < 0).sum()) <= count else torch.zeros_like(g, dtype=torch.long)
    for _ in range(count - int(counts.sum())):
        counts[(due - counts).argmax()] += 1
    return torch.arange(len(g), device=g.device).repeat_interleave(counts)


@torch.no_grad()
def _prior(model: nn.Module, update: SharedUpdate) -> Float[Tensor, " C"]:
    """The mean softmax of the model for 64 samples of normal noise."""
    like = next(model.parameters())
    noise = torch.randn(64, *_shape(update), generator=torch.Generator().manual_seed(0), dtype=like.dtype)
    return copy.deepcopy(model).eval()(noise.to(like.device)).softmax(1).mean(0)


def _server(
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
    return Server(model, chosen, observed, _count(update, batch_size), _shape(update), update.reduction)


def _count(update: SharedUpdate, batch_size: int | None) -> int:
    count = update.count if batch_size is None else batch_size
    if count is None:
        raise ValueError("the update does not disclose its batch size: give batch_size")
    if count < 1:
        raise ValueError(f"a batch has at least 1 sample, not {count}")
    return count


def _shape(update: SharedUpdate) -> tuple[int, ...]:
    if update.input_shape is None:
        raise ValueError("the update does not disclose the shape of a sample, which is needed to begin with one")
    return update.input_shape


def _fitting(labels: Int[Tensor, " k"], server: Server) -> Int[Tensor, " k"]:
    if len(labels) != server.count:
        raise ValueError(f"{len(labels)} labels for a batch of {server.count}")
    return labels.to(server.parameters[0].device)


def _nearest(
    server: Server,
    trial: Callable[[torch.Generator, Clock], Trial],
    steps: int,
    restarts: int,
    seed: int,
    clock: Clock,
) -> Reconstruction:
    """The trial whose gradients are nearest to those observed, of as many as the budget allows."""
    if steps < 1 or restarts < 1:
        raise ValueError(f"at least 1 step and 1 start, not {steps} and {restarts}")
    generator, trials = torch.Generator().manual_seed(seed), []
    while len(trials) < restarts and not (trials and clock.late):
        trials.append(trial(generator, clock))
    best = min(trials, key=lambda t: t.distance if math.isfinite(t.distance) else math.inf)
    reason = f"gradients matched to a distance of {best.distance:.1e}"
    return _uncertified(best, reason, Stats(clock.seconds, len(trials), clock.steps))


def _uncertified(trial: Trial, how: str, stats: Stats) -> Reconstruction:
    """A baseline's result: nothing shows the server which of its samples are true."""
    count = len(trial.inputs)
    residuals = torch.full((count,), math.inf, dtype=torch.float64)
    nothing = torch.zeros(count, dtype=torch.bool)
    return Reconstruction(trial.inputs, trial.labels, count, residuals, nothing, False, f"not certified: {how}", stats)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, ""]:
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))
