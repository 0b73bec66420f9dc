"""A noisy or rounded update opened: what stands out of its noise in every layer, and how many samples that is."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spear.deployments.levels import block_size, cells, held_by, spacing
from spear.deployments.likelihood import Noisy
from spear.deployments.spectrum import ROUNDING, Scaled, Variance, scaled
from spear.federated.update import HALVES, SharedUpdate
from spear.network.problem import NetworkView, join

FULL = 0.5  # of the live rows or columns: a rank that no batch makes which an attack here reads exactly
LOUD = 30  # roundings of an entry: what is under that is rounding, no noise


@dataclass(frozen=True)
class Opening:
    """The gradients of the hidden layers, each scaled so that its noise is even.

    `weighted` says that samples were clipped, and so have weights of their own, at most the common one; `rounded` that
    every gradient holds few distinct values; `sigma` is the noise per entry of the gradients where it is disclosed.
    """

    problem: NetworkView
    layers: tuple[Scaled, ...]
    weighted: bool
    rounded: bool
    sigma: float | None = None

    @property
    def count(self) -> int:
        """How many samples stand out, at most as many as were disclosed.

        A layer whose noise is as it is thought to be is believed; of several the one that shows fewest, since what
        rounding adds stands out too. Where there is none, the largest step in any spectrum tells.
        """
        if self.problem.batch_size is not None:
            return self.layers[0].rank
        like_noise = [layer.rank for layer in self.layers if layer.is_even]
        return min(like_noise) if like_noise else max(layer.step for layer in self.layers)[1]

    @property
    def is_visible(self) -> bool:
        """Whether what the samples leave of the first gradient looks like noise: above rounding, its spectrum short."""
        first, J = self.layers[0].standing(self.count), self.problem.augmented(0)
        rounding = max(LOUD * self.problem.precision, 10 * ROUNDING) * float(J.norm()) / J.numel() ** 0.5
        return self.rounded or (first.sigma > rounding and first.is_noise)

    @property
    def is_even(self) -> bool:
        """Whether what the batch leaves of a layer is noise, and nothing else."""
        return any(layer.is_even for layer in self.layers)

    def noisy(self, count: int | None = None) -> Noisy:
        """The problem as the refinement takes it, for as many samples as stand out, or another number of them."""
        size = count or self.count
        found = [layer.standing(size if count else min(size, layer.rank)) for layer in self.layers]
        unit = self.problem.unit(self.problem.batch_size or size)
        lows, sigmas = tuple(f.low for f in found), tuple(self.sigma or f.sigma for f in found)
        return Noisy(self.problem, lows, sigmas, None if self.weighted else unit, unit)


def open_noisy(problem: NetworkView, told: SharedUpdate) -> Opening:
    """Every hidden layer of a problem, with the noise that its update `told`, or that it shows.

    Raises `ValueError` for a gradient that is zero.
    """
    if not all(bool(g.any()) for g in problem.weight_gradients):
        raise ValueError("a gradient has rank 0: it is zero everywhere")
    scale = told.loss_scale * (told.learning_rate or 1.0)
    sigma, rounded, layers = told.noise / scale if told.noise else None, True, []
    for k in range(problem.last + 1):
        width = _width(problem, k)
        guesses = [] if width is None else [width.square]
        layers.append(scaled(problem.augmented(k), sigma, problem.batch_size, [*guesses, *_floats(problem, k, told)]))
        rounded &= width is not None
    return Opening(problem, tuple(layers), told.clip is not None, rounded, sigma)


def holds_few_values(problem: NetworkView) -> bool:
    """Whether every layer's gradient was rounded to few values: then its rank is all that its live rows allow.

    Exact gradients of the first layer may hold few as well, as pictures do, and all of a sample or two.
    """
    hidden = problem.weight_gradients[: problem.last + 1]
    if any(block_size(W.flatten(), W.shape[1]) is None for W in hidden):
        return False
    ranks = [(problem.factors(k).rank, problem.augmented(k)) for k in range(problem.last + 1)]
    return any(rank >= FULL * min(int(J.any(1).sum()), int(J.any(0).sum())) for rank, J in ranks)


def _width(problem: NetworkView, k: int) -> Float[Tensor, "m n1"] | None:
    """The width of the cell that each entry of layer k's gradient was rounded in, where its values are few."""
    W, bias = problem.weight_gradients[k], problem.bias_gradients[k]
    seen = cells(W)
    if seen is None or bias is None:
        return None if seen is None else seen.width
    own = cells(bias)
    alike = float(seen.width.mean() * bias.norm() / W.norm()) * (W.numel() / bias.numel()) ** 0.5
    return join(seen.width, torch.full_like(bias, alike) if own is None else own.width)


def _floats(problem: NetworkView, k: int, told: SharedUpdate) -> Iterator[Variance]:
    """The variance of rounding to the numbers of a type: 16 bits in which entries were sent, or the weights' own."""
    sent = problem.augmented(k) * told.loss_scale * (told.learning_rate or 1.0)
    dtype = held_by(sent, HALVES[::-1])
    if dtype is not None:
        yield lambda: spacing(sent, dtype).square()
    if told.learning_rate is not None and problem.dtype is not None:
        yield lambda: spacing(problem.affine(k), problem.dtype).square()
