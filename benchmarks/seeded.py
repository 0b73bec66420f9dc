"""The command line of benchmarks that print and keep one row for each case and seed."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import pandas as pd

Case = TypeVar("Case")


def run(
    measure: Callable[[str, Case, int, float], object], cases: Mapping[str, Case], *, limit: float, about: str
) -> None:
    """Measure the chosen cases, by name, with each seed; `limit` is the usual one, in seconds for an attack."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=float, default=limit)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows = []
    for name, seed in [(name, seed) for name in options.cases for seed in options.seeds]:
        try:
            rows.append(asdict(measure(name, cases[name], seed, options.limit)))
        except FileNotFoundError as error:
            print(f"{name}: skipped, {error}")
            continue
        print(rows[-1], flush=True)
        if options.csv is not None:
            pd.DataFrame(rows).to_csv(options.csv, index=False, float_format="%.3g")
