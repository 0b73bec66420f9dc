"""Problems for the network method's tests: small ReLU chains, batches and their gradients, made from a seed."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from spear.federated.clients import batch_loss
from spear.network.problem import NetworkView
from spear.network.recovery import Judged

DTYPE = torch.float64


@dataclass(frozen=True)
class Case:
    """A problem, and the truth that only the assertions read."""

    problem: NetworkView
    inputs: Tensor
    labels: Tensor


def initialise(sizes: tuple[int, ...], init: str, generator: Generator) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of a chain in one of the usual initialisations."""
    layers = []
    for a, o in pairwise(sizes):
        weight, bias = torch.empty(o, a, dtype=DTYPE), torch.zeros(o, dtype=DTYPE)
        if init == "default":
            weight.uniform_(-(a**-0.5), a**-0.5, generator=generator)
            bias.uniform_(-(a**-0.5), a**-0.5, generator=generator)
        elif init == "kaiming":
            weight.normal_(0, (2 / a) ** 0.5, generator=generator)
        elif init == "glorot":
            weight.uniform_(-((6 / (a + o)) ** 0.5), (6 / (a + o)) ** 0.5, generator=generator)
        else:
            weight.normal_(0, (2 / (a + o)) ** 0.5, generator=generator)
        layers.append((weight, bias))
    return layers


def logits(layers: list[tuple[Tensor, Tensor | None]], inputs: Tensor) -> Tensor:
    for k, (weight, bias) in enumerate(layers):
        inputs = F.linear(inputs, weight, bias)
        inputs = inputs.relu() if k < len(layers) - 1 else inputs
    return inputs


def case(
    sizes: tuple[int, ...] = (60, 120, 120, 10),
    batch: int = 20,
    *,
    seed: int = 0,
    init: str = "default",
    bias: bool = True,
    inputs: Tensor | None = None,
    labels: Tensor | None = None,
    reduction: str = "mean",
    dtype: torch.dtype = DTYPE,
    known: bool = True,
    smoothing: float = 0.0,
    loss: str = "cross_entropy",
    head: int = 1,
    lifted: float = 0.0,
) -> Case:
    """One batch's gradient by autograd, computed in `dtype`; `known` tells the attacker the batch size.

    The output weights are `head` times what `init` says, the first biases `lifted` by so much.
    """
    generator = Generator().manual_seed(seed)
    layers = initialise(sizes, init, generator)
    layers[-1][0].mul_(head)
    layers[0][1].add_(lifted)
    x = torch.randn(batch, sizes[0], generator=generator, dtype=DTYPE) if inputs is None else inputs
    y = torch.randint(max(sizes[-1], 2), (len(x),), generator=generator) if labels is None else labels
    live = [(w.to(dtype).requires_grad_(), c.to(dtype).requires_grad_() if bias else None) for w, c in layers]
    out = logits(live, x.to(dtype))
    value = batch_loss(out, y, loss, reduction)
    if smoothing:
        value = F.cross_entropy(out, y, reduction=reduction, label_smoothing=smoothing)
    flat = torch.autograd.grad(value, [t for layer in live for t in layer if t is not None])
    gradients = [g.to(DTYPE) for g in flat]
    problem = NetworkView(
        tuple(w.detach().to(DTYPE) for w, _ in live),
        tuple(c.detach().to(DTYPE) if bias else None for _, c in live),
        tuple(gradients[:: 2 if bias else 1]),
        tuple(gradients[1::2]) if bias else (None,) * len(live),
        len(x) if known else None,
        reduction,
        torch.finfo(dtype).eps / 2,
        loss=loss,
    )
    return Case(problem, x, y)


def errors(found: Tensor, truth: Tensor) -> Tensor:
    """Relative distance of every true sample to the nearest one found."""
    if not len(found):
        return torch.full((len(truth),), float("inf"), dtype=DTYPE)
    gap = (truth[:, None] - found[None]).norm(dim=2).amin(1)
    return gap / truth.norm(dim=1)


def assert_labels(made: Case, found: Judged, limit: float = 1e-6) -> None:
    """Every sample found bears the labels that it has in the batch, each as often."""
    for x, counts in zip(found.inputs, found.counts, strict=True):
        same = (made.inputs - x).norm(dim=1) < 10 * limit * x.norm()
        assert torch.equal(F.one_hot(made.labels[same], counts.numel()).sum(0).to(counts), counts)
