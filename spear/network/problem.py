"""The network as the server sees it: linear layers, activations between them, and the gradient received of each.

Samples are rows: activations (s, n), back-propagated vectors (s, m).
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spear.accuracy import Accuracy
from spear.federated import losses
from spear.federated.received import (
    check_count,
    check_gradients,
    check_size,
    check_width,
    coarsest,
    compute_device,
    input_shape,
    rounding_unit,
)
from spear.federated.update import Lazy, SharedUpdate
from spear.models.activations import RELU, Activation
from spear.models.layers import Layer
from spear.models.streaming import Blocks, product, product_back
from spear.models.tracing import chain
from spear.published.lowrank import LowRank, decompose
from spear.reconstruction import Refusal

LARGE = 2**22  # entries of a layer that is not converted to float64, and read by blocks


@dataclass(frozen=True)
class NetworkView:
    """What the server knows: a chain of linear layers with activations between them, and the gradient of each.

    `weights[k]` is (m_k, m_{k-1}); `biases[k]` is (m_k,), or `None` where the layer has no bias, and then so is
    `bias_gradients[k]`; that of the output layer need not have been sent. `reduction` says how the loss joins the
    samples, `batch_size` how many there are, if known.
    `folded` says that a map between the model's layers is in their weights: gradients are then not the model's own.
    `precision` is the unit roundoff of the gradients as they were sent, relative to them. All is in float64, but for
    hidden layers of over `LARGE` entries: these are held as they came, and `apply`, `back`, `lift` and `gradient` read
    them by blocks, until `widened`.
    `input_shape` the shape of one sample, where it is not a vector. `loss` is one of `spear.federated.LOSSES`,
    `dtype` the coarsest of model and update. `activations` are those of the hidden layers, ReLU unless they are given.
    """

    weights: tuple[Float[Tensor, "_out _in"], ...]
    biases: tuple[Float[Tensor, " _out"] | None, ...]
    weight_gradients: tuple[Float[Tensor, "_out _in"], ...]
    bias_gradients: tuple[Float[Tensor, " _out"] | None, ...]
    batch_size: int | None = None
    reduction: Literal["mean", "sum"] = "mean"
    precision: float = 2.0**-53
    input_shape: tuple[int, ...] | None = None
    loss: str = "cross_entropy"
    dtype: torch.dtype | None = None
    folded: bool = False
    activations: tuple[Activation, ...] = ()
    _factors: dict[tuple[int, int | None], LowRank] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.activations:
            object.__setattr__(self, "activations", (RELU,) * (len(self.weights) - 1))
        if len(self.weights) < 2:
            raise Refusal(f"the network method needs a hidden layer; the chain has {len(self.weights)} linear layer")
        for k, (w, g) in enumerate(zip(self.weights, self.weight_gradients, strict=True)):
            if w.shape != g.shape:
                raise ValueError(f"layer {k + 1}: weight {tuple(w.shape)} but gradient {tuple(g.shape)}")
            if k and w.shape[1] != self.weights[k - 1].shape[0]:
                below = self.weights[k - 1].shape[0]
                raise ValueError(f"layer {k + 1} takes {w.shape[1]} inputs; the layer below has {below} outputs")
        for k, (b, g) in enumerate(zip(self.biases, self.bias_gradients, strict=True)):
            if (b is None) != (g is None) and (b is None or k <= self.last):
                raise ValueError(f"layer {k + 1}: a bias needs its gradient, and a bias gradient its bias")

    @property
    def widened(self) -> "NetworkView":
        """The same with every layer in float64, for what takes whole matrices."""
        weights, gradients = (tuple(w.to(self.weights[-1]) for w in x) for x in (self.weights, self.weight_gradients))
        return replace(self, weights=weights, weight_gradients=gradients)

    @property
    def last(self) -> int:
        """Index of the last hidden layer."""
        return len(self.weights) - 2

    @property
    def is_relu(self) -> bool:
        """Whether every activation is ReLU."""
        return all(activation.is_relu for activation in self.activations)

    @property
    def outputs(self) -> int:
        """Width of the output layer."""
        return self.weights[-1].shape[0]

    @property
    def classes(self) -> int:
        """How many labels there are: one for each output, two where there is one output."""
        return max(self.outputs, 2)

    @property
    def accuracy(self) -> Accuracy:
        """What the rounding of the gradients lets be asked of samples."""
        return Accuracy.of(2 * self.precision, self.dtype)

    def unit(self, size: int) -> float:
        """dLoss/dlogits of one copy of a sample over (`activate(logits)` - one-hot label), in a batch of `size`."""
        one = losses.slope(self.loss, self.outputs, self.reduction)
        return one if self.reduction == "sum" else one / size

    def activate(self, logits: Float[Tensor, "*s outputs"]) -> Float[Tensor, "*s outputs"]:
        """What the loss compares with the one-hot label: softmax, sigmoid, or the outputs themselves."""
        return losses.activate(self.loss, logits)

    def one_hot(self, labels: Int[Tensor, " s"]) -> Float[Tensor, "s outputs"]:
        """The outputs that the loss wants for these labels."""
        return losses.one_hot(labels, self.weights[-1].T)

    def gradient(self, k: int) -> Blocks:
        """[dL/dW_k | dL/dbeta_k] = sum_i delta_i [input_i; 1]ᵀ, without the last column where there is no bias."""
        return Blocks(self.weight_gradients[k], self.bias_gradients[k], self.weights[-1])

    def augmented(self, k: int) -> Float[Tensor, "out in1"]:
        """The same as one matrix."""
        return (
            self.weight_gradients[k].to(self.weights[-1])
            if self.bias_gradients[k] is None
            else join(self.weight_gradients[k].to(self.weights[-1]), self.bias_gradients[k])
        )

    def factors(self, k: int, rank: int | None = None) -> LowRank:
        """The factorised gradient of layer k, its rank counted down to the rounding with which it was sent: once."""
        if (k, rank) not in self._factors:
            low = decompose(self.gradient(k), rank, eps=2 * self.precision, expected=self.batch_size or 0)
            self._factors[k, rank] = low
        return self._factors[k, rank]

    def affine(self, k: int) -> Float[Tensor, "out in1"]:
        """[W_k | beta_k], the map from [input; 1] to pre-activations, in the columns of `augmented(k)`."""
        return self.weights[k] if self.biases[k] is None else join(self.weights[k], self.biases[k])

    def lift(self, k: int, rows: Float[Tensor, "r in1"]) -> Float[Tensor, "out r"]:
        """[W_k | beta_k] rowsᵀ."""
        return Blocks(self.weights[k], self.biases[k], rows).times(rows.mT)

    def back(self, k: int, deltas: Float[Tensor, "*s out"]) -> Float[Tensor, "*s in"]:
        """Vectors of layer k's outputs led back to its inputs: W_kᵀ delta."""
        return product_back(deltas, self.weights[k])

    def extend(self, k: int, inputs: Float[Tensor, "s in"]) -> Float[Tensor, "s in1"]:
        """[input; 1], or the input alone where layer k has no bias, or none whose gradient was sent."""
        return inputs if self.bias_gradients[k] is None else torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)

    def apply(self, k: int, inputs: Float[Tensor, "s in"]) -> Float[Tensor, "s out"]:
        """Pre-activations of layer k."""
        z = product(inputs, self.weights[k])
        return z if self.biases[k] is None else z + self.biases[k]

    def shaped(self, inputs: Float[Tensor, "s n"]) -> Float[Tensor, "s *input_shape"]:
        """Inputs in the shape of a sample."""
        return inputs if self.input_shape is None else inputs.unflatten(1, self.input_shape).contiguous()


def join(matrix: Float[Tensor, "m n"], column: Float[Tensor, " m"]) -> Float[Tensor, "m n1"]:
    return torch.cat([matrix, column[:, None]], 1)


@dataclass(frozen=True)
class Passes:
    """Forward and backward pass of candidates: layer k has `inputs[k]` (s, m_{k-1}) and `deltas[k]` (s, m_k).

    A hidden layer k has pre-activations `z[k]` (s, m_k) and their `slopes[k]`, phi'(z).
    """

    inputs: tuple[Float[Tensor, "s _in"], ...]
    deltas: tuple[Float[Tensor, "s _out"], ...]
    z: tuple[Float[Tensor, "s _out"], ...]
    slopes: tuple[Float[Tensor, "s _out"], ...]


def forward(
    problem: NetworkView, inputs: Float[Tensor, "s n"]
) -> tuple[list[Float[Tensor, "s _in"]], Float[Tensor, "s outputs"]]:
    """Inputs of every layer, and the logits."""
    states, z = _states(problem, inputs)
    return states, z[-1]


def _states(
    problem: NetworkView, inputs: Float[Tensor, "s n"]
) -> tuple[list[Float[Tensor, "s _in"]], list[Float[Tensor, "s _out"]]]:
    """Inputs and pre-activations of every layer."""
    states, z = [inputs], []
    for k in range(problem.last + 2):
        z.append(problem.apply(k, states[-1]))
        if k <= problem.last:
            states.append(problem.activations[k].value(z[-1]))
    return states, z


@dataclass(frozen=True)
class Targets:
    """Who is in the batch: `counts[i]` (classes,) says how often sample i bears each label.

    `unit` is one copy's weight in the loss (`NetworkView.unit`), negative where the update's sign is reversed, `error`
    how far the counts were from integers before they were rounded. `measured`, where it is given, is dLoss/dlogits as
    the gradient shows it: it stands in for that of a weak sample whose input is not known well enough to compute it,
    and for every sample's where that is not `computed`: a saturated softmax multiplies the rounding of large logits.
    `whole` says that counts are whole numbers of copies; else every sample has one label, its count the sample's weight
    in units of `unit`. `free` says that no labels explain dLoss/dlogits, which is as `measured` then: the loss is
    another one, or compares the outputs with numbers; every sample is counted once.
    """

    counts: Float[Tensor, "s classes"]
    unit: float
    error: float
    measured: Float[Tensor, "s outputs"] | None = None
    whole: bool = True
    computed: bool = True
    free: bool = False

    @property
    def copies(self) -> Float[Tensor, " s"]:
        """How often each sample is in the batch, or its weight in units of `unit`."""
        return self.counts.sum(1)

    def errors(self, activated: Float[Tensor, "s outputs"]) -> Float[Tensor, "s outputs"]:
        """dLoss/dlogits of each sample, its copies added up, from `NetworkView.activate` of its logits."""
        if self.measured is not None and not self.computed:
            return self.measured
        own = self._own(activated)
        return own if self.measured is None else torch.where(self.agree(activated)[:, None], own, self.measured)

    def agree(self, activated: Float[Tensor, "s outputs"]) -> Bool[Tensor, " s"]:
        """Whose dLoss/dlogits is, to a per cent, what the gradient shows."""
        if self.measured is None or self.free:
            return torch.ones(len(activated), dtype=torch.bool, device=activated.device)
        return (self._own(activated) - self.measured).norm(dim=1) < 0.01 * self.measured.norm(dim=1)

    def _own(self, activated: Float[Tensor, "s outputs"]) -> Float[Tensor, "s outputs"]:
        return self.unit * (self.copies[:, None] * activated - self.counts[:, -activated.shape[1] :])

    def __getitem__(self, index: Tensor) -> "Targets":
        measured = None if self.measured is None else self.measured[index]
        return replace(self, counts=self.counts[index], measured=measured)

    def __len__(self) -> int:
        return len(self.counts)


def passes(problem: NetworkView, inputs: Float[Tensor, "s n"], targets: Targets) -> Passes:
    """Every layer's inputs and back-propagated vectors, for the loss of the samples with their labels."""
    return next(passes_of(problem, inputs, [targets]))


def passes_of(problem: NetworkView, inputs: Float[Tensor, "s n"], targets: Iterable[Targets]) -> Iterator[Passes]:
    """`passes` for each of several targets, with one forward pass."""
    states, z = _states(problem, inputs)
    slopes = [activation.slope(own) for activation, own in zip(problem.activations, z[:-1], strict=True)]
    activated = problem.activate(z[-1])
    for one in targets:
        deltas = [one.errors(activated)]
        for k in range(problem.last, -1, -1):
            deltas.insert(0, problem.back(k + 1, deltas[0]) * slopes[k])
        yield Passes(tuple(states), tuple(deltas), tuple(z[:-1]), tuple(slopes))


def open_network(
    model: nn.Module,
    update: SharedUpdate,
    *,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
) -> NetworkView:
    """The chain behind a model, with the update's gradients, on `device`, or on the CPU where that has no float64.

    Raises `Refusal` for a model that is not such a chain, and `ValueError` as `spear.attack` does for gradients that do
    not fit.
    """
    return view_of(chain(model, update.input_shape), model, update, batch_size=batch_size, device=device)


def view_of(
    layers: Sequence[Layer],
    model: nn.Module,
    update: SharedUpdate,
    *,
    idle: Collection[str] = (),
    batch_size: int | None = None,
    device: str | torch.device | None = None,
) -> NetworkView:
    """A chain of a model's layers with the update's gradients. Layers named in `idle` have a bias of no effect, whose
    gradient is zero but for rounding: it is left out. Raises as `open_network` does."""
    gradients, device = check_gradients(model, update), compute_device(device)
    count = update.count if batch_size is None else batch_size
    check_count(count)
    check_size(count, layers[0].linear.in_features, update)
    check_width(batch_size, layers[0].linear.out_features, layers[0].name)
    biased = [layer.linear.bias is not None and layer.name not in idle for layer in layers]
    sent = [has and layer.own.get(f"{layer.name}.bias") in gradients for layer, has in zip(layers, biased, strict=True)]
    for layer, has in zip(layers, biased, strict=True):
        enough = layer.own.get(f"{layer.name}.weight") in gradients and (not has or layer is layers[-1])
        if (missing := layer.missing(gradients)) and not enough:
            raise Refusal(f"the network method needs every layer's gradient; the update has none for {missing}")

    def held(layer: Layer, kind: str, values: Tensor) -> Tensor:
        large = kind == "weight" and layer is not layers[-1] and values.numel() > LARGE
        return values.detach().to(device, values.dtype if large else torch.float64)

    def received(layer: Layer, kind: str) -> Tensor:
        return held(layer, kind, layer.gradient(f"{layer.name}.{kind}", gradients))

    pairs = list(zip(layers, biased, strict=True))
    zero = {layer.own.get(f"{layer.name}.bias") for layer in layers if layer.name in idle}
    return NetworkView(
        tuple(held(layer, "weight", layer.linear.weight) for layer in layers),
        tuple(held(layer, "bias", layer.linear.bias) if has else None for layer, has in pairs),
        tuple(received(layer, "weight") for layer in layers),
        tuple(received(layer, "bias") if came else None for layer, came in zip(layers, sent, strict=True)),
        batch_size or update.count,
        update.reduction,
        rounding_unit(model, _without(update, zero)) / 2 * max(layer.growth(gradients) for layer in layers),
        input_shape(layers[0].name, layers[0].linear.in_features, update),
        _loss(layers[-1], update.loss),
        coarsest(model, update),
        any(layer.folded for layer in layers),
        tuple(layer.activation.to(device) for layer in layers[:-1]),
    )


def _without(update: SharedUpdate, names: Collection[str | None]) -> SharedUpdate:
    """The update without the gradients of these names."""
    g = update.gradients
    lost = (g.rounding, g.noise) if isinstance(g, Lazy) else ()
    rest = tuple(name for name in g if name not in names)
    return replace(update, gradients=Lazy(rest, g.__getitem__, *lost)) if names else update


def plain(problem: NetworkView) -> NetworkView:
    """The problem `widened`. Raises `Refusal` where its gradients are not the model's own, entry by entry, and where an
    activation is not ReLU: from noise, missing entries and steps, samples are told by ReLU's zeros."""
    if problem.folded:
        raise Refusal("between the layers stands a normalisation: noise, missing entries or steps are not of this form")
    if not problem.is_relu:
        raise Refusal("noise, missing entries and local steps need ReLU's zeros; an activation here is another one")
    return problem.widened


def _loss(last: Layer, told: str) -> str:
    """The loss that was told, or binary cross-entropy where that cannot be: of one output cross-entropy is zero."""
    return "binary_cross_entropy" if told == "cross_entropy" and last.linear.out_features == 1 else told
