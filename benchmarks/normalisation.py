"""Networks in training mode: seconds, recall up to the common mean, labels and certificates of each case.

    python benchmarks/normalisation.py [--cases NAME ...] [--seeds S ...] [--limit SECONDS] [--csv FILE]

Every case runs in a process of its own; processor seconds stand beside the wall clock's, for machines that are shared.
Data sets that are not there are skipped. `error` is the largest relative distance of a recovered image, less the mean
of the batch where the update does not tell that, from the true one. `--csv` writes one row a case, over its seeds:
benchmarks/normalisation.csv is that of one thread.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spear import data, federated
from spear.inversion import attack

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "group": lambda m: nn.GroupNorm(1, m),
    "none": lambda m: nn.Identity(),
}
RATE, TRAINED_ON, MINI_BATCH = 0.05, 600, 64  # of the training before the attack: SGD on other samples
EXACT = {torch.float64: 1e-6, torch.float32: 1e-3}


@dataclass(frozen=True)
class Case:
    """One row of the table: normalisation, data set, hidden layers, width, batch size; whether the client sends its
    buffers, the share of dropout, steps of training before, precision, and the seconds that the row is held to."""

    norm: str
    dataset: str
    hidden: int
    width: int
    batch: int
    buffers: bool = True
    drop: float = 0.0
    steps: int = 0
    dtype: torch.dtype = torch.float64
    bar: float = math.inf

    @property
    def name(self) -> str:
        parts = [self.norm, self.dataset, f"{self.hidden}x{self.width}", str(self.batch)]
        parts += ["epsilon"] * (self.norm == "batch" and not self.buffers) + [f"dropout-{self.drop:g}"] * (
            self.drop > 0
        )
        parts += [f"trained-{self.steps}"] * (self.steps > 0) + ["float32"] * (self.dtype == torch.float32)
        return "-".join(parts)


@dataclass(frozen=True)
class Row:
    """What one run measured."""

    case: str
    seed: int
    seconds: float
    cpu_seconds: float
    recovered: int
    labels: int
    vouched: int
    error: float
    starts: int
    reason: str


CASES = [
    Case("batch", "mnist", 1, 200, 16, bar=0.3),
    Case("batch", "mnist", 1, 200, 60, bar=1),
    Case("batch", "mnist", 1, 200, 16, buffers=False),
    Case("batch", "mnist", 1, 200, 60, buffers=False),
    Case("batch", "cifar10", 1, 400, 32, bar=1),
    Case("batch", "cifar10", 1, 400, 100, bar=3),
    Case("batch", "cifar10", 1, 400, 130),
    Case("batch", "mnist", 2, 400, 80, bar=2),
    Case("batch", "mnist", 3, 400, 64),
    Case("batch", "cifar10", 3, 400, 64, buffers=False),
    Case("batch", "cifar10", 1, 400, 32, dtype=torch.float32),
    Case("batch", "cifar10", 1, 400, 32, buffers=False, dtype=torch.float32),
    Case("batch", "mnist", 1, 200, 16, steps=200),
    Case("batch", "mnist", 1, 400, 32, steps=200),
    Case("layer", "cifar10", 1, 400, 32, bar=10),
    Case("layer", "mnist", 1, 400, 90),
    Case("layer", "cifar10", 2, 400, 64),
    Case("layer", "mnist", 1, 400, 32, steps=200),
    Case("rms", "cifar10", 1, 400, 32),
    Case("group", "cifar10", 1, 400, 32),
    Case("none", "cifar10", 1, 400, 64, drop=0.2),
    Case("none", "cifar10", 1, 400, 64, drop=0.5),
    Case("none", "mnist", 2, 400, 32, drop=0.5),
    Case("batch", "cifar10", 1, 400, 64, drop=0.5),
    Case("layer", "cifar10", 1, 400, 32, drop=0.2),
]


def network(case: Case, n: int, classes: int, seed: int) -> nn.Sequential:
    """Linear, normalisation, ReLU, dropout and so on, in torch's default initialisation."""
    sizes, parts = [n, *[case.width] * case.hidden], [nn.Flatten()]
    torch.manual_seed(seed)
    for a, b in pairwise(sizes):
        parts += [nn.Linear(a, b), NORMS[case.norm](b), nn.ReLU(), *[nn.Dropout(case.drop)] * (case.drop > 0)]
    return nn.Sequential(*parts, nn.Linear(case.width, classes)).double()


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(steps):
        index = torch.randint(len(x), (MINI_BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()


def measure(case: Case, seed: int, limit: float) -> Row:
    """Run one case in this process."""
    x, y = data.load(case.dataset, count=case.batch + TRAINED_ON * (case.steps > 0), seed=seed)
    model = network(case, x[0].numel(), len(data.classes(case.dataset)), seed)
    train(model, x[case.batch :], y[case.batch :], case.steps)
    model, x, y = model.to(case.dtype), x[: case.batch].to(case.dtype), y[: case.batch]
    update = federated.gradient(model, x, y)
    update = update if case.buffers else replace(update, buffers=None)
    begin, processor = time.perf_counter(), time.process_time()
    found = attack(model, update, method="network", time_limit=limit, seed=seed)
    seconds, processor = time.perf_counter() - begin, time.process_time() - processor
    truth, guess = x.flatten(1).double(), found.inputs.flatten(1).double()
    if not len(guess):
        return Row(case.name, seed, seconds, processor, 0, 0, 0, math.inf, found.stats.proposals, found.reason)
    if found.difference_bound is not None and not bool(found.certified.all()):
        truth, guess = truth - truth.mean(0), guess - guess.mean(0)
    apart = torch.cdist(truth, guess, compute_mode="donot_use_mm_for_euclid_dist") / truth.norm(dim=1, keepdim=True)
    error, match = apart.min(1)
    exact = error < EXACT[case.dtype]
    right = int((found.labels[match] == y)[exact].sum())
    counts = int(exact.sum()), right, int(found.differences.sum()), float(error.max())
    return Row(case.name, seed, seconds, processor, *counts, found.stats.proposals, found.reason)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], default=[c.name for c in CASES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows = []
    for case in (c for c in CASES if c.name in options.cases):
        with ProcessPoolExecutor(1) as pool:
            for seed in options.seeds:
                try:
                    rows.append(pool.submit(measure, case, seed, options.limit).result())
                except FileNotFoundError as error:
                    print(f"{case.name}: skipped, {error}", file=sys.stderr)
                    break
                report(case, rows[-1])
        if options.csv is not None and rows:
            summary(rows).to_csv(options.csv, index=False, float_format="%.3g")


def report(case: Case, row: Row) -> None:
    """Print one run on one line."""
    found = f"{row.recovered}/{case.batch} exact ({row.error:.0e}), labels {row.labels}, vouched for {row.vouched}"
    bar = "" if case.bar == math.inf else f" (bar {case.bar:g})"
    cost = f"{row.cpu_seconds:.2f} s of a processor{bar}, {row.seconds:.2f} s, {row.starts} starts"
    print(f"{row.case} seed {row.seed}: {found}, {cost} | {row.reason}", flush=True)


def summary(rows: list[Row]) -> pd.DataFrame:
    """One line a case: how many of its seeds came back whole, labels included and vouched for, and what they cost."""
    cases = {case.name: case for case in CASES}
    frame = pd.DataFrame([asdict(row) for row in rows])
    least = frame[["recovered", "labels", "vouched"]].min(axis=1)
    frame["whole"] = least == frame["case"].map(lambda name: cases[name].batch)
    grouped = frame.groupby("case", sort=False)
    table = {
        "seeds": grouped.size(),
        "whole and certified": grouped["whole"].sum(),
        "median processor seconds": grouped["cpu_seconds"].median(),
        "most": grouped["cpu_seconds"].max(),
        "bar": [cases[name].bar for name in frame["case"].unique()],
        "largest error": grouped["error"].max(),
    }
    return pd.DataFrame(table).reset_index()


if __name__ == "__main__":
    main()
