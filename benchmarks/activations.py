"""Activations other than ReLU: whole batches of real images, in seconds of one thread, fresh and after training.

    python benchmarks/activations.py [--cases NAME ...] [--seeds N] [--limit SECONDS] [--csv FILE]

Networks in torch's default initialisation, or after 200 steps of SGD on other samples of the data set (`trained`).
Seconds are of processor time, one thread. `--csv` writes one row a run as it ends, and skips the runs that the file
has; FILE-cases.csv beside it has one row a case. Batches past half the width (220) need `--limit 1800`. Data sets that
are not there are skipped.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from spear import data, federated, metrics, models
from spear.inversion import attack

POOL, STEPS, RATE, AT_ONCE = 800, 200, 0.05, 64  # samples trained on, and how


@dataclass(frozen=True)
class Case:
    """One row: activation, data set, batch, hidden layers, seconds it is held to; `trained`: after 200 steps."""

    activation: str
    dataset: str
    batch: int
    hidden: int = 1
    bar: float = math.inf
    trained: bool = False
    width: int = 400

    @property
    def name(self) -> str:
        layers = "" if self.hidden == 1 else f"-{self.hidden}-hidden"
        return f"{self.activation}-{self.dataset}-{self.batch}{layers}{'-trained' * self.trained}"


@dataclass(frozen=True)
class Row:
    """What one run measured."""

    case: str
    seed: int
    batch: int
    recovered: int
    certified: int
    labels: float
    seconds: float
    bar: float
    starts: int
    largest_error: float
    reason: str


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "hardswish": nn.Hardswish,
    "leaky-0.01": nn.LeakyReLU,
    "leaky-0.2": lambda: nn.LeakyReLU(0.2),
    "prelu": nn.PReLU,
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
}
FRESH = [
    *(Case(name, "mnist", b, bar=bar) for name in ("gelu", "silu") for b, bar in ((128, 3), (180, 8))),
    *(Case(name, "mnist", 220) for name in ("gelu", "silu")),
    *(Case(name, "cifar10", 128, bar=6) for name in ("gelu", "silu")),
    *(Case(name, "cifar10", b, bar=bar) for name in ("leaky-0.01", "leaky-0.2") for b, bar in ((100, 1.5), (180, 8))),
    *(Case("softplus", "mnist", b, bar=bar) for b, bar in ((128, 3), (180, 10))),
    *(Case(name, "mnist", b, bar=bar) for name in ("tanh", "sigmoid") for b, bar in ((64, 5), (128, 5))),
    *(Case(name, "mnist", 64, bar=2) for name in ("elu", "hardswish")),
    *(Case(name, "mnist", 64) for name in ("selu", "relu6", "prelu", "mish", "gelu-tanh")),
    Case("gelu", "cifar10", 64, hidden=2, bar=1),
    Case("gelu", "cifar10", 64, hidden=3, bar=5),
]
TRAINED = [Case(name, "mnist", 64, trained=True) for name in ACTIVATIONS if name != "hardtanh"]
CASES = [*FRESH, *TRAINED, Case("gelu", "cifar10", 64, hidden=2, trained=True)]


def network(case: Case, seed: int) -> nn.Module:
    """A network, fresh or trained; the batch attacked comes from other samples."""
    shape, classes = data.shape(case.dataset), len(data.classes(case.dataset))
    plain = models.fcnn(shape, case.width, case.hidden + 1, classes, seed=seed)
    layers = [ACTIVATIONS[case.activation]() if isinstance(layer, nn.ReLU) else layer for layer in plain]
    model = nn.Sequential(*layers).double()
    if case.trained:
        x, y = data.load(case.dataset, count=POOL + case.batch, seed=seed)
        train(model, x[case.batch :], y[case.batch :], seed)
    return model


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, seed: int) -> None:
    """Steps of SGD."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        part = torch.randint(len(x), (AT_ONCE,), generator=generator)
        optimiser.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimiser.step()


def measure(case: Case, seed: int, limit: float) -> Row:
    """Run one case."""
    count = case.batch + POOL * case.trained
    x, y = (part[: case.batch] for part in data.load(case.dataset, count=count, seed=seed))
    model = network(case, seed)
    update = federated.gradient(model, x, y)
    begin = time.process_time()
    found = attack(model, update, method="network", batch_size=case.batch, time_limit=limit, seed=seed)
    seconds = time.process_time() - begin
    report = metrics.evaluate(found, x, y)
    counts = int(report.recovered.sum()), int(found.certified.sum()), report.label_accuracy
    apart = torch.cdist(found.inputs.flatten(1), x.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    error = float((apart.amin(0) / x.flatten(1).norm(dim=1)).max()) if len(found.inputs) else math.inf
    bar, starts = case.bar, found.stats.proposals
    return Row(case.name, seed, case.batch, *counts, seconds, bar, starts, error, found.reason)


def by_case(rows: list[dict]) -> pd.DataFrame:
    """One row a case, over its seeds."""
    table = pd.DataFrame(rows)
    table["whole"] = (table.recovered == table.batch) & (table.labels == 1)
    table["certain"] = table.whole & (table.certified == table.batch)
    grouped = table.groupby("case", sort=False)
    columns = {
        "seeds": grouped.size(),
        "whole": grouped.whole.sum(),
        "whole and certified": grouped.certain.sum(),
        "median processor seconds": grouped.seconds.median(),
        "bar": grouped.bar.first().replace(math.inf, math.nan),
        "largest error": grouped.largest_error.max(),
    }
    return pd.DataFrame(columns).reset_index()


def write(rows: list[dict], path: Path) -> None:
    """The runs, and beside them the cases."""
    pd.DataFrame(rows).to_csv(path, index=False, float_format="%.3g")
    by_case(rows).to_csv(path.with_stem(f"{path.stem}-cases"), index=False, float_format="%.3g")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], default=[c.name for c in CASES])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=120.0)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = options.csv is not None and options.csv.exists()
    rows = pd.read_csv(options.csv).to_dict("records") if kept else []
    done = {(row["case"], row["seed"]) for row in rows}
    for seed in range(options.seeds):
        for case in (c for c in CASES if c.name in options.cases and (c.name, seed) not in done):
            try:
                row = measure(case, seed, options.limit)
            except FileNotFoundError as error:
                print(f"{case.name}: skipped, {error}", file=sys.stderr)
                continue
            rows.append(asdict(row))
            found = f"{row.recovered}/{row.batch} exact, {row.certified} certified, labels {row.labels:.2f}"
            bar = "" if row.bar == math.inf else f" (bar {row.bar:g})"
            print(f"{row.case} seed {seed}: {found}, {row.seconds:.2f} s{bar} | {row.reason}", flush=True)
            if options.csv is not None:
                write(rows, options.csv)


if __name__ == "__main__":
    main()
