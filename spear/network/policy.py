"""Which search at the last hidden layer is worth the next round, by how each kind did before."""

from dataclasses import dataclass

from spear.network.starts import FEW_CLASSES, FEW_LEFT

EASY, HARD_PRESSED = 0.3, 0.45  # rank over width: under the first most starts arrive, past the second few do
STARTS = (128, 256)  # of a round, in an easy problem and another
FEWEST, PER_SAMPLE = 32, 1.5  # starts: at least, and at most for each sample that is left
STEPS = (100, 200, 300)  # of a start, in an easy problem, another, a hard-pressed one
LONGEST = 5  # times as many, after rounds that found nothing
MANY_LEFT = 0.7  # share of samples left over which the partner knows too little: its space is nearly everything
SUCCESS = 0.3  # share of starts that find something from which they may go on without the partner
HALF_LEFT, HALF = 0.4, 0.5  # share of samples left over which the partner's evidence counts half
LITTLE = 0.2  # the same with one hidden layer: more, and starts keep to a wrong mask that fits the partner

MOVING = (0.05, 0.002)  # share of starts that an h that moves is expected to lead somewhere, in a crowd the second
PATIENCE = 4  # by how much a failure in a crowd lowers a share


@dataclass(frozen=True)
class Plan:
    """One round's search: whether h moves, how many starts and steps, and the partner's weight (0 leaves it out).

    `evened` evens out the rows: a unit with a small h_j says 0 or h_j as clearly as one with a large h_j.
    """

    free: bool
    starts: int
    steps: int
    weight: float
    evened: bool


@dataclass(frozen=True)
class Standing:
    """Where a search stands: `left` of `rank` samples at `width` units, after `idle` rounds in a row for nothing.

    `crowded` says that the batch is large for the width, `restricted` that every class keeps one h; `classes` is their
    number, `lowest` says that the last hidden layer is the first.
    """

    width: int
    rank: int
    left: int
    idle: int
    classes: int
    crowded: bool
    restricted: bool
    lowest: bool


@dataclass
class Policy:
    """`shares` of starts that found something last, with an h that moves and without, and the round when that was.

    `alone` is the share of those without the partner.
    """

    shares: dict[bool, tuple[float, int]]
    alone: float = 1.0

    @classmethod
    def at_first(cls, *, crowded: bool) -> "Policy":
        """A fixed h is tried first; one that moves finds less, in a crowd hardly anything."""
        return cls({False: (1.0, 0), True: (MOVING[crowded], 0)})

    def plan(self, at: Standing) -> Plan:
        """How to search: cheap while many are left and starts succeed, then with the partner, longer when idle."""
        easy, pressed = at.rank < EASY * at.width, at.rank >= HARD_PRESSED * at.width
        free = not at.restricted and max(self.shares, key=lambda kind: (self.shares[kind][0], -self.shares[kind][1]))
        starts = int(min(STARTS[not easy], max(FEWEST, PER_SAMPLE * at.left)))
        if at.left <= FEW_LEFT and at.classes <= FEW_CLASSES:
            starts = max(starts, 2 * at.classes)
        weight = self._partner_weight(at, free=free)
        evened = not free and not weight and at.crowded and at.classes <= FEW_CLASSES
        return Plan(free, starts, STEPS[(not easy) + pressed] * min(1 + at.idle, LONGEST), weight, evened)

    def _partner_weight(self, at: Standing, *, free: bool) -> float:
        """How much the pre-activations count: little with one hidden layer, else once that promises more than none."""
        share = at.left / at.rank
        if at.lowest:
            return 1.0 if free or at.restricted else LITTLE
        if at.idle % 2 == 0 if at.crowded else share > MANY_LEFT and self.alone >= SUCCESS:
            return 0.0
        return HALF if share > HALF_LEFT else 1.0

    def learn(self, plan: Plan, fresh: int, *, number: int, crowded: bool) -> None:
        """Note that round `number` by that plan found `fresh` directions; in a crowd one failure is no proof."""
        share = fresh / plan.starts
        if not plan.weight:
            self.alone = share
        self.shares[plan.free] = (self.shares[plan.free][0] / PATIENCE if crowded and not fresh else share, number)
