"""What the server knows of a table, field by field."""

import pytest
import torch
import torch.nn.functional as F

from spear import attack, models
from spear.data import tables
from spear.data.adult import Column
from spear.federated import gradient
from spear.reconstruction import Reconstruction, Stats
from spear.study.fields import compare

COLUMNS = (Column("size", 0, ()), Column("colour", 1, ("red", "green", "blue")), Column("weight", 4, ()))


def result(rows):
    k = len(rows)
    return Reconstruction(
        rows, None, k, torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.bool), False, "", Stats(0.0)
    )


def rows(*fields):
    """Rows of COLUMNS from (size, place of the colour, weight)."""
    size, colour, weight = (torch.tensor(part) for part in zip(*fields, strict=True))
    return torch.cat([size[:, None].double(), F.one_hot(colour, 3).double(), weight[:, None].double()], 1)


def test_fields_are_counted_one_by_one():
    truth = rows((0.0, 0, 8.0), (3.0, 1, -2.0), (9.0, 2, 5.0))
    guess = rows((3.2, 1, -2.5), (0.0, 2, 8.0))  # of the second and the first row, in this order
    fallback = rows((9.1, 0, 4.0))[0]
    fields = compare(result(guess), truth, COLUMNS, fallback=fallback)
    assert fields.categorical == pytest.approx(1 / 3)
    errors = [0.2, 0.5, 0.0, 0.0, 0.1, 1.0]
    assert fields.error == pytest.approx(sum(errors) / 6)
    assert fields.continuous == pytest.approx(sum(e <= 0.319 for e in errors) / 6)


def test_an_exact_recovery_knows_every_field():
    table = tables.load("cancer", count=3)
    model = models.fcnn((table.inputs.shape[1],), 60, 3, 2)
    result = attack(model, gradient(model, table.inputs, table.labels))
    everything = tables.load("cancer", count=200)
    fields = compare(result, table.inputs, table.columns, fallback=tables.typical(everything))
    assert (fields.categorical, fields.continuous) == (1, 1)
    assert fields.error < 1e-9
