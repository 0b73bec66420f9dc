"""Rounds of search at the last hidden layer: starts near the class means, fits, samples subtracted."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from spear.directions import TINY, apart
from spear.network.curves.dropped import Dropping
from spear.network.curves.fit import Effort, finish, fit
from spear.network.curves.layer import Curves, Known, Layer, Points
from spear.network.curves.reflections import polish, reflect
from spear.network.curves.together import EXACT as TOGETHER
from spear.network.curves.together import LEAST_DAMPED, Coupling, Descent, solve
from spear.network.problem import NetworkView
from spear.network.spaces import possible_errors
from spear.network.starts import TELLING, Starts, label_counts, prior_outputs

SPREADS = (2.0, 1.0, 0.5)  # of starts around their class mean, in units of the mean's own spread over the units
STARTS, FEWEST = 64, 16  # of a round, at most and at least
ROUGH = Effort(steps=40, inner=25, arrived=1e-4)  # of every start, in single precision
EXACT = 1e-11  # the sine against the whole gradient that needs no step: the batch as a whole is made exact later
REFLECTIONS, BEHIND_DROPOUT, LONGEST = 150, 100, 4  # steps of a start, how many times as many later
POLISH = Effort(steps=8, inner=40, arrived=1e-10)  # of one with its pieces
NEAR = 1e-3  # the sine under which a start in single precision has arrived
AMONG, ASIDE = 1e-5, 1e-4  # the sine beside samples known to a millionth; share of their spread by which all are moved
UNEQUAL = 1e3  # times the weight of one sample in the loss that a sample may have: more or less is none
SAME, ROUGHLY_SAME = 1e-4, 3e-3  # relative distances of two ends that are one, in double and single precision
BENT = 0.15  # share of starts that reflections are expected to lead somewhere where only phi'' jumps
FORGET = 0.3  # weight of what is known of a spread before the last round


@dataclass(frozen=True)
class Kind:
    """How a round searches: by reflections or by fits alone, from starts so far from their class mean."""

    reflected: bool
    spread: float


class CurveSearch:
    """A search in progress: `whole` is the layer as received, `layer` what is left of it, `known` what was found.

    `ground` is the layer against which single ends are held: the whole, or, where that is crowded, what is left of it
    once the samples that were found together are subtracted.
    """

    until = math.inf

    def __init__(
        self, problem: NetworkView, layer: Layer, generator: Generator, prior: Float[Tensor, " outputs"] | None = None
    ) -> None:
        """`prior` is the mean output of the batch, where it is not that of a fresh network."""
        self.problem, self.generator = problem, generator
        self.whole = self.layer = self.ground = layer
        self.curves = Curves.of(problem, self.whole)
        empty = self.whole.basis.new_zeros(0, len(layer.singular))
        none = torch.zeros(0, dtype=torch.long, device=empty.device)
        activation = problem.activations[problem.last]
        self.dropping = activation if isinstance(activation, Dropping) else None
        self.outputs = possible_errors(problem, layer.samples) if self.dropping else None
        self.known = Known(empty, empty, none, none.reshape(0, len(layer.lift)) if self.dropping else None)
        self.drawn = Starts(problem, generator, prior_outputs(problem) if prior is None else prior)
        self.accept = problem.accuracy.certain
        self.starts = self.rounds = self.idle = 0
        self.patience = 1
        promise = 1.0 if activation.jumps or self.dropping else BENT
        self.shares = {} if self.dropping else {Kind(False, spread): 1.0 for spread in SPREADS}
        if self.dropping or (activation.breaks and layer.normal is None):
            self.shares |= {Kind(True, spread): promise for spread in SPREADS[1:]}

    @property
    def left(self) -> int:
        """How many samples are still to be found."""
        return self.whole.samples - len(self.known)

    def round(self) -> None:
        """One round of starts; what they find is held against the gradient, and subtracted from it."""
        self.rounds += 1
        if self.layer.crowded and not self.dropping:
            self._together()
            return
        kind = max(self.shares, key=self.shares.get)
        s, labels = self._draw(kind.spread)
        self.starts += len(labels)
        ends = self._reflected(s, labels) if kind.reflected else (*self._fitted(s, labels), None)
        found = self._settled(*ends)
        share = len(found) / len(labels)
        self.shares[kind] = share + FORGET * self.shares[kind]
        if kind.reflected:
            self.patience = 1 if len(found) else min(2 * self.patience, LONGEST)
        self.idle = 0 if len(found) else self.idle + 1
        if len(found):
            self.known = self.known.join(found)
            self.layer = self.whole.without(self.known)
            self._learn()

    def _together(self) -> None:
        """As many starts as samples, sought together: what each of them alone leaves open, the others close."""
        counts = self._counts().cumsum(0)
        places = torch.arange(self.layer.samples, device=counts.device) + 0.5
        labels = torch.bucketize(places.to(counts), counts).clamp_max(self.problem.classes - 1)
        w = self.coordinates(self._scattered(labels, SPREADS[1]))
        self.starts += len(labels)
        w, labels = solve(self.curves, self.whole, w, labels, self._unit, self.until)
        self.idle = 0 if len(labels) else self.idle + 1
        if len(labels):
            at = self.curves.at(w, labels)
            self.known = Known(self.curves.samples(w), self.whole.directions(at.unit), labels)
            self.layer = self.ground = self.whole.without(self.known)
            self.accept = max(self.accept, AMONG)
            self._learn()

    def settle(self) -> Float[Tensor, " b"]:
        """All samples made exact together; how far, relative to the sample, another way ends from there."""
        coupling, labels = Coupling.of(self.curves, self.whole, self._unit), self.known.labels
        w = self.coordinates(self.known.s)
        aside = torch.randn(w.shape, generator=self.generator, dtype=torch.float64).to(w) * w.std(0)
        ends = []
        for start in (w, w + ASIDE * aside):
            run = Descent.of(coupling, start, labels, LEAST_DAMPED)
            run.go_on(self._effort(TOGETHER))
            ends.append(run.at)
        at = ends[0].points
        self.known = Known(self.curves.samples(at.w), at.unit @ self.whole.basis, labels)
        return (ends[0].points.z - ends[1].points.z).norm(dim=1) / at.z.norm(dim=1)

    @property
    def _unit(self) -> float:
        return self.problem.unit(self.problem.batch_size or self.whole.samples)

    def strangers(self, known: Known) -> int:
        """How many samples of one round, from the whole gradient, are none of the known ones."""
        self.round()
        z = self.whole.pre_activations(self.known.s)
        exactly = "donot_use_mm_for_euclid_dist"
        gap, index = torch.cdist(z, self.whole.pre_activations(known.s), compute_mode=exactly).min(1)
        same = (gap < SAME * z.norm(dim=1)) & (known.labels[index] == self.known.labels)
        return int((~same).sum())

    def coordinates(self, s: Float[Tensor, "k b"]) -> Float[Tensor, "k q"]:
        """The w, against the whole gradient, of samples' s."""
        return self.curves.coordinates_of(self.whole.pre_activations(s))

    def points(self) -> Points:
        """The samples found, against the whole gradient."""
        return self.curves.at(self.coordinates(self.known.s), self.known.labels, self.known.pieces)

    def _learn(self) -> None:
        """Of a network that was trained, the samples found show the mean outputs."""
        if len(self.known) >= TELLING:
            at = self.points()
            self.drawn = replace(self.drawn, prior=self.problem.activate(at.logits).mean(0))

    def _draw(self, spread: float) -> tuple[Float[Tensor, "k r"], Int[Tensor, " k"]]:
        """Starts: the mean of a class, and normal noise as the gradient's singular values have it."""
        layer = self.layer
        classes = self.problem.classes
        count = STARTS if self.dropping else min(STARTS, max(FEWEST, layer.samples))
        count = max(count, 2 * classes if layer.samples <= FEWEST else 0)
        labels = self.drawn.labels(count, self.known.labels, left=layer.samples, rank=self.whole.samples)
        return self._scattered(labels, spread), labels

    def _scattered(self, labels: Int[Tensor, " k"], spread: float) -> Float[Tensor, "k r"]:
        """Samples of these classes: the mean, and normal noise."""
        layer, mean = self.layer, self.layer.means
        mean = class_means(self.problem, layer, self._counts(), self.drawn.prior) if mean is None else mean
        mean = mean[labels]
        mean = mean - ((mean @ layer.ones) - 1)[:, None] * layer.origin
        noise = scattered(layer, len(labels), self.generator)
        size = lambda s: (s @ layer.lift.T).std(1, keepdim=True)  # noqa: E731
        reach = size(mean) if layer.reach is None else layer.reach
        return mean + spread * reach / size(noise).clamp_min(TINY) * noise

    def _counts(self) -> Float[Tensor, " classes"]:
        """How often each class is thought to be among the samples that are left."""
        need = label_counts(self.problem, self.drawn.prior, self.whole.samples)
        need = (need - torch.bincount(self.known.labels, minlength=len(need))).clamp_min(0.3)
        return need * (self.layer.samples / need.sum())

    def _reflected(
        self, s: Float[Tensor, "k r"], labels: Int[Tensor, " k"]
    ) -> tuple[Float[Tensor, "j b"], Int[Tensor, " j"], Int[Tensor, "j m"] | None]:
        """Where starts lead by reflections across the jumps of phi', in coordinates of the whole; their labels, and
        behind dropout their pieces."""
        curves = Curves.of(self.problem, self.layer)
        steps = (BEHIND_DROPOUT if self.dropping else REFLECTIONS) * self.patience
        z = self.layer.pre_activations(s)
        low, first = curves.coordinates_of(z).float(), self.dropping and self.dropping.drawn(z, self.generator)
        w, pieces = reflect(curves.to(torch.float32), low, labels, steps=steps, until=self.until, pieces=first)
        w, pieces = polish(curves, w.to(s), labels, pieces, self._effort(POLISH), self.outputs)
        pieces = pieces if self.dropping else None
        good = curves.at(w, labels, pieces).sine < self.accept**0.5
        return self.layer.in_whole(curves.samples(w[good])), labels[good], None if pieces is None else pieces[good]

    def _fitted(self, s: Float[Tensor, "k r"], labels: Int[Tensor, " k"]) -> tuple[Float[Tensor, "j b"], Tensor]:
        """Where starts lead by fits, in coordinates of the whole, each end once; and their labels."""
        curves = Curves.of(self.problem, self.layer)
        start = curves.coordinates_of(self.layer.pre_activations(s)).float()
        w, sine = fit(curves.to(torch.float32), start, labels, self._effort(ROUGH))
        arrived = (sine < NEAR).nonzero()[:, 0]
        arrived = arrived[sine[arrived].argsort()]
        w, labels = w[arrived].to(s), labels[arrived]
        one = apart(curves.base + w @ curves.frame.T, curves.base.new_zeros(0, len(curves.base)), ROUGHLY_SAME)
        w, labels = w[one], labels[one]
        return self.layer.in_whole(curves.samples(w)), labels

    def _settled(self, s: Float[Tensor, "k b"], labels: Int[Tensor, " k"], pieces: Int[Tensor, "k m"] | None) -> Known:
        """Ends made exact against the whole gradient: those that fit it and are new, the best first."""
        ground = self.ground
        curves = self.curves if ground is self.whole else Curves.of(self.problem, ground)
        start = curves.coordinates_of(self.whole.pre_activations(s))
        w, sine = finish(curves, start, labels, arrived=EXACT, pieces=pieces)
        at = curves.at(w, labels, pieces)
        if self.dropping:
            pieces = self.dropping.settled(at.z, pieces)
            at = curves.at(w, labels, pieces)
            sine = at.sine
        found = Known(ground.in_whole(curves.samples(w)), self.whole.directions(at.unit * at.size), labels, pieces)
        weight = (self.whole.weight(found) / (self._unit * at.size[:, 0])).abs()
        good = _of_one_size(weight, sine < self.accept)
        ranked = sine.argsort()
        ranked = ranked[good[ranked]]
        new = apart(at.z[ranked], self.whole.pre_activations(self.known.s), SAME)
        return found[ranked[new][: self.left]]

    def _effort(self, effort: Effort) -> Effort:
        return replace(effort, until=self.until)


def _of_one_size(weight: Float[Tensor, " k"], fits: Bool[Tensor, " k"]) -> Bool[Tensor, " k"]:
    """Which of those that fit have a weight near 1, or, where none has, near the median: a factor of the update."""
    near = lambda to: fits & (weight > to / UNEQUAL) & (weight < to * UNEQUAL)  # noqa: E731
    return torch.where(near(1).any(), near(1), near(torch.where(fits, weight, torch.nan).nanmedian()))


def scattered(layer: Layer, count: int, generator: Generator) -> Float[Tensor, "k r"]:
    """Differences of samples, as normal noise of the gradient's singular values."""
    noise = torch.randn(count, len(layer.singular), generator=generator, dtype=torch.float64)
    noise = noise.to(layer.lift) * layer.singular
    return noise - (noise @ layer.ones)[:, None] * layer.origin


def class_means(
    problem: NetworkView, layer: Layer, counts: Float[Tensor, " classes"], outputs: Float[Tensor, " outputs"]
) -> Float[Tensor, "classes r"]:
    """The mean s of each class, as far as a linear layer would show it; `outputs` are the batch's mean ones.

    Were phi' everywhere the same, the gradient would be W_outᵀ times the sums of (a - e_c) s: the sum of each class
    less its share of the whole. How many samples a class has gives the factor.
    """
    head = problem.weights[-1].T
    head = head - head.mean(1, keepdim=True) if problem.loss == "cross_entropy" else head
    sums = torch.linalg.lstsq(head, layer.basis * layer.singular, driver="gelsd").solution
    wanted = outputs * layer.samples - counts[-problem.outputs :]
    seen = sums @ layer.ones
    sums = outputs[:, None] * (layer.samples * layer.origin) - sums * ((wanted @ wanted) / _least(seen @ wanted))
    sums = sums if problem.outputs > 1 else torch.cat([layer.samples * layer.origin - sums, sums])
    return sums / counts[:, None]


def _least(x: Tensor) -> Tensor:
    return torch.where(x.abs() < TINY, TINY, x)
