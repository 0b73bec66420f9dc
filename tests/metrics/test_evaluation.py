"""The judge: matching, errors, recall and precision, against slow textbook versions."""

import itertools
import math

import numpy as np
import pytest
import torch

from spear.metrics import evaluate
from spear.reconstruction import Reconstruction, Stats


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def reconstruction(inputs, labels=None, certified=None):
    k = len(inputs)
    certified = torch.ones(k, dtype=torch.bool) if certified is None else torch.tensor(certified)
    return Reconstruction(inputs, labels, k, torch.zeros(k, dtype=torch.float64), certified, True, "", Stats(0.0))


@pytest.mark.parametrize("k", [0, 2, 4, 5])
@pytest.mark.parametrize("seed", range(5))
def test_matching_is_optimal(k, seed):
    truth, guess = normal(4, 3, 2, seed=seed), normal(k, 3, 2, seed=seed + 50)
    error = [[float((t - g).norm() / t.norm()) for g in guess] for t in truth]
    small = min(k, 4)
    pairs = [
        list(zip(rows, columns, strict=True))
        for rows in itertools.combinations(range(4), small)
        for columns in itertools.permutations(range(k), small)
    ]
    best = min(pairs, key=lambda chosen: sum(error[r][c] for r, c in chosen))
    result = evaluate(reconstruction(guess), truth)
    expected = [math.inf] * 4
    for r, c in best:
        expected[r] = error[r][c]
        assert int(result.match[r]) == c
    assert result.relative_error.tolist() == pytest.approx(expected)
    assert int((result.match < 0).sum()) == 4 - small


@pytest.mark.parametrize("seed", range(3))
def test_a_perfect_batch_in_any_order(seed):
    truth, labels = normal(6, 1, 4, 4, seed=seed), torch.arange(6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    result = evaluate(reconstruction(truth[order], labels[order]), truth, labels)
    assert (result.recall, result.precision, result.label_accuracy) == (1, 1, 1)
    assert result.recovered.all()
    assert (result.psnr == 200).all()
    assert torch.equal(order[result.match], torch.arange(6))


def test_the_same_image_twice_needs_two_answers():
    truth = normal(1, 5).repeat(2, 1)
    assert evaluate(reconstruction(truth[:1]), truth).recall == 0.5
    assert evaluate(reconstruction(truth), truth).recall == 1


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
@pytest.mark.parametrize("share", [0.9, 1.1])
def test_recovered_depends_on_the_precision(dtype, limit, share):
    truth = torch.ones(1, 100, dtype=dtype)
    result = evaluate(reconstruction(truth.double() * (1 + share * limit)), truth)
    assert bool(result.recovered[0]) == (share < 1)


def test_psnr_is_the_textbook_one_and_capped():
    truth, noise = normal(3, 50), 0.01 * normal(3, 50, seed=1)
    noise[2] = 0
    result = evaluate(reconstruction(truth + noise), truth, data_range=2.0)
    expected = 10 * np.log10(4 / (noise[:2] ** 2).mean(1).numpy())
    np.testing.assert_allclose(result.psnr[:2].numpy(), expected, rtol=1e-9)
    assert float(result.psnr[2]) == 200
    default = evaluate(reconstruction(truth + noise), truth)
    shift = 20 * math.log10(float(truth.max() - truth.min()) / 2)
    np.testing.assert_allclose(default.psnr[:2].numpy(), expected + shift, rtol=1e-9)


def test_precision_counts_certified_samples_only():
    truth = normal(4, 5)
    guess = torch.cat([truth[:2], normal(2, 5, seed=9)])
    assert evaluate(reconstruction(guess, certified=[True, True, True, False]), truth).precision == pytest.approx(2 / 3)
    assert evaluate(reconstruction(guess, certified=[True, False, False, False]), truth).precision == 1
    assert evaluate(reconstruction(guess, certified=[False] * 4), truth).precision == 1
    assert evaluate(reconstruction(guess, certified=[False, False, False, True]), truth).precision == 0


def test_labels():
    truth, labels = normal(3, 5), torch.tensor([4, 5, 6])
    guess = truth[[2, 0]]
    assert evaluate(reconstruction(guess, torch.tensor([6, 1])), truth, labels).label_accuracy == pytest.approx(1 / 3)
    assert evaluate(reconstruction(guess), truth, labels).label_accuracy == 0
    assert evaluate(reconstruction(guess, torch.tensor([6, 1])), truth).label_accuracy == 0


@pytest.mark.parametrize("size", [0, 5, 400])
def test_nothing_recovered(size):
    """Whatever nothing there is of: images, or features of another size."""
    result = evaluate(reconstruction(torch.zeros(0, size, dtype=torch.float64)), normal(3, 5), torch.arange(3))
    assert (result.recall, result.precision, result.label_accuracy) == (0, 1, 0)
    assert torch.isinf(result.relative_error).all()
    assert (result.psnr == 0).all()


def test_sizes_must_agree():
    with pytest.raises(ValueError, match="true inputs have 6 entries, reconstructed ones 5"):
        evaluate(reconstruction(normal(2, 5)), normal(2, 6))


def test_ssim_is_the_textbook_one():
    truth, noise = normal(2, 3, 9, 8), 0.5 * normal(2, 3, 9, 8, seed=1)
    result = evaluate(reconstruction(truth + noise), truth, data_range=4.0)
    for i in range(2):
        values = []
        for c, h, w in itertools.product(range(3), range(9 - 6), range(8 - 6)):
            x, y = (a[i, c, h : h + 7, w : w + 7].flatten() for a in (truth, truth + noise))
            c1, c2 = (0.01 * 4) ** 2, (0.03 * 4) ** 2
            covariance = torch.cov(torch.stack([x, y]))
            means = (2 * x.mean() * y.mean() + c1) / (x.mean() ** 2 + y.mean() ** 2 + c1)
            values.append(means * (2 * covariance[0, 1] + c2) / (covariance.trace() + c2))
        assert float(result.ssim[i]) == pytest.approx(float(sum(values) / len(values)))


def test_ssim_of_what_was_returned_and_of_what_is_not_an_image():
    truth = normal(3, 1, 8, 8)
    result = evaluate(reconstruction(truth[[2, 0]]), truth)
    assert result.ssim.tolist() == pytest.approx([1, 0, 1])
    assert evaluate(reconstruction(truth[:, :, :6]), truth[:, :, :6]).ssim.isnan().all()
    assert evaluate(reconstruction(truth.flatten(1)), truth.flatten(1)).ssim.isnan().all()
