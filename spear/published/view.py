"""The server's view of one layer, checked and decomposed: what every attack on a layer begins with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spear.accuracy import FINE, Accuracy
from spear.federated.losses import slope
from spear.federated.received import (
    Widened,
    check_count,
    check_gradients,
    check_inputs,
    check_width,
    coarsest,
    compute_device,
    input_shape,
    rounding_unit,
)
from spear.federated.update import Lazy, SharedUpdate
from spear.models.layers import Layer
from spear.models.streaming import Blocks, Streamed, streamed
from spear.models.tracing import find_layer
from spear.published.lowrank import MIN_GAP, LowRank, decompose, rank_under_noise
from spear.reconstruction import Refusal

MOST_UNDER_NOISE = 0.4  # of the smaller side: the share of a gradient's singular values that may rise above noise


@dataclass(frozen=True)
class Observed:
    """What the server sees of one layer, in the coordinates of its gradient's column space.

    G = L Q for the unknown Q (b, b), X^T = Q^-1 R and Z = B Q^-T with B = W R^T + beta d^T. `d` = L^T dL/dbeta = Q 1
    fixes the scale of every column; it is `None` where the layer has no bias, and each column of Q stays free up to a
    positive factor. An entry of a column of G counts as zero under `tolerance` times the column's largest entry, and
    one of Z under `blur` times its has no sign.
    """

    L: Float[Tensor, "m b"]
    R: Float[Tensor, "b n"]
    B: Float[Tensor, "m b"]
    d: Float[Tensor, " b"] | None
    tolerance: float = 1e-7
    blur: float = 0.0

    def alive(self) -> "Observed":
        """The same without the neurons that no sample activates: they are zeros of every direction, true or false."""
        norms = torch.linalg.vector_norm(self.L, dim=1)
        live = norms > self.tolerance * norms.max()
        return replace(self, L=self.L[live], B=self.B[live])

    def signed(self, v: Float[Tensor, "k b"]) -> Float[Tensor, "k b"]:
        """Guesses of columns of V with the sign that V^T d = 1 asks for, where there is a bias to tell it."""
        return v if self.d is None else torch.where((v @ self.d < 0)[:, None], -v, v)


@dataclass(frozen=True)
class LayerView:
    """One layer prepared for an attack: the server's copy of it and the gradients by name, in float64 on one device.

    `disclosed` is the number of samples in the loss, where it is known, `eps` the rounding unit of the update as it
    came, `input_shape` the shape of one input of the layer, `dtype` the coarsest of model and update.
    """

    layer: Layer
    gradients: Widened
    low: LowRank
    observed: Observed
    disclosed: int | None
    eps: float
    scale: float
    input_shape: tuple[int, ...]
    loss: str = "cross_entropy"
    reduction: str = "mean"
    dtype: torch.dtype = torch.float64

    @property
    def accuracy(self) -> Accuracy:
        """Thresholds for this update."""
        return Accuracy.of(self.eps, self.dtype)

    def unit(self, outputs: int) -> float:
        """dLoss/dlogits of a sample over what its loss compares with the label, less the label."""
        return self.scale * slope(self.loss, outputs, self.reduction)

    @property
    def count(self) -> int:
        """The number of samples in the loss: the disclosed one, or else the rank."""
        return self.low.rank if self.disclosed is None else self.disclosed


def open_layer(
    model: nn.Module,
    update: SharedUpdate,
    *,
    layer: str | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
) -> LayerView:
    """Check model and update against each other, and factorise the gradient of one layer.

    Linear algebra runs in float64 on `device`, or on the CPU where the device has no float64 (MPS).

    Raises `ValueError` as `spear.attack` does.
    """
    found = find_layer(model, layer, update.input_shape)
    received = _received(found, check_gradients(model, update))
    m, n = found.linear.weight.shape
    rank, disclosed = (None if count is None else count * found.rows for count in (batch_size, update.count))
    disclosed = disclosed if rank is None else rank
    check_count(disclosed)
    check_width(disclosed, m, found.name)
    check_inputs(disclosed, n, found.name)
    device = compute_device(device)
    tail = None if found.tail is None else streamed(found.tail, device)
    found = replace(found, linear=Streamed(found.linear, device), tail=tail)
    eps = rounding_unit(model, update)
    gradients = Widened(received, device)
    low, observed = observe(found, gradients, rank, eps, changed=update.learning_rate is not None)
    count = low.rank if disclosed is None else disclosed
    scale = 1 / count if update.reduction == "mean" else 1.0
    told = _loss(found, update.loss, gradients.device), update.reduction, coarsest(model, update)
    return LayerView(found, gradients, low, observed, disclosed, eps, scale, _input_shape(found, update), *told)


def _received(layer: Layer, gradients: Mapping[str, Tensor]) -> Lazy:
    """The gradients by the names of the layer and its tail, each made when it is asked for. Raises `Refusal` for a
    layer whose own gradient is not among them."""
    if why := layer.missing(gradients):
        raise Refusal(f"the update has no gradient for {why}; it has {', '.join(gradients)}")
    return Lazy(layer.names(gradients), lambda name: layer.gradient(name, gradients))


def _loss(layer: Layer, told: str, device: torch.device) -> str:
    """The loss that was told, or binary cross-entropy where that cannot be: of one output cross-entropy is zero."""
    if told != "cross_entropy" or layer.tail is None:
        return told
    with torch.no_grad():
        outputs = layer.tail(torch.zeros(1, layer.linear.out_features, dtype=torch.float64, device=device))
    return told if outputs.shape[1] > 1 else "binary_cross_entropy"


def observe(
    layer: Layer, gradients: Widened, rank: int | None, eps: float, *, changed: bool = False
) -> tuple[LowRank, Observed]:
    """The factorisation of a layer's gradient, and the server's view of the layer in its coordinates.

    `changed` says that it is a change of weights: its noise is their rounding, independent from entry to entry.
    """
    linear = layer.linear
    J = _jacobian(layer, gradients)
    low = decompose(J, eps=eps, expected=rank or 0)
    low = low if rank in (None, low.rank) or low.gap >= MIN_GAP else decompose(J, rank, eps=eps)
    B = Blocks(linear.weight, linear.bias, low.R).times(low.R.mT)
    return low, seen(low, B, linear.in_features, eps, changed=changed)


def seen(low: LowRank, B: Float[Tensor, "m b"], n: int, eps: float, *, changed: bool = False) -> Observed:
    """The server's view of a layer of n inputs in the coordinates of its factorised gradient; with a bias that has one
    column more."""
    d = low.R[:, n] if low.R.shape[1] > n else None
    coarse = min(max(1e-9, 10 * max(low.noise, eps * low.largest) / max(low.smallest, 1e-300)), 1e-2)
    fine = max(1e-9, 10 * low.entry_noise(n) * low.L.shape[0] ** 0.5 / max(low.smallest, 1e-300))
    tolerance = min(coarse, fine) if changed and low.gap >= MIN_GAP else coarse
    return Observed(low.L, low.R[:, :n], B, d, tolerance, coarse if eps > FINE else 0.0)


def _jacobian(layer: Layer, gradients: Widened) -> Blocks:
    """J = [dL/dW | dL/dbeta] as `augment` makes it, or dL/dW alone where the layer has no bias; read block by block."""
    dW = gradients.received[f"{layer.name}.weight"]
    dbeta = None if layer.linear.bias is None else gradients[f"{layer.name}.bias"]
    return Blocks(dW, dbeta, torch.empty(0, dtype=torch.float64, device=gradients.device))


def under_noise(view: LayerView) -> LayerView | None:
    """The same layer seen at the rank that rises above noise, entries of G counting as zero under the noise's size.

    The noise level is estimated from the singular values beyond the rank. `None` where no rank rises, or where what
    rises is too much of the layer to be told from noise.
    """
    J = _jacobian(view.layer, view.gradients).whole()
    m, n = J.shape
    s = torch.linalg.svdvals(J)
    rank = rank_under_noise(s, (m, n))
    if not 0 < rank <= MOST_UNDER_NOISE * min(m, n):
        return None
    low, observed = observe(view.layer, view.gradients, rank, view.eps)
    # Each entry of L = J V S^-1 carries noise sigma / s: four deviations, relative to a column of G of m entries.
    tolerance = min(4 * low.entry_noise(n) * math.sqrt(m) / low.smallest, 0.3)
    return replace(view, low=low, observed=replace(observed, tolerance=tolerance))


def _input_shape(layer: Layer, update: SharedUpdate) -> tuple[int, ...]:
    n = layer.linear.in_features
    return input_shape(layer.name, n, update) if layer.from_data and layer.rows == 1 else (n,)
