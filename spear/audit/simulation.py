"""Attacks by simulation: what comes back of a batch that the auditor holds, and the largest that comes back whole.

Truth and guess may meet here; the attacker in the simulation still sees the update alone.
"""

import time
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spear import inversion
from spear.audit.sample import Sample
from spear.federated.clients import gradient
from spear.federated.update import SharedUpdate
from spear.metrics import evaluation
from spear.models.watching import linear_layer, watched
from spear.reconstruction import Reconstruction

RECOGNISED = 20.0  # dB: from about here on a picture shows what it shows
FINENESS = 8  # the largest batch is found to one part in so many


@dataclass(frozen=True)
class Options:
    """How a simulated attack is run: on which layer (None: on the data), for how many seconds, from which seed."""

    layer: str | None = None
    time_limit: float | int | None = None
    seed: int = 0
    device: str | None = None

    def attack(self, model: nn.Module, update: SharedUpdate, method: str = "auto") -> Reconstruction:
        """What `spear.attack` returns. Raises as it does: `Refusal` where no method can begin."""
        return inversion.attack(model, update, method=method, **vars(self))


@dataclass(frozen=True)
class Reach:
    """The largest batch that `method` recovered whole, each sample certified, or its difference from the mean, in
    simulation.

    `failed` is the smallest batch tried that did not come back whole, with its `reason`; None where all did, up to
    `most`, the largest batch that was to be tried. `seconds` is the time that the largest one took.
    """

    method: str
    largest: int
    seconds: float
    failed: int | None
    reason: str
    most: int


def reach(model: nn.Module, sample: Sample, method: str, *, most: int, options: Options = Options()) -> Reach:
    """Double the batch until one does not come back whole, then halve the gap; `most` is the largest batch to try."""
    found, batch = Reach(method, 0, 0.0, None, "", most), min(_least(model, sample), most)
    while batch != found.largest:
        found = _tried(found, batch, model, sample, options)
        batch = _following(found)
    return found


def _least(model: nn.Module, sample: Sample) -> int:
    """The smallest batch that is worth a try: batch normalisation leaves nothing of one sample, of two but its
    epsilon."""
    try:
        gradient(model, *sample.take(1))
    except ValueError:
        return 3
    return 1


def _tried(found: Reach, batch: int, model: nn.Module, sample: Sample, options: Options) -> Reach:
    """What is known of the largest batch once this one was attacked."""
    started = time.monotonic()
    try:
        result = options.attack(model, gradient(model, *sample.take(batch)), found.method)
    except ValueError as error:  # a refusal, or a batch too small for batch normalisation
        return replace(found, failed=batch, reason=str(error))
    if not result.complete and not (len(result.inputs) == batch and bool(result.differences.all())):
        return replace(found, failed=batch, reason=result.reason)
    return replace(found, largest=batch, seconds=time.monotonic() - started)


def _following(found: Reach) -> int:
    """The batch to try next; the largest again where none is left to try."""
    if found.failed is None:
        return min(2 * found.largest, found.most)
    if found.failed - found.largest <= max(1, found.largest // FINENESS):
        return found.largest
    return (found.largest + found.failed) // 2


@dataclass(frozen=True)
class Comparison:
    """An attack against the truth, over `sent` samples: how many came back `exact`, how many `recognised` (from 20 dB
    on), how many `certified`; the `psnr` (dB) of the best one, and why the attack ended, in words. `in_time`: it ended
    by itself, not by its time limit."""

    sent: int
    exact: int
    recognised: int
    certified: int
    psnr: float
    reason: str
    in_time: bool = True


def compare(
    result: Reconstruction,
    truth: Float[Tensor, "b *_shape"],
    labels: Int[Tensor, " b"],
    time_limit: float | int | None = None,
) -> Comparison:
    """What an attack returned, beside the truth."""
    report = evaluation.evaluate(result, truth, labels)
    return Comparison(
        sent=len(truth),
        exact=int(report.recovered.sum()),
        recognised=int((report.psnr >= RECOGNISED).sum()),
        certified=int(result.certified.sum()),
        psnr=float(report.psnr.max()),
        reason=result.reason,
        in_time=time_limit is None or result.stats.seconds < time_limit,
    )


def entering(
    model: nn.Module, layer: str | None, inputs: Float[Tensor, "b *input_shape"]
) -> Float[Tensor, "b *_shape"]:
    """What enters the linear layer of that name, token by token; the inputs themselves where no layer is named."""
    if layer is None:
        return inputs
    with torch.no_grad(), watched(linear_layer(model, layer)) as seen:
        model(inputs)
    return seen[0][0].flatten(0, -2)
