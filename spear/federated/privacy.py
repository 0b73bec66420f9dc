"""DP-SGD as Opacus runs it, and the epsilon that its accountant gives."""

import copy
import importlib
import math
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from spear.federated.clients import gradient
from spear.federated.losses import logits_of
from spear.federated.update import SharedUpdate

DELTA = 1e-5  # chance at which the promise of epsilon may fail: the custom for some thousand samples
ORDERS = [1 + 10 ** (k / 10) for k in range(-80, 30)]  # of the Rényi divergence: fine near 1, where noise is weak


def private(
    model: nn.Module,
    inputs: Float[Tensor, "b *input_shape"],
    labels: Int[Tensor, " b"],
    *,
    clip: float | int,
    noise_multiplier: float | int,
    generator: Generator | None = None,
) -> SharedUpdate:
    """One step of DP-SGD, by Opacus: per-sample gradients clipped to the norm `clip`, summed, noise added, averaged.

    The noise has the standard deviation `noise_multiplier * clip` in each entry of the sum; the update's `epsilon` at
    `DELTA` is that of Opacus' Rényi accountant for this one release (infinite without noise). Needs the extra:
    `pip install "spear[privacy]"`. Source: Abadi et al. 2016, DP-SGD.

    Raises `ImportError` where Opacus is not installed, `ValueError` for a clip that is not positive or a negative
    noise multiplier, and as `spear.federated.gradient` does.
    """
    if clip <= 0 or noise_multiplier < 0:
        raise ValueError(f"clip {clip} must be positive and the noise multiplier {noise_multiplier} not negative")
    gradient(model, inputs[:1], labels[:1])  # refuses what no single gradient describes
    local = copy.deepcopy(model)
    for module in local.modules():  # Opacus listens to modules in training mode only, and only those with parameters
        module.training |= any(True for _ in module.parameters(recurse=False))
    local = _opacus("grad_sample").GradSampleModule(local, loss_reduction="sum")
    optimizer = _opacus("optimizers").DPOptimizer(
        torch.optim.SGD(local.parameters(), lr=1.0),
        noise_multiplier=noise_multiplier,
        max_grad_norm=clip,
        expected_batch_size=len(inputs),
        generator=generator,
    )
    # Inputs that require a gradient keep torch from warning about Opacus' backward hooks.
    logits = logits_of(local(inputs.detach().clone().requires_grad_()))
    F.cross_entropy(logits, labels, reduction="sum").backward()
    optimizer.pre_step()
    found = {n: p.grad.detach() for n, p in local._module.named_parameters() if p.grad is not None}
    noise = noise_multiplier * clip / len(inputs)
    spent = {"epsilon": epsilon(noise_multiplier), "delta": DELTA}
    return SharedUpdate(found, "mean", len(inputs), tuple(inputs.shape[1:]), clip=clip, noise=noise, **spent)


def epsilon(noise_multiplier: float | int, *, sample_rate: float | int = 1.0, steps: int = 1) -> float:
    """The epsilon at `DELTA` of `steps` DP-SGD releases, by Opacus' Rényi accountant; infinite without noise.

    Each batch is drawn at `sample_rate` from the client's data.
    """
    if noise_multiplier == 0:
        return math.inf
    accountant = _opacus("accountants").RDPAccountant()
    accountant.history.append((noise_multiplier, sample_rate, steps))
    return float(accountant.get_epsilon(DELTA, alphas=ORDERS))


def _opacus(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"opacus.{module}")
    except ImportError as error:
        raise ImportError('DP-SGD needs Opacus: pip install "spear[privacy]"') from error
