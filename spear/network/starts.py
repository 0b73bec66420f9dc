"""Where phase retrieval starts: a class for each start, the outputs that it would have, pre-activations at random."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from spear.directions import unit_rows
from spear.network.phase_retrieval import Iterate
from spear.network.problem import NetworkView
from spear.network.spaces import Solved, Spaces

FEW_CLASSES = 20  # up to which every class can have starts of its own
FEW_LEFT = 16  # samples left for which all classes take turns: what is missing is what the counts got wrong
TELLING = 20  # solved samples whose mean softmax is nearer to the batch's than a fresh network's
LEAST_NEED = (0.3, 0.02)  # samples that a class is thought to lack at least: with few classes, with many
SHARP_LOGITS = 3.0  # spread of the logits of a network that was trained a little
SATURATED = 0.01  # of |d| in all other entries, where a softmax knows but the label and the class that it took for it
SCALED = 2  # what counts below nothing must be scaled by to be none: the update is then no mean
SEEN, MIXED = 0.5, 0.9  # shares of pairs of classes: up to the first such as were solved, up to the second of theirs


@dataclass(frozen=True)
class Starts:
    """What a search knows of its problem when it draws starts."""

    problem: NetworkView
    generator: Generator
    prior: Float[Tensor, " outputs"]
    """The mean output of the batch, as far as it is known."""

    def draw(
        self, spaces: Spaces, s: Float[Tensor, "k b"], labels: Int[Tensor, " k"], *, spread: bool = False
    ) -> Iterate:
        """A start for each label: h of its class, v from the pre-activations of s.

        With `spread`, every other start has sharp outputs of its own instead of the mean ones.
        """
        p = self.prior.expand(len(labels), -1)
        if spread:
            p = torch.where(self._coins(len(labels)), self._sharp(len(labels)), p)
        h, v = unit_rows((p - self.problem.one_hot(labels)) @ spaces.head).float(), unit_rows(s @ spaces.lift.T).float()
        return Iterate(h * (v > 0), h, v, h)

    def saturated(self, spaces: Spaces, s: Float[Tensor, "k b"], d: Float[Tensor, "f outputs"]) -> Iterate:
        """Starts with the exact h of a saturated softmax, a difference of two rows of W_out.

        The pairs of classes are such as those that the d of solved samples show, mixtures of these, or any.
        """
        known, count = d.abs().topk(2, dim=1).indices[saturated(d)].cpu(), len(s)
        one, other = (known[torch.randint(len(known), (count,), generator=self.generator)] for _ in range(2))
        any_class = torch.randint(self.problem.outputs, (count, 2), generator=self.generator)
        kind = torch.rand(count, 1, generator=self.generator)
        mixed = torch.stack([one[:, 0], other[:, 1]], 1)
        pair = torch.where(kind < MIXED, mixed, any_class)
        pair = torch.where((kind < SEEN) | (pair[:, :1] == pair[:, 1:]), one, pair).to(self.prior.device)
        h = unit_rows(spaces.head[pair[:, 0]] - spaces.head[pair[:, 1]]).float()
        v = unit_rows(s @ spaces.lift.T).float()
        return Iterate(h * (v > 0), h, v, h)

    def _coins(self, count: int) -> Bool[Tensor, "k 1"]:
        return (torch.rand(count, 1, generator=self.generator) < 0.5).to(self.prior.device)

    def _sharp(self, count: int) -> Float[Tensor, "k outputs"]:
        """Outputs as a trained network makes them: of logits a few units apart."""
        logits = torch.randn(count, len(self.prior), generator=self.generator, dtype=torch.float64)
        return self.problem.activate(SHARP_LOGITS * logits).to(self.prior)

    def labels(self, count: int, found: Int[Tensor, " f"], *, left: int, rank: int) -> Int[Tensor, " k"]:
        """A class for every start, by the label counts that the output bias discloses, less those of what was found.

        All in turn where few of the `rank` samples are `left`.
        """
        number = self.problem.classes
        few = number <= FEW_CLASSES
        if few and left <= FEW_LEFT:
            return torch.arange(count, device=self.prior.device) % number
        need = label_counts(self.problem, self.prior, rank) - torch.bincount(found, minlength=number)
        need = need.clamp_min(LEAST_NEED[0] if few else LEAST_NEED[1]).cpu()
        return torch.multinomial(need, count, replacement=True, generator=self.generator).to(self.prior.device)


def saturated(d: Float[Tensor, "f outputs"]) -> Bool[Tensor, " f"]:
    """Whose softmax knows two classes only, so that d is their difference up to a factor."""
    size = d.abs()
    return size.sum(1) - size.topk(2, dim=1).values.sum(1) < SATURATED * size.sum(1)


def prior_outputs(problem: NetworkView) -> Float[Tensor, " outputs"]:
    """What the loss sees of a fresh network, whatever the input: its output bias, activated."""
    bias = problem.biases[-1]
    return problem.activate(torch.zeros_like(problem.weights[-1][:, 0]) if bias is None else bias)


def mean_probabilities(solved: Solved, prior: Float[Tensor, " classes"]) -> Float[Tensor, " classes"]:
    """The mean softmax of the solved samples; the scale of d makes the label's own probability the prior one."""
    label = solved.labels[:, None]
    p = solved.d * (-(1 - prior[label]) / solved.d.gather(1, label))
    p = p.scatter_add(1, label, torch.ones_like(p[:, :1])).mean(0).clamp_min(1e-6)
    return p / p.sum()


def label_counts(problem: NetworkView, prior: Float[Tensor, " outputs"], rank: int) -> Float[Tensor, " classes"]:
    """How often each label occurs, from the output bias gradient, the sum of activated outputs less the one-hot labels.

    All alike without one. A factor of the whole update is taken off where it shows: no label occurs less than never.
    """
    size = problem.batch_size or rank
    gradient = problem.bias_gradients[-1]
    if gradient is None:
        return prior.new_full((problem.classes,), size / problem.classes)
    change = gradient / problem.unit(size)
    if problem.loss != "squared_error":
        scaled = (change / (size * prior + 1)).max() > SCALED
        change = change / torch.where(scaled, (change / (size * prior)).max(), 1)
    counts = size * prior - change
    return (torch.cat([size - counts, counts]) if problem.outputs == 1 else counts).clamp_min(0)


def shown_factor(problem: NetworkView, rank: int) -> float:
    """About how many times the mean gradient an update is whose batch lacks some label; 1 where nothing tells."""
    gradient, size = problem.bias_gradients[-1], problem.batch_size or rank
    if gradient is None or problem.outputs == 1 or problem.loss == "squared_error":
        return 1.0
    return float((gradient / problem.unit(size) / (size * prior_outputs(problem))).max())
