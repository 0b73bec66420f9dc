"""The Adult census table: one-hot categories beside continuous columns, in one layout for any part of the table."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

CLASSES = ("<=50K", ">50K")
# Names, categories ("?" stands for missing) and order as in the archive's own description, adult.names.
_FIELDS: tuple[tuple[str, str], ...] = (
    ("age", ""),
    (
        "workclass",
        "Private Self-emp-not-inc Self-emp-inc Federal-gov Local-gov State-gov Without-pay Never-worked ?",
    ),
    ("fnlwgt", ""),
    (
        "education",
        "Bachelors Some-college 11th HS-grad Prof-school Assoc-acdm Assoc-voc 9th 7th-8th 12th Masters 1st-4th 10th "
        "Doctorate 5th-6th Preschool",
    ),
    ("education-num", ""),
    (
        "marital-status",
        "Married-civ-spouse Divorced Never-married Separated Widowed Married-spouse-absent Married-AF-spouse",
    ),
    (
        "occupation",
        "Tech-support Craft-repair Other-service Sales Exec-managerial Prof-specialty Handlers-cleaners "
        "Machine-op-inspct Adm-clerical Farming-fishing Transport-moving Priv-house-serv Protective-serv "
        "Armed-Forces ?",
    ),
    ("relationship", "Wife Own-child Husband Not-in-family Other-relative Unmarried"),
    ("race", "White Asian-Pac-Islander Amer-Indian-Eskimo Other Black"),
    ("sex", "Female Male"),
    ("capital-gain", ""),
    ("capital-loss", ""),
    ("hours-per-week", ""),
    (
        "native-country",
        "United-States Cambodia England Puerto-Rico Canada Germany Outlying-US(Guam-USVI-etc) India Japan Greece South "
        "China Cuba Iran Honduras Philippines Italy Poland Jamaica Vietnam Mexico Portugal Ireland France "
        "Dominican-Republic Laos Ecuador Taiwan Haiti Columbia Hungary Guatemala Nicaragua Scotland Thailand "
        "Yugoslavia El-Salvador Trinadad&Tobago Peru Hong Holand-Netherlands ?",
    ),
)
# Mean and standard deviation of the continuous columns over the 32,561 rows of adult.data.
_MOMENTS = {
    "age": (38.5816, 13.6404),
    "fnlwgt": (189778.0, 105550.0),
    "education-num": (10.0807, 2.5727),
    "capital-gain": (1077.65, 7385.29),
    "capital-loss": (87.3038, 402.960),
    "hours-per-week": (40.4375, 12.3474),
}


@dataclass(frozen=True)
class Column:
    """A column of the table and its place in an encoded row: entries `start` to `stop`, one-hot, or a single number."""

    name: str
    start: int
    categories: tuple[str, ...]  # none: continuous

    @property
    def stop(self) -> int:
        """One past the column's last entry."""
        return self.start + max(1, len(self.categories))


def _layout() -> tuple[Column, ...]:
    categories = {name: tuple(words.split()) for name, words in _FIELDS}
    starts = accumulate((max(1, len(words)) for words in categories.values()), initial=0)
    return tuple(Column(name, start, words) for start, (name, words) in zip(starts, categories.items(), strict=False))


COLUMNS = _layout()
WIDTH = COLUMNS[-1].stop


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


def moments() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each entry of an encoded row: 0 and 1 for one-hot entries, which stay unscaled."""
    mean, std = np.zeros(WIDTH), np.ones(WIDTH)
    for column in COLUMNS:
        if not column.categories:
            mean[column.start], std[column.start] = _MOMENTS[column.name]
    return tuple(mean.tolist()), tuple(std.tolist())


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
