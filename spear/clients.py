"""Clients as deployments have them: local epochs, accumulated gradients, DP-SGD, and sums that hide who sent what."""

import copy
import importlib
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from spear.federated import SharedUpdate, gradient

ORDERS = [1 + 10 ** (k / 10) for k in range(-80, 30)]  # of the Rényi divergence: fine near 1, where noise is weak


def local_training(
    model: nn.Module,
    inputs: Float[Tensor, "b *input_shape"],
    labels: Int[Tensor, " b"],
    *,
    epochs: int = 1,
    mini_batch: int | None = None,
    learning_rate: float | int = 0.1,
    momentum: float | int = 0.0,
    shuffle: bool = False,
    generator: Generator | None = None,
) -> SharedUpdate:
    """The update of a FedAvg client: its weights' change by `epochs` passes of SGD over its samples.

    Each step takes the next `mini_batch` samples (default: all), in the order given or, with `shuffle`, in a new one
    each epoch, and subtracts `learning_rate` times the mean gradient (with `momentum`: times its running sum, as
    `torch.optim.SGD` does). The model is left unchanged. Source: McMahan et al. 2017, Federated Averaging.

    Raises `ValueError` for epochs, mini-batch or learning rate that are not positive, for a momentum outside [0, 1),
    and as `spear.federated.gradient` does.
    """
    size = len(inputs) if mini_batch is None else mini_batch
    if min(epochs, size) < 1 or learning_rate <= 0 or not 0 <= momentum < 1:
        raise ValueError(
            f"epochs {epochs}, mini-batch {size} and learning rate {learning_rate} must be positive, "
            f"and 0 <= momentum {momentum} < 1"
        )
    local = copy.deepcopy(model)
    optimizer = torch.optim.SGD(local.parameters(), lr=learning_rate, momentum=momentum)
    steps = 0
    for _ in range(epochs):
        order = torch.randperm(len(inputs), generator=generator) if shuffle else torch.arange(len(inputs))
        for index in order.to(inputs.device).split(size):
            sent = gradient(local, inputs[index], labels[index]).gradients
            for name, parameter in local.named_parameters():
                parameter.grad = sent.get(name)
            optimizer.step()
            steps += 1
    after = dict(local.named_parameters())
    change = {name: (p - after[name]).detach() for name, p in model.named_parameters() if p.requires_grad}
    local_training = {"local_steps": steps, "learning_rate": learning_rate, "mini_batch": size, "momentum": momentum}
    return SharedUpdate(change, count=len(inputs), input_shape=tuple(inputs.shape[1:]), **local_training)


def accumulated(
    model: nn.Module, inputs: Float[Tensor, "b *input_shape"], labels: Int[Tensor, " b"], *, micro_batch: int
) -> SharedUpdate:
    """The gradient of a client without the memory for its whole batch: the mean over micro-batches of their means.

    Equal to `spear.federated.gradient` where `micro_batch` divides the batch; else the samples of the last, smaller
    one weigh more. Raises `ValueError` for a micro-batch under 1, and as `gradient` does.
    """
    if micro_batch < 1:
        raise ValueError(f"a micro-batch has at least 1 sample, not {micro_batch}")
    parts = zip(inputs.split(micro_batch), labels.split(micro_batch), strict=True)
    return replace(aggregated([gradient(model, x, y) for x, y in parts], by="clients"), clients=None)


def aggregated(updates: Sequence[SharedUpdate], *, by: str = "samples") -> SharedUpdate:
    """What secure aggregation lets the server see: one average of the updates of several clients.

    Weighted `by="samples"` (each client in proportion to its disclosed count: one large batch) or `by="clients"` (all
    clients equally). Source: Bonawitz et al. 2017, secure aggregation; the protocol hides the summands, not the sum.

    Raises `ValueError` for no updates, another weighting, updates of different parameters or local training, and for
    clients that do not disclose their counts.
    """
    if by not in ("samples", "clients"):
        raise ValueError(f"unknown weighting {by!r}: use 'samples' or 'clients'")
    counts = tuple(update.count for update in updates)
    if not updates or None in counts:
        raise ValueError(f"aggregation needs updates that disclose their counts, not {counts}")
    first = updates[0]
    same = [f.name for f in fields(SharedUpdate) if f.name not in ("gradients", "count")]
    for update in updates[1:]:
        if update.gradients.keys() != first.gradients.keys():
            raise ValueError("clients in one sum have gradients for the same parameters")
        if any(getattr(update, name) != getattr(first, name) for name in same):
            raise ValueError("clients in one sum disclose the same local training, reduction and compression")
    weights = _weights(counts, by) if first.reduction == "mean" else [1.0] * len(counts)
    joined = {
        name: sum(w * u.gradients[name] for w, u in zip(weights, updates, strict=True)) for name in first.gradients
    }
    noise = None if first.noise is None else first.noise * math.hypot(*weights)
    return replace(first, gradients=joined, count=sum(counts), clients=counts, noise=noise)


def _weights(counts: tuple[int, ...], by: str) -> list[float]:
    return [count / sum(counts) if by == "samples" else 1 / len(counts) for count in counts]


def private(
    model: nn.Module,
    inputs: Float[Tensor, "b *input_shape"],
    labels: Int[Tensor, " b"],
    *,
    clip: float | int,
    noise_multiplier: float | int,
    delta: float | int = 1e-5,
    sample_rate: float | int = 1.0,
    generator: Generator | None = None,
) -> SharedUpdate:
    """One step of DP-SGD, by Opacus: per-sample gradients clipped to the norm `clip`, summed, noise added, averaged.

    The noise has the standard deviation `noise_multiplier * clip` in each entry of the sum; `epsilon` at `delta` is
    that of Opacus' Rényi accountant for this one release, the batch having been drawn at `sample_rate` (infinite
    without noise). Needs the extra: `pip install "spear[privacy]"`. Source: Abadi et al. 2016, DP-SGD.

    Raises `ImportError` where Opacus is not installed, `ValueError` for a clip that is not positive or a negative
    noise multiplier, and as `spear.federated.gradient` does.
    """
    if clip <= 0 or noise_multiplier < 0:
        raise ValueError(f"clip {clip} must be positive and the noise multiplier {noise_multiplier} not negative")
    gradient(model, inputs[:1], labels[:1])  # refuses what no single gradient describes
    local = copy.deepcopy(model)
    for module in local.modules():  # Opacus listens to modules in training mode only, and only those with parameters
        module.training |= any(True for _ in module.parameters(recurse=False))
    local = _opacus("grad_sample").GradSampleModule(local, loss_reduction="sum")
    optimizer = _opacus("optimizers").DPOptimizer(
        torch.optim.SGD(local.parameters(), lr=1.0),
        noise_multiplier=noise_multiplier,
        max_grad_norm=clip,
        expected_batch_size=len(inputs),
        generator=generator,
    )
    # Inputs that require a gradient keep torch from warning about Opacus' backward hooks.
    F.cross_entropy(local(inputs.detach().clone().requires_grad_()), labels, reduction="sum").backward()
    optimizer.pre_step()
    found = {n: p.grad.detach() for n, p in local._module.named_parameters() if p.grad is not None}
    noise = noise_multiplier * clip / len(inputs)
    spent = {"epsilon": epsilon(noise_multiplier, delta=delta, sample_rate=sample_rate), "delta": delta}
    return SharedUpdate(found, "mean", len(inputs), tuple(inputs.shape[1:]), clip=clip, noise=noise, **spent)


def epsilon(
    noise_multiplier: float | int, *, delta: float | int = 1e-5, sample_rate: float | int = 1.0, steps: int = 1
) -> float:
    """The epsilon at `delta` of `steps` DP-SGD releases, by Opacus' Rényi accountant; infinite without noise."""
    if noise_multiplier == 0:
        return math.inf
    accountant = _opacus("accountants").RDPAccountant()
    accountant.history.append((noise_multiplier, sample_rate, steps))
    return float(accountant.get_epsilon(delta, alphas=ORDERS))


def _opacus(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"opacus.{module}")
    except ImportError as error:
        raise ImportError('DP-SGD needs Opacus: pip install "spear[privacy]"') from error
