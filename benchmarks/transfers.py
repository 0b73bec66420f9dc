"""How often each method makes the host wait for the device, by the lines that ask for it.

    python benchmarks/transfers.py [--csv FILE]

The device is pretended (tests/accelerator.py): no accelerator is needed, and values are the host's. A row says how many
waits a case took in all, how many of them a round of the search, and which lines ask most often.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

import spear
from spear import data

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "tests"))
from accelerator import accelerator  # noqa: E402

CASES = [("network", 16, 120, 3), ("network", 50, 100, 3), ("network", 30, 200, 2), ("layer", 30, 160, 3)]
CASES += [("dictionary", 6, 160, 3), ("sampling", 6, 120, 3), ("guided", 6, 120, 3)]
MOST = 3  # lines that are named


def measure(method: str, batch: int, width: int, depth: int) -> dict[str, object]:
    inputs, labels = data.load("photos", count=batch, seed=0)
    model = spear.models.fcnn(inputs.shape[1:], width, depth, len(data.classes("photos")), seed=0)
    update = spear.federated.gradient(model, inputs, labels)
    with accelerator() as (device, waits):
        result = spear.attack(model, update, method=method, seed=0, device=device)
    total, rounds = sum(waits.values()), result.stats.rounds
    named = "; ".join(f"{line} {count}" for line, count in waits.most_common(MOST))
    row = {"method": method, "batch": batch, "width": width, "layers": depth, "found": len(result.inputs)}
    return row | {"rounds": rounds, "waits": total, "waits a round": round(total / rounds, 1), "most often": named}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=HERE / "benchmarks" / "transfers.csv")
    frame = pd.DataFrame([measure(*case) for case in CASES])
    print(frame.to_string(index=False))
    frame.to_csv(parser.parse_args().csv, index=False, lineterminator="\n")


if __name__ == "__main__":
    main()
