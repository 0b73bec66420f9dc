"""From features to inputs: a front is made sharp while its inputs are found, each sample's by itself.

A max-pool's winner is mistaken as long as the input is off by more than neighbouring entries differ, and least squares
of the sharp front end in such mistakes. With kinks that are rounded off (`Softness`) there is little to mistake: a path
leads from any image to the image. A stage of it is some steps of quasi-Newton at one temperature, in coordinates of
images' frequencies, the coarse ones the longer the hotter (`Spectrum`). The next is as cold as the residual allows, and
hotter where a stage did not help.

Rounding moves the solution. From `TRUE` on each stage takes off what rounding does at its first candidate: then the
true input solves the stage at every temperature, and a smooth front's derivative is all that is used of it.
"""

import time
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from spear.fronts.descent import Cost, Descent
from spear.fronts.least_squares import Linearised, refined, residual
from spear.fronts.problem import FrontProblem
from spear.fronts.softened import measured
from spear.fronts.spectrum import Spectrum
from spear.reconstruction import Terms

AT_ONCE = 2**22  # entries of features and inputs that are worked on together
START = 1.0  # spread of the first candidates' coordinates
HOT, TRUE = 0.7, 0.3  # the first temperature, and that from which the true input solves a stage
COOLED, COLDEST = 0.7, 0.5  # of a temperature: down to `TRUE`, and the least after that
ALLOWED, AGAIN = 2.0, 50.0  # temperatures per residual: what follows a stage that helped, and one that did not
HELPED = 0.9  # of the residual before
DECAY = 1.8  # of the frequencies, times the root of the temperature
STEPS, STAGES = 40, 40  # in a stage, and stages before double precision is tried
NATURAL = 1.5  # decay of random inputs by which temperatures are measured
SIZED = 4  # rounds in which these get features of the right size
NEAR = 2e-4  # relative residual from which double precision takes over; a quarter of it where that failed
FINEST, LONG = 20, 200  # steps in double precision, of so many conjugate gradients
SHORTER, SHORTEST = 0.5, 0.1  # of such a step past a kink that does not help
TRIES = 3  # of double precision


@dataclass(frozen=True)
class Sought:
    """Candidates (k, *shape) in double precision, the relative residual (k,) of each one's features, stages made."""

    inputs: Float[Tensor, "k *shape"]
    residuals: Float[Tensor, " k"]
    rounds: int


def search(problem: FrontProblem, terms: Terms, enough: float) -> Sought:
    """Inputs whose features are those of `problem`, each sample by itself, to a relative residual of `enough`."""
    count = len(problem.features)
    at_once = max(1, AT_ONCE // (problem.unknowns + problem.features.shape[1]))
    parts, rounds, generator = [], 0, terms.generator()
    for index in torch.arange(count, device=problem.features.device).split(at_once):
        left = (count - int(index[0])) / len(index)
        until = time.monotonic() + (terms.budget.until - time.monotonic()) / left
        x, stages = _found(problem[index], enough, generator, until)
        parts.append(x)
        rounds += stages
        terms.report("network", int(index[-1]) + 1, count, rounds)
    inputs = torch.cat(parts)
    return Sought(inputs, residual(problem, inputs, joint=False).samples, rounds)


def _found(
    problem: FrontProblem, enough: float, generator: Generator, until: float
) -> tuple[Float[Tensor, "k *shape"], int]:
    """Inputs in double precision, and the stages that they took."""
    cooling = Cooling.of(problem.to(torch.float32), generator)
    x = cooling.inputs.double()
    open_ = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for k in range(TRIES):
        cooling.run(open_, NEAR / 4**k, until)
        index = open_.nonzero()[:, 0]
        x[index] = sharpened(problem[index], cooling.inputs[index], enough, until)
        open_ = residual(problem, x, joint=False).samples > 10 * enough
        if not bool(open_.any()) or time.monotonic() >= until:
            break
    return x, cooling.stages


@dataclass
class Cooling:
    """The best candidates `inputs` (k, *shape) of a problem in single precision, how `far` their features are; where
    each one's `path` is, how far that is, how often it did not lead on (`turns`), and the `temperature` of its next
    stage, relative to the spreads that `like` (k, *shape) have."""

    problem: FrontProblem
    generator: Generator
    like: Float[Tensor, "k *shape"]
    inputs: Float[Tensor, "k *shape"]
    far: Float[Tensor, " k"]
    path: Float[Tensor, "k *shape"]
    path_far: Float[Tensor, " k"]
    turns: Int[Tensor, " k"]
    temperature: Float[Tensor, " k"]
    stages: int = 0

    @classmethod
    def of(cls, problem: FrontProblem, generator: Generator) -> "Cooling":
        """Before the first stage."""
        far = torch.ones_like(problem.features[:, 0])
        random = torch.randn((len(far), *problem.shape), generator=generator).to(far)
        like = _sized(problem, Spectrum.of(problem.shape, torch.full_like(far, NATURAL)).inputs(random))
        turns, hot = torch.zeros_like(far, dtype=torch.int64), torch.full_like(far, HOT)
        made = cls(problem, generator, like, torch.zeros_like(like), far, random, far.clone(), turns, hot)
        made.path = made._anything(random)
        return made

    def run(self, open_: Bool[Tensor, " k"], near: float, until: float) -> None:
        """Stages of the samples in `open_` until they are as near, or were given up."""
        for _ in range(STAGES):
            index = (open_ & (self.far > near)).nonzero()[:, 0]
            if not len(index) or time.monotonic() >= until:
                break
            self._stage(index, until)
            self.stages += 1

    def _stage(self, index: Tensor, until: float) -> None:
        own, t = self.problem[index], self.temperature[index]
        spectrum = Spectrum.of(own.shape, _decay(t))
        measured(own.front, own.softness, self.like[index])
        shift = self._rounding(own, self.path[index], t)
        own.softness.temperature = t
        start = spectrum.coordinates(self.path[index])
        x = spectrum.inputs(Descent(_misfit(own, shift, spectrum), start).run(STEPS, until))
        own.softness.temperature = None
        far = residual(own, x, joint=False).samples
        better = far < self.far[index]
        self.inputs[index[better]], self.far[index[better]] = x[better], far[better]
        self._next(index, x, far)

    def _next(self, index: Tensor, x: Float[Tensor, "_i *shape"], far: Float[Tensor, " _i"]) -> None:
        """Where the paths go on, and how cold: where a stage as cold as its residual did not help, hot again or, every
        other time, from another start; after that slower."""
        t, turns, before = self.temperature[index], self.turns[index], self.path_far[index]
        allowed = torch.where(turns > 0, 2 * ALLOWED * far, ALLOWED * far)
        colder = torch.maximum(torch.where(turns > 0, COOLED * t, COLDEST * t), torch.minimum(t, allowed))
        stuck = (far > HELPED * before) & (t <= TRUE)
        turned = stuck & (t <= 1.5 * allowed)
        colder = torch.where(stuck | (t > TRUE), COOLED * t, colder)
        colder = torch.where(turned, (AGAIN * far).clamp_max(TRUE), colder)
        anew = turned & (turns % 2 == 1)
        self.path[index] = torch.where(anew.reshape(-1, *[1] * (x.ndim - 1)), self._anything(x), x)
        self.path_far[index] = torch.where(anew, 1.0, far)
        self.temperature[index] = torch.where(anew, HOT, colder)
        self.turns[index] = turns + turned

    def _anything(self, like: Float[Tensor, "_i *shape"]) -> Float[Tensor, "_i *shape"]:
        """Inputs at random, whose spectrum is that of images."""
        c = torch.randn(like.shape, generator=self.generator).to(like)
        return Spectrum.of(self.problem.shape, _decay(torch.full_like(c.flatten(1)[:, 0], HOT))).inputs(START * c)

    def _rounding(self, own: FrontProblem, x: Float[Tensor, "k *shape"], t: Float[Tensor, " k"]) -> Tensor:
        """What rounding adds to the features of x, where the temperature is down to `TRUE`."""
        with torch.no_grad():
            own.softness.temperature = None
            sharp = own.front(x)
            own.softness.temperature = t
            return torch.where((t <= TRUE)[:, None], own.front(x) - sharp, 0)


def _decay(temperature: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    return DECAY * temperature.sqrt()


def _sized(problem: FrontProblem, x: Float[Tensor, "k *shape"]) -> Float[Tensor, "k *shape"]:
    """Multiples of x whose features are as large as those of the problem."""
    for _ in range(SIZED):
        size = torch.linalg.vector_norm(problem.features_of(x), dim=1).clamp_min(1e-30)
        share = torch.linalg.vector_norm(problem.features, dim=1) / size
        x = x * share.clamp(0.1, 10).reshape(-1, *[1] * (x.ndim - 1))
    return x


def _misfit(problem: FrontProblem, shift: Float[Tensor, "k n"], spectrum: Spectrum) -> Cost:
    """Squared relative residual of the features, by coordinates."""
    sizes = problem.features.square().sum(1).clamp_min(1e-30)

    def cost(c: Float[Tensor, "k *shape"]) -> tuple[Float[Tensor, " k"], Float[Tensor, "k *shape"]]:
        x = spectrum.inputs(c).requires_grad_()
        with torch.enable_grad():
            z = problem.front(x) - shift
            off = torch.where(problem.positive | (z > problem.features), z - problem.features, 0)
            value = off.square().sum(1) / sizes
            (slope,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), spectrum.adjoint(slope)

    return cost


def sharpened(
    problem: FrontProblem, x: Float[Tensor, "k *shape"], enough: float, until: float
) -> Float[Tensor, "k *shape"]:
    """Candidates that are near, in double precision: solved in single, corrected by what the double front leaves."""
    x, rough = x.double(), problem.to(torch.float32)
    far = residual(problem, x, joint=False).samples
    near = far < NEAR
    for _ in range(FINEST):
        near = near & (far > enough)
        index = near.nonzero()[:, 0]
        if not len(index) or time.monotonic() >= until:
            break
        step = _corrected(problem[index], rough[index], x[index], False, until)
        near[index] = False
        share = 1.0
        while len(index) and share > SHORTEST:
            trial = x[index] + share * step
            now = residual(problem[index], trial, joint=False).samples
            better = now < far[index]
            gained = index[better]
            x[gained], far[gained], near[gained] = trial[better], now[better], True
            index, step, share = index[~better], step[~better], SHORTER * share
    return x


def sharpened_together(
    problem: FrontProblem, x: Float[Tensor, "k *shape"], enough: float, until: float
) -> Float[Tensor, "k *shape"]:
    """Candidates whose features are right, by the gradients of the front too: where features leave something open."""
    x, rough = x.double(), problem.to(torch.float32)
    far = _worst(problem, x)
    for _ in range(FINEST):
        if far <= enough or time.monotonic() >= until:
            break
        trial = x + _corrected(problem, rough, x, True, until)
        now = _worst(problem, trial)
        if not now < far:
            break
        x, far = trial, now
    return x


def _worst(problem: FrontProblem, x: Float[Tensor, "k *shape"]) -> float:
    found = residual(problem, x, joint=True)
    return max(float(found.samples.max()), found.parameters)


def _corrected(
    problem: FrontProblem, rough: FrontProblem, x: Float[Tensor, "k *shape"], joint: bool, until: float
) -> Float[Tensor, "k *shape"]:
    """The step that least squares take from x."""
    fine, single = Linearised(problem, x, joint), Linearised(rough, x.float(), joint)
    back = -fine.transposed([fine.residual.features, *fine.residual.gradients])
    return refined(fine, single, back, joint=joint, enough=1e-2, rounds=6 if joint else 2, inner=LONG, until=until)[0]
