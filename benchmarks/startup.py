"""What it costs to start: processor seconds of whole processes, and their ratio to `import torch` in the same run.

    python benchmarks/startup.py [--before REVISION] [--repeats N] [--csv FILE]

Cases take turns, so that whatever else the machine does falls on all of them alike; shown are medians. With a revision
its code is measured beside this checkout's, in the same turns. Commands run in a clone of the last commit.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
TOUCHED = (
    "import spear; spear.attack, spear.data.load, spear.federated.gradient, spear.models.fcnn, spear.metrics.evaluate"
)
CASES = {
    "import torch": ["-c", "import torch"],
    "import spear": ["-c", "import spear"],
    "import spear, names touched": ["-c", TOUCHED],
    "spear --help": ["-m", "spear", "--help"],
    "spear data list": ["-m", "spear", "data", "list"],
    "spear figures --list": ["-m", "spear", "figures", "--list"],
    "spear figures --pages": ["-m", "spear", "figures", "--pages"],
}


def seconds(arguments: list[str], package: Path, folder: Path) -> float:
    """User and system time of a new interpreter that runs these arguments on the code of a checkout."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": str(package), "SPEAR_DATA": str(folder), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-P", *arguments], cwd=folder, env=environment, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with status {process.returncode}")
    return usage.ru_utime + usage.ru_stime


@contextmanager
def checkouts(revision: str | None, folder: Path) -> Iterator[dict[str, Path]]:
    """This checkout, and a worktree of another revision of it for as long as it is needed."""
    if revision is None:
        yield {"now": HERE}
        return
    git = ["git", "-C", str(HERE), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder / "before"), revision], check=True)
    try:
        yield {"before": folder / "before", "now": HERE}
    finally:
        subprocess.run([*git, "remove", "--force", str(folder / "before")], check=True)


def project(folder: Path) -> Path:
    """A clone of this checkout for commands to run in: they read its notebooks and figures, and may write there."""
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{HERE}", str(folder)], check=True)
    return folder


def measure(before: str | None, repeats: int) -> list[dict[str, object]]:
    """A row for each case: median seconds and their ratio to `import torch`, for each checkout."""
    with tempfile.TemporaryDirectory() as place, checkouts(before, Path(place)) as packages:
        projects = {which: project(Path(place) / f"project-{which}") for which in packages}
        turns = [
            {
                (which, case): seconds(CASES[case], packages[which], projects[which])
                for which in packages
                for case in CASES
            }
            for _ in range(repeats + 1)
        ][1:]  # the first turn compiles
    medians = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    unit = {which: medians[which, "import torch"] for which in packages}
    rows = []
    for case in CASES:
        row: dict[str, object] = {"case": case}
        for which in packages:
            row |= {f"{which}, s": f"{medians[which, case]:.2f}"}
            row |= {f"{which}, times import torch": f"{medians[which, case] / unit[which]:.2f}"}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="REVISION")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=HERE / "benchmarks" / "startup.csv")
    options = parser.parse_args()
    rows = measure(options.before, options.repeats)
    print(*rows[0], sep=" | ")
    for row in rows:
        print(*row.values(), sep=" | ")
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
