"""Small problems with a known truth, for the tests of the attack."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from spear import models
from spear.federated import SharedUpdate, gradient
from spear.inversion import attack
from spear.metrics import evaluate
from spear.published.view import LayerView, Observed, open_layer
from spear.reconstruction import Reconstruction


@dataclass(frozen=True)
class Problem:
    """A client's batch, its model and update; the server's view of the first layer, and the true directions (b, b)."""

    model: nn.Sequential
    inputs: Tensor
    labels: Tensor
    update: SharedUpdate
    target: LayerView
    q: Tensor

    @property
    def observed(self) -> Observed:
        return self.target.observed


def batch(count: int, inputs: int, classes: int = 10, *, seed: int = 0, dtype: torch.dtype = torch.float64):
    """Gaussian inputs (count, inputs) and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, dtype=dtype, generator=generator)
    return x, torch.randint(classes, (count,), generator=generator)


def make(
    b: int = 6,
    m: int = 80,
    n: int = 40,
    depth: int = 3,
    *,
    seed: int = 0,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    reduction: str = "mean",
) -> Problem:
    """A batch of b Gaussian samples of n entries behind a fully connected network of width m."""
    inputs, labels = batch(b, n, seed=seed, dtype=dtype)
    model = models.fcnn((n,), m, depth, 10, seed=seed, bias=bias, dtype=dtype)
    update = gradient(model, inputs, labels, reduction=reduction)
    target = open_layer(model, update)
    X = inputs.double().mT
    Q = target.observed.R @ torch.linalg.pinv(X.mT)  # R = Q X^T
    return Problem(model, inputs, labels, update, target, (Q / torch.linalg.vector_norm(Q, dim=0)).mT.contiguous())


def noisy(update: SharedUpdate, size: float, seed: int) -> SharedUpdate:
    """Noise of that size, relative to the largest entry of each gradient; its level is not disclosed."""
    generator = torch.Generator().manual_seed(seed)
    return replace(
        update,
        gradients={
            k: g + size * g.abs().max() * torch.randn(g.shape, dtype=g.dtype, generator=generator)
            for k, g in update.gradients.items()
        },
    )


def judged(model: nn.Module, update: SharedUpdate, x: Tensor, y: Tensor, **options: object) -> Reconstruction | None:
    """Attack with a small budget; whatever is certified must be true. `None` where the attack is refused."""
    try:
        result = attack(model, update, **options)
    except ValueError:
        return None
    evaluation = evaluate(result, x, y)
    assert evaluation.precision == 1, (result.reason, evaluation.relative_error)
    assert not result.complete or evaluation.recall == 1 or update.count is None
    return result


def permuted_neurons(model, update):
    """Model and update with the first hidden layer's neurons in another order: the same function, the same batch."""
    order = torch.randperm(model.fc1.out_features, generator=torch.Generator().manual_seed(1))

    def moved(tensors):
        tensors = {n: t.detach()[order] if n.startswith("fc1") else t.detach() for n, t in tensors}
        return tensors | {"fc2.weight": tensors["fc2.weight"][:, order]}

    shuffled = copy.deepcopy(model)
    shuffled.load_state_dict(moved(model.named_parameters()))
    return shuffled, replace(update, gradients=moved(update.gradients.items()))
