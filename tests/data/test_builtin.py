"""Images that ship with other packages."""

import numpy as np
import pytest

from spear import data
from spear.data import builtin


@pytest.mark.parametrize(("size", "least"), [(32, 500), (64, 300), (224, 80)])
def test_photo_crops_are_many_distinct_detailed_and_from_every_photograph(size, least):
    pack = builtin.photos(size)
    assert len(pack.images) >= least
    assert pack.images.shape[1:] == (size, size, 3)
    assert len({image.tobytes() for image in pack.images}) == len(pack.images)
    assert np.array_equal(np.unique(pack.labels), np.arange(len(builtin.PHOTOGRAPHS)))
    assert 2 * builtin.CUTS[size].stride >= size
    grey = pack.images.astype(float).mean(-1)
    across, down = (np.abs(np.diff(grey, axis=axis)).mean((1, 2)) for axis in (2, 1))
    assert (across + down).min() >= builtin.EDGES
    assert (np.ptp(pack.images.astype(int), axis=-1).mean((1, 2)) > 2).all()  # in colour


def test_digits_are_normalised_by_their_own_moments():
    inputs, _ = data.load("digits", count=1797)
    assert abs(inputs.mean()) < 1e-3
    assert abs(inputs.std() - 1) < 1e-3
