"""What makes a recovered batch certain: the server recomputes the update from it with its own weights, and compares.

`certify` asks the layer and everything after it; `certify_layer` the layer alone, where the rest is not known.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear.accuracy import Accuracy
from spear.models.streaming import Outer, Streamed, pieces
from spear.models.tracing import Layer
from spear.published.filtering import determined, gram, zero_rows
from spear.published.greedy import matching_coefficient, recover_scales
from spear.published.view import LayerView, Observed

LEAST_SPARE = 8  # zeros of a column beyond the b - 1 that fix it, for one layer's word to count
SHARPEST = 1e-3  # of a column's largest entry: what one layer's zeros must be told from


@dataclass(frozen=True)
class Certificate:
    """The evidence for a recovered batch, from what the server knows alone.

    `matching` is lambda. `samples` (b,) is, per sample, the relative distance between its column of G and the same
    vector back-propagated from the recovered input and label. `gradients` is the largest relative residual over the
    observed gradients that the recovered batch explains, and `error` (b,) a bound, to first order, on each input's
    relative error. `limit` is the residual that rounding allows in the gradients and `limits` (b,) in the samples;
    `allowed` is the error under which a sample counts as recovered.
    """

    matching: float
    samples: Float[Tensor, " b"]
    gradients: float
    error: Float[Tensor, " b"]
    limit: float
    limits: Float[Tensor, " b"]
    allowed: float

    @property
    def holds(self) -> bool:
        """lambda = 1, every gradient and every sample's column reproduced to rounding, every input well determined."""
        exact = self.matching == 1 and self.gradients <= self.limit and bool((self.samples <= self.limits).all())
        return exact and bool((self.error <= self.allowed).all())

    def why_not(self) -> str:
        """The first condition that fails, in words; empty where the certificate holds."""
        if self.matching < 1:
            return f"matching coefficient {self.matching:.6f} instead of 1"
        if not self.gradients <= self.limit:
            return f"the batch reproduces the gradients to {self.gradients:.0e}, rounding allows {self.limit:.0e}"
        worst = int((self.samples / self.limits).argmax())
        if not self.samples[worst] <= self.limits[worst]:
            off, allows = float(self.samples[worst]), float(self.limits[worst])
            return f"a sample's own gradient is off by {off:.0e}, rounding allows {allows:.0e}"
        if not self.holds:
            bound = float(self.error.max())
            return f"an input is determined to {bound:.0e} only, a certificate needs {self.allowed:.0e}"
        return ""


@dataclass(frozen=True)
class LayerCertificate:
    """The evidence of one layer alone: W, beta, dL/dW and dL/dbeta, whatever the layers after it and the loss are.

    G and X multiply to the gradient, to the relative residual `gradients`, and agree in `matching` of the m b signs.
    Where every column of G is fixed by its zeros, with `spare` ones left, no other G has this pattern, so that `error`
    bounds the inputs to first order as in `Certificate`. Two things are out of its sight. Samples with one activation
    pattern and parallel columns of G look like one, their mean: hence the `disclosed` number of samples must be the
    `rank`. And the length of an input is that of dL/dW over dL/dbeta: both must come from one loss, which a full
    certificate would notice.
    """

    matching: float
    spare: int
    gradients: float
    error: Float[Tensor, " b"]
    limit: float
    allowed: float
    tolerance: float
    rank: int
    disclosed: int | None

    @property
    def holds(self) -> bool:
        """Every sign agrees, every zero is clear and to spare, and the batch has as many samples as directions."""
        return not self.why_not()

    def why_not(self) -> str:
        """The first condition that fails, in words; empty where the certificate holds."""
        if self.disclosed is None:
            return "one layer cannot tell a sample from the mean of several, and the number of samples is not disclosed"
        if self.disclosed != self.rank:
            return f"the gradient shows {self.rank} directions for {self.disclosed} samples"
        if self.matching < 1:
            return f"matching coefficient {self.matching:.6f} instead of 1"
        if self.tolerance > SHARPEST:
            return f"zeros are told from entries of {self.tolerance:.0e} only, one layer alone needs {SHARPEST:.0e}"
        if self.spare < LEAST_SPARE:
            return f"a column has {self.spare} zeros to spare, one layer alone needs {LEAST_SPARE}"
        if not self.gradients <= self.limit:
            return f"the batch reproduces the gradients to {self.gradients:.0e}, rounding allows {self.limit:.0e}"
        if not bool((self.error <= self.allowed).all()):
            bound = float(self.error.max())
            return f"an input is determined to {bound:.0e} only, a certificate needs {self.allowed:.0e}"
        return ""


def recover_labels(layer: Layer, Z: Float[Tensor, "b m"], G: Float[Tensor, "b m"], scale: float) -> Int[Tensor, " b"]:
    """The label of each sample from its column of G, by one directional derivative.

    With J = d logits / d z, G = scale J^T (p - e_c), hence (p - e_c)^T J G = |G|^2 / scale for the right class c alone:
    one product J G serves all classes. It is taken as the derivative of J^T u, linear in u, by u: reverse mode twice.
    """
    Z = Z.detach().requires_grad_(True)
    outputs = layer.tail(Z)
    u = torch.zeros_like(outputs, requires_grad=True)
    (back,) = torch.autograd.grad(outputs, Z, u, create_graph=True)
    (slope,) = torch.autograd.grad(back, u, G)
    value = (outputs.detach().softmax(1) * slope).sum(1, keepdim=True) - slope
    return (value - (G**2).sum(1, keepdim=True) / scale).abs().argmin(1)


def explain(
    layer: Layer, X: Float[Tensor, "b n"], Z: Float[Tensor, "b m"], labels: Int[Tensor, " b"], scale: float
) -> tuple[Float[Tensor, "b m"], dict[str, Tensor | Outer]]:
    """G, and the gradients of the layer and of everything after it, by name, that a batch would give.

    Those of linear layers come as the outer products that they are: each may be large.
    """
    parameters, seen, Z = dict(layer.tail.named_parameters()), {}, Z.detach().requires_grad_(True)
    linear = {name: part for name, part in layer.tail.named_modules() if isinstance(part, Streamed)}
    keep = lambda name: lambda _module, given, result: seen.setdefault(name, []).append((given[0], result))  # noqa: E731
    hooks = [part.register_forward_hook(keep(name)) for name, part in linear.items()]
    loss = scale * F.cross_entropy(layer.tail(Z), labels, reduction="sum")
    for hook in hooks:
        hook.remove()
    calls = [(name, x.detach(), z) for name, pairs in seen.items() for x, z in pairs]
    wanted = [Z, *parameters.values(), *(z for _, _, z in calls)]
    G, *rest = torch.autograd.grad(loss, wanted, materialize_grads=True)
    gradients = dict(zip(parameters, rest, strict=False))
    own = _linear(layer.name, [(G, X)])
    for name in seen:
        pairs = [(delta, x) for (n, x, _), delta in zip(calls, rest[len(parameters) :], strict=True) if n == name]
        own |= _linear(name, pairs)
    return G, own | gradients


def _linear(name: str, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor | Outer]:
    """The gradients of a linear layer's weight and bias, from the (delta, input) of its calls."""
    deltas, inputs = (torch.cat([x.flatten(0, -2) for x in side]) for side in zip(*pairs, strict=True))
    return {f"{name}.weight": Outer(deltas, inputs), f"{name}.bias": deltas.sum(0)}


def input_error(
    observed: Observed, q: Float[Tensor, "b b"], X: Float[Tensor, "b n"], noise: float
) -> Float[Tensor, " b"]:
    """Expected relative error of each input when every entry of the gradient carries an error of size `noise`.

    First order in the noise E: X^T = Q^-1 L^T (G X^T + E), and the columns of Q, kernels of rows A of L, move by about
    noise |S^-1 q| |L_A^+|, since L = J V S^-1. A safety factor of 10 covers what first order leaves out.
    """
    Q = q.mT * recover_scales(observed, q)
    s = torch.linalg.vector_norm(observed.R, dim=1)
    zero = zero_rows(observed.L, q, tolerance=observed.tolerance)
    inverse = 1 / torch.linalg.eigvalsh(gram(observed.L, zero))[:, 1:].clamp_min(1e-300)
    column = torch.linalg.vector_norm(Q / s[:, None], dim=0) * (1 + inverse.sum(1)).sqrt()
    size = torch.linalg.vector_norm(X, dim=1)
    spread = torch.sqrt(X.shape[1] + (column**2 * size**2).sum())
    return 10 * noise * torch.linalg.vector_norm(torch.linalg.inv(Q), dim=1) * spread / size


def certify(
    target: LayerView, q: Float[Tensor, "b b"], X: Float[Tensor, "b n"], labels: Int[Tensor, " b"]
) -> Certificate:
    """The evidence for a batch X with its labels, recovered from the directions `q` of all columns."""
    layer, observed = target.layer, target.observed
    G = (observed.L @ (q.mT * recover_scales(observed, q))).mT
    with torch.no_grad():
        Z = layer.linear(X)
        p = layer.tail(Z).softmax(1)
    # The client rounds p - e_c, which is small where the model is confident and right.
    confidence = torch.linalg.vector_norm(p - F.one_hot(labels, p.shape[1]), dim=1).clamp_min(target.eps)
    G_again, again = explain(layer, X, Z, labels, target.scale)
    received = target.gradients.received  # as it came, and compared piece by piece: it may fill the memory
    compared = {name: _compare(again.pop(name), received[name]) for name in list(again) if name in received}
    return Certificate(
        matching=float(matching_coefficient(observed, q)),
        samples=torch.linalg.vector_norm(G_again - G, dim=1) / torch.linalg.vector_norm(G, dim=1),
        gradients=max(relative for _, relative in compared.values()),
        error=input_error(observed, q, X, _entry_error(target, compared[f"{layer.name}.weight"][0])),
        limit=target.eps**0.5,
        limits=target.eps**0.5 + 10 * target.eps / confidence,
        allowed=Accuracy.of(target.eps).recovered,
    )


def certify_layer(target: LayerView, q: Float[Tensor, "b b"], X: Float[Tensor, "b n"]) -> LayerCertificate:
    """The evidence for inputs X, recovered from the directions `q` of all columns, from this layer alone."""
    name, observed, received = target.layer.name, target.observed, target.gradients.received
    G = observed.L @ (q.mT * recover_scales(observed, q))
    again = {f"{name}.weight": Outer(G.mT, X), f"{name}.bias": G.sum(1)}
    compared = {key: _compare(value, received[key]) for key, value in again.items()}
    return LayerCertificate(
        matching=float(matching_coefficient(observed, q)),
        spare=spare_zeros(observed, q),
        gradients=max(relative for _, relative in compared.values()),
        error=input_error(observed, q, X, _entry_error(target, compared[f"{name}.weight"][0])),
        limit=target.eps**0.5,
        allowed=Accuracy.of(target.eps).recovered,
        tolerance=observed.tolerance,
        rank=target.low.rank,
        disclosed=target.disclosed,
    )


def spare_zeros(observed: Observed, q: Float[Tensor, "b b"]) -> int:
    """How many zeros each column has at least beyond the b - 1 that fix it; 0 where a single one is indispensable.

    A neuron that no sample activates is zero in every direction, and neurons of equal weights, up to a factor, are one.
    A single sample has nothing to be told from: all m rows are to spare.
    """
    m, b = observed.L.shape
    if b == 1:
        return m
    live = torch.linalg.vector_norm(observed.L, dim=1) > 1e-9
    own = live & _one_of_each(observed.B)
    zeros = zero_rows(observed.L, q, tolerance=observed.tolerance) & own
    fixed = determined(observed.L[own], q, tolerance=observed.tolerance)
    return int(torch.where(fixed, zeros.sum(1) - (b - 1), 0).min())


def _one_of_each(B: Float[Tensor, "m b"]) -> Bool[Tensor, " m"]:
    """One row of each group that differ by a positive factor, told by the angle of two random products they share."""
    generator = torch.Generator().manual_seed(0)
    across = torch.randn(B.shape[1], 2, generator=generator, dtype=B.dtype).to(B.device)
    over, under = (B @ across).unbind(1)
    turn = torch.atan2(over, under).sort()
    own = torch.ones_like(turn.indices, dtype=torch.bool)
    own[turn.indices[1:]] = turn.values.diff() > 1e-9
    return own


def _entry_error(target: LayerView, misfit: float) -> float:
    """The error of each entry of the gradient: its rounding, or what the recovered batch leaves of it."""
    m, n = target.layer.linear.weight.shape
    rounding = max(target.low.noise, target.eps * target.low.largest) / (m**0.5 + n**0.5)
    return max(rounding, misfit / (m * n) ** 0.5)


def _compare(again: Tensor | Outer, received: Tensor) -> tuple[float, float]:
    """|again - received|, and relative to |received|; 0 / 0 = 0, as for a neuron that no sample activates."""
    apart, whole = 0.0, 0.0
    for part in pieces(len(received), received[:1].numel()):
        a = again[part]
        r = received[part].to(a)
        apart = math.hypot(apart, float(torch.linalg.vector_norm(a - r)))
        whole = math.hypot(whole, float(torch.linalg.vector_norm(r)))
    return apart, apart / max(whole, 1e-300) if apart else 0.0
