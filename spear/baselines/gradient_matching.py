"""What was known before SPEAR: gradient matching (DLG, iDLG, Inverting Gradients), and the closed form for one sample.

Each takes what `spear.attack` takes, a model and an update, and returns the same `Reconstruction`, so that one judge
serves all. What gradient matching returns is approximate, and nothing vouches for it: no sample is ever certified.
"""

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spear.baselines.closed_form import infer_labels
from spear.baselines.server import Clock, Server, Trial, server_of, uncertified
from spear.federated.update import SharedUpdate
from spear.reconstruction import Progress, Reconstruction, Stats

RATE = 0.1  # step length of Inverting Gradients, divided by ten after each of these shares of its steps
DECAY = (3 / 8, 5 / 8, 7 / 8)


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
    server = server_of(model, update, batch_size, device, dtype)
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
    server = server_of(model, update, batch_size, device, dtype)
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
    return uncertified(best, reason, Stats(clock.seconds, len(trials), clock.steps))
