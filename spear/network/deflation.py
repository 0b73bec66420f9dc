"""One sample alone, by the layer below: what lets a solved sample leave the problem before the others are found.

Once delta_i of the last hidden layer is known, h of the layer below, W_lᵀ delta_i, is known exactly and is this
sample's alone: its mask there is found at batch sizes far beyond those where the first one is. The mask is that of the
sample's activations y_i, whose zeros determine it; where inputs are fewer than samples, their few coordinates do, too.
Subtracting delta_i [y_i; 1]ᵀ leaves the same problem with one sample less, on both sides.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear.conjugate_gradients import conjugate_gradients
from spear.directions import TINY
from spear.network.alone import Alone
from spear.network.exact_step import Tolerances
from spear.network.factors import subtract
from spear.network.problem import NetworkView
from spear.network.spaces import Solved, Spaces, complement, dual, leverages, project, without_itself

SPARE_ROWS = 10  # equations beyond the unknowns: a solution that fits these too is no accident
MOST_ENTRIES = 2**23  # of the Gram matrices that are held at once
REFINEMENTS = 6  # of normal equations in single precision
RESOLVED = 1e-3  # of the diagonal of a factor in single precision: less is rounding
CLEAR = 0.95  # share of the units that are taken where y = ReLU(z') is searched for: hardly one in a hundred is wrong
EASY = 0.6  # unknowns for each equation up to which conjugate gradients are the faster way
STEPS = 200  # of conjugate gradients, in a round
ROUNDS = (1, 1, 4)  # of conjugate gradients: while masks are still renewed, and at last
SETTLING = 20  # renewals of a mask, of which 10 are enough at half the width: those that do not settle cycle
SAFETY = 10  # times the error that the residual itself shows
CERTAIN = 1e-6  # relative error of s, and least singular value of its equations, relative to the largest


def vectors_below(problem: NetworkView, spaces: Spaces, solved: Solved) -> Float[Tensor, "f m"]:
    """The solved samples' back-propagated vectors before the layer below's mask, to the scale of their t."""
    return problem.back(problem.last, spaces.scaled(solved.mask, solved.d @ spaces.head))


def masks_below(
    spaces: Spaces,
    solved: Solved,
    h: Float[Tensor, "f m1"],
    guess: Bool[Tensor, "f m1"],
    basis: Float[Tensor, "m1 b1"],
    tolerances: Tolerances,
) -> tuple[Int[Tensor, " g"], Bool[Tensor, "g m1"]]:
    """Which samples' masks are found, and these masks: D' ∘ h' in the span of `basis`, h' known exactly.

    Those on which a guess settles are taken; the others are searched for by `Alone`.
    """
    found, masks = torch.zeros(len(h), dtype=torch.bool, device=h.device), guess.clone()

    def keep(sample: Int[Tensor, " k"], mask: Bool[Tensor, "k m1"]) -> None:
        good, settled = _settled(h[sample], mask, basis, tolerances)
        found[sample[good]], masks[sample[good]] = True, settled

    keep(guess.any(1).nonzero()[:, 0], guess[guess.any(1)])
    if not found.all():
        rest = (~found).nonzero()[:, 0]
        keep(rest, Alone.of(spaces, solved, rest, len(basis)).masks(h[rest], basis))
    return found.nonzero()[:, 0], masks[found]


def _settled(
    h: Float[Tensor, "k m1"], mask: Bool[Tensor, "k m1"], basis: Float[Tensor, "m1 b1"], tolerances: Tolerances
) -> tuple[Int[Tensor, " g"], Bool[Tensor, "g m1"]]:
    """Which masks settle on one whose D' ∘ h' fits to rounding, and that mask.

    Each unit is renewed by what the others say of it: in a crowded span it follows what was wanted of it.
    """
    leverage = leverages(basis)
    for _ in range(SETTLING):
        wanted = mask * h
        told = without_itself(project(wanted, basis), wanted, leverage)
        before, mask = mask, (2 * told - h) * h > 0
        if bool((before == mask).all()):
            break
    inside = mask * h
    sine = (inside - project(inside, basis)).norm(dim=1) / inside.norm(dim=1).clamp_min(TINY)
    good = (mask.any(1) & (sine < tolerances.accept)).nonzero()[:, 0]
    return good, mask[good]


def activation_coordinates(
    spaces: Spaces,
    solved: Solved,
    activations: Float[Tensor, "b n"],
    index: Int[Tensor, " g"],
    mask: Bool[Tensor, "g n"],
    tolerances: Tolerances,
) -> tuple[Bool[Tensor, " g"], Float[Tensor, "g b"]]:
    """s of the samples `index` of `solved` from the zeros of their activations: which are determined, and s.

    s lies on an affine space, ⟨s, t_k / S⟩ = [k = i] for every solved k: the zeros of Vᵀ s (`activations` is V without
    its last column) fix the rest by least squares.
    """
    if not len(index):
        return index.bool(), solved.t[:0]
    free, particular = complement(spaces, solved), dual(spaces, solved)[index]
    enough = ~mask if not free.shape[1] else (~mask).sum(1, keepdim=True) >= free.shape[1] + SPARE_ROWS
    frame, triangle = torch.linalg.qr(activations.T @ free)
    rows, known = ~mask & enough, particular @ activations
    if frame.shape[1] > EASY * int(rows.sum(1).amin()):
        step, resolved = zeroed(frame, rows, known)
    else:
        step = -_combined(frame, frame.shape[1], rows, rows, known, ROUNDS[-1])
        resolved = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    s = particular - torch.linalg.solve_triangular(triangle, step.T, upper=True).T @ free.T
    y = s @ activations
    zero = torch.where(mask, 0.0, y).norm(dim=1) < tolerances.accept * y.norm(dim=1)
    return resolved & zero & (torch.where(mask, y, torch.inf).amin(1) > 0), s


def zeroed(
    frame: Float[Tensor, "n r"], rows: Bool[Tensor, "k n"], wanted: Float[Tensor, "k n"]
) -> tuple[Float[Tensor, "k r"], Bool[Tensor, " k"]]:
    """For each set of rows the a for which frame a is nearest to what is wanted there, and whether they determine it.

    `frame` has orthonormal columns. Normal equations in single precision, corrected in full; rows whose factor has a
    diagonal that is rounding do not determine a.
    """
    single, answers, resolved = frame.float(), [], []
    for part in torch.arange(len(rows)).split(max(1, MOST_ENTRIES // max(1, frame.shape[1] ** 2))):
        own = rows[part.to(rows.device)]
        each = [one.nonzero()[:, 0].to(own.device) for one in own.cpu()]  # one copy: which rows is asked one by one
        grams = [kept.T @ kept for kept in (single[one] for one in each)]
        factor, failed = torch.linalg.cholesky_ex(torch.stack(grams))
        a = frame.new_zeros(len(own), frame.shape[1])
        for _ in range(REFINEMENTS):
            rest = torch.where(own, wanted[part.to(rows.device)] - a @ frame.T, 0.0)
            a = a + torch.cholesky_solve((rest @ frame).float()[:, :, None], factor)[:, :, 0].to(a)
        answers.append(a)
        resolved.append((failed == 0) & (factor.diagonal(dim1=1, dim2=2) > RESOLVED).all(1))
    return torch.cat(answers), torch.cat(resolved)


def coordinates_by_inputs(
    spaces: Spaces,
    solved: Solved,
    image: Float[Tensor, "m1 r1"],
    index: Int[Tensor, " g"],
    tolerances: Tolerances,
    *,
    mask: Bool[Tensor, "g m1"] | None = None,
    until: float = math.inf,
) -> tuple[Bool[Tensor, " g"], Float[Tensor, "g b"]]:
    """s of the samples `index` of `solved` where y = ReLU(z'), z' in the span of the orthonormal `image`, fixes it.

    Also returns which it does. Least squares in both, y = z' where active and y = 0 where not; without a `mask`, one is
    searched for by `Alone`, and the units where it is in doubt are left out.
    """
    units, (free, particular) = len(image), (complement(spaces, solved), dual(spaces, solved)[index])
    enough = units if mask is not None else CLEAR * units
    if not len(index) or free.shape[1] + image.shape[1] + SPARE_ROWS > enough:
        return torch.zeros(len(index), dtype=torch.bool, device=image.device), particular
    y, known = spaces.rows[:, :units].T, particular @ spaces.rows[:, :units]
    frame, triangle = torch.linalg.qr(y @ free)
    columns, first = torch.cat([frame, -image], 1), frame.shape[1]

    def parts(mask: Tensor, clear: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
        step = _combined(columns, first, clear, clear & mask, known, rounds, until)
        return step[:, :first], known + step[:, :first] @ frame.T, step[:, first:] @ image.T

    if mask is not None:
        step, own, below = parts(mask, torch.ones_like(mask), ROUNDS[-1])
    else:
        mask, middle = Alone.of(spaces, solved, index, units).masks_by_inputs(image)
        for rounds in ROUNDS:
            doubtful = middle.abs().argsort(1)[:, : int((1 - CLEAR) * units)]
            step, own, below = parts(mask, torch.ones_like(mask).scatter(1, doubtful, False), rounds)
            middle = (own + below) / 2
            mask = middle > 0
    fits = (own - below.clamp_min(0)).norm(dim=1) < tolerances.accept * own.norm(dim=1)
    return fits, particular + torch.linalg.solve_triangular(triangle, step.T, upper=True).T @ free.T


def _combined(
    columns: Float[Tensor, "n both"],
    first: int,
    clear: Bool[Tensor, "k n"],
    active: Bool[Tensor, "k n"],
    known: Float[Tensor, "k n"],
    rounds: int,
    until: float = math.inf,
) -> Float[Tensor, "k both"]:
    """The x for which `known` and the first columns, and on `active` rows the others too, add to 0 on `clear` rows.

    By least squares: each round of conjugate gradients in single precision adds three digits.
    """

    def forward(x: Float[Tensor, "k both"], columns: Float[Tensor, "n both"]) -> Float[Tensor, "k n"]:
        return clear * (x[:, :first] @ columns[:, :first].T) + active * (x[:, first:] @ columns[:, first:].T)

    def back(rest: Float[Tensor, "k n"], columns: Float[Tensor, "n both"]) -> Float[Tensor, "k both"]:
        return torch.cat([(clear * rest) @ columns[:, :first], (active * rest) @ columns[:, first:]], 1)

    x, single = known.new_zeros(len(known), columns.shape[1]), columns.float()
    for _ in range(rounds):
        rest = back(-(clear * known) - forward(x, columns), columns)
        unit = rest.norm(dim=1, keepdim=True).clamp_min(TINY)
        wanted = (rest / unit).float()
        x = x + unit * conjugate_gradients(lambda v: back(forward(v, single), single), wanted, STEPS, until=until)[0]
    return x


def softmax_coordinates(
    problem: NetworkView, spaces: Spaces, solved: Solved
) -> tuple[Bool[Tensor, " f"], Float[Tensor, "f b"]]:
    """With one hidden layer: s of the `solved` samples from their softmax, and which of them that determines.

    For the classes other than the label, log d is the logit up to a constant, and the logits are linear in s where the
    mask is known: C - 2 equations, for as many unknowns as samples are missing.
    """
    free, s = complement(spaces, solved), dual(spaces, solved)
    if problem.loss != "cross_entropy" or problem.biases[0] is None or not 0 < free.shape[1] < problem.outputs - 3:
        return torch.zeros(len(s), dtype=torch.bool, device=s.device), s
    other = (solved.d > 0).to(s)
    offset = solved.d.clamp_min(1e-300).log() - (0 if problem.biases[-1] is None else problem.biases[-1])
    linear = (spaces.head * solved.mask[:, None, :]) @ spaces.lift - offset[:, :, None] * spaces.rows[:, -1]
    mean = (linear * other[:, :, None]).sum(1, keepdim=True) / other.sum(1)[:, None, None]
    linear = (linear - mean) * other[:, :, None]
    left, sizes, right = torch.linalg.svd(linear @ free, full_matrices=False)
    wanted = (linear @ s[:, :, None])[:, :, 0]
    step = torch.einsum("fkr,fk,fck,fc->fr", right, 1 / sizes.clamp_min(1e-300), left, wanted)
    s = s - step @ free.T
    rest = (linear @ s[:, :, None])[:, :, 0].norm(dim=1)
    error = SAFETY * rest / sizes.amin(1) / s.norm(dim=1)
    right_side = (s @ spaces.lift.T * (s @ spaces.rows[:, -1:]) > 0) == solved.mask
    return right_side.all(1) & (error < CERTAIN) & (sizes > CERTAIN * sizes.amax()).all(1), s


def deflate(spaces: Spaces, solved: Solved, index: Int[Tensor, " g"], s: Float[Tensor, "g b"]) -> tuple[Spaces, Solved]:
    """The problem without the samples `index`, whose s are known: smaller spaces, and the other solved ones in them."""
    left, singular, right = subtract(spaces.singular, solved.t[index], s)
    smaller = replace(
        spaces, basis=spaces.basis @ left, singular=singular, rows=right @ spaces.rows, lift=spaces.lift @ right.T
    )
    kept = torch.ones(len(solved), dtype=torch.bool, device=index.device)
    kept[index] = False
    rest = solved[kept]
    norm = (rest.t @ left).norm(dim=1, keepdim=True)
    return smaller, Solved(rest.t @ left / norm, rest.d / norm, rest.mask)
