"""What comes back from the updates that real frameworks send: benchmarks/frameworks.csv, by one command.

    python benchmarks/frameworks/run.py [NAME ...] [--only captures|attacks] [--again all|open] [--limit SECONDS]

For each framework an environment of its own is made, with the versions pinned in `environments.py`. In it the
framework's client takes one step of SGD and its server keeps what it receives, through each built-in filter, compressor
and privacy mechanism (`capture_NAME.py`). Every update is then attacked by `auto`: told the learning rate, which the
server sets, and nothing else; where that leaves images out, once more with the count, the sign and what the server
knows of the mechanism.

Needs the network, MNIST and CIFAR-10 (data/README.md), 2 GB, and an hour or two. What is in build/frameworks is not
captured again, and what is in the table is not attacked again: `--again open` repeats attacks that left images out.
"""

import argparse
import csv
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import environments
import torch
from exchange import RATE, Task, about, network

from spear import data, inversion, metrics, models
from spear.federated.update import SharedUpdate, difference
from spear.models.tensors import read_tensors
from spear.reconstruction import Reconstruction

ROOT = Path(__file__).resolve().parents[2]
TABLE, WORK = ROOT / "benchmarks" / "frameworks.csv", ROOT / "build" / "frameworks"
SETS, BATCHES, WIDTH, SEED = ("cifar10", "mnist"), (16, 64), 400, 0
RECOGNISED = 20.0  # dB of PSNR, from which on an image counts as recovered
LONGEST = 160  # letters of a reason


@dataclass(frozen=True)
class Row:
    """One attack on one update, whose tensors have `names` such as this.

    `told`: what the server knows beside update and rate; `psnr` (median, dB) is over the batch, and empty where nothing
    came back; `seconds` are the processor's.
    """

    framework: str
    version: str
    mechanism: str
    settings: str
    sends: str
    dtype: str
    names: str
    dataset: str
    batch: int
    told: str
    returned: int
    recovered: int
    certified: int
    psnr: float | str
    seconds: float
    outcome: str
    reason: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.framework, self.mechanism, self.dataset, str(self.batch), self.told


def tasks() -> list[Path]:
    """The clients' batches and the networks that they receive, as files."""
    paths = []
    folder = WORK / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    for batch in BATCHES:
        for name in SETS:
            path = folder / f"{name}-{batch}.safetensors"
            if not path.is_file():
                images, labels = data.load(name, count=batch, seed=SEED)
                sizes = images.shape[1:], WIDTH, 3, len(data.classes(name))
                model = models.fcnn(*sizes, seed=SEED, dtype=torch.float32)
                Task(path.stem, dict(model.state_dict()), images.float(), labels).save(folder)
            paths.append(path)
    return paths


def capture(name: str) -> None:
    """Let a framework's processes send their updates, each task once."""
    python, script = environments.make(name, WORK / "environments" / name), f"capture_{name}.py"
    folder = WORK / "updates" / name
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks():
        done = folder / f"{task.stem}.done"
        if not done.is_file():
            print(f"{name}: {task.stem} is sent", flush=True)
            with (folder / f"{task.stem}.log").open("w") as log:
                command = [python, Path(__file__).with_name(script), task, folder]
                subprocess.run(command, check=True, timeout=1800, stdout=log, stderr=log)
            done.touch()


def attack(path: Path, knows: bool, limit: float) -> Row:
    """Attack one update; `knows` says whether the server knows the count and the mechanism's settings."""
    words, (received, _) = about(path), read_tensors(path)
    task = Task.load(WORK / "tasks" / f"{words['task']}.safetensors")
    told = {"count": len(task.images), **words["told"]} if knows else {}
    start = time.process_time()
    try:
        update = _update(words["sends"], received, task, knows).disclosing(**told)
        result = inversion.attack(network(task.weights), update, time_limit=limit, seed=SEED)
    except ValueError as error:
        found = _found(None, task, str(error))
    else:
        found = _found(result, task, result.reason)
    kinds = "+".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in received.values()}))
    seconds = round(time.process_time() - start, 1)
    name, _, batch = task.name.rpartition("-")
    knowledge = [f"{key} {value}" for key, value in told.items()] + ["sign"] * (knows and words["sends"] != "weights")
    facts = (words[key] for key in ("package", "version", "mechanism", "settings", "sends"))
    case = kinds, min(received), name, int(batch), ", ".join(knowledge) or "nothing"
    return Row(*facts, *case, **found, seconds=seconds)


def _update(sends: str, received: dict[str, torch.Tensor], task: Task, knows: bool) -> SharedUpdate:
    """The update as the server takes it: from weights their change; a change as it came, or by its known sign."""
    if sends == "weights":
        return difference(network(task.weights), task.weights, received, learning_rate=RATE)
    sign = -1 if knows and sends == "after - before" else 1
    return SharedUpdate({name: sign * tensor for name, tensor in received.items()}, learning_rate=RATE)


def _found(result: Reconstruction | None, task: Task, reason: str) -> dict:
    """What came back, in numbers and in a word: the truth is known here, and only here."""
    reason = " ".join(reason.split("; ")[0].split())[:LONGEST]
    if result is None or not len(result.inputs):
        word = "refused" if result is None else "nothing"
        return {"returned": 0, "recovered": 0, "certified": 0, "psnr": "", "outcome": word, "reason": reason}
    judged, certified = metrics.evaluate(result, task.images, task.labels), int(result.certified.sum())
    if judged.precision < 1:
        raise SystemExit(f"{task.name}: a certified sample is wrong")
    recovered, batch = int((judged.psnr >= RECOGNISED).sum()), len(task.images)
    word = "part" if recovered < batch else "whole, certified" if certified == batch else "whole"
    psnr = round(float(judged.psnr.median()), 1)
    numbers = {"returned": len(result.inputs), "recovered": recovered, "certified": certified, "psnr": psnr}
    return {**numbers, "outcome": word if recovered else "nothing", "reason": reason}


def attacks(names: Sequence[str], again: str | None, limit: float) -> None:
    """Attack what is not in the table yet; it is written after each update, so that nothing is lost."""
    rows = {row.key: row for row in read()}
    for task in tasks():
        for path in sorted(p for name in names for p in (WORK / "updates" / name).glob(f"{task.stem}-*.safetensors")):
            words = about(path)
            own = [row for row in rows.values() if _is_of(row, words)]
            is_open = not any(row.told == "nothing" and row.recovered == row.batch for row in own)
            if own and not (again == "all" or (again == "open" and is_open)):
                continue
            for row in own:
                del rows[row.key]
            plain = attack(path, False, limit)
            tries = [plain] if plain.recovered == plain.batch else [plain, attack(path, True, limit)]
            for row in tries:
                rows[row.key] = row
                print(f"{row.framework} {row.mechanism} {words['task']}, told {row.told}: {row.outcome}", flush=True)
            write(rows.values())


def _is_of(row: Row, words: dict) -> bool:
    place = f"{row.dataset}-{row.batch}"
    return (row.framework, row.mechanism, place) == (words["package"], words["mechanism"], words["task"])


def read() -> list[Row]:
    """The table as it is; empty where there is none."""
    if not TABLE.is_file():
        return []
    with TABLE.open(newline="", encoding="utf-8") as file:
        kinds = {field.name: int if field.type is int else str for field in fields(Row)}
        return [Row(**{key: kinds[key](value) for key, value in row.items()}) for row in csv.DictReader(file)]


def write(rows: Iterable[Row]) -> None:
    """The table, framework by framework, what is sent without any mechanism first."""
    order = sorted(rows, key=lambda row: (row.framework, not row.mechanism.startswith("none"), *row.key))
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, order))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(environments.PINNED), metavar="NAME")
    parser.add_argument("--only", choices=("captures", "attacks"))
    parser.add_argument("--again", choices=("all", "open"))
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of one attack")
    options = parser.parse_args()
    if unknown := set(options.names) - set(environments.PINNED):
        parser.error(f"unknown {', '.join(unknown)}: use {', '.join(environments.PINNED)}")
    torch.set_num_threads(1)
    if options.only != "attacks":
        for name in options.names:
            capture(name)
    if options.only != "captures":
        attacks(options.names, options.again, options.limit)


if __name__ == "__main__":
    main()
