"""What the server does not see of a layer: its inputs, dL/dZ, the true columns of Q, and how hard they make it."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spear.models.watching import linear_layer, watched
from spear.published import filtering, kernels
from spear.published.view import Observed

MET = 1 - 1e-8  # |cosine| between a proposal and the true direction that it is


def true_directions(observed: Observed, inputs: Float[Tensor, "b *input_shape"]) -> Float[Tensor, "b b"]:
    """The columns of the true Q as unit rows, by R = Q X^T: what a search is to find. `inputs` enter the layer."""
    Q = observed.R @ torch.linalg.pinv(inputs.flatten(1))
    return (Q / torch.linalg.vector_norm(Q, dim=0)).mT.contiguous()


def first_met(
    L: Float[Tensor, "m b"],
    truth: Float[Tensor, "b b"],
    *,
    limit: int,
    generator: torch.Generator | None = None,
    chunk: int = 50_000,
) -> Float[Tensor, " b"]:
    """At which of `limit` independent proposals each true direction is first met; infinite where it is not.

    Proposals are counted from 1, as uniform as in `spear.published.kernels.naive`, until every direction was met. The
    judge knows the zeros of each column: a submatrix that has a row outside all of them is done with at that row, and
    kernels are computed of the few others only. Raises `ValueError` for b over 62.
    """
    zeros = _as_bits(filtering.zero_rows(L, truth).cpu().numpy())
    numbers = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    met = torch.full((len(truth),), torch.inf, dtype=torch.float64)
    for start in range(0, limit, chunk):
        place, rows = _inside_one_column(zeros, len(truth) - 1, min(chunk, limit - start), numbers)
        hit = met_by(L, truth, torch.from_numpy(rows)).cpu()
        first = torch.where(hit, start + 1.0 + torch.from_numpy(place)[:, None], torch.inf)
        met = torch.cat([first, met[None]]).amin(0)
        if met.isfinite().all():
            break
    return met


def met_by(L: Float[Tensor, "m b"], truth: Float[Tensor, "b b"], rows: Int[Tensor, "p c"]) -> Bool[Tensor, "p b"]:
    """Which true direction is the kernel of which submatrix of c = b - 1 rows of L."""
    return (kernels.kernels_lu(L[rows]) @ truth.mT).abs() > MET


def _as_bits(zeros: Bool[np.ndarray, "b m"]) -> Int[np.ndarray, " m"]:
    """The columns in which each row is zero, as the bits of an integer."""
    if len(zeros) > 62:
        raise ValueError(f"{len(zeros)} directions are more than independent proposals will ever meet: at most 62")
    kind = np.int32 if len(zeros) < 31 else np.int64
    return (zeros.astype(kind) << np.arange(len(zeros), dtype=kind)[:, None]).sum(0, dtype=kind)


def _inside_one_column(
    zeros: Int[np.ndarray, " m"], size: int, count: int, numbers: np.random.Generator
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, "p c"]]:
    """Of `count` uniform sets of `size` different rows, which ones are zero in a common column: their places, and rows.

    Row by row, each unlike those before it; a set leaves at the first row that leaves no column to it.
    """
    place, columns = np.arange(count), np.full(count, -1, zeros.dtype)
    rows = np.empty((size, count), np.int32)
    for k in range(size):
        drawn = numbers.integers(len(zeros), size=len(place), dtype=np.int32)
        while (again := np.flatnonzero((rows[:k] == drawn).any(0))).size:
            drawn[again] = numbers.integers(len(zeros), size=len(again), dtype=np.int32)
        rows[k] = drawn
        columns &= zeros.take(drawn)
        left = np.flatnonzero(columns)
        if len(left) < 0.7 * len(place) or k == size - 1:
            place, columns, rows = place[left], columns[left], rows.take(left, 1)
    return place, rows.T.astype(np.int64)


@dataclass(frozen=True)
class Shape:
    """What the true gradient G = dL/dZ (m, b) of a layer is like, and the layer's inputs X (n, b) with it.

    `zero_share` is the share of exact zeros in G, `agreeing` that of neurons that are zero for all samples or for none:
    these tell no sample from another. `condition` is the condition number of dL/dW = G X^T on its b directions,
    `spread` the ratio of the largest to the smallest column norm of G.
    """

    zero_share: float
    agreeing: float
    condition: float
    spread: float


def layer_truth(
    model: nn.Module, layer: str, inputs: Float[Tensor, "b *input_shape"], labels: Int[Tensor, " b"]
) -> tuple[Float[Tensor, "n b"], Float[Tensor, "m b"]]:
    """What the server does not see of a linear layer: its inputs X and G = dL/dZ for the mean cross-entropy, by a hook.

    Raises `ValueError` for a name that is not a linear layer of the model.
    """
    with watched(linear_layer(model, layer)) as seen:
        loss = F.cross_entropy(model(inputs), labels)
    ((X, Z),) = seen
    return X.detach().mT, torch.autograd.grad(loss, Z)[0].mT


def shape_of(G: Float[Tensor, "m b"], X: Float[Tensor, "n b"]) -> Shape:
    """How sparse, how even and how well conditioned a layer's gradient is."""
    zero, norms = G == 0, torch.linalg.vector_norm(G, dim=0)
    agreeing = zero.all(1) | ~zero.any(1)
    triangles = [torch.linalg.qr(part, mode="r")[1] for part in (G, X)]
    s = torch.linalg.svdvals(triangles[0] @ triangles[1].mT)
    return Shape(
        zero_share=float(zero.double().mean()),
        agreeing=float(agreeing.double().mean()),
        condition=float(s[0] / s[-1]),
        spread=float(norms.max() / norms.min()),
    )
