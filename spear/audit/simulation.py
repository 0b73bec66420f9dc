"""Attacks by simulation: what comes back of a batch that the auditor holds, and the largest that comes back whole.

Truth and guess may meet here; the attacker in the simulation still sees the update alone.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spear import inversion
from spear.audit.forecast import Forecast
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

    def attack(
        self, model: nn.Module, update: SharedUpdate, method: str = "auto", forecast: Forecast | None = None
    ) -> Reconstruction:
        """What `spear.attack` returns, before its time where a forecast says so. Raises as it does: `Refusal` where no
        method can begin."""
        return inversion.attack(model, update, method=method, progress=forecast, **vars(self))


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


def reach(
    model: nn.Module, sample: Sample, method: str, *, most: int, first: int = 1, options: Options = Options()
) -> Reach:
    """Batches from `first` to `most` in growing steps until one does not come back whole, then half the gap each time,
    over sizes an eighth apart. What a batch cannot reach at its rate is given up before its time."""
    sizes = _sizes(min(_least(model, sample), most), most)
    before = found = Reach(method, 0, 0.0, None, "", most)
    batch = max(size for size in sizes if size <= max(first, sizes[0]))
    while batch:
        after = _tried(found, batch, model, sample, options)
        before, found = (found if after.largest > found.largest else before), after
        batch = _following(before, found, sizes, options.time_limit)
    return found


def _sizes(least: int, most: int) -> list[int]:
    """Batches that are tried: from the least to the most, each an eighth larger than the one before."""
    sizes = [least]
    while sizes[-1] < most:
        sizes.append(min(most, sizes[-1] + max(1, sizes[-1] // FINENESS)))
    return sizes


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
        update, forecast = gradient(model, *sample.take(batch)), Forecast(options.time_limit)
        result = options.attack(model, update, found.method, forecast)
    except ValueError as error:  # a refusal, or a batch too small for batch normalisation
        return replace(found, failed=batch, reason=str(error))
    if not result.complete and not (len(result.inputs) == batch and bool(result.differences.all())):
        return replace(found, failed=batch, reason=result.reason)
    return replace(found, largest=batch, seconds=time.monotonic() - started)


def _following(before: Reach, found: Reach, sizes: list[int], time_limit: float | int | None) -> int:
    """The batch to try next, 0 where none is left; `before` is what was known before the last that came back whole."""
    between = [size for size in sizes if found.largest < size < (found.failed or math.inf)]
    if found.failed is not None:
        return between[len(between) // 2] if between else 0
    aim = found.largest * _growth(before, found, time_limit)
    return max((size for size in between if size <= aim), default=min(between, default=0))


def _growth(before: Reach, found: Reach, time_limit: float | int | None) -> float:
    """By how much larger a batch takes all of the time, if its power of the size grows twice as fast as it did: 2 at
    most."""
    if not before.largest or not time_limit or found.seconds <= before.seconds:
        return 2.0
    power = math.log(found.seconds / before.seconds) / math.log(found.largest / before.largest)
    return min(2.0, (time_limit / found.seconds) ** (1 / (2 * power)))


@dataclass(frozen=True)
class Comparison:
    """An attack against the truth, over `sent` samples: how many came back `exact`, how many `recognised` (from 20 dB
    on), how many `certified`; the `psnr` (dB) of the best one, and why the attack ended, in words. `in_time`: it ended
    by itself, not by its time limit, nor because that was out of reach."""

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
    *,
    in_time: bool = True,
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
        in_time=in_time,
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
