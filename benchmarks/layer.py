"""One layer's batch by descent: seconds, ratio to one SVD of the gradient and to sampling at b = 20, recall and memory.

    python benchmarks/layer.py [--cases NAME ...] [--seeds S ...] [--limit SECONDS] [--json] [--csv FILE]

Every case runs in a process of its own, with all of torch's threads, the SVD in the same one: compare ratios, not
seconds, between machines. A small attack before it takes what is imported at first use. The first case is sampling at
b = 20, which the others are compared with. Processor seconds stand beside the wall clock's, for machines that are
shared. Data sets that are not there are skipped. `--csv` writes one row a case, over its seeds: benchmarks/layer.csv is
that of one thread.
"""

import argparse
import json
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from spear import data, federated, metrics, models
from spear.inversion import attack


@dataclass(frozen=True)
class Case:
    """One row of the table: method, data set, number of linear layers, width, batch size, steps of training before."""

    method: str
    dataset: str
    depth: int
    width: int
    batch: int
    steps: int = 0

    @property
    def name(self) -> str:
        trained = f"-trained-{self.steps}" if self.steps else ""
        return f"{self.method}-{self.dataset}-{self.depth}-{self.width}-{self.batch}{trained}"


@dataclass(frozen=True)
class Row:
    """What one run measured; times in seconds, memory in GiB."""

    case: str
    seed: int
    seconds: float
    cpu_seconds: float
    svd_seconds: float
    recovered: int
    certified: int
    error: float
    starts: int
    memory_gib: float
    reason: str


CASES = [
    Case("sampling", "cifar10", 6, 400, 20),
    Case("dictionary", "cifar10", 6, 400, 20),
    Case("layer", "cifar10", 6, 400, 20),
    Case("dictionary", "cifar10", 6, 1000, 100),
    *(Case("layer", name, 6, 1000, b) for b in (64, 128, 200, 300) for name in ("mnist", "cifar10")),
    *(Case("layer", name, 6, 400, 100) for name in ("mnist", "cifar10")),
    Case("layer", "mnist", 2, 1000, 64),
    Case("layer", "mnist", 2, 1000, 64, steps=500),
]


def train(model: nn.Module, case: Case, seed: int) -> None:
    """Some steps of SGD on other samples than those that are attacked."""
    x, y = data.load(case.dataset, count=1000, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(case.steps):
        chosen = case.batch + torch.randint(1000 - case.batch, (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()


def warm_up(method: str) -> None:
    """A small attack, so that what is imported at first use is not timed."""
    small = models.fcnn((30,), 20, 2, 3, seed=0)
    inputs = torch.randn(3, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    attack(small, federated.gradient(small, inputs, torch.arange(3)), method=method, time_limit=10, seed=0)


def measure(case: Case, seed: int, limit: float) -> Row:
    """Run one case in this process."""
    x, y = data.load(case.dataset, count=1000 if case.steps else case.batch, seed=seed)
    x, y = x[: case.batch], y[: case.batch]
    model = models.fcnn(x.shape[1:], case.width, case.depth, len(data.classes(case.dataset)), seed=seed)
    train(model, case, seed)
    warm_up(case.method)
    update = federated.gradient(model, x, y)
    begin = time.perf_counter()
    torch.linalg.svd(update.gradients["fc1.weight"], full_matrices=False)
    svd = time.perf_counter() - begin
    begin, cpu = time.perf_counter(), time.process_time()
    found = attack(model, update, method=case.method, time_limit=limit, seed=seed)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    report = metrics.evaluate(found, x, y)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    right = (int(report.recovered.sum()), int(found.certified.sum()), float(report.relative_error.max()))
    return Row(case.name, seed, seconds, cpu, svd, *right, found.stats.proposals, memory, found.reason)


def show(row: Row, batch: int, sampling: float | None) -> None:
    """One line of the table."""
    found = f"{row.recovered}/{batch} exact, {row.certified} certified, {row.starts} starts"
    beside = "" if sampling is None else f", {row.seconds / sampling:.1f} times sampling at b = 20"
    cost = f"{row.seconds:.2f} s ({row.cpu_seconds:.2f} of the processor), {row.seconds / row.svd_seconds:.1f} SVDs"
    print(f"{row.case} seed {row.seed}: {found}, {cost}{beside}, {row.memory_gib:.1f} GiB | {row.reason}", flush=True)


def summary(rows: list[Row]) -> pd.DataFrame:
    """One line a case: how many of its seeds came back whole (every input to 1e-6), and the processor's seconds."""
    batch = {case.name: case.batch for case in CASES}
    frame = pd.DataFrame([asdict(row) for row in rows])
    frame["whole"] = (frame["recovered"] == frame["case"].map(batch)) & (frame["certified"] == frame["recovered"])
    grouped = frame.groupby("case", sort=False)
    columns = {
        "seeds": grouped.size(),
        "whole and certified": grouped["whole"].sum(),
        "least recovered": grouped["recovered"].min(),
        "largest relative error": grouped["error"].max(),
        "median processor seconds": grouped["cpu_seconds"].median(),
        "most processor seconds": grouped["cpu_seconds"].max(),
    }
    return pd.DataFrame(columns).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows, sampling = [], None
    for case, seed in [(c, s) for c in CASES if c.name in options.cases for s in options.seeds]:
        with ProcessPoolExecutor(1) as pool:
            try:
                row = pool.submit(measure, case, seed, options.limit).result()
            except FileNotFoundError as error:
                print(f"{case.name}: skipped, {error}")
                continue
        rows.append(row)
        sampling = row.seconds if case.method == "sampling" else sampling
        if not options.json:
            show(row, case.batch, sampling)
        if options.csv is not None:
            summary(rows).to_csv(options.csv, index=False, float_format="%.3g")
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
