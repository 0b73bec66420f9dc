"""What certifies inputs that were found from their features: every gradient reproduced, by no other inputs near.

With ReLU's zeros and the places of maxima as they are, features, and the gradients of the front's parameters, are
affine in the inputs: J x + c. Inputs that reproduce them are the only ones with this pattern where J has full column
rank, and a wrong pattern would satisfy more equations than there are unknowns by chance. That there are more is asked
of every part of the unknowns: the rank must stand when a random share of the equations (`SPARED`) is left out. An
affine front has no pattern: full column rank is all. It is no chance where a step folds, as squares do, or an order
is lost: such fronts are told by `spear.fronts.steps`, and certify nothing.

The rank is tested by a random right side u: (JᵀJ) w = u is solved to `SOLVED`, which u's share in a null space would
not allow but with a probability of about SOLVED times the root of the number of unknowns; and |w| bounds the smallest
singular value from below but with probability `RARE`.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from spear.fronts.least_squares import Linearised, refined
from spear.fronts.problem import FrontProblem

SPARED = 1 / 16  # of the equations that are left out of the rank
SOLVED = 1e-4  # relative residual of a random right side
RARE = 0.01  # chance that a random vector has less than this times its root mean square along a given direction
ROUNDS, INNER = 24, 200  # of the solver
SAFETY = 10.0  # on the bound of errors


@dataclass(frozen=True)
class Determined:
    """Per sample: how far (JᵀJ) w = u was solved, and the least singular value of J per unit of relative features."""

    solved: Float[Tensor, " k"]
    least: Float[Tensor, " k"]

    def bound(self, inputs: Float[Tensor, "k *shape"], residuals: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """The relative error of inputs that leave such residuals; infinite where J has not full column rank."""
        size = torch.linalg.vector_norm(inputs.flatten(1), dim=1).clamp_min(1e-300)
        error = SAFETY * residuals / self.least / size
        return torch.where(self.solved <= SOLVED, error, math.inf).nan_to_num(math.inf, math.inf)


def determined(
    problem: FrontProblem, inputs: Float[Tensor, "k *shape"], joint: bool, generator: Generator, until: float
) -> Determined:
    """How well the equations of a batch determine inputs that solve them, each by itself or all (`joint`) together."""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    spared = 0.0 if problem.is_affine(float(inputs.abs().max())) else SPARED
    fine = Linearised(problem, inputs, joint).leave_out(spared, Generator().manual_seed(seed))
    rough = Linearised(problem.to(torch.float32), inputs.float(), joint)
    rough.leave_out(spared, Generator().manual_seed(seed))
    u = torch.randn(inputs.shape, generator=generator, dtype=torch.float64).to(inputs.device)
    w, off = refined(fine, rough, u, joint=joint, enough=SOLVED, rounds=ROUNDS, inner=INNER, until=until)
    axes = None if joint else tuple(range(1, u.ndim))
    least = (RARE / w.square().sum(axes).sqrt().reshape(-1)).sqrt()  # along a unit vector u has size 1
    count = len(inputs)
    return Determined(off.expand(count), least.expand(count))
