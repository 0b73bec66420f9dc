"""Tables in place of images: rows with fields.

A row holds one-hot categories and continuous columns in units of their standard deviation, laid out by
`spear.data.adult.Column`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from spear.data import adult, catalog
from spear.data.adult import Column

QUARTERS = ("lowest quarter", "second quarter", "third quarter", "highest quarter")


@dataclass(frozen=True)
class Rows:
    """Rows of a table (k, n), their labels (k,), and the columns that lay them out."""

    inputs: Float[Tensor, "k n"]
    labels: Int[Tensor, " k"]
    columns: tuple[Column, ...]


def load(name: str, *, count: int, seed: int = 0, root: Path | str | None = None) -> Rows:
    """`count` different rows of a table, drawn by `seed`; a larger count extends the smaller one.

    "adult" is the census table, where it is under the data root. "cancer" is always there: measurements of 569 tumours
    that ship with scikit-learn (Wisconsin diagnostic breast cancer, UCI), the ten means as continuous columns, the
    twenty others cut into quarters, so that the table has both kinds of fields.

    Raises `FileNotFoundError` for a table that is absent, `ValueError` for an unknown one or too large a count.
    """
    if name == "adult":
        return Rows(*catalog.load("adult", count=count, seed=seed, root=root), adult.COLUMNS)
    if name != "cancer":
        raise ValueError(f"unknown table {name!r}: use 'adult' or 'cancer'")
    table = _cancer()
    if not 1 <= count <= len(table.labels):
        raise ValueError(f"cancer has {len(table.labels)} rows, so count must be 1 to {len(table.labels)}, not {count}")
    index = torch.randperm(len(table.labels), generator=torch.Generator().manual_seed(seed))[:count]
    return Rows(table.inputs[index], table.labels[index], table.columns)


@functools.cache
def _cancer() -> Rows:
    import pandas as pd  # these two here, as they take seconds that only this table needs
    from sklearn.datasets import load_breast_cancer

    values, labels = load_breast_cancer(return_X_y=True, as_frame=True)
    means, others = values.iloc[:, :10], values.iloc[:, 10:]
    quarters = others.apply(lambda column: pd.qcut(column, 4, labels=False))
    encoded = [
        (means - means.mean()) / means.std(),
        *(quarters[name].to_numpy()[:, None] == range(4) for name in others),
    ]
    columns = [Column(name, place, ()) for place, name in enumerate(means)]
    columns += [Column(name, 10 + 4 * place, QUARTERS) for place, name in enumerate(others)]
    inputs = torch.from_numpy(np.hstack(encoded).astype(np.float64))
    return Rows(inputs, torch.tensor(labels.to_numpy(), dtype=torch.int64), tuple(columns))


def typical(rows: Rows) -> Float[Tensor, " n"]:
    """The guess of somebody who knows the population and no update: the commonest category, the mean."""
    return discrete(rows.inputs.mean(0, keepdim=True), rows.columns)[0]


def category(rows: Float[Tensor, "b n"], column: Column) -> Int[Tensor, " b"]:
    """Which category of a column each row is in: that of its largest entry."""
    return rows[:, column.start : column.stop].argmax(1)


def discrete(rows: Float[Tensor, "b n"], columns: Sequence[Column]) -> Float[Tensor, "b n"]:
    """Each categorical field as the one-hot row of its largest entry; continuous fields as they are."""
    rows = rows.clone()
    for column in columns:
        if column.categories:
            rows[:, column.start : column.stop] = F.one_hot(category(rows, column), len(column.categories)).to(rows)
    return rows
