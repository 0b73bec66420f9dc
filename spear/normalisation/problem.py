"""The network as the server sees it, with what normalises the pre-activations of its hidden layers, and dropout.

Behind linear layer k, z = W x + β, stands y = γ x̂ + η and then an activation: x̂ is z less its mean, over its deviation,
over the batch (BatchNorm), over the layer (LayerNorm, GroupNorm of one group), or z over its root mean square
(RMSNorm). BatchNorm may stand behind the activation instead. Dropout then sets each activation to zero with probability
p and divides the others by 1 - p.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spear.network.problem import NetworkView
from spear.network.spaces import Levels

Kind = Literal["batch", "layer", "rms"]


@dataclass(frozen=True)
class Norm:
    """A normalisation: over what, its `scale` γ (m,), `shift` η (m,) and `eps`, and the gradients of γ and η.

    The gradients are `None` where the model has no such parameter, or the update no such gradient, unless the next
    layer tells the same. Of BatchNorm, `mean`
    and `variance` (m,) are the batch's own, the latter over b - 1, as far as the client's buffers tell, with the
    rounding of each (`mean_error`, `variance_error`), and `offset` (m,) is the linear layer's β, of which nothing but
    these depends.
    """

    kind: Kind
    scale: Float[Tensor, " m"]
    shift: Float[Tensor, " m"]
    eps: float
    scale_gradient: Float[Tensor, " m"] | None
    shift_gradient: Float[Tensor, " m"] | None
    offset: Float[Tensor, " m"] | None = None
    mean: Float[Tensor, " m"] | None = None
    variance: Float[Tensor, " m"] | None = None
    mean_error: Float[Tensor, " m"] | None = None
    variance_error: Float[Tensor, " m"] | None = None

    @property
    def mixes(self) -> bool:
        """Whether it mixes the samples of a batch."""
        return self.kind == "batch"

    def to(self, device: torch.device) -> "Norm":
        """The same on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class NormalisedView:
    """A chain of linear layers, and the normalisation behind each hidden layer (or `None`): before its activation
    (`norms`), or after it (`afters`).

    The `network` holds weights and gradients; a bias in front of BatchNorm is none of its biases (`Norm.offset`).
    `drops` are the shares p of dropout, 0 where there is none.
    """

    network: NetworkView
    norms: tuple[Norm | None, ...]
    drops: tuple[float, ...]
    afters: tuple[Norm | None, ...]

    @property
    def top(self) -> Norm | None:
        """The normalisation behind the last hidden layer."""
        return self.norms[self.network.last]

    @property
    def is_curved(self) -> bool:
        """Whether at the last hidden layer a gradient is not 0 or h_j, in every entry, beside known directions; nor,
        behind dropout, h_j times one of two slopes."""
        activation, alone = self.network.activations[-1], self.drops_units and not self.mixes
        two = alone and Levels.of(activation, activation.units) is not None
        return self.afters[-1] is not None or not (activation.is_relu or two)

    @property
    def is_uniform(self) -> bool:
        """Whether ReLU follows every layer, and BatchNorm in front of it either all of them or none: theorems bound
        the errors of samples there, where all of it is told."""
        mixing = {norm is not None and norm.mixes for norm in self.norms}
        return self.network.is_relu and len(mixing) == 1 and not any(self.afters) and self.is_told

    @property
    def is_told(self) -> bool:
        """Whether the gradient of each BatchNorm's shift is: what it takes from a sample's gradient is known then."""
        return not any(norm is not None and norm.mixes and norm.shift_gradient is None for norm in self.norms)

    @property
    def needs_all(self) -> bool:
        """Whether samples mix anywhere."""
        return any(norm is not None and norm.mixes for norm in (*self.norms, *self.afters))

    @property
    def mixes(self) -> bool:
        """Whether samples mix between the last hidden layer and its activation."""
        return self.top is not None and self.top.mixes

    @property
    def lacks_level(self) -> bool:
        """Whether they do, and the update does not hold their mean gradient there, that of BatchNorm's shift."""
        return self.mixes and self.top.shift_gradient is None

    @property
    def loses_mean(self) -> bool:
        """Whether the update does not depend on the mean input: BatchNorm follows the first layer."""
        return self.norms[0] is not None and self.norms[0].mixes

    @property
    def drops_units(self) -> bool:
        """Whether an activation is missing by chance at the last hidden layer."""
        return self.drops[-1] > 0

    @property
    def shows_zeros(self) -> bool:
        """Whether BatchNorm follows ReLU at the last hidden layer: its gradient's own zeros tell the samples there."""
        return self.afters[-1] is not None and self.network.activations[-1].is_relu

    def over(self, factor: float) -> "NormalisedView":
        """The same, every gradient divided by a factor."""
        less = lambda g: None if g is None else g / factor  # noqa: E731
        names = ("scale_gradient", "shift_gradient")
        before, after = (
            tuple(norm and replace(norm, **{name: less(getattr(norm, name)) for name in names}) for norm in norms)
            for norms in (self.norms, self.afters)
        )
        weights, biases = (tuple(map(less, g)) for g in (self.network.weight_gradients, self.network.bias_gradients))
        network = replace(self.network, weight_gradients=weights, bias_gradients=biases)
        return replace(self, network=network, norms=before, afters=after)

    def lacks_mean(self, k: int) -> bool:
        """Whether BatchNorm follows the activation of hidden layer k, and its statistics are not told."""
        return self.afters[k] is not None and self.afters[k].mean is None

    def mask(self, k: int, kept: Bool[Tensor, "b m"] | None) -> Float[Tensor, "b m"] | float:
        """What dropout multiplies the activations of hidden layer k by, where it kept those."""
        share = 1 - self.drops[k]
        return 1 / share if kept is None else kept.to(self.network.weights[k]) / share

    def scale(self, k: int) -> Float[Tensor, " m"]:
        """γ of hidden layer k; ones where it has no normalisation."""
        norm, W = self.norms[k], self.network.weights[k]
        return W.new_ones(len(W)) if norm is None else norm.scale


def normalise(
    norm: Norm | None, z: Float[Tensor, "b m"]
) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b m"], Float[Tensor, "#b #m"]]:
    """y = γ x̂ + η of pre-activations z, x̂, and the deviation σ that z was divided by, over the samples given."""
    if norm is None:
        return z, z, z.new_ones(len(z), 1)
    dim = 0 if norm.mixes else 1
    centred = z if norm.kind == "rms" else z - z.mean(dim, keepdim=True)
    deviation = (centred.pow(2).mean(dim, keepdim=True) + norm.eps).sqrt()
    normal = centred / deviation
    return norm.scale * normal + norm.shift, normal, deviation


def denormalise(
    norm: Norm | None, dy: Float[Tensor, "b m"], normal: Float[Tensor, "b m"], deviation: Float[Tensor, "#b #m"]
) -> Float[Tensor, "b m"]:
    """∂L/∂z from ∂L/∂y, by the derivative of `normalise` at the x̂ and σ that it gave."""
    if norm is None:
        return dy
    dim, g = 0 if norm.mixes else 1, norm.scale * dy
    along = normal * (g * normal).mean(dim, keepdim=True)
    level = 0 if norm.kind == "rms" else g.mean(dim, keepdim=True)
    return (g - level - along) / deviation
