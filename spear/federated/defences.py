"""What is done to an update before it is sent: half precision, random rounding, pruning, noise. Each keeps a record."""

import math
from dataclasses import replace

import torch
from torch import Generator, Tensor

from spear.federated.update import HALVES, SharedUpdate, each


def half_precision(update: SharedUpdate, dtype: torch.dtype = torch.float16) -> SharedUpdate:
    """Send 16 bits an entry: `torch.float16` (scaled, as loss scaling does, so that small entries survive) or bfloat16.

    Raises `ValueError` for another dtype.
    """
    if dtype not in HALVES:
        raise ValueError(f"{dtype} is not a half precision: use torch.float16 or torch.bfloat16")
    largest = max(float(g.abs().max()) for g in update.gradients.values() if g.numel())
    scale = 2.0 ** math.floor(math.log2(3e4 / largest)) if dtype == torch.float16 and largest > 0 else 1.0
    return replace(each(update, lambda g: (g * scale).to(dtype)), loss_scale=update.loss_scale * scale)


def quantised(update: SharedUpdate, bits: int = 8, *, generator: Generator | None = None) -> SharedUpdate:
    """Round each entry at random, without bias, to one of the 2^bits - 1 levels from -max to max of its tensor.

    Source: Alistarh et al. 2017, QSGD (here with the largest entry as scale). Raises `ValueError` for fewer than 2
    bits or more than 16.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"quantisation takes 2 to 16 bits an entry, not {bits}")

    def rounded(g: Tensor) -> Tensor:
        step = g.abs().max().clamp_min(torch.finfo(g.dtype).tiny) / (2 ** (bits - 1) - 1) if g.numel() else g.sum()
        u = torch.rand(g.shape, generator=generator, dtype=g.dtype, device=generator.device if generator else g.device)
        return (g / step + u.to(g.device)).floor() * step

    return replace(each(update, rounded), bits=bits)


def pruned_random(update: SharedUpdate, keep: float | int, *, generator: Generator | None = None) -> SharedUpdate:
    """Send each entry with probability `keep`; the others arrive as zero. Raises `ValueError` unless 0 < keep <= 1."""
    _check_share(keep)

    def pruned(g: Tensor) -> Tensor:
        device = generator.device if generator else g.device
        return g * (torch.rand(g.shape, generator=generator, device=device).to(g.device) < keep)

    return replace(each(update, pruned), pruning="random")


def pruned_top_k(update: SharedUpdate, keep: float | int) -> SharedUpdate:
    """Send the share `keep` of entries that are largest in size over all tensors (top-k); the others arrive as zero.

    Raises `ValueError` unless 0 < keep <= 1.
    """
    _check_share(keep)
    sizes = torch.cat([g.flatten().abs() for g in update.gradients.values()])
    drop = len(sizes) - max(1, round(keep * len(sizes)))
    if drop == 0:
        return replace(update, pruning="top-k")
    threshold = sizes.kthvalue(drop).values
    return replace(each(update, lambda g: g * (g.abs() > threshold)), pruning="top-k")


def noisy(
    update: SharedUpdate, sigma: float | int, *, relative: bool = False, generator: Generator | None = None
) -> SharedUpdate:
    """Add normal noise of standard deviation `sigma` to every entry; `relative`: of `sigma` times its tensor's RMS.

    Relative noise differs from tensor to tensor and is not disclosed. Raises `ValueError` for a negative `sigma`.
    """
    if sigma < 0:
        raise ValueError(f"noise has a standard deviation of at least 0, not {sigma}")

    def perturbed(g: Tensor) -> Tensor:
        device = generator.device if generator else g.device
        draw = torch.randn(g.shape, generator=generator, dtype=g.dtype, device=device).to(g.device)
        return g + draw * (sigma * g.pow(2).mean().sqrt() if relative else sigma)

    return replace(each(update, perturbed), noise=None if relative else math.hypot(sigma, update.noise or 0.0))


def _check_share(keep: float | int) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"the share of entries kept is in (0, 1], not {keep}")
