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
counting: each sample solves m - b equations in b - 1 unknowns, and the search keeps what solves them to rounding.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from spear.certificate import SAFETY, inverse_columns, norms, rms
from spear.federated.losses import activate_along
from spear.network.layerwise import solve
from spear.network.problem import NetworkView, Passes, Targets

MOST_ENTRIES = 2**23  # of derivatives that are held at once
PROBES = 4  # random directions that measure the size of a derivative
FLATTEST = 1e-12  # squared singular value, relative to the largest, under which a direction is undetermined


def curved_bounds(problem: NetworkView, run: Passes, targets: Targets) -> Float[Tensor, " s"]:
    """A bound on each input's relative error; infinite where the batch is not isolated, or a layer has no bias."""
    G, X, total = run.deltas[0], problem.extend(0, run.inputs[0]), problem.augmented(0)
    unknown = G.new_full((len(G),), torch.inf)
    lost = len(G) > min(total.shape) or any(b is None for b in problem.biases[:-1])
    if lost or not bool(G.isfinite().all() and X.isfinite().all()):
        return unknown
    rest, eps = torch.addmm(total, G.T, X, alpha=-1), 2 * problem.precision
    entry, bias = (max(rms(x), eps * rms(y)) for x, y in ((rest, total), (rest[:, -1], total[:, -1])))
    row, column, size = inverse_columns(G), inverse_columns(X), norms(run.inputs[0])
    lever, reach, along = _levers(problem, run, targets)
    own = row * (entry * X.shape[1] ** 0.5 + bias * size)
    turned = lever * (entry * column + row * (entry * reach + bias * along))
    error = SAFETY * (own + turned) / size + solve(G, rest).norm(dim=1) / size
    return error.nan_to_num(torch.inf, torch.inf)


def _levers(problem: NetworkView, run: Passes, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sample |T⁺|, |J| (Frobenius norms), and |J x|."""
    x = run.inputs[0]
    E = torch.linalg.qr((x[1:] - x[:1]).T)[0]
    probes = torch.randn(x.shape[1], PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x)
    basis = torch.linalg.qr(run.deltas[0].T)[0]
    common = torch.cat([E, probes], 1).T @ problem.weights[0].T
    parts = torch.arange(len(x), device=x.device).split(max(1, MOST_ENTRIES // max(1, common.numel())))
    derived = Derivatives.of(problem, run, targets)
    found = []
    for index in parts:
        own = (x[index] @ problem.weights[0].T)[:, None]
        moved = derived.along(torch.cat([common.expand(len(index), -1, -1), own], 1), index)
        free = moved[:, : E.shape[1]]
        free = free - (free @ basis) @ basis.T
        lengths = moved[:, E.shape[1] :].norm(dim=2)
        found.append((_inverse_norm(free), lengths[:, :-1].pow(2).mean(1).sqrt(), lengths[:, -1]))
    lever, reach, along = (torch.cat(x) for x in zip(*found, strict=True))
    return lever, reach, along


def _inverse_norm(rows: Float[Tensor, "s q m"]) -> Float[Tensor, " s"]:
    """The Frobenius norm of each matrix's pseudo-inverse; infinite where its rows are dependent."""
    if not rows.shape[1]:
        return rows.new_zeros(len(rows))
    squared = torch.linalg.eigvalsh(rows @ rows.mT)
    sure = squared[:, 0] > FLATTEST * squared[:, -1]
    return torch.where(sure, squared.clamp_min(1e-300).reciprocal().sum(1).sqrt(), torch.inf)


class Derivatives:
    """The derivative of each sample's ∂L/∂z of the first layer along changes of that layer's pre-activations."""

    def __init__(self, problem: NetworkView, run: Passes, targets: Targets, bends: list[Tensor]) -> None:
        self.problem, self.run, self.targets, self.bends = problem, run, targets, bends
        self.logits = problem.apply(problem.last + 1, run.inputs[-1])

    @classmethod
    def of(cls, problem: NetworkView, run: Passes, targets: Targets) -> "Derivatives":
        """Of the batch whose passes are given: each hidden layer's vector before its slope, times phi''."""
        bends = []
        for k, activation in enumerate(problem.activations):
            bends.append((run.deltas[k + 1] @ problem.weights[k + 1]) * activation.at(run.z[k])[2])
        return cls(problem, run, targets, bends)

    def along(self, dz: Float[Tensor, "s q m"], index: Tensor) -> Float[Tensor, "s q m"]:
        """Of the samples `index`, for q changes each: forward with the slopes, back with slopes and bends."""
        problem, changes = self.problem, [dz]
        slopes = [slope[index][:, None] for slope in self.run.slopes]
        for k in range(problem.last):
            changes.append((changes[-1] * slopes[k]) @ problem.weights[k + 1].T)
        moved = (changes[-1] * slopes[-1]) @ problem.weights[-1].T
        logits = self.logits[index][:, None].expand_as(moved)
        along = activate_along(problem.loss, logits.flatten(0, 1), moved.flatten(0, 1)).unflatten(0, moved.shape[:2])
        back = self.targets.unit * self.targets.copies[index][:, None, None] * along
        for k in range(problem.last, -1, -1):
            back = (back @ problem.weights[k + 1]) * slopes[k] + self.bends[k][index][:, None] * changes[k]
        return back
