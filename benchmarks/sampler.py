"""Proposals per second of SPEAR's samplers, against batched singular value decompositions in the same run.

    python benchmarks/sampler.py [--json] [--b 10 16 20 24] [--seconds 2] [--seeds 3]

One network of 400 neurons a layer and depth 6, the gradient of a batch of b samples, L its column space. Methods:

  svd      draw b - 1 rows, the kernel by a batched `torch.linalg.svd`, test every row of L q: the published form
  lu       the same with the kernel from a linear system
  blocks   the b kernels of a random b x b block from one inversion, tested on a few rows first
  uniform  walks that test kernels without computing them (`spear.published.walks`), pools of rows drawn uniformly
  walks    the same with pools of rows that the layer's weights let expect to vanish together: two rounds of three, as
           the attack runs them

*Proposals* are kernels tested. *Hits* are sets of b - 1 rows whose kernel was found to have enough zeros; for the
independent draws of svd and lu they are the proposals times sum_i C(zeta_i, b-1) / C(m, b-1), which is exact where a
few seconds of sampling show nothing. *All columns* is the time until every column was met: measured for the
median of the seeds, and for svd and lu the expected number of proposals over their rate. *Share* is that of the
machine's matrix-multiply rate (float32, 2 n^3 operations for n = 3000), with these counts of floating-point operations:

  svd, lu  (2/3) b^3 for the kernel by elimination (an SVD does more, and is not credited for it), 2 m b for the test
  blocks   2 b^3 for an inverse, 2 b for each of the rows tested, per kernel: 2 b^2 + 24 b
  walks    2 b k for a pivot, b divisions for each pair of rows compared: (2 k + 3) b per step of a chain, which tests
           3 C(b-1, 2) kernels; comparing integers is not counted
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from spear import data, executors, federated, models
from spear.published import filtering, sampling, sparsity, theory
from spear.published.kernels import kernels_lu, kernels_svd, naive
from spear.published.view import Observed, open_layer
from spear.published.walks import HELD, PAIRS

WIDTH, DEPTH = 400, 6
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Problem:
    """The server's view, the zeros (b,) of each column of G, the true directions (b, b) as rows, and the threshold."""

    observed: Observed
    zeros: Tensor
    truth: Tensor
    threshold: int

    @property
    def L(self) -> Tensor:
        return self.observed.L


@dataclass(frozen=True)
class Row:
    """One method at one b: rates per second, ratios to svd, seconds (`None`: over the limit), share of matmul."""

    b: int
    method: str
    proposals: float
    proposals_ratio: float
    hits: float
    hits_ratio: float
    all_columns: float | None
    share: float


def make(name: str, b: int, seed: int) -> Problem:
    """The gradient of a batch, and what only the judge knows of it."""
    if name == "gauss":
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(b, 3, 32, 32, dtype=torch.float64, generator=generator)
        labels = torch.randint(10, (b,), generator=generator)
    else:
        inputs, labels = data.load(name, count=b, seed=seed)
    model = models.fcnn(inputs.shape[1:], WIDTH, DEPTH, int(labels.max()) + 1, seed=seed)
    observed = open_layer(model, federated.gradient(model, inputs, labels)).observed
    with torch.no_grad():
        zero = model[1](inputs.flatten(1)).mT <= 0
    truth = torch.cat([kernels_svd(observed.L[None, rows]) for rows in zero.mT])
    return Problem(observed, zero.sum(0), truth, sparsity.threshold(WIDTH, false_rejection=1e-9))


Batch = tuple[int, Tensor]


def independent(problem: Problem, kernels: Callable[[Tensor], Tensor], chunk: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        found = naive(problem.L, chunk, threshold=problem.threshold, generator=generator, kernels=kernels, chunk=chunk)
        yield found.count, found.directions


def blocks(problem: Problem, seed: int) -> Iterator[Batch]:
    def work(part: range) -> Batch:
        generator = torch.Generator().manual_seed(1000 * seed + part[0])
        count, q = sampling.block_round(problem.observed, generator=generator)
        return count, sparse(problem, q)

    return threaded(work, 0, 1)


def walks(problem: Problem, seed: int, period: int) -> Iterator[Batch]:
    """Rounds 0, 1, 2, ... (`period` 1), or the uniform ones alone."""

    def work(part: range) -> Batch:
        count, q = sampling.chain_rounds(problem.observed, part, seed=seed, device=CPU)
        return count, sparse(problem, q)

    return threaded(work, period - 1, period)


def threaded(work: Callable[[range], Batch], start: int, step: int) -> Iterator[Batch]:
    """Rounds `start`, `start` + `step`, ..., as many at a time as there are threads."""

    def numbered(index: int) -> Batch:
        return work(range(start + step * index, start + step * index + 1))

    return executors.in_order(numbered, ahead=torch.get_num_threads())


def sparse(problem: Problem, q: Tensor) -> Tensor:
    return torch.cat([part[filtering.sparsity_filter(problem.L, part, problem.threshold)] for part in q.split(4096)])


METHODS: dict[str, Callable[[Problem, int], Iterator[Batch]]] = {
    "svd": lambda problem, seed: independent(problem, kernels_svd, 1000, seed),
    "lu": lambda problem, seed: independent(problem, kernels_lu, 10_000, seed),
    "blocks": blocks,
    "uniform": lambda problem, seed: walks(problem, seed, len(sampling.SHARES)),
    "walks": lambda problem, seed: walks(problem, seed, 1),
}


def speed(method: str, problem: Problem, seconds: float) -> tuple[float, float]:
    """Proposals and hits per second."""
    start, count, hits = time.perf_counter(), 0, 0
    for proposals, q in METHODS[method](problem, 0):
        count, hits = count + proposals, hits + len(sparse(problem, q))
        elapsed = time.perf_counter() - start
        if elapsed > seconds:
            break
    if method in ("svd", "lu"):
        hits = count * float(theory.success_probability(problem.zeros, *problem.L.shape).sum())
    return count / elapsed, hits / elapsed


def until_all(method: str, problem: Problem, seed: int, limit: float) -> float:
    """Seconds until every column was met; infinite where that takes more than `limit` seconds."""
    met, start = torch.zeros(len(problem.truth), dtype=torch.bool), time.perf_counter()
    for _, q in METHODS[method](problem, seed):
        met |= ((sparse(problem, q) @ problem.truth.mT).abs() > 1 - 1e-9).any(0)
        elapsed = time.perf_counter() - start
        if met.all() or elapsed > limit:
            return elapsed if met.all() else math.inf
    raise AssertionError("samplers do not end")


def operations(method: str, m: int, b: int) -> float:
    """Floating-point operations per proposal, as counted above."""
    if method in ("svd", "lu"):
        return 2 / 3 * b**3 + 2 * m * b
    if method == "blocks":
        return 2 * b * b + 2 * b * sampling.HELD_OUT
    return (2 * HELD + PAIRS) * b / (PAIRS * math.comb(b - 1, 2))


def matmul_rate(n: int = 3000) -> float:
    """Operations per second of the better of a few float32 matrix products."""
    A = torch.randn(n, n)

    def once() -> float:
        start = time.perf_counter()
        A @ A
        return time.perf_counter() - start

    return 2 * n**3 / min(once() for _ in range(4))


def measure(b: int, name: str, seconds: float, seeds: int, limit: float, rate: float) -> list[Row]:
    problems = [make(name, b, seed) for seed in range(seeds)]
    rates = {method: speed(method, problems[0], seconds) for method in METHODS}
    rows = []
    for method, (proposals, hits) in rates.items():
        if method in ("svd", "lu"):
            p = [theory.success_probability(problem.zeros, WIDTH, b) for problem in problems]
            times = [theory.expected_proposals(each) / proposals for each in p]
        else:
            times = [until_all(method, problem, seed + 1, limit) for seed, problem in enumerate(problems)]
        share = proposals * operations(method, WIDTH, b) / rate
        ratios = proposals / rates["svd"][0], hits / rates["svd"][1]
        median = statistics.median(times)
        rows.append(Row(b, method, proposals, ratios[0], hits, ratios[1], median if median < math.inf else None, share))
    return rows


def show(rows: list[Row], rate: float) -> None:
    title = f"{torch.get_num_threads()} threads, matrix multiply {rate / 1e9:.0f} GFLOP/s, m = {WIDTH}"
    table = Table("b", "method", "proposals/s", "ratio", "hits/s", "ratio", "all columns, s", "share", title=title)
    for row in rows:
        table.add_row(
            str(row.b),
            row.method,
            f"{row.proposals:.3g}",
            f"{row.proposals_ratio:,.0f}",
            f"{row.hits:.3g}",
            f"{row.hits_ratio:,.0f}",
            "-" if row.all_columns is None else f"{row.all_columns:.3g}",
            f"{row.share:.1%}",
            end_section=row.method == "walks",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the samplers, as ratios within one run.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--b", type=int, nargs="+", default=[10, 16, 20, 24], help="batch sizes")
    parser.add_argument("--data", default="gauss", help="gauss, or a data set by name")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each rate")
    parser.add_argument("--seeds", type=int, default=3, help="problems per batch size")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds after which a search for all columns ends")
    options = parser.parse_args()
    rate = matmul_rate()
    measured = [measure(b, options.data, options.seconds, options.seeds, options.limit, rate) for b in options.b]
    rows = [row for each in measured for row in each]
    if options.json:
        facts = {
            "threads": torch.get_num_threads(),
            "matmul_flops": rate,
            "width": WIDTH,
            "rows": [asdict(r) for r in rows],
        }
        print(json.dumps(facts))
    else:
        show(rows, rate)


if __name__ == "__main__":
    main()
