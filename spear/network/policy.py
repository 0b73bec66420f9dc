"""Which search at the last hidden layer is worth the next round, by how each kind did before."""

from dataclasses import dataclass
from typing import Literal

from spear.network.starts import FEW_CLASSES, FEW_LEFT

EASY, HARD_PRESSED = 0.3, 0.45  # rank over width: under the first most starts arrive, past the second few do
STARTS, SHARE = 128, 0.25  # of a round: so many, or a share of the samples that are left
FEWEST, PER_SAMPLE = 32, 1.5  # starts: at least, and at most for each sample that is left
STEPS = (60, 100, 200)  # of a start, in an easy problem, another, a hard-pressed one
PAIRED = (96, 150)  # starts of a round and steps where the layer below is searched as well
LONGEST = 5  # times as many, after rounds that found nothing
MOVING = (0.05, 0.002)  # share of starts that an h that moves is expected to lead somewhere, in a crowd the second
PATIENCE = 4  # by how much a failure in a crowd lowers a share
Kind = Literal["mean", "free", "saturated"]  # of h: from the mean outputs, moving, of a softmax that knows two classes


@dataclass(frozen=True)
class Plan:
    """One round's search: what kind of h, how many starts and steps, whether z is searched with u, as its partner.

    `paired` searches the layer below as well.
    """

    kind: Kind
    starts: int
    steps: int
    partnered: bool
    paired: bool

    @property
    def free(self) -> bool:
        """Whether h moves."""
        return self.kind == "free"


@dataclass(frozen=True)
class Standing:
    """Where a search stands: `left` of `rank` samples at `width` units, after `idle` rounds in a row for nothing.

    `crowded` says that the batch is large for the width, `restricted` that every class keeps one h; `classes` is their
    number, `lowest` says that the last hidden layer is the first, `paired` that ReLU stands in it and the one below.
    """

    width: int
    rank: int
    left: int
    idle: int
    classes: int
    crowded: bool
    restricted: bool
    lowest: bool
    paired: bool


@dataclass
class Policy:
    """`shares` of starts that found something last, for every kind of h, and the round when that was."""

    shares: dict[Kind, tuple[float, int]]

    @classmethod
    def at_first(cls, *, crowded: bool) -> "Policy":
        """A fixed h is tried first; one that moves finds less, in a crowd hardly anything."""
        return cls({"mean": (1.0, 0), "free": (MOVING[crowded], 0)})

    def expect(self, kind: Kind) -> None:
        """Try a kind next that was not thought of before."""
        self.shares.setdefault(kind, (1.0, 0))

    def plan(self, at: Standing) -> Plan:
        """How to search: cheaply while nothing is known of the samples' z, then with it, longer when idle."""
        easy, pressed = at.rank < EASY * at.width, at.rank >= HARD_PRESSED * at.width
        best = max(self.shares, key=lambda kind: (self.shares[kind][0], -self.shares[kind][1]))
        kind: Kind = "mean" if at.restricted else best
        paired = at.paired and kind == "mean"
        most, steps = PAIRED if paired else (STARTS, STEPS[(not easy) + pressed])
        starts = int(min(max(most, SHARE * at.left), max(FEWEST, PER_SAMPLE * at.left)))
        if at.left <= FEW_LEFT and at.classes <= FEW_CLASSES:
            starts = max(starts, 2 * at.classes)
        partnered = at.lowest or at.left < at.rank or at.idle > 0
        return Plan(kind, starts, steps * min(1 + at.idle, LONGEST), partnered, paired)

    def learn(self, plan: Plan, fresh: int, *, number: int, crowded: bool) -> None:
        """Note that round `number` by that plan found `fresh` directions; in a crowd one failure is no proof."""
        share = fresh / plan.starts
        self.shares[plan.kind] = (self.shares[plan.kind][0] / PATIENCE if crowded and not fresh else share, number)
