"""Images that ship with scikit-learn and scikit-image, cut to size: always there."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from spear.data.packs import Pack

# Photographs that ship with scikit-image and scikit-learn, in colour, with nobody in them.
PHOTOGRAPHS = {
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "tissue": ("skimage", "data/ihc.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "pagoda": ("sklearn", "datasets/images/china.jpg"),
}


@dataclass(frozen=True)
class Cut:
    """How photographs are cut into crops of `size` pixels a side.

    Each photograph is shrunk so that its shorter side has each of the `heights` (never enlarged), cut on a regular grid
    with about `stride` pixels from crop to crop. Kept are at most `quota` crops of it, those with the strongest edges:
    the mean difference of neighbouring pixels, down and across together, of `EDGES` grey levels of 255 at least.
    """

    size: int
    heights: tuple[int, ...]
    stride: int
    quota: int


EDGES = 7.5  # grey levels of 255: crops under it show sky or blur
CUTS = {
    32: Cut(32, heights=(64, 96, 128, 160), stride=20, quota=90),
    64: Cut(64, heights=(96, 128, 192, 256), stride=40, quota=56),
    224: Cut(224, heights=(224, 300, 400), stride=112, quota=14),
}


@functools.cache
def digits() -> Pack:
    """scikit-learn's 1,797 handwritten digits, 8x8, grey."""
    from sklearn.datasets import load_digits  # here, as it takes a second that only this data set needs

    bunch = load_digits()
    images = np.rint(bunch.images[..., None] * (255 / 16)).astype(np.uint8)
    return Pack(images, bunch.target.astype(np.int64), tuple("0123456789"))


@functools.cache
def photos(size: int) -> Pack:
    """Crops of 32, 64 or 224 pixels a side from seven photographs; the label is the photograph."""
    crops = [_sharpest(_crops(place, CUTS[size]), CUTS[size].quota) for place in PHOTOGRAPHS.values()]
    labels = np.repeat(np.arange(len(crops), dtype=np.int64), [len(of_one) for of_one in crops])
    return Pack(np.concatenate(crops), labels, tuple(PHOTOGRAPHS))


def _crops(place: tuple[str, str], cut: Cut) -> UInt8[np.ndarray, "N s s 3"]:
    package, member = place
    with (files(package) / member).open("rb") as file, Image.open(file) as image:
        photograph = image.convert("RGB")
    crops = []
    for height in (height for height in cut.heights if height <= min(photograph.size)):
        ratio = height / min(photograph.size)
        size = round(photograph.width * ratio), round(photograph.height * ratio)
        shrunk = np.asarray(photograph.resize(size, Image.Resampling.LANCZOS))
        for y in _offsets(shrunk.shape[0], cut):
            crops += [shrunk[y : y + cut.size, x : x + cut.size] for x in _offsets(shrunk.shape[1], cut)]
    return np.stack(crops)


def _offsets(length: int, cut: Cut) -> Sequence[int]:
    room = length - cut.size
    return np.linspace(0, room, 1 + round(room / cut.stride)).round().astype(int).tolist()


def _sharpest(crops: UInt8[np.ndarray, "N s s 3"], quota: int) -> UInt8[np.ndarray, "k s s 3"]:
    grey = crops.mean(-1)
    edges = sum(np.abs(np.diff(grey, axis=axis)).mean((1, 2)) for axis in (1, 2))
    kept = np.argsort(-edges, kind="stable")[:quota]
    return crops[np.sort(kept[edges[kept] >= EDGES])]
