"""One layer alone behind an activation whose slope is never zero: how nearly its inputs can be told.

    python benchmarks/slopes.py [--seeds N] [--csv FILE]

G = U Q, and nothing else is known of G: whatever Q is, G / phi'(Z) is some dL/da. So nothing is exact; but slopes that
are nearly zero make columns nearly sparse. Two errors of the inputs, medians over the batch: `floor`, of the column
that is shortest where the true slopes are small (each entry over its slope), which an attack does not know; `found`, of
columns sought as if they were ReLU's, from the gradient alone (soft thresholding, then inverse iteration on the
smallest rows), each image against the nearest found; `near` counts images found to 5 %. Rows are appended as cases end.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from activations import Case, network

from spear import data, federated
from spear.descent.dictionary import soft_threshold
from spear.directions import distinct, unit_rows
from spear.network.problem import NetworkView, open_network

SPARSE, POLISHES = 0.42, 6  # share of the rows that are taken for small, and how often they are chosen anew
SAME, NEW = 0.98, 0.05  # cosine of two directions that are one; length beside others under which one is made of them
NEAR = 0.05  # relative error of an image that is easily known again
NAMES = ["leaky-0.01", "leaky-0.2", "gelu", "silu", "softplus", "tanh", "elu"]


@dataclass(frozen=True)
class Row:
    """What one batch measured."""

    activation: str
    dataset: str
    seed: int
    batch: int
    small_slopes: float
    floor: float
    found: float
    near: int


def smallest(U: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """For each row of weights the unit q for which the weighted U q is shortest."""
    rows = weight[:, :, None] * U
    return torch.linalg.eigh(rows.mT @ rows)[1][:, :, 0]


def columns(U: torch.Tensor) -> torch.Tensor:
    """As many directions as samples, the sparsest first, from the rows of U; fewer where no more are found."""
    q = soft_threshold(U, unit_rows(U))
    for _ in range(POLISHES):
        small = (q @ U.T).abs()
        q = smallest(U, (small <= small.quantile(SPARSE, dim=1, keepdim=True)).to(U))
    small = (q @ U.T).abs().sort(1)[0][:, : int(SPARSE * len(U))].square().sum(1)
    kept = q[:0]
    for one in q[distinct(q, SAME, order=small)]:
        beside = one - torch.linalg.lstsq(kept.T, one[:, None]).solution[:, 0] @ kept if len(kept) else one
        kept = torch.cat([kept, one[None]]) if len(kept) < U.shape[1] and beside.norm() > NEW else kept
    return kept


def errors(problem: NetworkView, q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of each true image the relative distance to the nearest that the directions lead to; 1 where they are too few."""
    if len(q) < len(x):
        return torch.ones(len(x))
    rows = torch.linalg.solve(q.T, problem.factors(0).R)
    return torch.cdist(x, rows[:, :-1] / rows[:, -1:]).amin(1) / x.norm(dim=1)


def measure(name: str, dataset: str, seed: int, batch: int) -> Row:
    """Behind the first of three hidden layers of 400 units."""
    x, y = data.load(dataset, count=batch, seed=seed)
    model = network(Case(name, dataset, batch, hidden=3), seed)
    problem = open_network(model, federated.gradient(model, x, y), batch_size=batch)
    x, U = x.flatten(1).double(), problem.factors(0).L
    slope = problem.activations[0].slope(problem.apply(0, x)).abs()
    largest = slope.max()
    floor = errors(problem, smallest(U, 1 / slope.clamp_min(1e-3 * largest)), x)
    found = errors(problem, columns(U), x)
    small = float((slope < 0.05 * largest).double().mean())
    return Row(
        name, dataset, seed, batch, small, float(floor.median()), float(found.median()), int((found < NEAR).sum())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in NAMES:
        for dataset in ("mnist", "cifar10"):
            for seed in range(options.seeds):
                rows.append(asdict(measure(name, dataset, seed, 16)))
            if options.csv is not None:
                pd.DataFrame(rows).to_csv(options.csv, index=False, float_format="%.2g")
    print(pd.DataFrame(rows).groupby(["activation", "dataset"], sort=False).median(numeric_only=True))


if __name__ == "__main__":
    main()
