"""What is known of a batch's inputs where a front computes features of them, and how far candidates are from it.

Samples are rows: inputs (k, *shape), features (k, n).
"""

import copy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, fx

from spear.fronts.softened import Softness, is_relu, softened
from spear.models.traced import Traced, source_of

TRIES = 4  # random inputs on which a front is compared with one that is cut before its last ReLU


@dataclass(frozen=True)
class FrontProblem:
    """A front, what it gives for each sample of a batch, and the gradients of its own parameters.

    `front` computes the features (k, n); where `floored`, max(front, 0) does, its last ReLU being left out. `slopes`
    (k, n) are dLoss/dfeatures, `None` where they are not known; `gradients` are the batch's by the front's parameters,
    of those that were received. A feature counts as zero up to `tolerance`.
    """

    front: fx.GraphModule
    softness: Softness
    floored: bool
    shape: tuple[int, ...]
    features: Float[Tensor, "k n"]
    slopes: Float[Tensor, "k n"] | None
    gradients: dict[str, Tensor]
    tolerance: float

    @property
    def positive(self) -> Bool[Tensor, "k n"]:
        """Features that say what enters the last ReLU; of the others it is not positive."""
        if not self.floored:
            return torch.ones_like(self.features, dtype=torch.bool)
        return self.features > self.tolerance * self.features.amax(1, keepdim=True)

    @property
    def unknowns(self) -> int:
        """Entries of one input."""
        return torch.Size(self.shape).numel()

    @property
    def of_parameters(self) -> int:
        """Equations that the gradients of the front's parameters make, of all samples together."""
        return 0 if self.slopes is None else sum(g.numel() for g in self.gradients.values())

    def is_affine(self, size: float) -> bool:
        """Whether the front is affine, as padding and average pools are: tried on random inputs of about that size."""
        generator = torch.Generator().manual_seed(0)
        x, y = size * torch.randn(2, TRIES, *self.shape, generator=generator, dtype=torch.float64).to(self.features)
        with torch.no_grad():
            apart = self.front(x + y) + self.front(torch.zeros_like(x)) - self.front(x) - self.front(y)
            return bool(apart.abs().max() <= 1e-9 * self.front(x).abs().max())

    def features_of(self, inputs: Float[Tensor, "k *shape"]) -> Float[Tensor, "k n"]:
        """The features of inputs."""
        with torch.no_grad():
            z = self.front(inputs)
        return z.relu() if self.floored else z

    def to(self, dtype: torch.dtype) -> "FrontProblem":
        """The same in another precision, with a softness of its own."""
        front, softness = softened(self.front)
        tensors = {name: g.to(dtype) for name, g in self.gradients.items()}
        slopes = None if self.slopes is None else self.slopes.to(dtype)
        made = replace(self, front=front.to(dtype), softness=softness, features=self.features.to(dtype))
        return replace(made, slopes=slopes, gradients=tensors)

    def __getitem__(self, index: Tensor) -> "FrontProblem":
        """Some of the samples, without the gradients: these are of all."""
        return replace(self, features=self.features[index], slopes=None, gradients={})


def without_last_relu(front: fx.GraphModule, shape: tuple[int, ...]) -> tuple[fx.GraphModule, bool]:
    """The front as it is before its last ReLU, where features are max(that, 0), as a ReLU and max-pools in any order
    give them; else the front itself.

    Raises what the front does at numbers that are no index, no word or no pixel.
    """
    generator = torch.Generator().manual_seed(0)
    like = next(iter(front.parameters()), torch.zeros(0, dtype=torch.float64))
    tried = torch.randn(TRIES, *shape, generator=generator, dtype=like.dtype).to(like.device) * 3
    with torch.no_grad():
        whole = front.forward(tried)  # a call would print what it raises
    traced = Traced(copy.deepcopy(front), training=False)
    relus = [node for node in traced.nodes if is_relu(traced, node)]
    if not relus:
        return front, False
    last = relus[-1]
    last.replace_all_uses_with(source_of(last))
    traced.module.graph.eliminate_dead_code()
    traced.module.recompile()
    with torch.no_grad():
        same = torch.allclose(traced.module(tried).relu(), whole, rtol=1e-9, atol=0)
    return (traced.module, True) if same else (front, False)
