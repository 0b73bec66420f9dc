"""What the server does not see of a layer: its inputs, dL/dZ, the true columns of Q, and how hard they make it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from spear.models.watching import linear_layer, watched
from spear.published import kernels
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
    chunk: int = 2000,
) -> Float[Tensor, " b"]:
    """At which of `limit` independent proposals each true direction is first met; infinite where it is not.

    Proposals are counted from 1 and drawn as in `spear.published.kernels.naive`, until every direction was met.
    """
    m, b = L.shape
    met = torch.full((b,), torch.inf, dtype=torch.float64)
    for start in range(0, limit, chunk):
        rows = kernels.sample_rows(min(chunk, limit - start), m, b - 1, generator=generator, device=L.device)
        hit = ((kernels.kernels_lu(L[rows]) @ truth.mT).abs() > MET).cpu()
        place = torch.where(hit.any(0), start + 1.0 + hit.int().argmax(0), torch.inf)
        met = torch.minimum(met, place.double())
        if met.isfinite().all():
            break
    return met


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
