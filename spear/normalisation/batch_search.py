"""Rounds of search behind BatchNorm: starts by the label counts, reflections, exact steps; what is found confines the
rest."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from spear.network.exact_step import different_masks
from spear.network.spaces import possible_errors
from spear.network.starts import label_counts
from spear.normalisation.exact_step import ExactStep, settle
from spear.normalisation.problem import NormalisedView
from spear.normalisation.reflections import Pieces, search
from spear.normalisation.spaces import BatchSpaces, Found, Plane, plane

WEIGHT = 0.4  # of y beside g, where both are about 1
NEAR = 0.3  # residual under which a mask is worth an exact step
RIDGES = (0.3, 0.1, 0.03)  # of the fits of d, in turn
FIRM = (3.0, 1.0, 0.5)  # the same under squared error, where d is linear in y and no two samples' are alike
SHRINK = (1.001, 0.3, 0.1, 0.03, 0.01)  # sizes of h of rounds that found nothing, in turn: confident samples' are small
STARTS = (16, 64)  # of a round, at least and at most
FEW_LEFT = 16  # samples left for which all classes take turns
DRAWS = 400  # of y at random, for the mean outputs
SAME = 1e-9  # of a cosine: two solutions that are one
ROOM = 0.9  # share of the rows up to which the whole plane's unknowns are solved for, not those of the samples left
ZERO = 1e-6  # of the largest entry: what is less is a unit that is not active
MARGIN = 8  # rows beyond the unknowns: equations that a wrong answer fails


class BatchSearch:
    """A search in progress at the last hidden layer: `found` samples, in `rounds` of `starts` together.

    A round under way ends when `time.monotonic` shows `until`.
    """

    until = math.inf

    def __init__(self, view: NormalisedView, spaces: BatchSpaces, accept: float, generator: Generator) -> None:
        problem, norm, self.drop = view.network, view.top, view.drops[-1]
        self.problem, self.spaces, self.accept, self.generator = problem, spaces, accept, generator
        live, last = spaces.live, problem.last + 1
        self.head = problem.weights[last][:, live] / (1 - self.drop)
        self.contrasts = possible_errors(problem, spaces.batch)
        rest = problem.weights[last][:, ~live] @ norm.shift[~live].clamp_min(0)  # units without a gradient are constant
        self.bias = rest if problem.biases[last] is None else rest + problem.biases[last]
        self.prior = self._mean_outputs()
        errors = (self.prior - problem.one_hot(torch.zeros(1, dtype=torch.long, device=live.device))) @ self.head
        self.size = 1 / float(errors.square().mean().sqrt())
        self.heads = self.size * self.head.mT @ self.contrasts
        self.found = Found.none(spaces, self.contrasts.shape[1])
        self.weight = WEIGHT / float(spaces.scale.square().mean().sqrt())
        self.starts = self.rounds = self.idle = 0

    @property
    def left(self) -> int:
        """How many samples are still to be found."""
        return self.spaces.batch - len(self.found)

    @property
    def lacking(self) -> str:
        """In words, that fewer units' deviations are told than a sample has unknowns."""
        told, needed = len(self.heads), 2 * (self.spaces.batch - 1) + self.heads.shape[1]
        return "" if told >= needed else f"the deviations of {told} units are told, a sample has {needed} unknowns"

    @property
    def ridge(self) -> float:
        """That of the fits of d in this round."""
        ridges = FIRM if self.problem.loss == "squared_error" else RIDGES
        return ridges[self.rounds % len(ridges)]

    @property
    def counts(self) -> Float[Tensor, " classes"]:
        """How often each label occurs, by the gradient of the output bias."""
        return label_counts(self.problem, self.prior, self.spaces.batch)

    @property
    def labels(self) -> Int[Tensor, " f"]:
        """The class of each sample found, by the sign of its d."""
        d = self.found.d @ self.contrasts.mT
        return (d[:, 0] < 0).long() if self.problem.outputs == 1 else d.argmin(1)

    def outputs(self, y: Float[Tensor, "k m"]) -> Float[Tensor, "k outputs"]:
        """What the loss sees of the activations y of the live units, those that dropout keeps."""
        return self.problem.activate(y @ self.head.mT.to(y.dtype) + self.bias.to(y.dtype))

    def _mean_outputs(self) -> Float[Tensor, " outputs"]:
        noise = torch.randn(DRAWS, len(self.spaces.scale), generator=self.generator, dtype=torch.float64)
        y = (self.spaces.shift + self.spaces.scale * noise.to(self.head)).clamp_min(0)
        return self.outputs(y * (1 - self.drop)).mean(0)

    def round(self) -> None:
        """One round of starts, of a smaller h where the last found nothing."""
        shrinks = self.idle and self.problem.loss != "squared_error"
        before, size = self.left, SHRINK[self.idle % len(SHRINK)] if shrinks else 1.0
        here, near = (plane(spaces, self.found, self.size) for spaces in (self.spaces, self.spaces.as_told))
        if self.left == 1:  # the last one is what the others leave
            t, s = -self.found.t.sum(0), -self.found.s.sum(0)
            g, y = self.spaces.gradients(t[None], s[None]), self.spaces.outputs(s[None])
            self._accept(here, g.abs() > ZERO * g.abs().amax() if self.drop else y > 0)
        weight = self.weight * min(1.0, size)
        mask = self._searched(near, weight, size, self.ridge, NEAR)
        if len(mask):
            step = ExactStep.of(here, self.heads)
            self._accept(here, settle(step, mask, accept=self.accept, near=NEAR, weight=weight, dropped=self.drop > 0))
        self.rounds += 1
        self.idle = 0 if self.left < before else self.idle + 1

    def near_misses(self, near: float) -> Bool[Tensor, "k m"]:
        """Different masks of starts that end this near to their pieces, the nearest first; nothing is accepted."""
        here = plane(self.spaces, Found.none(self.spaces, self.heads.shape[1]), self.size)
        mask = self._searched(here, self.weight, 1.0, self.ridge, near)
        self.rounds += 1
        return mask

    def _searched(self, here: Plane, weight: float, size: float, ridge: float, near: float) -> Bool[Tensor, "k m"]:
        labels, d = self._draw(size)
        pieces = Pieces(self.heads.float(), weight, self.drop)
        wanted, space = self.problem.one_hot(labels).float(), self.contrasts.float()
        mask, distance = search(
            here,
            pieces,
            d,
            targets=lambda y: (self.outputs(y) - wanted) @ space,
            ridge=ridge,
            generator=self.generator,
            until=self.until,
        )
        self.starts += len(labels)
        mask, distance = mask[distance < near], distance[distance < near]
        return mask[different_masks(mask, distance)]

    def _draw(self, size: float) -> tuple[Int[Tensor, " k"], Float[Tensor, "k c"]]:
        """A label and d for each start: of the mean outputs, or of random confident ones, which are smaller."""
        number, most = self.problem.classes, STARTS[1]
        few = self.left <= FEW_LEFT
        count = most if self.idle else max(STARTS[0], min(most, 2 * self.left), 2 * number if few else 0)
        if few:
            labels = torch.arange(count) % number
        else:
            need = self.counts.cpu() - torch.bincount(self.labels.cpu(), minlength=number)
            labels = torch.multinomial(need.clamp_min(0.2), count, replacement=True, generator=self.generator)
        labels = labels.to(self.head.device)
        wanted = self.problem.one_hot(labels)
        p = self.prior.expand(count, -1)
        if size != 1 and self.problem.outputs > 1:
            logits = 2 * torch.randn(count, self.problem.outputs, generator=self.generator, dtype=torch.float64)
            other = logits.softmax(1).to(wanted) * (1 - wanted)
            small = size * 0.2 ** torch.rand(count, 1, generator=self.generator, dtype=torch.float64).to(wanted)
            return labels, small * (other / other.sum(1, keepdim=True) - wanted) @ self.contrasts
        return labels, (p - wanted) @ self.contrasts

    def _accept(self, here: Plane, mask: Bool[Tensor, "k m"]) -> None:
        """Solve among all samples, as what was found before adds its errors; in a crowd, among those left."""
        if not len(mask):
            return
        unknowns = 2 * (self.spaces.batch - 1) + self.heads.shape[1]
        if len(self.found) and unknowns < ROOM * len(self.heads):
            here = plane(self.spaces, Found.none(self.spaces, self.heads.shape[1]), self.size)
        new = self._solved(here, mask, self.accept)
        self.found = self.found.join(new, self.left, 1 - max(SAME, min(1e-2, 10 * self.accept)))

    def solved(self, mask: Bool[Tensor, "k m"]) -> Found:
        """Samples of these masks, among all samples."""
        return self._solved(plane(self.spaces, Found.none(self.spaces, self.heads.shape[1]), self.size), mask, math.inf)

    def _solved(self, here: Plane, mask: Bool[Tensor, "k m"], accept: float) -> Found:
        at = ExactStep.of(here, self.heads)(mask)
        good = at.residual <= accept
        t, s = here.coordinates(at.x[good])
        return Found(t, s, at.d[good], mask[good])
