"""Where truth and guess meet: how much of a batch a reconstruction holds. Attack code never imports this."""

from dataclasses import dataclass

import numpy as np
import scipy  # its parts, and those of skimage, load when they are first used
import skimage
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spear.accuracy import Accuracy
from spear.certificate import norms
from spear.reconstruction import Reconstruction

PSNR_CAP = 200.0  # dB: an exact match is infinitely good, which no mean stands
WINDOW = 7  # side of the squares over which SSIM averages, in pixels


@dataclass(frozen=True)
class Evaluation:
    """A reconstruction against the truth, under the one-to-one matching of least total error.

    Per true sample: `match` (b,) is the index of the returned sample (-1 where none), `relative_error` (b,) = |guess -
    truth| / |truth| (infinite where none), `psnr` (b,) in dB, capped at 200 (0 where none), `ssim` (b,) the structural
    similarity, 1 for equal images (0 where none; NaN for what is not an image (C, H, W) of at least 7 x 7 pixels),
    `recovered` (b,) whether the relative error is under what a certificate allows, `Reconstruction.limit` (or 1e-3 for
    inputs below float64). An error is relative to `spear.certificate.norms`. Over the batch: `recall`
    is the share recovered, `precision` the share of certified samples that are true (1 where none is certified),
    `label_accuracy` the share of the batch whose label was returned right.
    """

    match: Int[Tensor, " b"]
    relative_error: Float[Tensor, " b"]
    psnr: Float[Tensor, " b"]
    ssim: Float[Tensor, " b"]
    recovered: Bool[Tensor, " b"]
    recall: float
    precision: float
    label_accuracy: float


def evaluate(
    reconstruction: Reconstruction,
    inputs: Float[Tensor, "b *input_shape"],
    labels: Int[Tensor, " b"] | None = None,
    *,
    data_range: float | int | None = None,
) -> Evaluation:
    """Compare what an attack returned with the batch that was attacked.

    `data_range` is the peak-to-peak range of the inputs for PSNR and SSIM; the default is that of the true batch.
    Without `labels` the label accuracy is 0.

    Raises `ValueError` for inputs of another size than the reconstruction's.
    """
    truth = inputs.flatten(1).cpu().double()
    guess = reconstruction.inputs.flatten(1).cpu().double()
    guess = guess if len(guess) else truth[:0]  # nothing has no size
    if truth.shape[1] != guess.shape[1]:
        raise ValueError(f"true inputs have {truth.shape[1]} entries, reconstructed ones {guess.shape[1]}")
    error = torch.cdist(truth, guess, compute_mode="donot_use_mm_for_euclid_dist")
    error = error / norms(truth)[:, None]
    rows, columns = (
        torch.as_tensor(i, dtype=torch.long) for i in scipy.optimize.linear_sum_assignment(error.clamp_max(1e6))
    )
    match = torch.full((len(truth),), -1)
    match[rows] = columns
    relative = torch.full((len(truth),), torch.inf, dtype=torch.float64)
    relative[rows] = error[rows, columns]
    recovered = relative < max(Accuracy.of_dtype(inputs.dtype).recovered, reconstruction.limit)
    certified = reconstruction.certified.cpu()
    true_certified = certified[match[recovered]].sum()
    peak = float(truth.max() - truth.min()) if data_range is None else data_range
    return Evaluation(
        match=match,
        relative_error=relative,
        psnr=_psnr(truth, guess, match, peak),
        ssim=_ssim(truth, guess, match, peak, tuple(inputs.shape[1:])),
        recovered=recovered,
        recall=float(recovered.double().mean()),
        precision=float(true_certified / certified.sum()) if certified.any() else 1.0,
        label_accuracy=_label_accuracy(reconstruction.labels, labels, match),
    )


def _psnr(
    truth: Float[Tensor, "b n"], guess: Float[Tensor, "k n"], match: Int[Tensor, " b"], peak: float | int
) -> Float[Tensor, " b"]:
    psnr = torch.zeros(len(truth), dtype=torch.float64)
    with np.errstate(divide="ignore"):  # an exact match is infinitely good
        for row in (match >= 0).nonzero()[:, 0].tolist():
            pair = truth[row].numpy(), guess[match[row]].numpy()
            psnr[row] = min(PSNR_CAP, skimage.metrics.peak_signal_noise_ratio(*pair, data_range=peak))
    return psnr


def _ssim(
    truth: Float[Tensor, "b n"],
    guess: Float[Tensor, "k n"],
    match: Int[Tensor, " b"],
    peak: float | int,
    shape: tuple[int, ...],
) -> Float[Tensor, " b"]:
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004), over squares of equal weight, mean of channels."""
    if len(shape) != 3 or min(shape[1:]) < WINDOW:
        return torch.full((len(truth),), torch.nan, dtype=torch.float64)
    ssim = torch.zeros(len(truth), dtype=torch.float64)
    for row in (match >= 0).nonzero()[:, 0].tolist():
        pair = (image.reshape(shape).numpy() for image in (truth[row], guess[match[row]]))
        ssim[row] = skimage.metrics.structural_similarity(*pair, data_range=peak, channel_axis=0, win_size=WINDOW)
    return ssim


def _label_accuracy(
    guess: Int[Tensor, " k"] | None, truth: Int[Tensor, " b"] | None, match: Int[Tensor, " b"]
) -> float:
    if guess is None or truth is None:
        return 0.0
    right = (guess.cpu()[match] == truth.cpu()) & (match >= 0) if len(guess) else torch.zeros(len(match))
    return float(right.double().mean())
