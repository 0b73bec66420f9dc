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

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "hardtanh": nn.Hardtanh}
ACTIVATIONS |= {"leaky": lambda: nn.LeakyReLU(0.1)}
DROPPED = 0.2  # of the data, where dropout stands before the first layer
ENTRIES = {"": [], "batch": [nn.BatchNorm1d], "dropout": [lambda _: nn.Dropout(DROPPED)]}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm1d,
    "bare-batch": lambda m: nn.BatchNorm1d(m, affine=False),
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
    buffers, the share of dropout, steps of training before, precision, and the seconds that the row is held to; the
    activation, whether the normalisation is behind it, which layers have one, and what stands before the first."""

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
    activation: str = "relu"
    behind: bool = False
    layers: str = "all"
    entry: str = ""

    @property
    def name(self) -> str:
        parts = [self.norm, self.dataset, f"{self.hidden}x{self.width}", str(self.batch)]
        parts += [f"before-{self.entry}"] * bool(self.entry) + [f"{self.layers}-layer"] * (self.layers != "all")
        parts += [self.activation] * (self.activation != "relu") + ["behind"] * self.behind
        told = "batch" not in (self.norm, self.entry) or self.buffers
        parts += ["epsilon"] * (not told) + [f"dropout-{self.drop:g}"] * (self.drop > 0)
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
    Case("bare-batch", "mnist", 1, 200, 16),
    Case("bare-batch", "cifar10", 1, 400, 32),
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
    Case("none", "mnist", 1, 400, 48, drop=0.5, activation="gelu"),
    Case("none", "cifar10", 1, 400, 64, drop=0.2, activation="silu"),
    Case("none", "mnist", 2, 400, 32, drop=0.2, activation="gelu"),
    Case("none", "cifar10", 1, 400, 64, drop=0.2, activation="leaky"),
    Case("none", "mnist", 2, 400, 32, drop=0.5, activation="hardtanh"),
    Case("batch", "mnist", 1, 200, 24, drop=0.3, activation="gelu"),
    Case("batch", "mnist", 1, 400, 32, buffers=False, dtype=torch.float32),
    Case("batch", "mnist", 1, 400, 64, activation="gelu"),
    Case("batch", "cifar10", 1, 400, 100, activation="gelu"),
    Case("batch", "cifar10", 1, 400, 64, activation="leaky"),
    Case("batch", "cifar10", 2, 400, 64, activation="gelu"),
    Case("batch", "mnist", 1, 400, 32, activation="gelu", steps=200),
    Case("layer", "mnist", 1, 400, 64, activation="gelu"),
    Case("layer", "cifar10", 1, 400, 128, activation="gelu"),
    Case("layer", "cifar10", 2, 400, 64, activation="gelu"),
    Case("layer", "mnist", 1, 400, 32, activation="gelu", steps=200),
    Case("rms", "cifar10", 1, 400, 64, activation="silu"),
    Case("batch", "mnist", 1, 400, 32, behind=True),
    Case("batch", "cifar10", 1, 400, 64, behind=True),
    Case("batch", "cifar10", 2, 400, 32, behind=True),
    Case("batch", "cifar10", 1, 400, 64, activation="gelu", behind=True),
    Case("batch", "mnist", 1, 200, 16, buffers=False, behind=True),
    Case("batch", "mnist", 1, 200, 60, buffers=False, behind=True),
    Case("batch", "mnist", 1, 400, 32, buffers=False, behind=True),
    Case("batch", "cifar10", 1, 400, 32, buffers=False, behind=True),
    Case("batch", "cifar10", 1, 400, 100, buffers=False, behind=True),
    Case("batch", "cifar10", 2, 400, 32, buffers=False, behind=True),
    Case("batch", "mnist", 3, 400, 32, buffers=False, behind=True),
    Case("batch", "mnist", 1, 400, 32, buffers=False, behind=True, steps=200),
    Case("batch", "cifar10", 2, 400, 32, buffers=False, behind=True, dtype=torch.float32),
    Case("batch", "cifar10", 2, 400, 64, layers="first"),
    Case("batch", "mnist", 2, 400, 64, layers="last"),
    Case("none", "cifar10", 1, 400, 64, entry="batch"),
    Case("none", "cifar10", 1, 400, 64, entry="batch", buffers=False),
    Case("none", "cifar10", 1, 400, 64, entry="dropout"),
]


def network(case: Case, n: int, classes: int, seed: int) -> nn.Sequential:
    """Linear, normalisation, activation, dropout and so on, in torch's default initialisation."""
    torch.manual_seed(seed)
    sizes, parts = [n, *[case.width] * case.hidden], [nn.Flatten(), *[made(n) for made in ENTRIES[case.entry]]]
    for k, (a, b) in enumerate(pairwise(sizes)):
        chosen = {"all": True, "first": k == 0, "last": k == case.hidden - 1}[case.layers]
        between = [*[NORMS[case.norm](b)] * chosen, ACTIVATIONS[case.activation]()]
        between = between[::-1] if case.behind else between
        parts += [nn.Linear(a, b), *between, *[nn.Dropout(case.drop)] * (case.drop > 0)]
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
    entered: list[Tensor] = []
    model[1].register_forward_hook(lambda *passed: entered.append(passed[2].detach()))
    update = federated.gradient(model, x, y)
    x = (1 - DROPPED) * entered[0] if case.entry == "dropout" else x  # what that left of the images
    model[1]._forward_hooks.clear()
    update = update if case.buffers else replace(update, buffers=None)
    begin, processor = time.perf_counter(), time.process_time()
    found = attack(model, update, method="network", time_limit=limit, seed=seed)
    seconds, processor = time.perf_counter() - begin, time.process_time() - processor
    truth, guess = x.flatten(1).double(), found.inputs.flatten(1).double()
    if not len(guess):
        return Row(case.name, seed, seconds, processor, 0, 0, 0, math.inf, found.stats.proposals, found.reason)
    if "no gradient depends on the mean" in found.reason and not bool(found.certified.all()):
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
    """One line a case: how many of its seeds came back whole, labels included, how many of these are vouched for, and
    what they cost."""
    cases = {case.name: case for case in CASES}
    frame = pd.DataFrame([asdict(row) for row in rows])
    size = frame["case"].map(lambda name: cases[name].batch)
    frame["back"] = frame[["recovered", "labels"]].min(axis=1) == size
    frame["whole"] = frame["back"] & (frame["vouched"] == size)
    grouped = frame.groupby("case", sort=False)
    table = {
        "seeds": grouped.size(),
        "whole": grouped["back"].sum(),
        "whole and certified": grouped["whole"].sum(),
        "median processor seconds": grouped["cpu_seconds"].median(),
        "most": grouped["cpu_seconds"].max(),
        "bar": [cases[name].bar for name in frame["case"].unique()],
        "largest error": grouped["error"].max(),
    }
    return pd.DataFrame(table).reset_index()


if __name__ == "__main__":
    main()
