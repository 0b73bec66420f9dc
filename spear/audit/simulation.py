"""Attacks by simulation: the largest batch that comes back whole, and what is left of the attack behind a defence.

Here the client is simulated on samples that the auditor holds, so truth and guess may meet; the attacker in the
simulation still sees the update alone.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from spear import inversion, reconstruction
from spear.audit.sample import Sample
from spear.federated import clients, defences, privacy
from spear.federated.clients import gradient
from spear.federated.update import SharedUpdate
from spear.metrics import evaluation

RECOGNISED = 20.0  # dB: from about here on a picture shows what it shows
FINENESS = 8  # the largest batch is found to one part in so many
AGGREGATED = 8  # clients in the sum that secure aggregation shows
CLIP, NOISE_MULTIPLIER = 1.0, 1.0  # of DP-SGD
Client = Callable[[nn.Module, Tensor, Tensor, Generator], SharedUpdate]


@dataclass(frozen=True)
class Options:
    """How a simulated attack is run: on which layer (None: on the data), for how many seconds, from which seed."""

    layer: str | None = None
    time_limit: float | int | None = None
    seed: int = 0
    device: str | None = None

    def attack(
        self, model: nn.Module, update: SharedUpdate, method: str = "auto"
    ) -> reconstruction.Reconstruction | str:
        """The result, or why the attack could not be started, in words."""
        try:
            return inversion.attack(model, update, method=method, **vars(self))
        except ValueError as error:
            return str(error)


@dataclass(frozen=True)
class Reach:
    """The largest batch that `method` recovered whole, each sample certified, in simulation.

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
    largest, seconds, failed, reason, batch = 0, 0.0, None, "", 1
    while batch <= most and batch != largest:
        started = time.monotonic()
        result = options.attack(model, gradient(model, *sample.take(batch)), method)
        if not isinstance(result, str) and result.complete:
            largest, seconds = batch, time.monotonic() - started
        else:
            failed, reason = batch, result if isinstance(result, str) else result.reason
        batch = min(2 * batch, most) if failed is None else (largest + failed) // 2
        if failed is not None and failed - largest <= max(1, largest // FINENESS):
            break
    return Reach(method, largest, seconds, failed, reason, most)


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


@dataclass(frozen=True)
class Defence:
    """A defence by name, what to switch on, and the client that uses it. `rounds`: what it sends are weights, whose
    rounding in single precision may hide what the defence itself does not."""

    name: str
    advice: str
    client: Client
    rounds: bool = False


@dataclass(frozen=True)
class Tested:
    """What was left of the attack behind a defence.

    `outcome` is None where such a client could not be simulated, or the attack does not take its update: `reason`.
    `rounded` says that nothing came back in single precision, but in double precision it does.
    """

    name: str
    advice: str
    outcome: Comparison | None
    reason: str = ""
    rounded: bool = False

    @property
    def verdict(self) -> str:
        """In words: whether not one sample came back recognisable, or some, or some exactly."""
        if self.outcome is None:
            return "not attacked"
        if self.rounded:
            return "only rounding hides it"
        if not self.outcome.recognised:
            return "stops this attack" if self.outcome.in_time else "not in the time given"
        return "does not stop it" if self.outcome.exact else "blurs"


def compare(
    result: reconstruction.Reconstruction,
    truth: Float[Tensor, "b *_shape"],
    labels: Int[Tensor, " b"],
    time_limit: float | int | None = None,
) -> Comparison:
    """What an attack returned, beside the truth."""
    report = evaluation.evaluate(result, truth, labels)
    recognised = int((report.psnr >= RECOGNISED).sum())
    exact, best = int(report.recovered.sum()), float(report.psnr.max())
    in_time = time_limit is None or result.stats.seconds < time_limit
    return Comparison(len(truth), exact, recognised, int(result.certified.sum()), best, result.reason, in_time)


def try_defences(
    model: nn.Module,
    sample: Sample,
    count: int,
    *,
    others: Sample,
    options: Options = Options(),
    progress: Callable[[str], None] | None = None,
) -> tuple[Tested, ...]:
    """Every defence on the first `count` of `sample`, attacked; the other clients of a sum have samples of `others`.

    The first entry is no defence at all. `progress` is called with each defence's name before it is tried.
    """
    tested = []
    for defence in _defences(others, count):
        if progress:
            progress(defence.name)
        batch = sample.take(count)
        found = _behind(defence, model, batch, options)
        nothing = not isinstance(found, str) and not found.recognised
        if nothing and defence.rounds and next(model.parameters()).dtype == torch.float32:
            again = _behind(defence, copy.deepcopy(model).double(), (batch[0].double(), batch[1]), options)
            rounded = not isinstance(again, str) and again.recognised > 0
        else:
            rounded = False
        outcome, reason = (None, found) if isinstance(found, str) else (found, "")
        tested.append(Tested(defence.name, defence.advice, outcome, reason, rounded))
    return tuple(tested)


def _behind(defence: Defence, model: nn.Module, batch: tuple[Tensor, Tensor], options: Options) -> Comparison | str:
    """What the attack makes of a client's update behind a defence, or why there is none, in words."""
    try:
        update = defence.client(model, *batch, Generator().manual_seed(options.seed))
        result = options.attack(model, update)
    except (ValueError, ImportError, NotImplementedError) as error:  # Opacus knows only its own layers
        return str(error)
    if isinstance(result, str):
        return result
    return compare(result, entering(model, options.layer, batch[0]), batch[1], options.time_limit)


def entering(
    model: nn.Module, layer: str | None, inputs: Float[Tensor, "b *input_shape"]
) -> Float[Tensor, "b *_shape"]:
    """What enters the linear layer of that name; the inputs themselves where no layer is named."""
    if layer is None:
        return inputs
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        handle.remove()
    return seen[0]


def _plain(model: nn.Module, x: Tensor, y: Tensor, _generator: Generator) -> SharedUpdate:
    return gradient(model, x, y)


def _then(change: Callable[..., SharedUpdate], *arguments: object, draws: bool = False) -> Client:
    """The client that changes its gradient before it sends it; `draws` says whether that takes chance."""

    def client(model: nn.Module, x: Tensor, y: Tensor, generator: Generator) -> SharedUpdate:
        return change(gradient(model, x, y), *arguments, **({"generator": generator} if draws else {}))

    return client


def _private(model: nn.Module, x: Tensor, y: Tensor, generator: Generator) -> SharedUpdate:
    return privacy.private(model, x, y, clip=CLIP, noise_multiplier=NOISE_MULTIPLIER, generator=generator)


def _local(model: nn.Module, x: Tensor, y: Tensor, _generator: Generator) -> SharedUpdate:
    return clients.local_training(model, x, y, epochs=2, mini_batch=max(1, len(x) // 4), learning_rate=0.1)


def _aggregated(others: Sample, model: nn.Module, x: Tensor, y: Tensor, _generator: Generator) -> SharedUpdate:
    inputs, labels = others.take(AGGREGATED * len(x))
    crowd = zip(inputs.split(len(x))[1:], labels.split(len(x))[1:], strict=True)  # the first may be this client's
    return clients.aggregated([gradient(model, x, y), *(gradient(model, *batch) for batch in crowd)])


def _defences(others: Sample, count: int) -> tuple[Defence, ...]:
    return (
        Defence("none", "the gradient of one batch, as it is", _plain),
        Defence("float16", "send half precision", _then(defences.half_precision)),
        Defence("bfloat16", "send brain floats", _then(defences.half_precision, torch.bfloat16)),
        Defence("8 bits", "round each entry at random to 8 bits", _then(defences.quantised, 8, draws=True)),
        Defence("4 bits", "round each entry at random to 4 bits", _then(defences.quantised, 4, draws=True)),
        Defence("random pruning", "send a random quarter", _then(defences.pruned_random, 0.25, draws=True)),
        Defence("top 10 %", "send the largest tenth of the entries", _then(defences.pruned_top_k, 0.1)),
        Defence("local training", "two epochs of four mini-batches, learning rate 0.1", _local, rounds=True),
        Defence("secure aggregation", f"sum over {AGGREGATED} clients of {count}", partial(_aggregated, others)),
        Defence("DP-SGD", f"clip at {CLIP:g}, noise multiplier {NOISE_MULTIPLIER:g}", _private),
    )
