"""Small networks that normalise while they train, and what their clients send."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

import spear
from spear.federated import SharedUpdate, gradient
from spear.reconstruction import Reconstruction, Refusal


@dataclass(frozen=True)
class Sent:
    """A model in training mode, its client's batch and update."""

    model: nn.Sequential
    inputs: Tensor
    labels: Tensor
    update: SharedUpdate


def chain(
    sizes: tuple[int, ...],
    norm: Callable[[int], nn.Module | list[nn.Module]],
    *,
    seed: int = 0,
    spread: float = 0.0,
    drop: float = 0.0,
) -> nn.Sequential:
    """Linear, normalisation, ReLU, dropout and so on, or what else `norm` lists; γ and η scatter by `spread` around 1
    and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: list[nn.Module] = []
        for a, b in pairwise(sizes[:-1]):
            made = norm(b)
            made = made if isinstance(made, list) else [made, nn.ReLU(), *([nn.Dropout(drop)] if drop else [])]
            parts += [nn.Linear(a, b), *made]
        model = nn.Sequential(*parts, nn.Linear(*sizes[-2:])).double()
    with torch.no_grad():
        for part in model:
            if not isinstance(part, nn.Linear):
                for p in part.parameters():
                    p += spread * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model


def sent(
    sizes: tuple[int, ...] = (60, 120, 10),
    b: int = 12,
    norm: Callable[[int], nn.Module | list[nn.Module]] = nn.BatchNorm1d,
    *,
    seed: int = 0,
    spread: float = 0.0,
    drop: float = 0.0,
    **told: str,
) -> Sent:
    """A batch of Gaussian inputs, each away from the others, behind such a network."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, sizes[0], generator=generator, dtype=torch.float64) + 0.5
    y = torch.randint(sizes[-1], (b,), generator=generator)
    model = chain(sizes, norm, seed=seed, spread=spread, drop=drop)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of what dropout draws
        return Sent(model, x, y, gradient(model, x, y, **told))


def less_mean(x: Tensor) -> Tensor:
    x = x.flatten(1)
    return x - x.mean(0)


def difference_errors(result: Reconstruction, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Of each recovered input less the mean, the relative distance to the nearest true one, and which that is."""
    truth = less_mean(inputs)
    apart = torch.cdist(less_mean(result.inputs), truth, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = apart.argmin(1)
    return apart.amin(1) / truth.norm(dim=1)[nearest], nearest


def differences_back(result: Reconstruction, case: Sent, error: float = 1e-6) -> None:
    """The whole batch, up to one image common to all, with labels; and the result says so."""
    assert len(result.inputs) == len(case.inputs), result.reason
    errors, nearest = difference_errors(result, case.inputs)
    assert nearest.unique().numel() == len(case.inputs)
    assert bool((errors < error).all()), errors
    assert torch.equal(result.labels, case.labels[nearest])
    assert bool(result.differences.all()), result.reason
    if result.difference_bound is not None:
        assert bool((errors <= result.difference_bound).all())


def nothing_certified_if_changed(case: Sent, name: str, size: float, proposals: int = 60) -> None:
    """Of an update with noise of that size on one gradient: refused, or nothing certified, differences included."""
    g = dict(case.update.gradients)
    noise = torch.randn(g[name].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g[name] = g[name] + size * g[name].abs().max() * noise
    try:
        result = spear.attack(case.model, replace(case.update, gradients=g), method="network", max_proposals=proposals)
    except Refusal:
        return
    assert not result.certified.any()
    assert not result.differences.any()
