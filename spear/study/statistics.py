"""What a cell of an ablation amounts to: one row per cell, each measure with its 95 % confidence interval."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

SHARES = ("recall", "precision", "complete", "label_accuracy")
MEANS = ("psnr", "proposals", "rank", "zero_share", "agreeing")
MAGNITUDES = ("error", "seconds", "condition", "spread")
CONFIDENCE = 0.95  # of the intervals
FINITE = (1e-17, 1e17)  # magnitudes are held within: 0 and infinity have no logarithm


def summarize(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """One row per cell, cells in order of appearance: `batches`, and each measure with `_low` and `_high` around it.

    Shares get a Wilson interval whose unit is the batch, as samples of one batch succeed and fail together; means a
    t interval; magnitudes (`error`, `seconds`, `condition`, `spread`) the geometric mean with a t interval of the
    logarithms. Values that are missing do not count.
    """
    rows = []
    for key, group in frame.groupby(list(by), sort=False):
        row = dict(zip(by, key, strict=True)) | {"batches": len(group)}
        for names, interval in ((SHARES, share_interval), (MEANS, mean_interval), (MAGNITUDES, magnitude_interval)):
            for name in names:
                values = group[name].dropna().to_numpy(float)
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), interval(values), strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def share_interval(values: Float[np.ndarray, " n"]) -> tuple[float, float, float]:
    """Mean of shares in [0, 1] and its Wilson interval for n trials.

    Of all quantities in [0, 1] with a given mean, one that is 0 or 1 varies most, so the interval is wide enough for
    shares between; a number of successes that is no integer is rounded outwards.
    """
    if not len(values):
        return math.nan, math.nan, math.nan
    total = round(values.sum(), 9)
    low, high = (
        stats.binomtest(int(k), len(values)).proportion_ci(CONFIDENCE, method="wilson")
        for k in (math.floor(total), math.ceil(total))
    )
    return float(values.mean()), float(low.low), float(high.high)


def mean_interval(values: Float[np.ndarray, " n"]) -> tuple[float, float, float]:
    """Mean and its t interval; no interval (NaN) for fewer than two values."""
    if not len(values):
        return math.nan, math.nan, math.nan
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * pd.Series(values).sem()
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def magnitude_interval(values: Float[np.ndarray, " n"]) -> tuple[float, float, float]:
    """Geometric mean and the t interval of the logarithms, with values held within `FINITE`."""
    log = mean_interval(np.log(values.clip(*FINITE)))
    return math.exp(log[0]), math.exp(log[1]), math.exp(log[2])
