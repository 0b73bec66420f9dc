"""Tables in place of images: rows with fields, what a recovered row says field by field, and a TabLeak-like baseline.

A row holds one-hot categories and continuous columns in units of their standard deviation, laid out by
`spear.adult.Column`.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

from spear import adult, baselines, data, metrics
from spear.adult import Column
from spear.federated import SharedUpdate
from spear.reconstruction import Reconstruction, Stats
from spear.target import check_gradients

QUARTERS = ("lowest quarter", "second quarter", "third quarter", "highest quarter")
TOLERANCE = 0.319  # standard deviations within which TabLeak counts a continuous field as right


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
        return Rows(*data.load("adult", count=count, seed=seed, root=root), adult.COLUMNS)
    if name != "cancer":
        raise ValueError(f"unknown table {name!r}: use 'adult' or 'cancer'")
    table = _cancer()
    if not 1 <= count <= len(table.labels):
        raise ValueError(f"cancer has {len(table.labels)} rows, so count must be 1 to {len(table.labels)}, not {count}")
    index = torch.randperm(len(table.labels), generator=torch.Generator().manual_seed(seed))[:count]
    return Rows(table.inputs[index], table.labels[index], table.columns)


@functools.cache
def _cancer() -> Rows:
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


@dataclass(frozen=True)
class Fields:
    """How much of a batch's fields is known: shares of `categorical` and `continuous` fields that are right.

    A continuous field is right within 0.319 standard deviations, as TabLeak counts; `error` is their mean absolute
    error in standard deviations.
    """

    categorical: float
    continuous: float
    error: float


def typical(rows: Rows) -> Float[Tensor, " n"]:
    """The guess of somebody who knows the population and no update: the commonest category, the mean."""
    return discrete(rows.inputs.mean(0, keepdim=True), rows.columns)[0]


def compare(
    result: Reconstruction, truth: Float[Tensor, "b n"], columns: Sequence[Column], *, fallback: Float[Tensor, " n"]
) -> Fields:
    """What the server knows of each field of a batch; for a row that was not returned it guesses `fallback`."""
    match = metrics.evaluate(result, truth).match
    guess = fallback.repeat(len(truth), 1)
    guess[match >= 0] = result.inputs.to(truth)[match[match >= 0]]
    categorical = [column for column in columns if column.categories]
    entries = [column.start for column in columns if not column.categories]
    right = [_category(guess, column) == _category(truth, column) for column in categorical]
    error = (guess[:, entries] - truth[:, entries]).abs()
    return Fields(
        float(torch.stack(right).double().mean()), float((error <= TOLERANCE).double().mean()), float(error.mean())
    )


def _category(rows: Float[Tensor, "b n"], column: Column) -> Int[Tensor, " b"]:
    return rows[:, column.start : column.stop].argmax(1)


def discrete(rows: Float[Tensor, "b n"], columns: Sequence[Column]) -> Float[Tensor, "b n"]:
    """Each categorical field as the one-hot row of its largest entry; continuous fields as they are."""
    rows = rows.clone()
    for column in columns:
        if column.categories:
            rows[:, column.start : column.stop] = F.one_hot(_category(rows, column), len(column.categories)).to(rows)
    return rows


def tableak(
    model: nn.Module,
    update: SharedUpdate,
    columns: Sequence[Column],
    *,
    steps: int = 1500,
    restarts: int = 30,
    rate: float | int = 0.06,
    seed: int = 0,
) -> Reconstruction:
    """Gradient matching in the manner of TabLeak (Vero, Balunović, Dimitrov, Vechev, ICML 2023).

    Categories are relaxed to a softmax, the cosine distance of the gradients is lowered by Adam, from all `restarts` at
    once; then each start is matched, row by row, to the nearest one; their median is the answer. Numbers of steps and
    starts are the authors' as far as known. Labels are inferred (`spear.baselines.infer_labels`).

    Raises `ValueError` where the batch size is not disclosed, and for gradients that do not fit the model.
    """
    began, labels = time.monotonic(), baselines.infer_labels(model, update)
    distance = _Distance(model, update, labels, columns)
    generator = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    z = torch.randn(restarts, len(labels), columns[-1].stop, generator=generator, dtype=like.dtype).to(like.device)
    z.requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=rate)
    for _ in range(steps):
        (z.grad,) = torch.autograd.grad(torch.vmap(distance)(z).sum(), z)
        optimizer.step()
    with torch.no_grad():
        reached = torch.vmap(distance)(z)
        rows = discrete(pool(distance.relax(z), reached), columns)
    nobody = torch.zeros(len(rows), dtype=torch.bool)
    unknown = torch.full((len(rows),), torch.inf, dtype=rows.dtype)
    reason = f"not certified: gradients matched to a cosine distance of {float(reached.min()):.1e}"
    stats = Stats(time.monotonic() - began, restarts, steps)
    return Reconstruction(rows, labels, len(rows), unknown, nobody, False, reason, stats)


class _Distance:
    """1 - cos(g(x), g*) of the gradients g of a relaxed batch x to the observed ones g*, as a function of z."""

    def __init__(self, model: nn.Module, update: SharedUpdate, labels: Int[Tensor, " b"], columns: Sequence[Column]):
        self.model, self.labels, self.reduction = model, labels, update.reduction
        self.observed = check_gradients(model, update)
        self.parameters = {name: p.detach() for name, p in model.named_parameters() if name in self.observed}
        fields = [column for column in columns if column.categories]
        like = next(iter(self.parameters.values()))
        self.members = like.new_zeros(columns[-1].stop, len(fields))  # which entry belongs to which category's field
        for place, column in enumerate(fields):
            self.members[column.start : column.stop, place] = 1

    def relax(self, z: Float[Tensor, "*restarts b n"]) -> Float[Tensor, "*restarts b n"]:
        """Rows whose categorical fields are softmaxes."""
        power = (z - z.amax(-1, keepdim=True).detach()).exp()
        total = power @ self.members @ self.members.mT
        categorical = self.members.any(1)
        return torch.where(categorical, power / torch.where(categorical, total, 1), z)

    def __call__(self, z: Float[Tensor, "b n"]) -> Float[Tensor, ""]:
        x = self.relax(z)

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            logits = torch.func.functional_call(self.model, parameters, (x,))
            return F.cross_entropy(logits, self.labels, reduction=self.reduction)

        g = torch.func.grad(loss)(self.parameters)
        product, size, seen = (
            sum((a[name] * b[name]).sum() for name in g) for a, b in ((g, self.observed), (g, g), (self.observed,) * 2)
        )
        return 1 - product / (size * seen).sqrt()


def pool(rows: Float[Tensor, "restarts b n"], distance: Float[Tensor, " restarts"]) -> Float[Tensor, "b n"]:
    """The median over starts, each with its rows in the order of those of the nearest start that they resemble."""
    best = rows[distance.nan_to_num(torch.inf).argmin()]
    aligned = []
    for start in rows:
        order = linear_sum_assignment(torch.cdist(best, start).nan_to_num(1e9).cpu())[1]
        aligned.append(start[torch.as_tensor(order, dtype=torch.long, device=rows.device)])
    return torch.stack(aligned).nanmedian(0).values
