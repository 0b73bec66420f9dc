"""A client's local training as the server can repeat it: what was disclosed, the state after each step, rounding."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from spear.federated.update import SharedUpdate
from spear.network.problem import NetworkView, Targets, passes
from spear.reconstruction import Refusal

MOST_STEPS = 10_000  # that are simulated, whatever a client says


@dataclass(frozen=True)
class Training:
    """What a client disclosed of its local training: sample count, the steps' sizes, learning rate and momentum.

    `dropped` samples of those told are in no step: the last mini-batch of an epoch, a smaller one, is left out.
    """

    count: int
    sizes: tuple[int, ...]
    rate: float | int
    momentum: float | int
    dropped: int = 0

    @classmethod
    def of(cls, update: SharedUpdate) -> "Training":
        """Raises `Refusal` where the client does not disclose what a simulation needs."""
        told = {"count": update.count, "learning_rate": update.learning_rate, "mini_batch": update.mini_batch}
        hidden = [name for name, value in told.items() if value is None]
        if hidden:
            what = f"an update of {update.local_steps} local steps is not the gradient of one batch"
            verb = "is" if len(hidden) == 1 else "are"
            raise Refusal(f"{what}, and its {' and '.join(hidden)} {verb} not disclosed")
        largest = max(g.numel() for g in update.gradients.values())
        if update.count > largest or update.local_steps > MOST_STEPS:
            what = f"{update.count:,} samples in {update.local_steps:,} local steps"
            raise Refusal(f"{what} are not simulated: at most {largest:,} in {MOST_STEPS:,}")
        epoch, whole = _epoch(update.count, update.mini_batch), update.count // update.mini_batch * update.mini_batch
        if update.local_steps % len(epoch) and whole:
            epoch = _epoch(whole, update.mini_batch)
        if update.local_steps % len(epoch):
            raise Refusal(f"{update.local_steps} local steps are no whole epochs of {len(epoch)} mini-batches")
        epochs = update.local_steps // len(epoch)
        told = update.learning_rate, update.momentum, update.count - sum(epoch)
        return cls(sum(epoch), tuple(epoch * epochs), *told)

    @property
    def epochs(self) -> int:
        """How often each sample was visited."""
        return sum(self.sizes) // self.count

    def scale(self, step: int) -> float:
        """How much of a step's gradient is in the total change: the learning rate, and what momentum repeats of it."""
        left = len(self.sizes) - step
        return self.rate * sum(self.momentum**k for k in range(left))


def _epoch(count: int, size: int) -> list[int]:
    """The sizes of the mini-batches of an epoch."""
    return [len(part) for part in torch.arange(count).split(size)]


@dataclass(frozen=True)
class State:
    """A client's weights after some steps, and its momentum: per layer the running sum of gradients."""

    problem: NetworkView
    speed: tuple[Float[Tensor, "_m _n"], ...] | None = None

    def after(
        self, inputs: Float[Tensor, "s n"], labels: Int[Tensor, " s"], training: Training
    ) -> tuple["State", Float[Tensor, "s m"]]:
        """The state after one step on these samples, and their back-propagated vectors at the first layer."""
        now = self.problem
        counts = F.one_hot(labels, now.classes).to(inputs)
        run = passes(now, inputs, Targets(counts, now.unit(len(inputs)), 0.0))
        step = [d.T @ now.extend(k, x) for k, (d, x) in enumerate(zip(run.deltas, run.inputs, strict=True))]
        if self.speed is not None:
            step = [training.momentum * v + g for v, g in zip(self.speed, step, strict=True)]
        moved = [now.affine(k) - training.rate * v for k, v in enumerate(step)]
        weights = tuple(a[:, : w.shape[1]] for a, w in zip(moved, now.weights, strict=True))
        biases = tuple(None if b is None else a[:, -1] for a, b in zip(moved, now.biases, strict=True))
        return State(replace(now, weights=weights, biases=biases), tuple(step)), run.deltas[0]


def rounding(weights: Float[Tensor, "m n"], eps: float, steps: int) -> float:
    """The standard deviation per entry that rounding the weights after each of so many steps leaves in their change.

    Each rounding is uniform over one unit in the last place, `eps` times the power of two below the weight.
    """
    unit = eps * 2.0 ** (torch.frexp(weights[weights != 0])[1].double() - 1)
    return float(unit.pow(2).sum().div(weights.numel()).mul(steps / 12).sqrt()) if len(unit) else math.nan
