"""The server's view of a block: its weights, and its two gradients, checked and factorised."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spear.accuracy import Accuracy
from spear.federated.received import check_count, check_gradients, coarsest, compute_device, rounding_unit
from spear.federated.update import SharedUpdate
from spear.models.activations import Activation, Gated
from spear.models.layers import Block, Layer
from spear.models.normalised import Normaliser
from spear.models.sublayers import added, normalised
from spear.models.tracing import find_block, traced_model
from spear.network.factors import Factors
from spear.published.lowrank import LowRank, augment, decompose
from spear.reconstruction import Refusal

FADED = 3.0  # times the next one: a singular value that is no rounding, where the number of tokens is known
MARGIN = 8  # equations beyond the unknowns of a token: those that a wrong answer fails


@dataclass(frozen=True)
class Before:
    """The normalisation directly before a block, its `rounding`, and the gradient `total` of the weights whose outputs
    are added last to what it is given, where that was received."""

    norm: Normaliser
    rounding: float
    total: Float[Tensor, "n r"] | None


@dataclass(frozen=True)
class BlockView:
    """A block as the server sees it, in float64 on one device.

    `lift` is [W | beta] of the first layer (W where it has no bias), `reader` the weights W' of the second; `below` and
    `above` are their gradients in the same way, `low` both factorised. Of a gated block `lift` and `below` hold the
    gate's under the first layer's, `reader` its weights twice. `from_data` says whether the samples themselves
    enter, or parts of them; `anchored` whether the first layer has a bias, and whether the second. `disclosed` is the
    number of tokens of all samples together, `None` where it is not known. `eps` is the rounding unit of the gradients
    as they came, `dtype` the coarsest of model and update. `before` is what is looked for where the equations leave the
    length of a token open.
    """

    name: str
    from_data: bool
    activation: Activation | Gated
    lift: Float[Tensor, "m n1"]
    reader: Float[Tensor, "outputs m"]
    below: Float[Tensor, "m n1"]
    above: Float[Tensor, "outputs m1"]
    anchored: tuple[bool, bool]
    low: tuple[LowRank, LowRank]
    disclosed: int | None
    eps: float
    dtype: torch.dtype
    before: Before | None = None

    @property
    def rank(self) -> int:
        """How many tokens the gradients show."""
        return self.low[0].rank

    @cached_property
    def is_scaled(self) -> bool:
        """Whether the equations of a token fix its length: not those of a ReLU between layers without biases (T5)."""
        return any(self.anchored) or self.activation.degree is None

    @property
    def accuracy(self) -> Accuracy:
        """Thresholds for this update."""
        return Accuracy.of(self.eps, self.dtype)

    def factors(self) -> tuple[Factors, Factors]:
        """Both gradients as U diag(S) V."""
        return Factors.of(self.low[0]), Factors.of(self.low[1])

    def tokens(self, extended: Float[Tensor, "k n1"]) -> Float[Tensor, "k n"]:
        """The x of [x; 1]."""
        return extended[:, :-1] if self.anchored[0] else extended

    def read(self, a: Float[Tensor, "k m"]) -> Float[Tensor, "k m1"]:
        """What the second layer reads: [a; 1], or a where it has no bias."""
        return torch.cat([a, a.new_ones(len(a), 1)], 1) if self.anchored[1] else a


def open_block(
    model: nn.Module,
    update: SharedUpdate,
    *,
    layer: str | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
) -> BlockView:
    """The block that begins with `layer`, or else the model's first, with the update's gradients.

    Raises `Refusal` where there is no block, where it is too narrow for its tokens, and `ValueError` as `spear.attack`
    does for gradients that do not fit.
    """
    block, received = find_block(model, layer, update.input_shape), check_gradients(model, update)
    for why in filter(None, (part.missing(received) for part in (*block.begins, block.second))):
        raise Refusal(f"the update has no gradient for {why}; it has {', '.join(received)}")
    count = update.count if batch_size is None else batch_size
    check_count(count)
    disclosed = None if count is None or not _is_counted(block, update) else count * block.first.rows
    device, eps = compute_device(device), rounding_unit(model, update)
    below = torch.cat([_gradient(part, received, device) for part in block.begins])
    above = _gradient(block.second, received, device)
    _check_room(block, below, above, disclosed)
    low = _factorised(block, below, above, disclosed, eps)
    lift, linear = torch.cat([_affine(part, device) for part in block.begins]), block.second.linear
    anchored = block.first.linear.bias is not None, linear.bias is not None
    reader = linear.weight.detach().to(device, torch.float64).repeat(1, len(block.begins))
    weights, phi = (lift, reader, below, above), block.first.activation.to(device)
    activation = phi if block.gate is None else Gated(phi)
    told = anchored, low, disclosed, eps, coarsest(model, update)
    view = BlockView(block.first.name, block.first.from_data, activation, *weights, *told)
    return view if view.is_scaled else replace(view, before=_before(model, update, block, view, received))


def _before(
    model: nn.Module, update: SharedUpdate, block: Block, view: BlockView, received: Mapping[str, Tensor]
) -> Before | None:
    traced = traced_model(model, update.input_shape)
    found = normalised(traced, view.name)
    if found is None:
        return None
    totals, names = [], traced.names()
    for out in added(traced, found, [part.name for part in block.begins], block.second.name):
        own = names.get(weight := f"{out.target}.weight")
        if own in received:
            totals.append(received[own].T if weight in traced.turned else received[own])
    norm = replace(found.norm, scale=found.norm.scale.to(view.lift), shift=found.norm.shift.to(view.lift))
    return Before(norm, found.rounding, totals[0].to(view.lift) if totals else None)


def _is_counted(block: Block, update: SharedUpdate) -> bool:
    """Whether it is known how many tokens a sample makes."""
    return update.input_shape is not None or block.first.from_data


def _gradient(layer: Layer, received: object, device: torch.device) -> Float[Tensor, "m n1"]:
    kinds = ("weight", "bias") if layer.linear.bias is not None else ("weight",)
    parts = [layer.gradient(f"{layer.name}.{kind}", received).to(device, torch.float64) for kind in kinds]
    return augment(*parts) if len(parts) == 2 else parts[0]


def _affine(layer: Layer, device: torch.device) -> Float[Tensor, "m n1"]:
    weight = layer.linear.weight.detach().to(device, torch.float64)
    bias = layer.linear.bias
    return weight if bias is None else augment(weight, bias.detach().to(device, torch.float64))


def _check_room(block: Block, below: Tensor, above: Tensor, disclosed: int | None) -> None:
    """Raises `Refusal` for more tokens than either gradient could show."""
    narrow = min(*below.shape, *above.shape)
    if disclosed is not None and disclosed > narrow:
        many = f"{disclosed:,} tokens ({block.first.rows} of each sample)"
        raise Refusal(f"{many} are more than the {narrow} that {block.first.name} and {block.second.name} can show")


def _factorised(
    block: Block, below: Tensor, above: Tensor, disclosed: int | None, eps: float
) -> tuple[LowRank, LowRank]:
    """Both gradients at one rank. Raises `Refusal` where they have none in common, or one that leaves a token too few
    equations."""
    low = [decompose(J, eps=eps, expected=disclosed or 0) for J in (below, above)]
    for one, J in zip(low, (below, above), strict=True):
        if one.rank == min(J.shape) != disclosed:
            full = f"a gradient of {block.first.name} or {block.second.name} has the full rank of {one.rank}"
            raise Refusal(f"{full}: as many tokens as these layers can show, or more, or noise")
    known = [disclosed if disclosed is not None and one.rank < disclosed else one.rank for one in low]
    if known[0] == known[1] and known != [one.rank for one in low]:  # weak tokens may fade into rounding, in one sooner
        told = [decompose(J, rank, eps=eps) for J, rank in zip((below, above), known, strict=True)]
        low = told if all(one.gap > FADED for one in told) else low
    if low[0].rank != low[1].rank:
        shown = f"the gradient of {block.first.name} has rank {low[0].rank}, that of {block.second.name} {low[1].rank}"
        raise Refusal(f"{shown}: tokens that are alike behind the block cannot be told apart")
    rank, m = low[0].rank, block.second.linear.in_features
    if 2 * rank - 1 + MARGIN > m:
        raise Refusal(f"{rank} tokens leave each {m - rank} equations for {rank - 1} unknowns, of {m} units")
    return low[0], low[1]
