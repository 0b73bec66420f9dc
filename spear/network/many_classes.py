"""Many classes: where the space of all h is too large for the width, each class keeps one h, made exact at the end.

With C - 1 + b directions (2 b, where b < C) in m dimensions every mask fits some h, so the exact step says nothing;
with fewer it says little, at C² m operations a mask. But the more classes, the smaller each probability, and the better
is h known from the class alone: from the mean softmax of the batch, which the output bias gradient discloses. All
samples found, each one's own softmax follows from its activations, h from that, and so on: the error shrinks by a
constant factor a round.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear.directions import TINY, unit_rows
from spear.network.layerwise import activations, solve
from spear.network.phase_retrieval import Iterate
from spear.network.problem import NetworkView
from spear.network.spaces import Solved, Spaces, misfit, project

SAME = 1 - 1e-2  # cosine of two directions that are one: each h is wrong by that much
ROUNDS = 40  # of sharpening: the error shrinks by a constant factor in each
SETTLED = 1e-14  # a change that is rounding
SETTLING = 4  # renewals of a mask: those that do not settle by then cycle
DEAD = 1e-9  # length of the row of U of a unit that no sample activates
NEAR = 0.1  # the sine to span(U) under which a mask is taken, its h known to a per cent or two
MANY = 32  # classes from which h is known that well in a fresh network, and the exact step is slow
LEAST_YIELD, FRUITLESS = 0.04, 2  # directions a start, and rounds in a row without any: h is not known well enough


def too_many(problem: NetworkView, spaces: Spaces, margin: int) -> bool:
    """Whether h must be restricted: the live units are fewer than the unknowns of one sample and of its d."""
    live, unknown = int((spaces.basis.norm(dim=1) > DEAD).sum()), spaces.rank + spaces.contrasts.shape[1] + 1
    return problem.loss == "cross_entropy" and live < unknown + margin


def worth_a_try(problem: NetworkView) -> bool:
    """Whether one h a class is the cheaper search, should the class tell enough of h."""
    return problem.loss == "cross_entropy" and problem.outputs > MANY


def fruitless(idle: int, found: int, starts: int) -> bool:
    """Whether a search by one h a class had better end, after `idle` rounds in a row that found nothing."""
    return idle >= FRUITLESS or found < LEAST_YIELD * starts


def mean_softmax(problem: NetworkView, prior: Float[Tensor, " classes"], rank: int) -> Float[Tensor, " classes"]:
    """The batch's mean softmax: the output bias gradient is that minus the share of each label, a multiple of 1 / b."""
    if problem.bias_gradients[-1] is None:
        return prior
    size = problem.batch_size or rank
    gradient = problem.bias_gradients[-1] / problem.unit(size)
    return ((gradient + (size * prior - gradient).round()) / size).clamp_min(1e-300)


def settle(
    spaces: Spaces, end: Iterate, labels: Int[Tensor, " k"], p: Float[Tensor, " classes"], problem: NetworkView
) -> Solved:
    """The directions near which a search ended, with the h of the guessed class: masks by what projection says."""
    d = p - problem.one_hot(labels)
    h, mask = d @ spaces.head, spaces.active(end.target, end.h)
    for _ in range(SETTLING):
        before, mask = mask, spaces.active(others_say(spaces, mask, h), h)
    sine = misfit(unit_rows(spaces.scaled(mask, h)), spaces.basis).clamp_min(0).sqrt()
    good = (before == mask).all(1) & (sine < NEAR)
    found = directions(spaces, h[good], d[good], mask[good])
    return Solved.none(spaces).join(found[sine[good].argsort()], room=spaces.rank, cosine=SAME)


def others_say(spaces: Spaces, mask: Bool[Tensor, "k m"], h: Float[Tensor, "k m"]) -> Float[Tensor, "k m"]:
    """What each unit of D ∘ h would be by the other units."""
    wanted = spaces.scaled(mask, h)
    return spaces.without_itself(project(wanted, spaces.basis), wanted)


def directions(
    spaces: Spaces, h: Float[Tensor, "k m"], d: Float[Tensor, "k classes"], mask: Bool[Tensor, "k m"]
) -> Solved:
    """D ∘ h in the coordinates of U, and d to the same scale."""
    t = spaces.scaled(mask, h) @ spaces.basis
    norm = t.norm(dim=1, keepdim=True).clamp_min(TINY)
    return Solved(t / norm, d / norm, mask)


def sharpen(problem: NetworkView, spaces: Spaces, solved: Solved) -> Solved:
    """Directions made exact once all are there: activations, softmax, h and mask of each in turn, until they settle.

    A unit counts as active by its pre-activation and by the projection of D ∘ h: few are near zero in both.
    """
    wanted, change = problem.one_hot(solved.labels), float("inf")
    for _ in range(ROUNDS):
        rows = solve(solved.t, spaces.singular[:, None] * spaces.rows)
        y, _ = activations(problem, rows, solved.mask, solved.d)
        z = problem.apply(problem.last, y)
        y = problem.activations[problem.last].value(z)
        d = problem.activate(problem.apply(problem.last + 1, y)) - wanted
        h = d @ spaces.head
        inside, unit = others_say(spaces, solved.mask, h), unit_rows(z)
        mask = spaces.evidence(inside, h) / h.pow(2).sum(1, keepdim=True) + unit * unit.abs() > 0
        before, solved = solved, directions(spaces, h, d, mask)
        last, change = change, float((solved.t - before.t).norm())
        if not change < last or change < SETTLED:
            break
    return solved
