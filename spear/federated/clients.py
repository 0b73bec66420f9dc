"""Clients: the gradient of one batch (FedSGD), local training (FedAvg), accumulation, sums over clients.

What is done to an update before it is sent is in `spear.federated.defences`, DP-SGD in `spear.federated.privacy`.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Generator, Tensor, nn

from spear.federated.losses import logits_of
from spear.federated.update import SharedUpdate, check_told


def gradient(
    model: nn.Module,
    inputs: Num[Tensor, "b *input_shape"],
    labels: Int[Tensor, " labels"] | Float[Tensor, "targets *outputs"],
    *,
    reduction: str = "mean",
    loss: str = "cross_entropy",
) -> SharedUpdate:
    """The update of a FedSGD client: gradients of the loss of one batch by every parameter.

    `inputs` holds one sample per row, in the dtype of the model, or numbers of a vocabulary; `labels` the class of each
    sample, or, unless the loss is cross-entropy, numbers (b, outputs) that the outputs are compared with. The model is
    used in the mode that it is in: in training mode dropout draws from torch's own generator, and batch normalisation
    takes the batch's statistics; its running statistics after the step are the update's `buffers`. The model is left
    unchanged, its `.grad` fields and buffers included.

    A model may return its logits among other things, by that name (`spear.federated.losses.logits_of`).

    Raises `ValueError` for an unknown reduction or loss, for inputs and labels of unequal length, for a label that the
    model has no output for, and for several outputs of which none is called logits.
    """
    check_told({"loss": loss, "reduction": reduction})
    if len(inputs) != len(labels):
        raise ValueError(f"{len(inputs)} inputs but {len(labels)} labels")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    names, parameters = tuple(trained), tuple(trained.values())
    with _kept_buffers(model) as buffers:
        logits = logits_of(model(inputs))
        _check_labels(labels, logits, loss)
        value = batch_loss(logits, labels, loss, reduction)
        values = torch.autograd.grad(value, parameters, allow_unused=True)
    found = {n: g for n, g in zip(names, values, strict=True) if g is not None}
    return SharedUpdate(found, reduction, len(inputs), tuple(inputs.shape[1:]), loss=loss, buffers=buffers or None)


def _check_labels(labels: Tensor, logits: Float[Tensor, "b outputs"], loss: str) -> None:
    """Raises `ValueError` for a label without an output, and for numbers that cannot be compared with the outputs."""
    if labels.is_floating_point():
        if loss == "cross_entropy" or labels.shape != logits.shape:
            what = f"numbers of shape {tuple(labels.shape)} as labels"
            raise ValueError(f"{what}: {loss} of outputs {tuple(logits.shape)} does not compare these")
        return
    most = 2 if logits.shape[1] == 1 and loss != "cross_entropy" else logits.shape[1]
    if int(labels.min()) < 0 or int(labels.max()) >= most:
        span = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"labels run from {span}; the model has {logits.shape[1]} outputs")


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Buffers are put back at the end of the context, and what changed of them is then in the dictionary."""
    before, changed = {name: buffer.clone() for name, buffer in model.named_buffers()}, {}
    try:
        yield changed
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if not torch.equal(buffer, before[name]):
                    changed[name] = buffer.clone()
                    buffer.copy_(before[name])


def batch_loss(
    logits: Float[Tensor, "b outputs"],
    labels: Int[Tensor, " b"] | Float[Tensor, "b outputs"],
    loss: str,
    reduction: str,
) -> Float[Tensor, ""]:
    """One of `LOSSES` of a batch; "mean" is that over samples and, but for cross-entropy, over outputs."""
    if loss == "cross_entropy":
        return F.cross_entropy(logits, labels, reduction=reduction)
    outputs = logits.shape[1]
    wanted = labels if labels.is_floating_point() else F.one_hot(labels, max(outputs, 2))[:, -outputs:]
    wanted = wanted.to(logits)
    compare = F.mse_loss if loss == "squared_error" else F.binary_cross_entropy_with_logits
    return compare(logits, wanted, reduction=reduction)


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
    same = [f.name for f in fields(SharedUpdate) if f.name not in ("gradients", "count", "buffers")]
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
    return replace(first, gradients=joined, count=sum(counts), clients=counts, noise=noise, buffers=None)


def _weights(counts: tuple[int, ...], by: str) -> list[float]:
    return [count / sum(counts) if by == "samples" else 1 / len(counts) for count in counts]
