"""This checkout against another revision: the same attacks in turns, ratio of processor seconds, medians, peak memory.

    python benchmarks/against.py REVISION [--cases NAME ...] [--long] [--seeds N] [--limit SECONDS] [--csv FILE]

Each attack runs in a process of its own, one after the other, the two checkouts taking turns, so that whatever else the
machine does falls on both alike, and after a small attack that is not timed. An audit, which attacks in several
processes, is compared by wall seconds; GiB are those of the largest process. Both run this file's cases through the
public interface of their own code. A batch counts as whole where every image came back to 1e-6, but for those whose
gradient is under a millionth of the largest (a softmax that is sure of the right class); where labels are recovered,
each of these must be right.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent.parent
EXACT, EXACT_OF_SINGLE = 1e-6, 1e-3
VISIBLE = 1e-6  # of the largest dLoss/dlogits: a sample under that is below the rounding of the others


@dataclass(frozen=True)
class Case:
    """One attack: data set, linear layers, width, batch size, method. A `long` case takes minutes.

    `spread` is the standard deviation of the weights, drawn anew with zero biases; `normalize` centres the pixels.
    `inputs` is the number of entries of a sample of uniform noise, in place of a data set; all is then in single
    precision. The method `audit` is the whole of `spear audit` without an update.
    """

    dataset: str
    depth: int
    width: int
    batch: int
    method: str = "network"
    long: bool = False
    spread: float | None = None
    normalize: bool = True
    inputs: int | None = None

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        large = "" if self.spread is None else "-large-weights"
        size = "" if self.inputs is None else f"{self.inputs}"
        return f"{self.method}-{self.dataset}{size}-{self.depth}x{self.width}-{self.batch}{large}"

    @property
    def exact(self) -> float:
        """The relative error up to which an image counts as back."""
        return EXACT if self.inputs is None else EXACT_OF_SINGLE


CASES = [
    Case("cifar10", 3, 400, 20),
    Case("cifar10", 3, 400, 180),
    Case("cifar10", 3, 400, 230, long=True),
    *(Case("tinyimagenet", 3, 400, batch) for batch in (80, 200)),
    Case("mnist", 3, 1000, 256),
    Case("mnist", 3, 1000, 500, long=True),
    Case("mnist", 2, 1000, 400, long=True),
    *(Case("mnist", 3, 2048, batch, long=True) for batch in (1000, 1200)),
    Case("cifar10", 3, 2048, 1000, long=True),
    Case("mnist", 3, 8192, 2000, long=True),
    *(
        Case(dataset, 2, 1000, batch, spread=0.5, normalize=False, long=True)
        for dataset in ("cifar10", "mnist")
        for batch in (64, 128, 256)
    ),
    *(Case(dataset, 6, 1000, 64, method="layer") for dataset in ("mnist", "cifar10")),
    *(Case(dataset, 6, 1000, b, method="layer", long=True) for b in (300, 350) for dataset in ("mnist", "cifar10")),
    Case("mnist", 6, 2000, 500, method="layer", long=True),
    Case("cifar10", 6, 400, 20, method="sampling"),
    *(Case("cifar10", 6, 400, batch, method="sampling", long=True) for batch in (28, 32)),
    *(Case("noise", 3, 2048, 32, inputs=n, long=n > 2**15) for n in (2**15, 2**18)),
    Case("photos", 6, 400, 16, method="audit", long=True),
]


def attack_once(case: Case, seed: int, limit: float) -> dict[str, object]:
    """One attack with the code that this process imports: processor and wall seconds, and what came back."""
    import torch

    import spear

    generator, dtype = torch.Generator().manual_seed(seed), torch.float64 if case.inputs is None else torch.float32
    if case.inputs is None:
        inputs, labels = spear.data.load(case.dataset, count=case.batch, seed=seed, normalize=case.normalize)
        classes = len(spear.data.classes(case.dataset))
    else:
        inputs, classes = 2 * torch.rand(case.batch, case.inputs, generator=generator) - 1, 10
        labels = torch.randint(classes, (case.batch,), generator=generator)
    model = spear.models.fcnn(inputs.shape[1:], case.width, case.depth, classes, seed=seed, dtype=dtype)
    if case.method == "audit":
        return audit_once(model, case, seed)
    if case.spread is not None:
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * case.spread
            parameter.data = values if parameter.dim() > 1 else torch.zeros_like(values)
    update = spear.federated.gradient(model, inputs, labels)
    warm_up(case, generator)
    wall, cpu = time.perf_counter(), processor_time()
    found = spear.attack(model, update, method=case.method, time_limit=limit, seed=seed)
    seconds = {"cpu": processor_time() - cpu, "wall": time.perf_counter() - wall}
    report = spear.metrics.evaluate(found, inputs, labels)
    exact = report.relative_error < case.exact
    with torch.no_grad():
        errors = model(inputs).softmax(1) - torch.nn.functional.one_hot(labels, classes)
    seen = errors.norm(dim=1) > VISIBLE * errors.norm(dim=1).max()
    right = found.labels is None or round(report.label_accuracy * case.batch) >= int(seen.sum())
    whole = bool(exact[seen].all()) and right
    return seconds | {"exact": int(exact.sum()), "whole": whole, "certified": int(found.certified.sum())}


def processor_time() -> float:
    """Seconds of all cores, of this process and those that it has begun and waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def warm_up(case: Case, generator: object) -> None:
    """A small attack by the same method: what Python and torch load at the first one is not part of its time."""
    import torch

    import spear

    model = spear.models.fcnn((16,), 32, case.depth, 10, seed=0, dtype=torch.float64)
    inputs = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    spear.attack(model, spear.federated.gradient(model, inputs, torch.arange(2)), method=case.method, time_limit=1.0)


def audit_once(model: object, case: Case, seed: int) -> dict[str, object]:
    """One audit of a model on a simulated batch."""
    from spear.audit import assessment

    wall, cpu = time.perf_counter(), processor_time()
    found = assessment.audit(model, data=case.dataset, count=case.batch, seed=seed)
    seconds = {"cpu": processor_time() - cpu, "wall": time.perf_counter() - wall}
    exact, certified = found.outcome.exact, found.outcome.certified
    return seconds | {"exact": exact, "whole": exact == case.batch, "certified": certified}


def in_process(case: Case, seed: int, limit: float, package: Path) -> dict[str, object]:
    """The attack in a new interpreter on the code of a checkout, with its peak memory in GiB."""
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--one", case.name, str(seed), str(limit)]
    environment = os.environ | {"PYTHONPATH": str(package)}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{case.name}, seed {seed}: status {process.returncode} in {package}")
        out.seek(0)
        return json.load(out) | {"GiB": usage.ru_maxrss / 2**20}


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A checkout of the revision for as long as it is needed."""
    git = ["git", "-C", str(HERE), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "before"
        subprocess.run([*git, "add", "--quiet", "--detach", str(place), revision], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=True)


def summary(case: Case, runs: dict[str, list[dict]]) -> dict[str, object]:
    """A row of the table: for each checkout medians over the seeds, whole batches, peak memory; and the ratio."""
    row: dict[str, object] = {"case": case.name, "seeds": len(runs["now"])}
    for which, rows in runs.items():
        for kind in ("cpu", "wall"):
            row[f"{which} {kind} s"] = f"{statistics.median(run[kind] for run in rows):.3g}"
        row[f"{which} whole"] = sum(run["whole"] for run in rows)
        row[f"{which} certified"] = sum(run["certified"] == case.batch for run in rows)
        row[f"{which} GiB"] = f"{max(run['GiB'] for run in rows):.3g}"
    pairs, kind = zip(runs["before"], runs["now"], strict=True), "wall" if case.method == "audit" else "cpu"
    row["times faster"] = f"{statistics.median(old[kind] / new[kind] for old, new in pairs):.3g}"
    return row


def _record(table: Path, row: dict[str, object], order: list[str]) -> None:
    """Put a row into the table, in place of an earlier one of its case; rows stand in the order of the cases."""
    before = pd.read_csv(table, dtype=str).to_dict("records") if table.is_file() else []
    rows = [*(other for other in before if other["case"] != row["case"]), row]
    rows.sort(key=lambda entry: order.index(entry["case"]))
    pd.DataFrame(rows).to_csv(table, index=False, lineterminator="\n")


def main() -> None:
    by_name = {case.name: case for case in CASES}
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(attack_once(by_name[sys.argv[2]], int(sys.argv[3]), float(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("--cases", nargs="+", choices=list(by_name), default=[], metavar="NAME")
    parser.add_argument("--long", action="store_true", help="also the cases that take minutes")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one attack")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    chosen = options.cases or [case.name for case in CASES if options.long or not case.long]
    with worktree(options.revision) as before:
        for name in chosen:
            runs: dict[str, list[dict]] = {"before": [], "now": []}
            for seed in range(options.seeds):
                for which, package in {"before": before, "now": HERE}.items():
                    runs[which].append(in_process(by_name[name], seed, options.limit, package))
            row = summary(by_name[name], runs)
            print(" | ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if options.csv is not None:
                _record(options.csv, row, list(by_name))


if __name__ == "__main__":
    main()
