"""Whole batches through every layer: seconds, ratio to one SVD of the first gradient, recall and memory of each case.

    python benchmarks/network.py [--cases NAME ...] [--long] [--seeds N] [--limit SECONDS] [--json] [--csv FILE]

Every case runs in a process of its own, with all of torch's threads, the SVD in the same one: compare ratios, not
seconds, between machines. Cases named sampling-N are the search of one layer on the batches of cifar10-N; the ratio of
the two is printed last. Without names, the cases that take minutes run with --long only. Data sets that are not there
are skipped. `--csv` writes one row a case, over its seeds: benchmarks/network.csv is that of two threads.
"""

import argparse
import json
import math
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch

from spear import data, federated, metrics, models
from spear.inversion import attack


@dataclass(frozen=True)
class Case:
    """One row of the table: data set, number of linear layers, width, batch size, and the seconds it is held to.

    A `long` case takes minutes.
    """

    name: str
    dataset: str
    depth: int
    width: int
    batch: int
    normalize: bool = True
    bar: float = math.inf
    long: bool = False


@dataclass(frozen=True)
class Row:
    """What one run measured."""

    case: str
    seed: int
    seconds: float
    svd_seconds: float
    recovered: int
    certified: int
    labels: float
    starts: int
    memory_gib: float
    reason: str


CASES = [
    Case("sampling-20", "cifar10", 6, 400, 20),
    Case("cifar10-20", "cifar10", 6, 400, 20),
    Case("sampling-28", "cifar10", 6, 400, 28, long=True),
    Case("cifar10-28", "cifar10", 6, 400, 28),
    Case("cifar10-180", "cifar10", 3, 400, 180, bar=2),
    Case("cifar10-200", "cifar10", 3, 400, 200, bar=3),
    Case("cifar10-230", "cifar10", 3, 400, 230, long=True),
    Case("mnist-256", "mnist", 3, 1000, 256, bar=1.5),
    Case("mnist-400", "mnist", 3, 1000, 400, bar=15),
    Case("mnist-500", "mnist", 3, 1000, 500, long=True),
    Case("mnist-one-hidden-128", "mnist", 2, 1000, 128, bar=0.7),
    Case("mnist-one-hidden-128-pixels", "mnist", 2, 1000, 128, normalize=False, bar=0.7),
    Case("cifar10-one-hidden-128", "cifar10", 2, 1000, 128, bar=0.7),
    Case("cifar10-one-hidden-128-pixels", "cifar10", 2, 1000, 128, normalize=False, bar=0.7),
    Case("mnist-one-hidden-400", "mnist", 2, 1000, 400, long=True),
    Case("cifar10-one-hidden-400", "cifar10", 2, 1000, 400, long=True),
    Case("tinyimagenet-128", "tinyimagenet", 3, 1000, 128),
    Case("photos224-64", "photos224", 3, 400, 64),
    Case("gauss-1024", "gauss", 3, 4096, 1024, bar=600, long=True),
]


def load(case: Case, seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Inputs, labels and the number of classes."""
    if case.dataset == "gauss":
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(case.batch, 1024, generator=generator, dtype=torch.float64)
        return x, torch.randint(10, (case.batch,), generator=generator), 10
    x, y = data.load(case.dataset, count=case.batch, seed=seed, normalize=case.normalize)
    return x, y, len(data.classes(case.dataset))


def measure(case: Case, seed: int, limit: float) -> Row:
    """Run one case in this process."""
    x, y, classes = load(case, seed)
    model = models.fcnn(x.shape[1:], case.width, case.depth, classes, seed=seed)
    update = federated.gradient(model, x, y)
    begin = time.perf_counter()
    torch.linalg.svd(update.gradients["fc1.weight"], full_matrices=False)
    svd = time.perf_counter() - begin
    method = "sampling" if case.name.startswith("sampling") else "network"
    begin = time.perf_counter()
    found = attack(model, update, method=method, time_limit=limit, seed=seed)
    seconds = time.perf_counter() - begin
    report = metrics.evaluate(found, x, y)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    counts = (int(report.recovered.sum()), int(found.certified.sum()), report.label_accuracy, found.stats.proposals)
    return Row(case.name, seed, seconds, svd, *counts, memory, found.reason)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], default=[])
    parser.add_argument("--long", action="store_true", help="also the cases that take minutes")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows, chosen = [], options.cases or [c.name for c in CASES if options.long or not c.long]
    for case in (c for c in CASES if c.name in chosen):
        for seed in range(options.seeds):
            with ProcessPoolExecutor(1) as pool:
                try:
                    rows.append(pool.submit(measure, case, seed, options.limit).result())
                except FileNotFoundError as error:
                    print(f"{case.name}: skipped, {error}", file=sys.stderr)
                    continue
            if not options.json:
                report(case, rows[-1])
            if options.csv is not None:
                summary(rows).to_csv(options.csv, index=False, float_format="%.3g")
    ratios = against_sampling(rows)
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "sampling_over_network": ratios}, indent=1))
        return
    for batch, ratio in ratios.items():
        print(f"b = {batch}: sampling takes {ratio:.1f} times the time of the network method")


def report(case: Case, row: Row) -> None:
    """Print one run on one line."""
    found = f"{row.recovered}/{case.batch} exact, {row.certified} certified, labels {row.labels:.2f}"
    bar = "" if case.bar == math.inf else f" (bar {case.bar:g})"
    cost = f"{row.seconds:.2f} s{bar}, {row.seconds / row.svd_seconds:.1f} SVDs, {row.memory_gib:.1f} GiB"
    print(f"{row.case} seed {row.seed}: {found}, {cost} | {row.reason}", flush=True)


def summary(rows: list[Row]) -> pd.DataFrame:
    """One line a case: how many of its seeds came back whole, labels included, and what they cost."""
    cases = {case.name: case for case in CASES}
    frame = pd.DataFrame([asdict(row) for row in rows])
    full = frame[["recovered", "certified"]].min(axis=1) == frame["case"].map(lambda name: cases[name].batch)
    frame["whole"], frame["over"] = full & (frame["labels"] == 1), frame["seconds"] / frame["svd_seconds"]
    grouped = frame.groupby("case", sort=False)
    table = {
        "layers": [cases[name].depth for name in frame["case"].unique()],
        "width": [cases[name].width for name in frame["case"].unique()],
        "batch": [cases[name].batch for name in frame["case"].unique()],
        "seeds": grouped.size(),
        "whole and certified": grouped["whole"].sum(),
        "median seconds": grouped["seconds"].median(),
        "times one SVD": grouped["over"].median(),
        "peak GiB": grouped["memory_gib"].max(),
    }
    return pd.DataFrame(table).reset_index()


def against_sampling(rows: list[Row]) -> dict[str, float]:
    """By batch size, the median time of sampling over that of the network method on the same batches."""
    times: dict[str, list[float]] = {}
    for row in rows:
        times.setdefault(row.case, []).append(row.seconds)
    sizes = [name.removeprefix("sampling-") for name in times if name.startswith("sampling-")]
    middle = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    return {b: middle[f"sampling-{b}"] / middle[f"cifar10-{b}"] for b in sizes if f"cifar10-{b}" in middle}


if __name__ == "__main__":
    main()
