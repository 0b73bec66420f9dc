"""What the notebooks' figures share: style, picture grids, bands over seeds, and saving a figure beside its numbers."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from cycler import cycler
from jaxtyping import Float, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from torch import Tensor

from spear import paths
from spear.data import catalog

# Okabe and Ito's colours, which stay apart for colour-blind readers; yellow, too faint on white, is left out.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TILE = 0.85  # inches of a picture's side in a grid, gap included
CAPTION = 0.22  # height of a caption, in pictures' sides
LETTER = 0.115  # width of a letter of a row's title, in pictures' sides


def style() -> None:
    """Set matplotlib's defaults for the session: sizes legible in the README, constrained layout, `PALETTE`."""
    plt.rcParams.update(
        {
            "axes.grid": True,
            "axes.prop_cycle": cycler(color=PALETTE),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "figure.figsize": (7.5, 4.0),
            "font.size": 11,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "savefig.dpi": 110,
        }
    )


def save(figure: Figure, name: str, frame: pd.DataFrame) -> None:
    """Write `figure` to NAME.png and the numbers it was drawn from to NAME.csv, in `paths.figures()`: both or neither.

    The same figure gives the same bytes: no date, no version. Floats keep six significant digits; the index is not
    written. Raises `ValueError` for a name with other characters than letters, digits, - and _, for an empty frame, or
    for one whose index holds anything.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"a figure cannot be named {name!r}: use letters, digits, - and _")
    if frame.empty or not frame.index.equals(pd.RangeIndex(len(frame))):
        raise ValueError(f"{name}: the numbers need rows, and an index of 0, 1, ...: call reset_index() first")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    numbers = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()
    paths.write({paths.figures() / f"{name}.png": picture.getvalue(), paths.figures() / f"{name}.csv": numbers})


def band(
    axes: Axes, x: Shaped[np.ndarray, " n"], samples: Shaped[np.ndarray, "seeds n"], *, label: str | None = None
) -> pd.DataFrame:
    """Draw the median over seeds against `x` and a band from the 10th to the 90th percentile; return what was drawn.

    The frame has the columns x, p10, median, p90 and as many rows as `x` has entries.
    """
    low, middle, high = np.percentile(samples, (10, 50, 90), axis=0)
    (line,) = axes.plot(x, middle, label=label)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    return pd.DataFrame({"x": x, "p10": low, "median": middle, "p90": high})


def interval(
    axes: Axes, x: Sequence[float] | np.ndarray, table: pd.DataFrame, name: str, *, label: str | None = None
) -> None:
    """Draw column `name` of a table against `x`, with bars from its column `name`_low to `name`_high."""
    middle = table[name]
    bars = [(middle - table[f"{name}_low"]).clip(lower=0), (table[f"{name}_high"] - middle).clip(lower=0)]
    axes.errorbar(x, middle, bars, marker="o", markersize=4, capsize=3, elinewidth=1, label=label)


def shares(axes: Axes, table: pd.DataFrame) -> None:
    """Draw a table of shares from 0 to 1 as coloured cells with their numbers; its index and columns name the axes."""
    axes.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        _ = axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    axes.set(xticks=range(table.shape[1]), xticklabels=table.columns, yticks=range(len(table)), yticklabels=table.index)
    axes.set(xlabel=table.columns.name, ylabel=table.index.name)
    axes.grid(visible=False)


def grid(
    images: Float[Tensor, "k C H W"] | Mapping[str, Tensor],
    name: str | None = None,
    *,
    captions: Mapping[str, Sequence[str]] | None = None,
    columns: int = 8,
) -> Figure:
    """Pictures in rows of `columns`; with several titled rows (k, C, H, W), each picture stands above its counterpart.

    With the `name` of a data set, images are taken as `spear.data.load` normalised them, and clipped to [0, 1];
    without, each is stretched from its least value to its greatest. What is not finite is left white. `captions` gives
    a row's words under its pictures.

    Raises `ValueError` for no images, shapes that differ between rows, or captions that fit no row.
    """
    rows = dict(images) if isinstance(images, Mapping) else {"": images}
    captions = dict(captions or {})
    count = _count(rows, captions)
    columns = min(columns, count)
    figure = plt.figure(layout=PlaceHolderLayoutEngine(True, True))  # "none" gives way to the style's layout once saved
    axes = figure.add_axes((0, 0, 1, 1))
    top = 0.0
    for start in range(0, count, columns):
        shown = slice(start, start + columns)
        for title, row in rows.items():
            _ = axes.text(-0.12, top + 0.5, title, ha="right", va="center")
            _draw(axes, top, row[shown], name, captions.get(title, ())[shown])
            top += 1.06 + CAPTION * (title in captions)
        top += 0.12 * (len(rows) > 1 and start + columns < count)
    margin = LETTER * max(map(len, rows))
    axes.set(xlim=(-margin, 1.06 * columns), ylim=(top, -0.06), aspect="equal")
    axes.axis("off")
    figure.set_size_inches(TILE * (1.06 * columns + margin), TILE * (top + 0.06))
    return figure


def _draw(axes: Axes, top: float, row: Tensor, name: str | None, captions: Sequence[str]) -> None:
    pixels = catalog.unnormalize(row, name) if name else _stretched(row)
    pixels = torch.where(row.isfinite(), pixels.clamp(0, 1), 1.0).detach().cpu().movedim(1, -1)
    for i, image in enumerate(pixels.expand(-1, -1, -1, 3)):
        axes.imshow(image.float().numpy(), extent=(1.06 * i, 1.06 * i + 1, top + 1, top))
    for i, words in enumerate(captions):
        _ = axes.text(1.06 * i + 0.5, top + 1.02, words, ha="center", va="top", fontsize=8)


def _stretched(row: Float[Tensor, "k C H W"]) -> Float[Tensor, "k C H W"]:
    low = row.where(row.isfinite(), torch.inf).amin((1, 2, 3), keepdim=True)
    high = row.where(row.isfinite(), -torch.inf).amax((1, 2, 3), keepdim=True)
    return (row - low) / (high - low)


def _count(rows: Mapping[str, Tensor], captions: Mapping[str, Sequence[str]]) -> int:
    shapes = {tuple(row.shape) for row in rows.values()}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape:
        raise ValueError(f"rows of pictures need one shape (k, 1 or 3, H, W), not {sorted(shapes)}")
    for title, words in captions.items():
        if title not in rows or len(words) != shape[0]:
            raise ValueError(f"{len(words)} captions for {title!r}, with rows {', '.join(rows)} of {shape[0]} pictures")
    return shape[0]
