"""When a recovered batch is beyond doubt, and how far each image can be from the truth: one rule for every method.

**Theorem.** The update of a linear layer is U = [dL/dW | dL/dβ] = G X: column i of G (m, b) is ∂L/∂z of sample i, row i
of X (b, n + 1) its input [x; 1]. Let a batch be found, G' X' = U, both of rank b, and let F_i be a linear space that
holds ∂L/∂z of *every* sample that activates the units which the found sample i activates. If span(G') meets each F_i in
the line of its own column g'_i alone, no other batch of b samples with these activation patterns gives U, whatever its
labels and weights in the loss.

*Proof.* U has rank b, so every batch of b samples that gives U has span(G) = span(G'). Its g_i lies there and in F_i:
g_i = a_i g'_i. G' has a left inverse, so diag(a) X = X', and the last columns, ones on both sides, say a = 1.

Two such spaces are known. From the layer alone: what vanishes on the inactive units; the condition is then that the
inactive rows of G' have rank b - 1, SPEAR's own. From a chain of linear layers and piecewise linear
activations: D_1 W_2ᵀ D_2 ... W_outᵀ times any vector of dLoss/dlogits, D_l the found sample's slopes. Where an
activation is curved there are no such regions: `spear.network.curved_bounds`.

*Error.* Let G' X' = U + N, and let T_k be the inverse of what span(G') leaves of F_k beside g'_k. To first order in N,

    x'_i - x_i = (G'⁺N)_i - (G'⁺N)_{i,bias} x_i + sum_k (G'⁺ T_k N X'⁺)_{ik} (x_k - x_i)

The map from batch to update is thus inverted for each sample by itself: rows of G'⁺, columns of X'⁺, angles between
span(G') and F_k. `input_errors` takes the entries of N for independent, each as large as rounding or what the batch
leaves of U makes them, whichever is more, times `SAFETY`. That is assumed; all before it is proven.

**Limits.** Samples that share an activation pattern and have parallel vectors in F_i look like fewer: where A, the
Jacobian of the logits in their linear region, has A h = 0, x + h and x - h leave exactly the gradient of twice x. So
the number of samples must be disclosed, is taken on trust, and must be that of the images found, each once. And the
batch is the only one in its linear region: one with other activation patterns is not excluded, and networks can be
built that have one (units in groups that fire together, so that means of samples fire in one group each). That all
tensors of the update share one factor is not taken on trust for those of the biases, which often learn at a rate of
their own: the last columns, ones on both sides, say a = 1 only where labels (`length_by_labels`), or the gradient of a
layer that reads these inputs (`length_by_reader`), say it too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear.directions import unit_rows
from spear.models.streaming import Blocks

SAFETY = 10.0  # what first order, and noise that is not quite independent, leave out
LOOSE = 1e-2  # relative error up to which an input that is not certified is still returned
NO_ANGLE = 1e-12  # squared sine of two spaces that meet
DEPENDENT = 1e-12  # share of a vector beside others under which it is made of them
LEAST_NORM = 1e-6  # of the batch's root mean square norm: what an error is relative to where an image is black
LEAST_BESIDE = 1e-7  # share of a row's change by its length that others do not make: less is rounding
BY_BIASES = "lengths rest on the biases' gradients alone, which may have a factor of their own"
TWO_CLASSES = "with two classes a label cannot be told from a weight in the loss"
AT_ONCE = 2**21  # entries of inactive rows that are held together


@dataclass(frozen=True)
class Certificate:
    """The evidence for k distinct recovered samples, from what the server knows alone.

    `copies` (k,) says how often each is in the batch, `disclosed` how many samples the client says there are.
    `residual` is the largest relative residual over the observed gradients, `limit` what rounding allows of it;
    `error_bound` (k,) bounds each input's relative error, `allowed` is the largest bound that is certified. `doubt` is
    what the method itself holds against the batch, in words; `reserve` what leaves it explained, but not certain.
    """

    copies: Int[Tensor, " k"]
    disclosed: int | None
    residual: float
    limit: float
    error_bound: Float[Tensor, " k"]
    allowed: float
    doubt: str = ""
    reserve: str = ""

    @property
    def explained(self) -> Bool[Tensor, " k"]:
        """Which samples the update supports: exact, if the number of samples is that of the images found."""
        return (self.error_bound <= self.allowed) & (not self.doubt and self.residual <= self.limit)

    @property
    def supported(self) -> Bool[Tensor, " k"]:
        """Which samples the update determines to a per cent at least, in a batch that explains it."""
        return (self.error_bound <= max(self.allowed, LOOSE)) & (not self.doubt and self.residual <= self.limit)

    @property
    def certified(self) -> Bool[Tensor, " k"]:
        """Which samples the theorem holds of: explained, and of as many as were disclosed, each once."""
        once = bool((self.copies == 1).all()) and len(self.copies) == self.disclosed
        return self.explained & (once and not self.reserve)

    @property
    def holds(self) -> bool:
        """Whether there are samples, and every one is certified."""
        return len(self.copies) > 0 and bool(self.certified.all())

    def why_not(self) -> str:
        """The first condition that fails, in words; empty where the certificate holds."""
        if self.doubt:
            return self.doubt
        if not self.residual <= self.limit:
            return f"the batch reproduces the gradients to {self.residual:.0e}, rounding allows {self.limit:.0e}"
        if not bool(self.explained.all()):
            bound = float(self.error_bound.max())
            return f"an input is determined to {bound:.0e} only, a certificate needs {self.allowed:.0e}"
        return self.reserve or self._miscounted()

    def _miscounted(self) -> str:
        found, entries = len(self.copies), int(self.copies.sum())
        if self.disclosed is None:
            alike = "exact if no two samples share an activation pattern and a label"
            return f"{alike}: the number of samples is not disclosed"
        if entries > found:
            several = int((self.copies > 1).sum())
            mean = "copies, or images that this model cannot tell apart: their mean"
            return f"{several} of {found} images stand for several samples each: {mean}"
        return f"{found} samples were found, {self.disclosed} disclosed" if found != self.disclosed else ""


def norms(inputs: Float[Tensor, "k n"]) -> Float[Tensor, " k"]:
    """What an input's error is relative to: its norm, or `LEAST_NORM` of the batch's, as a black image has none."""
    size = torch.linalg.vector_norm(inputs, dim=1)
    return size.clamp_min(max(LEAST_NORM * rms(size), 1e-300))


def rms(x: Tensor) -> float:
    """The root mean square of the entries."""
    return float(torch.linalg.vector_norm(x)) / max(x.numel(), 1) ** 0.5


def input_errors(
    G: Float[Tensor, "b m"],
    X: Float[Tensor, "b n1"],
    *,
    entries: tuple[float, float],
    lengths: Float[Tensor, " b"] | None = None,
) -> Callable[[Float[Tensor, " b"]], Float[Tensor, " b"]]:
    """A bound on each input's relative error, by the theorem, where entries of the update are off by `entries`.

    It is a function of how far each column of ∂L/∂z may be off beside itself (`column_errors`). `G` are these columns,
    `X` the inputs as the gradient has them, [x; 1]; `entries` the root mean square error of dL/dW's entries and of
    dL/dβ's. Without a bias, X = x, and `lengths` says how far off the length of each input may be, relative to it.
    Infinite for dependent columns.
    """
    inputs = X if lengths is not None else X[:, :-1]
    size, row = norms(inputs), inverse_columns(G)
    if lengths is None:
        away, lengths = torch.cdist(inputs, inputs), row * entries[1]
    else:
        away = size.expand(len(X), -1)

    def errors(moved: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        off = torch.sqrt(X.shape[1] * entries[0] ** 2 + (away * moved).pow(2).sum(1))
        return (SAFETY * (row * off / size + lengths)).nan_to_num(torch.inf, torch.inf)

    return errors


def column_errors(column: Float[Tensor, " b"], spread: Float[Tensor, " b"], entry: float) -> Float[Tensor, " b"]:
    """How far each column of ∂L/∂z may be off beside itself, by the theorem: T_k N X'⁺, N of entries of size `entry`.

    `column` are the norms of X'⁺'s columns (`inverse_columns`), `spread` is that of each F_k. Infinite where inputs
    [x; 1] are dependent.
    """
    return (entry * column * spread).nan_to_num(torch.inf, torch.inf)


def inverse_columns(A: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """The norm of each column of A⁺; infinite where the rows of A are dependent."""
    triangle = torch.linalg.qr(A.mT, mode="r")[1]
    if len(triangle) < len(A):
        return A.new_full((len(A),), torch.inf)
    return torch.linalg.vector_norm(torch.linalg.inv_ex(triangle)[0], dim=1).nan_to_num(torch.inf, torch.inf)


def spread_of_zeros(
    basis: Float[Tensor, "m b"], own: Float[Tensor, "s m"], inactive: Bool[Tensor, "s m"]
) -> Float[Tensor, " s"]:
    """sqrt(1 + sum 1 / sin²) over the angles between span(G) and F_i, what vanishes on the `inactive` units of i.

    `basis` is an orthonormal one of span(G), `own` are the samples' columns of G, whose own angle, 0, is left out.
    Infinite where the inactive rows have a rank below b - 1: more is in the intersection.
    """
    most, rank = int(inactive.sum(1).max()) if len(inactive) else 0, basis.shape[1]
    at_once, padded = max(1, AT_ONCE // max(1, most * rank)), torch.cat([basis, basis.new_zeros(1, rank)])
    eye, spreads = torch.eye(rank, dtype=basis.dtype, device=basis.device), [basis[:0, 0]]
    for zero, line in zip(inactive.split(at_once), unit_rows(own @ basis).split(at_once), strict=True):
        rows = zero.to(torch.uint8).argsort(dim=1, descending=True)[:, :most]
        inside = padded[torch.where(zero.gather(1, rows), rows, len(basis))]
        factor, failed = torch.linalg.cholesky_ex(torch.baddbmm(line[:, :, None] * line[:, None], inside.mT, inside))
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        total = inverse.pow(2).sum((1, 2))  # of 1 / sin², and so over the largest of these
        spreads.append(torch.where((failed == 0) & (total < 1 / NO_ANGLE), total.sqrt(), torch.inf))
    return torch.cat(spreads)


def spread_of_family(
    basis: Float[Tensor, "m b"], own: Float[Tensor, "s m"], family: Float[Tensor, "s r m"]
) -> Float[Tensor, " s"]:
    """The same for spaces F_i that the rows of `family`[i] span; one that the others make counts as a right angle."""
    vectors = torch.cat([own[:, None], family], 1)
    Q, R = torch.linalg.qr(vectors.mT)
    pivots, sizes = R.diagonal(dim1=1, dim2=2).abs(), torch.linalg.vector_norm(vectors, dim=2)
    independent = (pivots > DEPENDENT * sizes[:, : pivots.shape[1]])[:, 1:]
    cosines = (Q.mT[:, 1:] @ basis) * independent[:, :, None]
    eye = torch.eye(cosines.shape[1], dtype=basis.dtype, device=basis.device)
    return _spread(torch.linalg.eigvalsh(eye - cosines @ cosines.mT))


def _spread(squared: Float[Tensor, "s r"]) -> Float[Tensor, " s"]:
    """From squared sines, that of g_i itself set to 1."""
    return torch.where(squared.amin(1) > NO_ANGLE, (1 / squared.clamp_min(1e-300)).sum(1).sqrt(), torch.inf)


def length_slack(linear: Float[Tensor, "b m"], bias: Float[Tensor, " m"]) -> Float[Tensor, " b"]:
    """By what share each input could be longer or shorter before the sign of a pre-activation W x + β changes.

    `linear` is W x. One layer takes the length of an input from dL/dW over dL/dβ: a factor on the latter, from a rate
    or a rounding of its own, shows nowhere else.
    """
    turn = -bias / linear  # the factor on x at which a pre-activation is zero
    longer = torch.where(turn > 1, turn - 1, torch.inf).amin(1)
    shorter = torch.where((turn > 0) & (turn < 1), 1 - turn, 1.0).amin(1)
    return torch.maximum(longer, shorter)


def length_by_labels(
    own: Float[Tensor, "b outputs"], along: Float[Tensor, "b outputs"], error: Float[Tensor, " b"], *, whole: bool
) -> float:
    """By what share all inputs can be longer or shorter, from the sample whose label tells it best.

    A factor on the biases' gradients is one for all. `own` is each sample's dLoss/dlogits, known to `error`, relative;
    it moves by `along` with the length of its input, or, where the scale of the loss is none that was told (not
    `whole`), by what of that is beside it. Infinite where no softmax moves, as for logits near zero or far from it.
    """
    size = torch.linalg.vector_norm(own, dim=1).clamp_min(1e-300)
    if not whole:
        along = along - (along * own).sum(1, keepdim=True) * own / size[:, None] ** 2
    shares = SAFETY * error * size / torch.linalg.vector_norm(along, dim=1)
    return float(shares.nan_to_num(torch.inf, torch.inf).min())


def length_by_reader(
    outputs: Float[Tensor, "b m1"], slopes: Float[Tensor, "b m1"], J: Blocks, eps: float, dependent: int = 0
) -> tuple[Float[Tensor, " b"], float]:
    """By what share each input can be longer or shorter, from the gradient J of a linear layer that reads `outputs`.

    J = C Y for the rows Y of `outputs`, what the samples give that layer, whatever the loss and its weights; its bias,
    whose gradient may have a factor of its own as the first one's may, is left out. An input that is longer by a share
    t moves its row by t times that of `slopes`: what J shows beside the rows of Y tells t, by least squares. Infinite
    where it does not, as behind biases that are zero, or where more rows of Y than `dependent` are made of others
    (behind BatchNorm they may sum to zero). Also returned: what is left of J, relative to it. Its rounding is `eps`.
    """
    if not bool(outputs.isfinite().all()):
        return torch.full_like(outputs[:, 0], torch.inf), torch.inf
    U, S, V = torch.linalg.svd(outputs, full_matrices=False)
    rank = int((DEPENDENT * S[0] < S).sum())
    if rank < len(outputs) - dependent:
        return torch.full_like(outputs[:, 0], torch.inf), torch.inf
    Q = V[:rank].mT
    beside = slopes - (slopes @ Q) @ Q.mT
    told = torch.linalg.vector_norm(beside, dim=1) > LEAST_BESIDE * torch.linalg.vector_norm(slopes, dim=1)
    beside = beside * told[:, None]
    found = J.times(torch.cat([Q, beside.mT], 1))
    C = (U[:, :rank] / S[:rank]) @ found[:, :rank].mT  # J = Cᵀ Y
    gram = (C @ C.mT) * (beside @ beside.mT)
    gram = gram + torch.where(told, torch.finfo(gram.dtype).eps * gram.diagonal(), 1.0).diag()
    inverse, wrong = torch.linalg.inv_ex(gram)
    if int(wrong) or not bool(inverse.isfinite().all() and (gram.diagonal() > 0).all()):
        return torch.full_like(gram[0], torch.inf), torch.inf
    shares = inverse @ (C * found[:, rank:].mT).sum(1)
    rest, whole = 0.0, 0.0
    for part, block in J:
        own = block - found[part, :rank] @ Q.mT - (C[:, part].mT * shares) @ beside
        rest, whole = math.hypot(rest, float(own.norm())), math.hypot(whole, float(block.norm()))
    entries = max(rest, eps * whole) / math.prod(J.shape) ** 0.5
    open_by = shares.abs() + SAFETY * entries * inverse.diagonal().clamp_min(0).sqrt()
    return torch.where(told, open_by, torch.inf), rest / max(whole, 1e-300)
