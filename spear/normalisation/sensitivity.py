"""How far inputs can be from the truth where no theorem bounds it: by doing again what follows the search.

What the update holds is spoilt by as much as rounding, or what the batch leaves unexplained, may have spoilt it: every
gradient, and the running statistics. From the samples found, the last hidden layer is solved anew and everything below
it. The map from update to batch is differentiable there, so that an input moves as far, to first order, as it may be
off; `SAFETY` times that is the bound, and a map that is singular moves inputs far.

**Assumed**, beyond that errors of the update's entries are independent and of the size of rounding: that no second
batch, far from this one, gives the same update. At a ReLU that is one with other activation patterns, behind dropout
one with other masks. Where an activation is curved, counting speaks against it (each sample solves more equations than
it has unknowns), and a round of starts from the whole gradient that ends at none but these samples (`recover`).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from spear.certificate import SAFETY, norms, rms
from spear.normalisation.problem import Norm, NormalisedView

PROBES = 3  # updates that are spoilt, of which the root mean square counts

Again = Callable[[NormalisedView], Float[Tensor, "b n"] | None]


def measured_bounds(
    view: NormalisedView, inputs: Float[Tensor, "b n"], again: Again, misfit: float
) -> Float[Tensor, " b"]:
    """A bound on each input's relative error, less the mean where the update does not depend on that; infinite where
    the batch cannot be solved for again.

    `again` gives the inputs that another update of the same batch leads to; `misfit` is the relative residual of the
    worst gradient.
    """
    generator, moved = Generator().manual_seed(0), torch.zeros_like(inputs[:, 0])
    if not misfit < 1:
        return torch.full_like(moved, torch.inf)
    centred = (lambda x: x - x.mean(0)) if view.loses_mean else (lambda x: x)
    for _ in range(PROBES):
        found = again(spoilt(view, max(2 * view.network.precision, misfit), generator))
        if found is None:
            return torch.full_like(moved, torch.inf)
        moved += (centred(found) - centred(inputs)).square().sum(1) / PROBES
    return (SAFETY * moved.sqrt() / norms(centred(inputs))).nan_to_num(torch.inf, torch.inf)


def spoilt(view: NormalisedView, eps: float, generator: Generator) -> NormalisedView:
    """The view with noise on what the update tells, `eps` of the root mean square of each gradient, or of its rows."""

    def noisy(x: Tensor | None, error: Tensor | float | None = None) -> Tensor | None:
        if x is None:
            return None
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        size = rms(x) if x.ndim == 1 else x.square().mean(1, keepdim=True).sqrt()
        return x + noise * (eps * size if error is None else error)

    def of(norm: Norm | None) -> Norm | None:
        if norm is None:
            return None
        gradients = {name: noisy(getattr(norm, name)) for name in ("scale_gradient", "shift_gradient")}
        told = {name: noisy(getattr(norm, name), getattr(norm, f"{name}_error")) for name in ("mean", "variance")}
        return replace(norm, **gradients, **told)

    network = replace(
        view.network,
        weight_gradients=tuple(noisy(g) for g in view.network.weight_gradients),
        bias_gradients=tuple(noisy(g) for g in view.network.bias_gradients),
    )
    norms_before, norms_after = (tuple(of(norm) for norm in some) for some in (view.norms, view.afters))
    return replace(view, network=network, norms=norms_before, afters=norms_after)
