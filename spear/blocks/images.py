"""From the tokens that enter a transformer's first block to the samples behind them, step by step, each linear.

    e = stream(sample)      o = branch(e)      x = norm(e + o)      y = h + feed-forward(x), h = e + o

The branch ends with a layer W_o, b_o that reads c. A normalisation forgets the length of h, LayerNorm its mean too; the
gradient tells the length (`lengths`), and then, by dLoss/dW_o = sum_t dLoss/dh_t c_tᵀ, every c_t, so that
e_t = h_t - W_o c_t - b_o is known, but for its mean behind LayerNorm. Where e is affine in the sample, e = M_p s + b_p
at position p, a token's position is the one whose equations it solves. Which tokens are of one sample the branch tells,
where it is a softmax attention (`members`).
"""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spear.blocks.lengths import by_stream, columns_of
from spear.directions import TINY, complement
from spear.models.sublayers import Sublayer
from spear.network.layerwise import solve

FITS = 1e-4  # relative residual of equations that hold
SEEN = 1e-6  # singular value, of the largest, that tells a number
LARGEST = 2**26  # entries of the stream's derivative


@dataclass(frozen=True)
class Stream:
    """e_p = `slope`_p s + `start`_p for a sample s of N entries, at each of T positions."""

    slope: Float[Tensor, "T n N"]
    start: Float[Tensor, "T n"]

    @property
    def blank(self) -> Bool[Tensor, " T"]:
        """Positions that show nothing of a sample."""
        return self.slope.flatten(1).abs().amax(1) == 0


def stream_of(part: Sublayer, shape: tuple[int, ...], like: Tensor) -> Stream | None:
    """The stream as an affine map of a sample; `None` where it is none, or too large."""
    stream, count = double(part.stream, like), torch.Size(shape).numel()
    with torch.no_grad():
        try:
            start = stream.forward(like.new_zeros(1, *shape))[0]  # a call would print errors
        except RuntimeError:  # of numbers of a vocabulary
            return None
        if start.ndim != 2 or start.numel() * count > LARGEST:
            return None
        units = torch.eye(count, dtype=like.dtype, device=like.device).split(256)
        slope = torch.cat([stream(part.unflatten(1, shape)) - start for part in units])
        tried = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
        made, wanted = stream(tried.reshape(1, *shape))[0] - start, torch.tensordot(tried, slope, 1)
    if float((made - wanted).norm()) > FITS * float(wanted.norm()):
        return None
    return Stream(slope.movedim(0, 2).contiguous(), start)


def double(module: nn.Module, like: Tensor) -> nn.Module:
    """A copy in double precision, in evaluation mode."""
    return copy.deepcopy(module).to(like.device, torch.float64).eval()


@dataclass(frozen=True)
class Streamed:
    """Each token's e (n, d), behind LayerNorm up to its mean, and what its branch read, c."""

    e: Float[Tensor, "n d"]
    c: Float[Tensor, "n r"]


def before_branch(
    part: Sublayer,
    total: Float[Tensor, "d r"],
    x: Float[Tensor, "n d"],
    by_x: Float[Tensor, "n d"],
    by_y: Float[Tensor, "n d"],
) -> Streamed | None:
    """What the stream held of each token, from the gradient `total` of W_o; `None` where that does not fit.

    `by_x` and `by_y` are the loss' gradients by what enters the block and by what it adds to the stream.
    """
    seen = by_stream(part.norm, columns_of(total, len(x)), x, by_x, by_y)
    if not seen.fits:
        return None
    c = solve(seen.by_h, total)
    if float((total - seen.by_h.T @ c).norm()) > FITS * float(total.norm()):
        return None
    o = c @ part.out.weight.detach().to(x).T + (0 if part.out.bias is None else part.out.bias.detach().to(x))
    e = (x - part.norm.shift.to(x)) / part.norm.scale.to(x) / seen.over[:, None] - o
    return Streamed(e - e.mean(1, keepdim=True) if part.norm.kind == "layer" else e, c)


def positions(stream: Stream, e: Float[Tensor, "n d"]) -> tuple[Int[Tensor, " n"], bool]:
    """The position of each token, and whether each fits one alone."""
    ones = torch.ones_like(e[:1])
    off = []
    for slope, start in zip(stream.slope, stream.start, strict=True):
        used = slope[:, slope.abs().amax(0) > 0]
        known = torch.linalg.qr(torch.cat([used, ones.T], 1))[0].T
        free = complement(known) if len(known) < len(slope) else e.new_zeros(len(slope), 0)
        off.append(((e - start) @ free).norm(dim=1))
    fit, order = torch.stack(off, 1).sort(1)
    size = e.norm(dim=1)
    alone = (fit[:, 0] < FITS * size) & (fit[:, 1] > 10 * fit[:, 0]) & (fit[:, 1] > FITS * size)
    return order[:, 0], bool(alone.all())


def members(
    branch: nn.Module, part: Sublayer, found: Streamed, place: Int[Tensor, " n"], stream: Stream
) -> Int[Tensor, "b T"] | None:
    """Which tokens are of one sample, by what attention read: its tokens in the order of their positions.

    Of softmax attention c_t = sum_s m_s w_ts v_s / sum_s m_s w_ts, entry by entry, m_s = 1 for the tokens of t's
    sample. What it gives of a sequence of one token over and over is v, and of all t but one s tells w_ts / w_tt: the
    m_s then solve linear equations, each position having one token of each sample.
    """
    T, count = len(stream.start), len(place) // len(stream.start)
    if bool((torch.bincount(place, minlength=T) != count).any()):
        return None
    by_place = place.argsort(stable=True).reshape(T, count)
    shown = (~stream.blank).nonzero()[:, 0]
    own, others = by_place[shown[0]], torch.cat([by_place[shown].flatten(), by_place[stream.blank][:, 0]])
    e, weight = found.e, part.out.weight.detach().to(found.e)
    back = torch.linalg.pinv(weight)
    bias = 0 if part.out.bias is None else part.out.bias.detach().to(e)

    def read(sequences: Float[Tensor, "k T d"]) -> Float[Tensor, "k r"]:
        with torch.no_grad():
            return (branch(sequences)[:, 0] - bias) @ back.T

    v = read(e[:, None].expand(-1, T, -1))
    rows = []
    for t in own:
        mixed = e[t].expand(len(others), T, -1).clone()
        mixed[:, 1] = e[others]
        gained, gap = read(mixed) - v[t], v[others] - v[t]
        share = (gained / torch.where(gap.abs() > TINY, gap, torch.inf)).clamp(0, 1 - 1e-9)
        ratio = (T - 1) * share / (1 - share)  # w_ts / w_tt
        ratio[others == t] = 1.0
        rows.append(_membership(ratio * (v[others] - found.c[t]), count, len(shown), others == t))
    chosen = torch.stack(rows)
    if bool(((chosen - chosen.round()).abs() > 0.2).any()) or bool((chosen.round().sum(0) != 1).any()):
        return None
    index = by_place.T.clone()
    index[:, shown] = torch.stack([by_place[shown].gather(1, m.argmax(1)[:, None])[:, 0] for m in chosen])
    return index


def _membership(
    equations: Float[Tensor, "s r"], count: int, shown: int, itself: Bool[Tensor, " s"]
) -> Float[Tensor, "shown count"]:
    """The m_s of tokens that show something of a sample, `count` of each position; of the others m_s = 1."""
    variable = equations[: shown * count]
    scale = equations.norm()
    each = torch.eye(shown, dtype=equations.dtype, device=equations.device).repeat_interleave(count, 1) * scale
    fixed = torch.where(itself[: shown * count], scale, 0.0).to(equations)[None]
    left = torch.cat([variable.T, each, fixed])
    right = torch.cat([-equations[shown * count :].sum(0), scale.expand(shown), scale[None]])
    return torch.linalg.lstsq(left, right[:, None]).solution[:, 0].reshape(shown, count)


def samples(stream: Stream, e: Float[Tensor, "b T d"], shape: tuple[int, ...]) -> tuple[Float[Tensor, "b *shape"], int]:
    """Samples whose stream is e up to the mean of each token, by least squares; and how many numbers are missing."""
    slope = stream.slope - stream.slope.mean(1, keepdim=True)
    gap = e - stream.start
    gap = gap - gap.mean(2, keepdim=True)
    used = stream.slope.abs().amax(1) > 0  # (T, N)
    found, known = e.new_zeros(len(e), used.shape[1]), 0
    everywhere = [torch.ones_like(used[:, 0])] if bool((used.sum(0) > 1).any()) else list(torch.eye(len(used)) > 0)
    for rows in everywhere:  # patches that do not overlap are solved for one by one
        columns = used[rows].any(0).nonzero()[:, 0]
        left, values, right = torch.linalg.svd(slope[rows][:, :, columns].flatten(0, 1), full_matrices=False)
        seen = values > SEEN * values[:1].clamp_min(TINY)
        found[:, columns] = gap[:, rows].flatten(1) @ left[:, seen] / values[seen] @ right[seen]
        known += int(seen.sum())
    return found.unflatten(1, shape), used.shape[1] - known
