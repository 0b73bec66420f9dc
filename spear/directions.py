"""Unit vectors, and what is asked of sets of them: complements, copies, zeros. Vectors are rows."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LARGE = 1e5  # entries of a basis from which a cheaper type is worth its conversions
ROWS = 16  # of products in bfloat16: oneDNN compiles each shape when it is first seen, which takes ten products' time
TINY = 1e-30  # length under which a vector is zero, and stays so: far below any rounding, and a number of float32


def unit_rows(x: Float[Tensor, "*k n"]) -> Float[Tensor, "*k n"]:
    """The vectors at length 1; zeros stay."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(TINY)


def quick(basis: Float[Tensor, "m r"]) -> Float[Tensor, "m r"]:
    """A large basis of a search in single precision, in bfloat16 where the processor multiplies matrices of it.

    Its error, 0.2 %, is a tenth of that of what a search guesses, and the exact step afterwards knows nothing of it.
    Without such units (AMX, AVX-512 BF16, CUDA) products in bfloat16 can take twice the time of those in single
    precision.
    """
    large, capable = basis.dtype == torch.float32 and basis.numel() > LARGE, torch.cpu.get_capabilities()
    on_host = basis.device.type == "cpu" and any(capable.get(unit) for unit in ("amx_bf16", "avx512_bf16"))
    return basis.bfloat16() if large and (basis.is_cuda or on_host) else basis


def times(x: Float[Tensor, "k m"], basis: Float[Tensor, "m r"]) -> Float[Tensor, "k r"]:
    """The product with a `quick` basis, computed in its precision, in that of x.

    Rows are filled up to a multiple of `ROWS`, for as starts end their number changes all the time.
    """
    rows = -(-len(x) // ROWS) * ROWS
    if basis.dtype == x.dtype or rows == len(x):
        return (x.to(basis.dtype) @ basis).to(x.dtype)
    filled = x.new_zeros(rows, x.shape[1], dtype=basis.dtype)
    filled[: len(x)] = x
    return (filled @ basis)[: len(x)].to(x.dtype)


def least_squares(A: Float[Tensor, "m n"], B: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
    """The X of least |A X - B|, by QR; NaN where either holds what is no number, or A a column of zeros: LAPACK stops
    at these."""
    sound = A.isfinite().all() & B.isfinite().all()
    try:
        X = torch.linalg.lstsq(torch.where(sound, A, 0), torch.where(sound, B, 0), driver="gels").solution
    except torch.linalg.LinAlgError:
        return A.new_full((A.shape[1], B.shape[1]), torch.nan)
    return torch.where(sound, X, torch.nan)


def complement(x: Float[Tensor, "f n"]) -> Float[Tensor, "n r"]:
    """Orthonormal basis (columns) of the vectors orthogonal to all of the independent x."""
    if not len(x):
        return torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return torch.linalg.qr(x.mT, mode="complete")[0][:, len(x) :]


def away_from(known: Float[Tensor, "f n"], x: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
    """The part of each x that is orthogonal to all of the independent `known` vectors."""
    if not len(known):
        return x
    span = torch.linalg.qr(known.mT)[0]
    return x - (x @ span) @ span.mT


def distinct(
    x: Float[Tensor, "k n"],
    cosine: float,
    *,
    known: Float[Tensor, "f n"] | None = None,
    order: Float[Tensor, " k"] | None = None,
    signed: bool = False,
) -> Int[Tensor, " j"]:
    """Indices of the unit vectors that are no copies: each within `cosine` of none kept before it, nor of `known` ones.

    They are taken as they come, or by increasing `order`. Opposite vectors are equal unless they are `signed`.
    """
    ranked = torch.arange(len(x), device=x.device) if order is None else order.argsort()
    sorted_x = x[ranked]
    close = sorted_x @ sorted_x.mT
    close = (close if signed else close.abs_()) > cosine
    keep = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if known is not None:
        near = sorted_x @ known.mT
        keep = ~((near if signed else near.abs_()) > cosine).any(1)
    close = close.triu_(1)
    close.diagonal().copy_(keep)
    close = close.cpu()  # one copy: what follows decides vector by vector
    keep = close.diagonal().clone()
    close.fill_diagonal_(False)
    for k in (close.any(1) & keep).nonzero()[:, 0].tolist():  # the others drop nobody
        if keep[k]:
            keep &= ~close[k]
    return ranked[keep.nonzero()[:, 0].to(x.device)]


def first_of_each(code: Tensor) -> Int[Tensor, " j"]:
    """Index of the first entry of each value, in their order: exact copies, where `distinct` finds near ones."""
    _, inverse = torch.unique(code, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1 if len(code) else 0,), len(code), device=code.device)
    return first.scatter_reduce(0, inverse, torch.arange(len(code), device=code.device), "amin").sort()[0]


def apart(x: Float[Tensor, "k n"], known: Float[Tensor, "f n"], least: float) -> Bool[Tensor, " k"]:
    """Which points are `least` of its size away from every known one and earlier one: unlike a direction's, its length
    counts."""
    both = torch.cat([known, x])
    close = torch.cdist(both, both) < least * both.norm(dim=1)
    return ~close.tril(-1).any(1)[len(known) :]


def zero_entries(x: Float[Tensor, "*k n"], tolerance: float, *, dim: int = -1) -> Bool[Tensor, "*k n"]:
    """Which entries are at most `tolerance` times the largest of their vector; all of a zero vector's."""
    size = x.abs()
    return size <= tolerance * size.amax(dim, keepdim=True)
