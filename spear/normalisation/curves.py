"""Normalisation beside an activation of any form: everything about a sample is a function of its pre-activations alone.

In front of phi, BatchNorm of known deviation is a known map to y = η + γ x̂, and

    phi'(y) ∘ h - a - c ∘ x̂ in span (σ/γ) U        y in η + span γ P

with the symbols of `spaces`. Behind phi it is a known map of phi(z), folded into the next layer's weights, and

    phi'(z) ∘ γ/σ ∘ (h - a - c ∘ x̂) in span U        x̂ = (phi(z) - μ) / σ

LayerNorm and RMSNorm are functions of z. So a sample is still a point on a curve of b - 1 dimensions, and the search of
`spear.network.curves` finds it.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from spear import directions
from spear.certificate import rms
from spear.models.activations import Activation
from spear.network.curves.dropped import Dropping
from spear.network.curves.layer import Known, Layer
from spear.network.curves.normal import Normal, Taken
from spear.network.problem import NetworkView
from spear.network.starts import label_counts
from spear.normalisation.problem import Norm, NormalisedView
from spear.normalisation.spaces import BatchSpaces
from spear.normalisation.statistics import from_buffers
from spear.published.lowrank import LowRank
from spear.reconstruction import Refusal

DRAWS = 400  # of y at random, for the mean outputs
CONSTANT = 1e-3  # of BatchNorm's epsilon: a variance that is none
REACH = 0.5  # of a sample's x̂ around its class mean, over the units
STEEPNESS = 0.5  # mean phi' of centred y
DAMPED = 1e-2  # of the mean diagonal of its equations
SETTLING = 12  # steps to a typical sample
SEARCHED = "with an activation other than ReLU that is not searched"


@dataclass(frozen=True)
class BatchLayer(Layer):
    """The last hidden layer behind BatchNorm: z is y, b samples have b - 1 coordinates s, whose sum is zero.

    Samples found are not subtracted, as the rest would have the same rank: they confine s and t of the others, which
    are `centre` + s and those of `basis` beside what `taken` holds. `triangle` leads from t to coordinates in `basis`.
    """

    batch: int = 0
    unit: float = 1.0
    triangle: Float[Tensor, "b b"] | None = None
    moved: Float[Tensor, " b"] | float = 0.0

    @classmethod
    def in_front(cls, spaces: BatchSpaces, network: NetworkView, prior: Float[Tensor, " outputs"]) -> "BatchLayer":
        """The whole gradient's. `prior` are the mean outputs."""
        basis, triangle = torch.linalg.qr(spaces.turned)
        along = spaces.slope / spaces.scale
        r = len(triangle)
        eye = torch.eye(r, dtype=basis.dtype, device=basis.device)
        before = torch.stack([spaces.level - along * spaces.shift, along])
        taken = Taken(before, torch.zeros_like(before))
        lift = spaces.scale[:, None] * spaces.place
        parts = basis, spaces.singular, lift, torch.zeros_like(spaces.singular), eye, eye, spaces.shift, taken, None
        starts = _class_means(spaces, network, prior), REACH * rms(spaces.scale)
        return cls(*parts, *starts, spaces.batch, abs(network.unit(spaces.batch)), triangle)

    @property
    def samples(self) -> int:
        """How many samples are left."""
        return self.batch

    @property
    def crowded(self) -> bool:
        """Never: samples that do not determine themselves are not sought."""
        return False

    @property
    def tangent(self) -> Float[Tensor, "r r"]:
        """Every direction."""
        return torch.eye(len(self.singular), dtype=self.lift.dtype, device=self.lift.device)

    def in_whole(self, s: Float[Tensor, "k r"]) -> Float[Tensor, "k b"]:
        """The same s in the coordinates of the whole."""
        return self.moved + s @ self.right

    def directions(self, delta: Float[Tensor, "k m"]) -> Float[Tensor, "k r"]:
        """t of samples' delta, of the whole layer."""
        return torch.linalg.solve_triangular(self.triangle, (delta @ self.basis).mT, upper=True).mT

    def weight(self, known: Known) -> Float[Tensor, " f"]:
        """Each sample's weight in units of its t: nothing is left open."""
        return self.unit * (known.t @ self.triangle.mT).norm(dim=1)

    def without(self, known: Known) -> "BatchLayer":
        """The layer of the samples that are left, as `spear.normalisation.spaces.plane` has it."""
        known = known[torch.arange(min(len(known), self.batch - 2), device=known.s.device)]
        left = self.batch - len(known)
        free, turn = (directions.complement(v / self.singular) for v in (known.t, known.s))
        moved, level = -known.s.sum(0) / left, -known.t.sum(0) / left
        before = torch.stack([self.taken.before[0] + self.basis @ (self.triangle @ level), self.taken.before[1]])
        return replace(
            self,
            basis=torch.linalg.qr(self.basis @ (self.triangle @ turn))[0],
            singular=(self.singular[:, None] * free).norm(dim=0),
            lift=self.lift @ free,
            ones=self.ones @ free,
            left=turn,
            right=free.mT,
            shift=self.shift + self.lift @ moved,
            taken=replace(self.taken, before=before),
            batch=left,
            moved=moved,
            means=(self.means - moved) @ free,
        )


def _class_means(
    spaces: BatchSpaces, network: NetworkView, prior: Float[Tensor, " outputs"]
) -> Float[Tensor, "classes r"]:
    """The mean s of each class as a linear layer would show it: sum_i h_i s_iᵀ, h_i = W_outᵀ(a - e_c)."""
    head = network.weights[-1].mT
    head = head - head.mean(1, keepdim=True) if network.loss == "cross_entropy" else head
    sums = torch.linalg.lstsq(head, spaces.turned * spaces.singular / STEEPNESS, driver="gelsd").solution
    sums = sums if network.outputs > 1 else torch.cat([-sums, sums])
    return -sums / label_counts(network, prior, spaces.batch).clamp_min(1)[:, None]


@dataclass(frozen=True)
class Top:
    """The last hidden layer for a search of curves: the network with what is known there folded in, the layer, the mean
    outputs of its batch where they are not those of a fresh network."""

    network: NetworkView
    layer: Layer
    prior: Float[Tensor, " outputs"] | None


def top(view: NormalisedView, low: LowRank, spaces: BatchSpaces | None, generator: Generator) -> Top:
    """The last hidden layer, `spaces` being those of a BatchNorm in front of the activation."""
    network, k = view.network, view.network.last
    if view.drops_units:
        dropping = Dropping.behind(network.activations[k], view.drops[k])
        view = replace(view, network=replace(network, activations=(*network.activations[:-1], dropping)))
        network = view.network
    network, taken = _folded(view, low.rank) if view.afters[k] is not None else (network, None)
    if spaces is not None:
        if unknown := int((~spaces.live).sum()):
            raise Refusal(f"the deviation of {unknown} units behind the last hidden layer is not told: {SEARCHED}")
        prior = _outputs(view, generator)
        return Top(network, BatchLayer.in_front(spaces, network, prior), prior)
    norm, after = view.norms[k], view.afters[k]
    normal = None if norm is None else Normal(norm.kind, norm.scale, norm.shift, norm.eps)
    prior = None if norm is None and after is None else _outputs(view, generator)
    layer = Layer.of(network, low, taken, normal)
    if after is not None and norm is None:
        typical = _typical(layer, view.network.activations[k], after, from_buffers(after, 0.0, low.rank).sigma)
        layer = replace(layer, means=typical.expand(network.classes, -1), reach=REACH * rms(after.variance.sqrt()) * 2)
    return Top(network, layer, prior)


def _typical(layer: Layer, activation: Activation, norm: Norm, sigma: Float[Tensor, " m"]) -> Float[Tensor, " r"]:
    """The s whose activations are nearest to the batch's mean ones, in units of their deviations."""
    s = best = layer.origin
    least = torch.inf
    columns = layer.lift @ layer.tangent
    for _ in range(SETTLING):
        value, slope, _ = activation.at(layer.pre_activations(s[None]))
        off = (norm.mean - value[0]) / sigma
        if float(off.norm()) > least:
            break
        best, least = s, float(off.norm())
        M = (slope[0] / sigma)[:, None] * columns
        gram = M.mT @ M
        gram = gram + DAMPED * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype).to(gram)
        s = s + layer.tangent @ torch.linalg.solve(gram, M.mT @ off)
    return best


def _folded(view: NormalisedView, size: int) -> tuple[NetworkView, Taken]:
    """The network with the BatchNorm behind the last activation in its output layer, and what that takes."""
    network, norm = view.network, view.afters[view.network.last]
    sigma = from_buffers(norm, 2 * network.precision, size).sigma
    varies = norm.variance > CONSTANT * norm.eps  # a unit that is the same in all samples is not active in any
    ratio, whole = varies * norm.scale / sigma, network.unit(size) * size
    along = norm.scale_gradient / (whole * sigma)
    behind = torch.stack([ratio * (norm.shift_gradient / whole - along * norm.mean), ratio * along])
    W, bias = network.weights[-1], network.biases[-1]
    shifted = W @ (norm.shift - ratio * norm.mean) + (0 if bias is None else bias)
    folded = replace(
        network,
        weights=(*network.weights[:-1], W * ratio),
        biases=(*network.biases[:-1], shifted),
        bias_gradients=(*network.bias_gradients[:-1], _bias_gradient(network)),
    )
    return folded, Taken(torch.zeros_like(behind), behind)


def _bias_gradient(network: NetworkView) -> Float[Tensor, " outputs"]:
    """That of the output bias; where there is none, as if all outputs were right."""
    found = network.bias_gradients[-1]
    return torch.zeros_like(network.weights[-1][:, 0]) if found is None else found


def _outputs(view: NormalisedView, generator: Generator) -> Float[Tensor, " outputs"]:
    """The mean outputs, of normal pre-activations."""
    network, k = view.network, view.network.last
    W, front, after = network.weights[k + 1], view.norms[k], view.afters[k]
    if after is not None:
        value = after.shift[None]
    else:
        noise = torch.randn(DRAWS, W.shape[1], generator=generator, dtype=torch.float64).to(W)
        value = network.activations[k].value(front.shift + front.scale * noise)
    return network.activate(network.apply(k + 1, value)).mean(0)
