import dataclasses

import pytest
import torch

from spear.accuracy import FINE, SHARP, Accuracy


@pytest.mark.parametrize(("dtype", "recovered"), [(torch.float64, 1e-6), (torch.float32, 1e-3), (torch.uint8, 1e-3)])
def test_what_counts_as_recovered_follows_from_the_type(dtype, recovered):
    assert Accuracy.of_dtype(dtype).recovered == recovered


@pytest.mark.parametrize("pair", [(2**-52, 1e-13), (1e-13, 1e-11), (1e-11, 1e-9), (1e-9, 2**-23), (2**-23, 1e-3)])
def test_a_coarser_rounding_never_asks_for_more(pair):
    fine, coarse = (dataclasses.astuple(Accuracy.of(eps)) for eps in pair)
    assert all(a <= b for a, b in zip(fine, coarse, strict=True))


@pytest.mark.parametrize("eps", [2**-52, FINE / 2, FINE, SHARP / 2, SHARP, 2**-23])
def test_thresholds_lie_above_the_rounding(eps):
    assert min(dataclasses.astuple(Accuracy.of(eps))) > eps


@pytest.mark.parametrize("eps", [2**-52, SHARP, 1e-6])
def test_what_is_asked_of_an_input_follows_from_its_dtype_alone(eps):
    """A step at a tiny learning rate has large roundings, and float64 is float64 all the same."""
    assert Accuracy.of(eps, torch.float64).recovered == Accuracy.of_dtype(torch.float64).recovered
    assert Accuracy.of(eps, torch.float32).recovered == Accuracy.of_dtype(torch.float32).recovered
