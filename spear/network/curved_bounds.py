"""How far inputs can be from the truth where an activation is curved: the derivative of ∂L/∂z by the input decides.

**Theorem.** Let U = G' X', both of rank b, P the projection on span(G'), E a basis of the differences of the inputs
(b - 1 directions), J_i the derivative of ∂L/∂z of sample i by its input. If (1 - P) J_i E has full column rank for each
i, the batch is isolated: no other batch of b samples, however labelled, that lies near it gives U.

*Proof.* A batch that gives U has span(G) = span(G') and the same row space, so every x_i moves by E v alone and its
∂L/∂z stays in span(G'): (1 - P) delta_i(x_i + E v) = 0, whose derivative in v is injective at v = 0. Near X', G = U X⁺
is near G', so the labels are the same.

*Error.* U = G' X' + N, to first order: with n = (G'⁺N)_i, n_1 its last entry, of the bias, and x⁺ the columns of X'⁺,

    x'_i - x_i = c + E T⁺ ((1 - P) N x⁺_i - (1 - P) J_i c)      c = n - n_1 x_i      T = (1 - P) J_i E

The entries of N are taken for independent, as large as `spear.certificate` takes them, times `SAFETY`.

**Assumed**, beyond what is said there: that no second batch, far from this one, gives the same update. ReLU's theorem
excludes those with the same activation patterns; here all of them form one region, so nothing excludes them but
counting: each sample solves m - b equations in b - 1 unknowns to rounding, and a round of starts from the whole
gradient ends at none but these samples (`curves.whole.alone`). Without a bias in each hidden layer not even counting
does: an odd activation gives x with one label and -x with the other the same gradient.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spear.certificate import SAFETY, inverse_columns, norms, rms
from spear.network.derivatives import turned
from spear.network.layerwise import solve
from spear.network.problem import NetworkView, Passes, Targets

PROBES = 4  # random directions that measure the size of a derivative
MOST_UNEQUAL = 1e12  # squared condition of a derivative past which its inverse is rounding


class Levers(NamedTuple):
    """Of each sample |T⁺|, |(1 - P) J| and |(1 - P) J x|, in Frobenius norms."""

    inverse: Float[Tensor, " s"]
    reach: Float[Tensor, " s"]
    along: Float[Tensor, " s"]

    @classmethod
    def joined(cls, parts: "list[Levers]") -> "Levers":
        """Those of all parts."""
        return cls(*(torch.cat(part) for part in zip(*parts, strict=True)))


def curved_bounds(
    problem: NetworkView, run: Passes, targets: Targets, known: Levers | None = None
) -> Float[Tensor, " s"]:
    """A bound on each input's relative error; infinite where the batch is not isolated, or a layer has no bias.

    `known` are the levers, where Newton's last step computed them.
    """
    G, X, total = run.deltas[0], problem.extend(0, run.inputs[0]), problem.augmented(0)
    unknown = G.new_full((len(G),), torch.inf)
    lost = len(G) > min(total.shape) or any(b is None for b in problem.biases[:-1])
    if lost or not bool(G.isfinite().all() and X.isfinite().all()):
        return unknown
    rest, eps = torch.addmm(total, G.T, X, alpha=-1), 2 * problem.precision
    entry, bias = (max(rms(x), eps * rms(y)) for x, y in ((rest, total), (rest[:, -1], total[:, -1])))
    row, column, size = inverse_columns(G), inverse_columns(X), norms(run.inputs[0])
    if known is None:
        basis = torch.linalg.qr(G.T)[0]
        parts = turned(problem, run, targets, basis, *probes(run.inputs[0]))
        known = Levers.joined([levers(free @ free.mT, own) for _, free, own in parts])
    lever, reach, along = known
    own = row * (entry * X.shape[1] ** 0.5 + bias * size)
    moved = lever * (entry * column + row * (entry * reach + bias * along))
    error = SAFETY * (own + moved) / size + solve(G, rest).norm(dim=1) / size
    return error.nan_to_num(torch.inf, torch.inf)


def probes(x: Float[Tensor, "s n"]) -> Float[Tensor, "probes s n"]:
    """Random changes of the inputs, and the inputs: what measures the size of a derivative."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(PROBES, *x.shape, generator=generator, dtype=torch.float64).to(x)
    return torch.cat([random, x[None]])


def levers(gram: Float[Tensor, "s q q"], own: Float[Tensor, "s probes m"]) -> Levers:
    """From T Tᵀ, rows being directions, and the derivatives along the `probes`."""
    lengths = own.norm(dim=2)
    return Levers(_inverse_norm(gram), lengths[:, :-1].pow(2).mean(1).sqrt(), lengths[:, -1])


def _inverse_norm(gram: Float[Tensor, "s q q"]) -> Float[Tensor, " s"]:
    """The Frobenius norm of each T⁺ from T Tᵀ; infinite where the rows of T are dependent."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    eye = torch.eye(gram.shape[1]).to(gram)
    inverse = torch.cholesky_inverse(torch.where((failed == 0)[:, None, None], factor, eye)) if gram.shape[1] else gram
    squared, size = (x.diagonal(dim1=1, dim2=2).sum(1) for x in (inverse, gram))
    sure = (failed == 0) & (squared * size < MOST_UNEQUAL)
    return torch.where(sure, squared.clamp_min(0).sqrt(), torch.inf)
