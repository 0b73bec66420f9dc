"""Labelled images: the sample pack (one npz file), and folders of pictures."""

import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, UInt, UInt16
from PIL import Image, ImageOps
from torch import Tensor

from spear import paths
from spear.data import deep_png

TOP = 65535  # the largest value of 16 bits
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue in grey, as Pillow has it
LEVELS = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # Pillow's names for pictures of more than 8 bits, which it clips
FREE, EXPANSION = 2**26, 100  # bytes that a pack may unpack to: so many however small it is, and for each of its own
CHUNK, MOST_HEADER = 2**20, 2**17  # bytes read at a time, and in the header of an array
PICTURES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, eq=False)
class Pack:
    """Images (N, H, W, C) of 0..255, or of 0..65535 in 16 bits, labels (N,) from 0, and what each label means (K,).

    Raises `ValueError` for another type or shape, channels neither 1 nor 3, no images, or a label not in 0..K-1.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype not in LEVELS or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
            raise ValueError(f"images are {images.dtype} {images.shape}, not uint8 or uint16 (N, H, W, 1 or 3)")
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
    """The sample pack at `path`, checked. Nothing is ever unpickled, nor more memory taken than its size justifies.

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
    Where one has more than 8 bits, the pack has 16.
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
    return Pack(stacked(images), np.array([label for _, label in found], dtype=np.int64), tuple(classes))


def stacked(images: Sequence[UInt[np.ndarray, "H W C"]]) -> UInt[np.ndarray, "N H W C"]:
    """Pictures as one array: in 8 bits, or all in 16 where one is."""
    if all(image.dtype == np.uint8 for image in images):
        return np.stack(images)
    wide = (image if image.dtype == np.uint16 else image.astype(np.uint16) * np.uint16(257) for image in images)
    return np.stack(tuple(wide))


def decode(source: Path | zipfile.ZipExtFile, shape: tuple[int, int, int] | None = None) -> UInt[np.ndarray, "H W C"]:
    """The picture in a file: its own size in RGB, or scaled and cropped about its centre to `shape` (C, H, W).

    A grey picture of more than 8 bits, and a PNG in colours, keeps 16 of them; one of floating-point numbers runs from
    0 to 1. Raises `ValueError` naming the file where it is no readable picture, or has values beyond these.
    """
    try:
        with Image.open(source) as image:
            if image.mode in DEEP:
                return _deep(np.asarray(image).astype(np.float32)[..., None], 1 if image.mode == "F" else TOP, shape)
            if _is_cut(image):
                return _deep(_colours(image), TOP, shape)
            if shape is None:
                return np.asarray(image.convert("RGB"))
            channels, height, width = shape
            picture = image.convert("L" if channels == 1 else "RGB")
            fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
            return np.asarray(fitted).reshape(height, width, channels)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = source if isinstance(source, Path) else source.name
        raise ValueError(f"{name} is no readable picture: {error}") from error


def _is_cut(image: Image.Image) -> bool:
    """Whether a picture has more than 8 bits in each colour, of which Pillow leaves 8."""
    told = [tile[3] if isinstance(tile[3], tuple) else (tile[3],) for tile in image.tile]
    return any(";16" in str(word) or (isinstance(word, int) and word == TOP) for words in told for word in words)


def _colours(image: Image.Image) -> Float32[np.ndarray, "H W C"]:
    """A PNG of 16 bits in each colour, transparency left out. Raises `ValueError` for another kind of file."""
    if image.format != "PNG":
        raise ValueError(f"a {image.format} of 16 bits in each colour, of which 8 would be lost: save it as PNG")
    image.fp.seek(0)
    return deep_png.read(image.fp.read()).astype(np.float32)


def _deep(
    values: Float32[np.ndarray, "H W C"], top: int, shape: tuple[int, int, int] | None
) -> UInt16[np.ndarray, "_H _W _C"]:
    """A picture of more than 8 bits, from 0 to `top`, its range kept."""
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        raise ValueError(f"values from {values.min():g} to {values.max():g} are not within 0 and {top}: scale them")
    channels, height, width = shape or (3, *values.shape[:2])
    if channels < values.shape[-1]:
        values = (values @ LUMA)[..., None]
    if shape is not None:
        size, how = (width, height), Image.Resampling.LANCZOS
        each = [ImageOps.fit(Image.fromarray(np.ascontiguousarray(v)), size, how) for v in np.moveaxis(values, -1, 0)]
        values = np.stack([np.asarray(v) for v in each], -1)
    levels = np.rint(np.clip(values, 0, top) * (TOP / top)).astype(np.uint16)  # resampling overshoots at edges
    return np.broadcast_to(levels, (*levels.shape[:2], channels)).copy()


def _unpacked(file: io.BufferedReader) -> Pack:
    if not zipfile.is_zipfile(file):
        raise ValueError("truncated, or no npz file")
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        entries = [_entry(archive, key) for key in ("images", "labels", "classes")]
        size = sum(entry.file_size for entry in archive.infolist())
        if size > FREE + EXPANSION * file.seek(0, io.SEEK_END):
            raise ValueError(f"it unpacks to {size:,} bytes, more than {EXPANSION} times its size")
        images, labels, classes = (_array(archive, entry) for entry in entries)
    if classes.dtype.kind != "U" or classes.ndim != 1:
        raise ValueError(f"classes are {classes.dtype} {classes.shape}, not strings (K,)")
    return Pack(images, labels, tuple(classes.tolist()))


def _entry(archive: zipfile.ZipFile, key: str) -> zipfile.ZipInfo:
    if f"{key}.npy" not in archive.namelist():
        raise ValueError(f"{key} is not a file in the archive")
    entry = archive.getinfo(f"{key}.npy")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{key} is compressed in another way than NumPy does it")
    return entry


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """The array in an entry, which has to be as large as it says, in its own header and in the archive's."""
    content, done = bytearray(entry.file_size), 0
    with archive.open(entry) as member, memoryview(content) as view:
        while read := member.readinto(view[done : done + CHUNK]):
            done += read
    stream = io.BytesIO(content[:MOST_HEADER])
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = header(stream)
    if dtype.hasobject:
        raise ValueError(f"{entry.filename} holds Python objects, which are not unpickled")
    if stream.tell() + math.prod(shape) * dtype.itemsize != done:
        raise ValueError(f"{entry.filename} says {dtype} {shape}, which are not its {done:,} bytes")
    return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape, order="F" if by_columns else "C")


def pictures(folder: Path) -> list[Path]:
    """The picture files anywhere under a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())


def unit_interval(images: UInt[np.ndarray, "k H W C"]) -> Float64[Tensor, "k C H W"]:
    """Levels of 8 or 16 bits as numbers from 0 to 1, channels first."""
    return torch.from_numpy(images).movedim(-1, 1).to(torch.float64).contiguous() / LEVELS[images.dtype]
