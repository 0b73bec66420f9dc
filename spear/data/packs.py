"""Labelled images: the sample pack (one npz file), and folders of pictures."""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from spear import paths

PICTURES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, eq=False)
class Pack:
    """Images (N, H, W, C) of 0..255, labels (N,) from 0, and what each label means (K,).

    Raises `ValueError` for another type or shape, channels neither 1 nor 3, no images, or a label not in 0..K-1.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
            raise ValueError(f"images are {images.dtype} {images.shape}, not uint8 (N, H, W, 1 or 3)")
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels are {labels.dtype} {labels.shape}, not int64 ({len(images)},)")
        if labels.min() < 0 or labels.max() >= len(self.classes):
            raise ValueError(f"labels from {labels.min()} to {labels.max()} with {len(self.classes)} classes")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def take(self, index: Int64[Tensor, " k"]) -> Float64[Tensor, "k C H W"]:
        """The images at `index`, in [0, 1]."""
        return unit_interval(self.images[index.numpy()])


def read(path: Path) -> Pack:
    """The sample pack at `path`, checked. Nothing is ever unpickled.

    Raises `ValueError` naming the file for a truncated or foreign file, a missing array, or one that `Pack` refuses.
    """
    with path.open("rb") as file:
        try:
            return _unpacked(file)
        except Exception as error:  # damaged bytes raise whatever zipfile, zlib, lzma, bz2 and numpy come upon
            raise ValueError(f"{path} is no sample pack: {error}") from error


def write(pack: Pack, path: Path) -> None:
    """Write `pack` to `path`, whole or not at all."""
    content = io.BytesIO()
    np.savez_compressed(content, images=pack.images, labels=pack.labels, classes=np.array(pack.classes, dtype=np.str_))
    paths.write({path: content.getvalue()})


def from_folder(folder: Path, shape: tuple[int, int, int] | None = None) -> Pack:
    """A pack of the pictures in `folder`'s sub-folders, one sub-folder a class, both in alphabetical order.

    Pictures are scaled and cropped about their centre to `shape` (C, H, W); without it they are RGB, all of one size.
    Raises `ValueError` for no pictures, sizes that differ, or a file that is no readable picture.
    """
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    found = [(path, label) for label, name in enumerate(classes) for path in pictures(folder / name)]
    if not found:
        raise ValueError(f"{folder}: no pictures in sub-folders, one for each class")
    images = [decode(path, shape) for path, _ in found]
    for (path, _), image in zip(found, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(f"{path} has shape {image.shape}, {found[0][0]} has {images[0].shape}")
    return Pack(np.stack(images), np.array([label for _, label in found], dtype=np.int64), tuple(classes))


def decode(source: Path | zipfile.ZipExtFile, shape: tuple[int, int, int] | None = None) -> UInt8[np.ndarray, "H W C"]:
    """The picture in a file: its own size in RGB, or scaled and cropped about its centre to `shape` (C, H, W).

    Raises `ValueError` naming the file where it is no readable picture.
    """
    try:
        with Image.open(source) as image:
            if shape is None:
                return np.asarray(image.convert("RGB"))
            channels, height, width = shape
            picture = image.convert("L" if channels == 1 else "RGB")
            fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
            return np.asarray(fitted).reshape(height, width, channels)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = source if isinstance(source, Path) else source.name
        raise ValueError(f"{name} is no readable picture: {error}") from error


def _unpacked(file: io.BufferedReader) -> Pack:
    if not zipfile.is_zipfile(file):
        raise ValueError("truncated, or no npz file")
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        images, labels, classes = (archive[key] for key in ("images", "labels", "classes"))
    if classes.dtype.kind != "U" or classes.ndim != 1:
        raise ValueError(f"classes are {classes.dtype} {classes.shape}, not strings (K,)")
    return Pack(images, labels, tuple(classes.tolist()))


def pictures(folder: Path) -> list[Path]:
    """The picture files anywhere under a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())


def unit_interval(images: UInt8[np.ndarray, "k H W C"]) -> Float64[Tensor, "k C H W"]:
    """Bytes as numbers from 0 to 1, channels first."""
    return torch.from_numpy(images).movedim(-1, 1).to(torch.float64).contiguous() / 255
