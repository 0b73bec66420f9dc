"""The Adult census table, read from a file like its archive's and encoded as `spear.data.adult` lays it out."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from spear.data.adult import CLASSES, COLUMNS, WIDTH


@dataclass(frozen=True, eq=False)
class Table:
    """Encoded rows (N, WIDTH), not yet scaled, and labels (N,): 1 where the income is over 50,000 dollars."""

    rows: Float64[np.ndarray, "N n"]
    labels: Int64[np.ndarray, " N"]
    classes: tuple[str, ...] = CLASSES
    shape: tuple[int, ...] = (WIDTH,)

    def take(self, index: Int64[Tensor, " k"]) -> Float64[Tensor, "k n"]:
        """The rows at `index`."""
        return torch.from_numpy(self.rows[index.numpy()])


def read(path: Path) -> Table:
    """The table in a file like the archive's adult.data: comma-separated, no header, empty lines skipped.

    Raises `ValueError` naming the file and line for a wrong number of fields, an unknown category or no number.
    """
    rows, labels = [], []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file, skipinitialspace=True)
        try:
            for fields in filter(None, reader):
                row, label = _encode(fields)
                rows.append(row)
                labels.append(label)
        except (ValueError, csv.Error) as error:  # ValueError: also bytes that are no text
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    if not rows:
        raise ValueError(f"{path}: no rows")
    return Table(np.array(rows), np.array(labels, dtype=np.int64))


def _encode(fields: Sequence[str]) -> tuple[list[float], int]:
    if len(fields) != len(COLUMNS) + 1:
        raise ValueError(f"{len(fields)} fields, not {len(COLUMNS) + 1}")
    row = [0.0] * WIDTH
    for column, field in zip(COLUMNS, fields, strict=False):
        if column.categories:
            row[column.start + _index(column.categories, field, column.name)] = 1.0
        else:
            row[column.start] = _number(field, column.name)
    return row, _index(CLASSES, fields[-1], "income")


def _number(field: str, name: str) -> float:
    number = float(field)
    if not math.isfinite(number):
        raise ValueError(f"{field!r} is no finite {name}")
    return number


def _index(categories: tuple[str, ...], field: str, name: str) -> int:
    if field not in categories:
        raise ValueError(f"{field!r} is no {name}")
    return categories.index(field)
