"""One sample alone, by the layer below: what lets a solved sample leave the problem before the others are found.

Once delta_i of the last hidden layer is known, h of the layer below, W_lᵀ delta_i, is known exactly and is this
sample's alone: phase retrieval finds its mask there at batch sizes far beyond those where the first one works. The mask
is that of the sample's activations y_i, whose zeros determine it. Subtracting delta_i [y_i; 1]ᵀ leaves the same problem
with one sample less, on both sides.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from spear.directions import TINY, unit_rows
from spear.network import phase_retrieval
from spear.network.exact_step import Tolerances
from spear.network.factors import subtract
from spear.network.phase_retrieval import Iterate, Reflections
from spear.network.problem import NetworkView
from spear.network.spaces import Solved, Spaces, complement, project

SPARE_ROWS = 10  # equations beyond the unknowns: a solution that fits these too is no accident
STEPS = 200  # of each start: h is exact here, so what has not arrived by then is stuck
NEAR = 1e-7  # squared sine at which a start has arrived
SETTLING = 4  # renewals of a mask: those that do not settle by then cycle
SAFETY = 10  # times the error that the residual itself shows
CERTAIN = 1e-6  # relative error of s, and least singular value of its equations, relative to the largest


def vectors_below(problem: NetworkView, solved: Solved) -> Float[Tensor, "f m"]:
    """The solved samples' back-propagated vectors before the layer below's mask, to the scale of their t."""
    top = problem.last
    return problem.back(top, (solved.d @ problem.weights[top + 1]) * solved.mask)


def masks_below(
    h: Float[Tensor, "f m"],
    guess: Bool[Tensor, "f m"],
    basis: Float[Tensor, "m b"],
    tolerances: Tolerances,
    *,
    starts: int = 2,
    generator: Generator,
    until: float = math.inf,
) -> tuple[Int[Tensor, " g"], Bool[Tensor, "g m"]]:
    """Which samples' masks are found, and these masks: D ∘ h in the span of `basis`, h known exactly.

    Those that the guess is already are taken; of the others, phase retrieval starts from the guess, then `starts` times
    at random. Its steps end when the clock shows `until`.
    """
    found, masks = torch.zeros(len(h), dtype=torch.bool, device=h.device), guess.clone()

    def keep(sample: Int[Tensor, " k"], mask: Bool[Tensor, "k m"]) -> None:
        good, settled = _settled(h[sample], mask, basis, tolerances)
        found[sample[good]], masks[sample[good]] = True, settled

    keep(guess.any(1).nonzero()[:, 0], guess[guess.any(1)])
    for times, guessed in ((1, True), (starts, False)):
        sample = (~found & guess.any(1) if guessed else ~found).nonzero()[:, 0].repeat(times)
        if len(sample):
            noise = torch.randn(len(sample), h.shape[1], generator=generator, dtype=torch.float64).to(h)
            first = guess[sample] if guessed else noise > 0
            keep(sample, _retrieved(unit_rows(h)[sample], first, basis, until))
    return found.nonzero()[:, 0], masks[found]


def _retrieved(
    h: Float[Tensor, "k m"], mask: Bool[Tensor, "k m"], basis: Float[Tensor, "m b"], until: float
) -> Bool[Tensor, "k m"]:
    """Where phase retrieval from these masks ends."""
    start = Iterate(h * mask, h, h, h).to(torch.float32)
    return phase_retrieval.retrieve_phases(start, basis.float(), Reflections(STEPS, near=NEAR, until=until)).target != 0


def _settled(
    h: Float[Tensor, "k m"], mask: Bool[Tensor, "k m"], basis: Float[Tensor, "m b"], tolerances: Tolerances
) -> tuple[Int[Tensor, " g"], Bool[Tensor, "g m"]]:
    """Which masks settle on one whose D ∘ h fits to rounding, and that mask."""
    for _ in range(SETTLING):
        u = project(mask * h, basis)
        before, mask = mask, (2 * u - h) * h > 0
    inside = mask * h
    sine = (inside - project(inside, basis)).norm(dim=1) / inside.norm(dim=1).clamp_min(TINY)
    good = ((before == mask).all(1) & mask.any(1) & (sine < tolerances.accept)).nonzero()[:, 0]
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
    scaled = solved.t / spaces.singular
    dual = torch.linalg.pinv(scaled).T[index]
    free = complement(spaces, solved)
    answers, sure, host = [], [], mask.cpu()  # one copy: which entries are zero is asked sample by sample
    for particular, row in zip(dual, host, strict=True):
        active, inactive = (which.nonzero()[:, 0].to(mask.device) for which in (row, ~row))
        zeros = activations[:, inactive]
        s = particular
        if free.shape[1] and zeros.shape[1] >= free.shape[1] + SPARE_ROWS:
            s = particular - free @ _least_squares(zeros.T @ free, zeros.T @ particular)
        y = s @ activations
        sure.append(((s @ zeros).norm() < tolerances.accept * y.norm()) & (y[active].min() > 0))
        answers.append(s)
    return torch.stack(sure), torch.stack(answers)


def _least_squares(A: Float[Tensor, "r k"], b: Float[Tensor, " r"]) -> Float[Tensor, " k"]:
    try:
        return torch.linalg.lstsq(A, b[:, None], driver="gels").solution[:, 0]
    except torch.linalg.LinAlgError:  # of less than full rank: samples that are alike
        return torch.linalg.pinv(A) @ b


def softmax_coordinates(
    problem: NetworkView, spaces: Spaces, solved: Solved
) -> tuple[Bool[Tensor, " f"], Float[Tensor, "f b"]]:
    """With one hidden layer: s of the `solved` samples from their softmax, and which of them that determines.

    For the classes other than the label, log d is the logit up to a constant, and the logits are linear in s where the
    mask is known: C - 2 equations, for as many unknowns as samples are missing.
    """
    free, scaled = complement(spaces, solved), solved.t / spaces.singular
    s = torch.linalg.pinv(scaled).T
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
