"""Local training (FedAvg) retraced: images exact, certified and near, for each mini-batch, number of epochs and rate.

    python benchmarks/local_training.py [--data NAME ...] [--precision float64 float32] [--seeds N] [--json]

20 images, three linear layers of width 400. Error is the largest relative error of an image; `expected` the median of
what the server expects where nothing is certified. Data sets that are not there are skipped.
"""

import argparse
import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass

import torch

from spear import data, metrics, models
from spear.federated import clients
from spear.inversion import attack

COUNT, WIDTH, DEPTH = 20, 400, 3
CASES = tuple(itertools.product((20, 5), (1, 2, 5), (0.001, 0.01, 0.1)))


@dataclass(frozen=True)
class Row:
    """What one run measured."""

    data: str
    precision: str
    seed: int
    mini_batch: int
    epochs: int
    rate: float
    returned: int
    certified: int
    labels: float
    error: float
    expected: float
    seconds: float
    reason: str


def measure(name: str, precision: str, seed: int, mini_batch: int, epochs: int, rate: float) -> Row:
    """Run one case; `seconds` of this process's CPUs."""
    dtype = getattr(torch, precision)
    images, labels = data.load(name, count=COUNT, seed=seed)
    images = images.to(dtype)
    model = models.fcnn(images.shape[1:], WIDTH, DEPTH, len(data.classes(name)), seed=seed).to(dtype)
    options = {"mini_batch": mini_batch, "epochs": epochs, "learning_rate": rate}
    update = clients.local_training(model, images, labels, **options)
    begin = time.process_time()
    found = attack(model, update, method="network", seed=seed)
    seconds = time.process_time() - begin
    seen = metrics.evaluate(found, images, labels)
    expected = float("nan") if found.expected_error is None else float(found.expected_error.median())
    counts = len(found.inputs), int(found.certified.sum()), seen.label_accuracy, float(seen.relative_error.max())
    return Row(name, precision, seed, mini_batch, epochs, rate, *counts, expected, seconds, found.reason)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["cifar10", "mnist"])
    parser.add_argument("--precision", nargs="+", choices=["float64", "float32"], default=["float64", "float32"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for name, precision, seed in itertools.product(options.data, options.precision, range(options.seeds)):
        if not data.available(name):
            print(f"{name}: skipped, it is not here", file=sys.stderr)
            continue
        for case in CASES:
            rows.append(measure(name, precision, seed, *case))
            if not options.json:
                report(rows[-1])
    whole = sum(row.certified == COUNT for row in rows)
    near = sum(row.returned == COUNT and row.error < 0.01 for row in rows)
    if options.json:
        print(
            json.dumps({"rows": [asdict(row) for row in rows], "certified": whole, "within_1_percent": near}, indent=1)
        )
    else:
        print(f"all {COUNT} images certified in {whole} of {len(rows)} runs, within 1 % in {near}")


def report(row: Row) -> None:
    """Print one run on one line."""
    how = f"mini-batch {row.mini_batch}, {row.epochs} epochs, rate {row.rate:g}"
    found = f"{row.returned} returned, {row.certified} certified, labels {row.labels:.2f}"
    error = f"error {row.error:.0e}, expected {row.expected:.0e}"
    case = f"{row.data} {row.precision} seed {row.seed}: {how}"
    print(f"{case}: {found}, {error}, {row.seconds:.1f} s | {row.reason}", flush=True)


if __name__ == "__main__":
    main()
