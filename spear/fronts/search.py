"""From features to inputs: least squares from coarse to fine, from smooth to sharp, cooled again where it stuck.

A max-pool's winner is mistaken as long as the input is off by more than neighbouring windows differ. So the first
stages trust natural images' spectrum and a front whose kinks are rounded off, the later ones neither: what is found
grows from where it is right. One sample by itself where its own features outnumber its entries.
"""

import math
import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spear.fronts.least_squares import Descent, Linearised, refined, residual
from spear.fronts.problem import FrontProblem
from spear.fronts.spectrum import Spectrum
from spear.reconstruction import Terms

AT_ONCE = 2**22  # entries of features and inputs that are worked on together
START = 0.01  # spread of the first candidates
NEAR = 1e-3  # relative residual from which double precision takes over
SINGLE = 3e-6  # what single precision reaches
SHARP = 1e-7  # damping where the pattern is right but for a few places
FINE, FINEST = 12, 12  # steps without a prior in single and in double precision, of so many conjugate gradients:
INNER, LONG = 60, 200


@dataclass(frozen=True)
class Stage:
    """Steps under a prior in coordinates of a `decay` (`Spectrum`), of a front of some `temperature` (`Softness`)."""

    decay: float
    prior: float
    temperature: float
    steps: int
    inner: int = 30


STAGES = (
    Stage(2.0, 1e-1, 1.0, 4, 20),
    Stage(2.0, 1e-2, 0.5, 4, 20),
    Stage(1.5, 1e-3, 0.25, 5),
    Stage(1.5, 1e-4, 0.12, 5),
    Stage(1.2, 1e-5, 0.08, 5),
    Stage(1.0, 1e-5, 0.05, 5),
    Stage(1.0, 1e-6, 0.03, 5),
    Stage(0.7, 1e-6, 0.015, 5),
    Stage(0.5, 1e-7, 0.0, 8),
)
AGAIN = (3, 2, 0, 3, 2, 0, 3, 2)  # the stage from which each following pass begins; from the first, anew


@dataclass(frozen=True)
class Sought:
    """Candidates (k, *shape) in double precision, the relative residual (k,) of each one's features, passes made."""

    inputs: Float[Tensor, "k *shape"]
    residuals: Float[Tensor, " k"]
    rounds: int


def search(problem: FrontProblem, terms: Terms, enough: float) -> Sought:
    """Inputs whose features are those of `problem`, each sample by itself, to a relative residual of `enough`."""
    count = len(problem.features)
    at_once = max(1, AT_ONCE // (problem.unknowns + problem.features.shape[1]))
    parts, rounds = [], 0
    for index in torch.arange(count, device=problem.features.device).split(at_once):
        part = problem[index]
        left = (count - int(index[0])) / len(index)
        part_until = time.monotonic() + (terms.budget.until - time.monotonic()) / left
        x, rounds = _passes(part, terms, part_until, rounds)
        parts.append(sharpened(part, x, enough, terms.budget.until))
        terms.report("network", int(index[-1]) + 1, count, rounds)
    inputs = torch.cat(parts)
    return Sought(inputs, residual(problem, inputs, joint=False).samples, rounds)


def _passes(problem: FrontProblem, terms: Terms, until: float, rounds: int) -> tuple[Float[Tensor, "k *shape"], int]:
    """Passes through the stages, those that follow of the samples that are not found yet."""
    rough, features = problem.to(torch.float32), problem.features
    generator = terms.generator()
    best = torch.zeros(len(features), *problem.shape, device=features.device)
    far = torch.full((len(features),), math.inf, device=features.device)
    for begin in (0, *AGAIN):
        open_ = (far > NEAR).nonzero()[:, 0]
        if not len(open_) or time.monotonic() >= until:
            break
        own = rough[open_]
        x = best[open_]
        if not begin:
            x = START * (1 + rounds) ** 2 * torch.randn(x.shape, generator=generator).to(x)
        x = run_stages(own, x, STAGES[begin:], until)
        x = _sharp(own, x, FINE, SINGLE, until)
        found = residual(own, x, joint=False).samples
        better = found < far[open_]
        best[open_[better]], far[open_[better]] = x[better], found[better]
        rounds += 1
    return best, rounds


def run_stages(
    problem: FrontProblem, x: Float[Tensor, "k *shape"], stages: tuple[Stage, ...], until: float, joint: bool = False
) -> Float[Tensor, "k *shape"]:
    """One stage after the other, from x; the problem is sharp again at the end."""
    for stage in stages:
        problem.softness.temperature = stage.temperature
        spectrum = Spectrum.of(problem.shape, stage.decay, x)
        x = Descent(problem, spectrum, joint, stage.prior, stage.inner, until=until).run(x, stage.steps, NEAR / 10)
    problem.softness.temperature = 0.0
    return x


def sharpened(
    problem: FrontProblem, x: Float[Tensor, "k *shape"], enough: float, until: float
) -> Float[Tensor, "k *shape"]:
    """Candidates that are near, in double precision: solved in single, corrected by what the double front leaves."""
    x, rough = x.double(), problem.to(torch.float32)
    for _ in range(FINEST):
        far = residual(problem, x, joint=False).samples
        near = ((far < NEAR) & (far > enough)).nonzero()[:, 0]
        if not len(near) or time.monotonic() >= until:
            break
        step = _corrected(problem[near], rough[near], x[near], False, until)
        better = residual(problem[near], x[near] + step, joint=False).samples < far[near]
        x[near[better]] += step[better]
        if not bool(better.any()):
            break
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
    return refined(fine, single, back, joint=joint, enough=1e-3, rounds=6, inner=LONG, until=until)[0]


def _sharp(
    problem: FrontProblem, x: Float[Tensor, "k *shape"], steps: int, enough: float, until: float
) -> Float[Tensor, "k *shape"]:
    """Steps without a prior."""
    plain = Spectrum.of(problem.shape, 0, x)
    return Descent(problem, plain, inner=INNER, damping=SHARP, until=until).run(x, steps, enough)
