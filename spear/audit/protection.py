"""What is left of the attack behind each defence, by simulation."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor, nn

from spear.audit.forecast import Forecast
from spear.audit.sample import Sample
from spear.audit.simulation import Comparison, Options, compare, entering
from spear.federated import clients, defences, privacy
from spear.federated.clients import gradient
from spear.federated.update import SharedUpdate

AGGREGATED = 8  # clients in the sum that secure aggregation shows
CLIP, NOISE_MULTIPLIER = 1.0, 1.0  # of DP-SGD
Client = Callable[[nn.Module, Tensor, Tensor, Generator], SharedUpdate]


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


def trials(
    model: nn.Module, sample: Sample, count: int, *, others: Sample, options: Options
) -> dict[str, Callable[[], Tested]]:
    """Attacks behind every defence, yet to be made, on the first `count` of `sample`; the other clients of a sum have
    samples of `others`. By a few words each; the first is no defence at all."""
    batch = sample.take(count)
    return {
        f"defence: {defence.name}": partial(_tested, defence, model, batch, options)
        for defence in _defences(others, count)
    }


def _tested(defence: Defence, model: nn.Module, batch: tuple[Tensor, Tensor], options: Options) -> Tested:
    """What is left of the attack behind a defence; where that is nothing, in double precision too."""
    try:
        found = _behind(defence, model, batch, options)
    except (ValueError, ImportError, NotImplementedError) as error:  # Opacus knows only its own layers
        return Tested(defence.name, defence.advice, None, str(error))
    rounded = False
    if not found.recognised and defence.rounds and next(model.parameters()).dtype == torch.float32:
        wide = copy.deepcopy(model).double()
        rounded = _behind(defence, wide, (batch[0].double(), batch[1]), options).recognised > 0
    return Tested(defence.name, defence.advice, found, rounded=rounded)


def _behind(defence: Defence, model: nn.Module, batch: tuple[Tensor, Tensor], options: Options) -> Comparison:
    """What the attack makes of a client's update behind a defence. Raises where there is no such client or attack."""
    update = defence.client(model, *batch, Generator().manual_seed(options.seed))
    forecast = Forecast(options.time_limit)
    result = options.attack(model, update, forecast=forecast)
    in_time = not forecast.hopeless and (options.time_limit is None or result.stats.seconds < options.time_limit)
    return compare(result, entering(model, options.layer, batch[0]), batch[1], in_time=in_time)


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
