"""A linear layer of a model: how a sample reaches it, what stands behind it, and how its gradient is read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from spear.models.activations import Activation
from spear.models.entrywise import Entrywise

Shape = tuple[int, ...] | None


@dataclass(frozen=True)
class Path:
    """How the data reach a linear layer: each sample, of `shape`, becomes `rows` inputs by `change`.

    `guessed`: nobody said which shape a sample has. `off` names dropout on the way that is off.
    """

    shape: tuple[int, ...]
    rows: int
    change: Entrywise
    guessed: bool
    off: str


@dataclass(frozen=True)
class Behind:
    """What follows a layer: a map of its entries, its activation, another map.

    `start` is the node whose value enters the activation, `end` the one behind the second map, `relu` that of a ReLU
    which reads it first.
    """

    before: Entrywise
    relu: fx.Node | None
    activation: Activation | None
    after: Entrywise
    start: fx.Node
    end: fx.Node


@dataclass(frozen=True)
class Layer:
    """A linear layer Z = W X + beta of a traced model.

    `name` is the module's qualified name; `from_data` says whether its inputs are the samples, or parts of them, as
    `path` says; `relu` whether ReLU alone reads Z, `activation` what is computed of its entries. `tail` computes the
    logits (b, C) from the layer's pre-activations z (b, m) and shares the model's parameters; it is `None` for the
    reason `unknown`. Where an affine map of each entry stands between the layer and its activation (`before`), it is
    folded into `linear`, and z is what enters that; `after` is such a map behind it, and `below` what is folded into
    the weights from the layer below (`chain`).
    `own` is the model's own name of each parameter that no other layer shares, of those in `turned` its transpose.
    `outer_bias`: its bias is what is added last before the ReLU, the layer having none.
    `readers` are the linear layers that read what `after` gives, as it is; `rows` is how many inputs of the layer a
    sample makes: tokens, patches (1 where the shape of a sample is not known).
    `obstacle` says what the client did in training mode that leaves the gradient without ReLU's zeros.
    """

    name: str
    linear: nn.Linear
    from_data: bool
    relu: bool
    activation: Activation | None
    tail: fx.GraphModule | None
    unknown: str
    path: Path | None
    before: Entrywise
    after: Entrywise
    own: Mapping[str, str]
    turned: frozenset[str]
    outer_bias: bool = False
    obstacle: str = ""
    below: Entrywise | None = None
    readers: tuple[str, ...] = ()
    rows: int = 1

    @property
    def folded(self) -> bool:
        """Whether `linear` is another map than the model's own."""
        return not self.before.is_plain or self.below is not None

    def names(self, received: Mapping[str, Tensor]) -> tuple[str, ...]:
        """What the gradients of the layer and of its tail are called, of those received by the model's own names."""
        return tuple(name for name, own in self.own.items() if own in received)

    def missing(self, received: Mapping[str, Tensor]) -> str:
        """Which of the layer's own gradients was not received, by the model's name, and why; empty where all were."""
        for kind in ("weight", "bias") if self.linear.bias is not None else ("weight",):
            own = self.own.get(f"{self.name}.{kind}")
            if own is None:
                shared = "it is shared with another layer" if kind == "weight" else "the model has no such parameter"
                return f"{self.name}.{kind} ({shared})"
            if own not in received:
                return own if self.linear.weight.requires_grad else f"{own} (the layer is frozen)"
        return ""

    def gradient(self, name: str, received: Mapping[str, Tensor]) -> Tensor:
        """One of these gradients: that of the loss by `linear`'s parameters, or by the tail's."""
        g = received[self.own[name]]
        g = g.T if name in self.turned else g
        folded = (f"{self.name}.weight",) if self.outer_bias else (f"{self.name}.weight", f"{self.name}.bias")
        if name in folded and not self.before.is_plain:
            factor = self.before.factor.to(g)
            g = g[self.before.entries.to(g.device)] / factor.reshape(-1, *[1] * (g.ndim - 1))
        return self._of_below(g, received) if name == f"{self.name}.weight" and self.below is not None else g

    def _of_below(self, g: Tensor, received: Mapping[str, Tensor]) -> Tensor:
        """The gradient of weights into which a map of the layer's input is folded."""
        if bool(self.below.shift.any()):
            g = g - self._shifted(g, received)
        made = torch.empty_like(g)
        made[:, self.below.entries.to(g.device)] = g / self.below.factor.to(g)
        return made

    def _shifted(self, g: Tensor, received: Mapping[str, Tensor]) -> Tensor:
        """What the shift of the layer's inputs adds to the gradient of its weights."""
        return torch.outer(self.gradient(f"{self.name}.bias", received).to(g), self.below.shift.to(g))

    def growth(self, received: Mapping[str, Tensor]) -> float:
        """How much larger rounding is in the gradient of the weights, relative to it, than in what was received."""
        if self.below is None:
            return 1.0
        name = f"{self.name}.weight"
        g, made = (layer.gradient(name, received).double() for layer in (replace(self, below=None), self))
        size = g.abs() + self._shifted(g, received).abs() if bool(self.below.shift.any()) else g.abs()
        size = size / self.below.factor.abs().to(size)
        return max(1.0, float(size.norm() / made.norm().clamp_min(1e-300)))


@dataclass(frozen=True)
class Block:
    """Two linear layers with an elementwise activation between: a feed-forward block, or a piece of a network.

    Of a gated one, `gate` reads what `first` reads, and its outputs multiply the activations.
    """

    first: Layer
    second: Layer
    gate: Layer | None = None

    @property
    def begins(self) -> tuple[Layer, ...]:
        """The layers that tokens enter."""
        return (self.first,) if self.gate is None else (self.first, self.gate)
