"""Tables in place of images: what a recovered row says, field by field.

A row holds one-hot categories and continuous columns in units of their standard deviation, laid out by
`spear.data.adult.Column` (`spear.data.tables`). Notebook 08_tabular.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spear.data.adult import Column
from spear.data.tables import category
from spear.metrics import evaluation
from spear.reconstruction import Reconstruction

TOLERANCE = 0.319  # standard deviations within which TabLeak counts a continuous field as right


@dataclass(frozen=True)
class Fields:
    """How much of a batch's fields is known: shares of `categorical` and `continuous` fields that are right.

    A continuous field is right within 0.319 standard deviations, as TabLeak counts; `error` is their mean absolute
    error in standard deviations.
    """

    categorical: float
    continuous: float
    error: float


def compare(
    result: Reconstruction, truth: Float[Tensor, "b n"], columns: Sequence[Column], *, fallback: Float[Tensor, " n"]
) -> Fields:
    """What the server knows of each field of a batch; for a row that was not returned it guesses `fallback`."""
    match = evaluation.evaluate(result, truth).match
    guess = fallback.repeat(len(truth), 1)
    guess[match >= 0] = result.inputs.to(truth)[match[match >= 0]]
    categorical = [column for column in columns if column.categories]
    entries = [column.start for column in columns if not column.categories]
    right = [category(guess, column) == category(truth, column) for column in categorical]
    error = (guess[:, entries] - truth[:, entries]).abs()
    return Fields(
        categorical=float(torch.stack(right).double().mean()),
        continuous=float((error <= TOLERANCE).double().mean()),
        error=float(error.mean()),
    )
