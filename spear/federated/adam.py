"""Adam's first step undone: a change of weights that is the gradient in other clothes.

Adam, AdamW, NAdam, RMSprop and Adagrad, with and without bias correction, make of a gradient g in their first step

    change = A g / (|g| + E) + c W        g / E = u / (1 - |u|),  u = (change - c W) / A

The constants A (the rate, or what the betas make of it) and c (the rate times a decay of the weights themselves) are
read off: for the right ones a layer's gradient has the rank of a batch. E is a factor common to all of g, which an
attack finds. A decay that was added to the gradient stays in g. Rounding of the weights hides the entries that are much
larger than E: in float64 few, in single precision many, and then g is left with noise of known size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spear.federated.parts import SIDES, Part, widest_part
from spear.federated.update import Lazy, SharedUpdate

EPSILON = 1e-8  # torch's default: what E is taken to be
FEWEST = 16  # rows and columns that a layer needs for that
TRIAL = 5  # steps after which a solution that gets nowhere is given up
STEPS, TURNS = 14, 30  # of the solution, which is quadratic at its end, and of the envelope that it begins with
LOWER = 0.02  # weight of entries below the envelope, in units of that of those above
LARGE, FLAT = 0.5, 0.9  # of the largest entry: what the envelope goes through; a median that shows little but signs
LEFT = 1e-2  # of what remains of a typical direction of the change: what may remain where the constants are right
SIGN = 4  # roundings: a step that is nearer to A shows its sign alone
SIGNS = "all entries have one size: of the gradient its signs are left, and no more"
LINEAR = 1e3  # times the largest step: where A is more, the change is the gradient up to a factor
LOW_RANK = 1e-6  # of the largest singular value: what remains of the others in a plain gradient
EXACT = 1e-6  # share of a gradient that rounding may be, where more than noise is left of it
LEAST_DECAY = 1e-4  # of the weights: less cannot be told from rounding where most steps are of one size
ROUNDED = 12**-0.5  # of a spacing: the standard deviation of rounding to it
SAME, NEAR = 1e-6, 1e-2  # relative difference of rates that are one, and of a rate and the largest step


@dataclass(frozen=True)
class Constants:
    """A and c of the change; `decay` times W, over E, is in the gradient; what `remains` of a typical direction."""

    A: float
    c: float = 0.0
    decay: float = 0.0
    remains: float = math.inf


@dataclass(frozen=True)
class Undone:
    """The gradient behind a first step; `words` for it."""

    update: SharedUpdate
    words: str


def undone(model: nn.Module, update: SharedUpdate) -> Undone | None:
    """The gradient behind a first step of Adam's kind; `None` for any other update."""
    at = constants(model, update)
    if at is None:
        return None
    found = _Step(model, update, at)
    if found.is_sign:
        return Undone(update, SIGNS)
    names, share, sigma = tuple(update.gradients), *found.error()
    words = f"the change is a first step of Adam's kind, of size {at.A:.6g}"
    if update.learning_rate and abs(at.A / update.learning_rate - 1) > SAME:
        words += f" at a rate of {update.learning_rate:g}"
    words += f", with a decay of {at.c / at.A:.6g} times the weights" if at.c else ""
    words += f": the gradient was computed from it, with eps {EPSILON:g}"
    told = {"learning_rate": None, "loss_scale": 1.0, "weight_decay": update.weight_decay if at.decay else 0.0}
    if share < EXACT:
        return Undone(replace(update, gradients=Lazy(names, found.gradient, share), **told), words)
    words += f"; the rounding of the weights leaves noise of {sigma:.1e} in its entries, the large ones above all"
    return Undone(replace(update, gradients=Lazy(names, found.gradient, noise=sigma), noise=sigma, **told), words)


def constants(model: nn.Module, update: SharedUpdate) -> Constants | None:
    """The constants under which a layer's gradient has a low rank; or, where most steps are of one size, that."""
    for side in SIDES:  # a small part shows a plain gradient of a small batch
        part = widest_part(model, update, side)
        if part is None or len(part) < FEWEST or _is_low_rank(torch.linalg.svdvals(part.received)):
            return None
    for side in SIDES:
        part = widest_part(model, update, side)
        s = torch.linalg.svdvals(part.received)
        size = part.received.abs()
        flat = float(size[size > 0].median()) > FLAT * float(size.max())
        own = float(s[len(s) // 2]) / (float(size[size > 0].median()) * len(s) ** 0.5)
        best = min((solved(part, start) for start in _starts(part, update)), key=lambda at: at.remains)
        if best.remains < LEFT * own and LINEAR * float(size.max()) > best.A:
            return best
        if not flat:
            return None
    return _by_size(part, update)


def _is_low_rank(s: Float[Tensor, " k"]) -> bool:
    """Whether singular values are those of a plain gradient, of a batch of less than half as many."""
    return not s[len(s) // 2] > LOW_RANK * s[0]


def _by_size(part: Part, update: SharedUpdate) -> Constants | None:
    """The rate where most steps are of its size, of that which was told, or else a round one; and so the decay."""
    around, most = _envelope(part), float(part.received.abs().max())
    rate = update.learning_rate or float(f"{most:.0e}")
    if abs(most / rate - 1) > NEAR:
        return None
    decay = float(f"{around.c / rate:.1e}")
    return Constants(rate, rate * decay if decay > LEAST_DECAY else 0.0)


def _starts(part: Part, update: SharedUpdate) -> Iterator[Constants]:
    """Constants to begin with: those that were told, a step a little larger than any, the envelope of all steps."""
    if update.learning_rate is not None:
        yield Constants(update.learning_rate, update.learning_rate * update.weight_decay)
    yield Constants(float(part.received.abs().max()))
    yield _envelope(part)


def _envelope(part: Part) -> Constants:
    """A + c sign(change) W from above to the large entries of |change|: an expectile, by reweighted least squares."""
    size, toward = part.received.abs().flatten(), (part.received.sign() * part.weights).flatten()
    large = size > LARGE * size.max()
    size, rows = size[large], torch.stack([torch.ones_like(toward), toward], 1)[large]
    at = torch.linalg.lstsq(rows, size[:, None]).solution
    for _ in range(TURNS):
        weight = torch.where(size[:, None] > rows @ at, 1.0, LOWER).sqrt().to(rows)
        at = torch.linalg.lstsq(rows * weight, size[:, None] * weight).solution
    return Constants(*at[:, 0].tolist())


def solved(part: Part, start: Constants) -> Constants:
    """The best of the constants that Gauss-Newton steps lead to, with a decay of the weights, or one in the gradient.

    A step makes the gradient vanish, to first order, between the smaller half of its left and right singular vectors.
    """
    ends = []
    for unknowns in (("A",), ("A", "c"), ("A", "decay")):
        at = start if "c" in unknowns else replace(start, c=0.0)
        for k in range(STEPS):
            at = _inside(part, at)
            now, steps = _step(part, at, unknowns)
            ends.append(replace(at, remains=now))
            first = now if k == 0 else first
            if (k == TRIAL and not now < first / 2) or not all(math.isfinite(step) for step in steps):
                break
            moved = {name: getattr(at, name) + step for name, step in zip(unknowns, steps, strict=True)}
            least = float((part.received - moved.get("c", at.c) * part.weights).abs().max())
            at = replace(at, **moved | {"A": max(moved["A"], least + max(at.A - least, 0.0) / 4)})
    return min(ends, key=lambda at: at.remains)


def _inside(part: Part, at: Constants) -> Constants:
    """A above every step."""
    least = float((part.received - at.c * part.weights).abs().max())
    return at if least < at.A else replace(at, A=least * (1 + 1e-7))


def _step(part: Part, at: Constants, unknowns: tuple[str, ...]) -> tuple[float, list[float]]:
    """What remains of a typical direction, and the step of each unknown."""
    u = (part.received - at.c * part.weights) / at.A
    room = 1 - u.abs()
    G = u / room - at.decay * part.weights
    if not bool(G.isfinite().all()):
        return math.inf, [math.nan]
    U, s, V = torch.linalg.svd(G)
    half = len(s) // 2
    U, V = U[:, half:], V[half:].mT
    slopes = {"A": -u / (at.A * room**2), "c": -part.weights / (at.A * room**2), "decay": -part.weights}
    columns = torch.stack([(U.mT @ slopes[name] @ V).flatten() for name in unknowns], 1)
    size = torch.linalg.vector_norm(columns, dim=0).clamp_min(1e-300)
    steps = torch.linalg.lstsq(columns / size, -(U.mT @ G @ V).flatten()[:, None]).solution[:, 0] / size
    typical = float(G[G != 0].abs().median()) * len(s) ** 0.5
    return float(s[half]) / max(typical, 1e-300), steps.tolist()


@dataclass(frozen=True)
class _Step:
    """A first step with its constants."""

    model: nn.Module
    update: SharedUpdate
    at: Constants

    def gradient(self, name: str) -> Tensor:
        """g of a parameter."""
        u, rounding = self._steps(name)
        return EPSILON * u / torch.maximum(1 - u.abs(), rounding)

    def _steps(self, name: str) -> tuple[Tensor, Tensor]:
        """u, and the standard deviation of its rounding: that of the weight, and of the arithmetic."""
        parameter, change = self.model.get_parameter(name).detach(), self.update.gradients[name]
        W, C = parameter.to(change.device).double(), change.double()
        eps = max(torch.finfo(x.dtype).eps for x in (parameter, change))
        rest = C - self.at.c * W
        without = float(rest.abs().max()) > self.at.A and float(C.abs().max()) <= self.at.A  # no decay on this one
        u = (C if without else rest) / self.at.A
        return u, (ROUNDED * eps * W.abs() / self.at.A + eps / 2)

    @property
    def is_sign(self) -> bool:
        """Whether rounding leaves nothing but the sign of nearly every step."""
        steps = [self._steps(name) for name in self.update.gradients]
        apart = torch.cat([(1 - u.abs() > SIGN * rounding)[u != 0] for u, rounding in steps])
        return float(apart.double().mean()) < LEFT if len(apart) else False

    def error(self) -> tuple[float, float]:
        """What rounding leaves in the gradients: the largest share of any, and the root mean square of an entry."""
        shares, squares, entries = [0.0], 0.0, 0
        for name in self.update.gradients:
            u, rounding = self._steps(name)
            room = torch.maximum(1 - u.abs(), rounding)
            g, off = EPSILON * u.abs() / room, EPSILON * u.abs() * rounding / room**2
            off = torch.minimum(off, g)
            size = float(torch.linalg.vector_norm(g))
            shares += [float(torch.linalg.vector_norm(off)) / size] if size else []
            squares, entries = squares + float(off.pow(2).sum()), entries + off.numel()
        return max(shares), (squares / entries) ** 0.5
