"""What makes a recovered batch certain: the server recomputes the update from it with its own weights, and compares."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from spear.filtering import Observed, gram, matching_coefficient, recover_scales, zero_rows
from spear.streaming import Outer, Streamed, pieces
from spear.target import Target
from spear.tracing import Layer


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


def certify(target: Target, q: Float[Tensor, "b b"], X: Float[Tensor, "b n"], labels: Int[Tensor, " b"]) -> Certificate:
    """The evidence for a batch X with its labels, recovered from the directions `q` of all columns."""
    layer, observed, low = target.layer, target.observed, target.low
    G = (observed.L @ (q.mT * recover_scales(observed, q))).mT
    with torch.no_grad():
        Z = layer.linear(X)
        p = layer.tail(Z).softmax(1)
    # The client rounds p - e_c, which is small where the model is confident and right.
    confidence = torch.linalg.vector_norm(p - F.one_hot(labels, p.shape[1]), dim=1).clamp_min(target.eps)
    G_again, again = explain(layer, X, Z, labels, target.scale)
    received = target.gradients.received  # as it came, and compared piece by piece: it may fill the memory
    compared = {name: _compare(again.pop(name), received[name]) for name in list(again) if name in received}
    m, n = layer.linear.weight.shape
    rounding = max(low.noise, target.eps * low.largest) / (m**0.5 + n**0.5)
    misfit = compared[f"{layer.name}.weight"][0] / (m * n) ** 0.5
    return Certificate(
        matching=float(matching_coefficient(observed, q)),
        samples=torch.linalg.vector_norm(G_again - G, dim=1) / torch.linalg.vector_norm(G, dim=1),
        gradients=max(relative for _, relative in compared.values()),
        error=input_error(observed, q, X, max(rounding, misfit)),
        limit=target.eps**0.5,
        limits=target.eps**0.5 + 10 * target.eps / confidence,
        allowed=1e-6 if target.eps < 1e-10 else 1e-3,
    )


def _compare(again: Tensor | Outer, received: Tensor) -> tuple[float, float]:
    """|again - received|, and relative to |received|; 0 / 0 = 0, as for a neuron that no sample activates."""
    apart, whole = 0.0, 0.0
    for part in pieces(len(received), received[:1].numel()):
        a = again[part]
        r = received[part].to(a)
        apart = math.hypot(apart, float(torch.linalg.vector_norm(a - r)))
        whole = math.hypot(whole, float(torch.linalg.vector_norm(r)))
    return apart, apart / max(whole, 1e-300) if apart else 0.0
