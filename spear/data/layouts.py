"""Data sets as their publishers or torchvision lay them out: MNIST, CIFAR-10, ImageNet's photographs."""

import gzip
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from spear.data import packs
from spear.data.packs import Pack

SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True, eq=False)
class Photographs:
    """Picture files, labels (N,) and classes (K,): like a pack, but decoded only when taken, to `shape` (C, H, W)."""

    files: tuple[Path, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    shape: tuple[int, int, int]

    def take(self, index: Int64[Tensor, " k"]) -> Float64[Tensor, "k C H W"]:
        """The images at `index`, in [0, 1]. Raises `ValueError` naming a file that is no readable picture."""
        return packs.unit_interval(packs.stacked([packs.decode(self.files[i], self.shape) for i in index.tolist()]))


def photographs(folder: Path, shape: tuple[int, int, int]) -> Photographs:
    """ImageNet's pictures under `folder`; the class is the synset (`n01580077`) in the file's or its folder's name.

    Raises `ValueError` for no pictures, or one whose name and folder carry no synset.
    """
    found = packs.pictures(folder)
    if not found:
        raise ValueError(f"{folder}: no pictures")
    synsets = [_synset(path) for path in found]
    classes = sorted(set(synsets))
    labels = np.array([classes.index(synset) for synset in synsets], dtype=np.int64)
    return Photographs(tuple(found), labels, tuple(classes), shape)


def read_mnist(folder: Path) -> Pack:
    """MNIST's 60,000 training images, from torchvision's folder `MNIST`. Raises `ValueError` naming a bad file."""
    return read_idx(folder / "raw", suffix="")


def read_cifar10(folder: Path) -> Pack:
    """CIFAR-10's 50,000 training images, from its folder `cifar-10-batches-py`, whose checksums torchvision checks.

    Raises `ValueError` naming the folder where a file is missing or altered.
    """
    from torchvision.datasets import CIFAR10  # here, as it takes a second that only this data set needs

    try:
        images = CIFAR10(folder.parent, train=True)
    except (RuntimeError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder}: CIFAR-10 is incomplete or altered") from error
    return Pack(images.data, np.array(images.targets, dtype=np.int64), tuple(images.classes))


def read_idx(folder: Path, suffix: str = ".gz") -> Pack:
    """MNIST's training images from its two idx files, as they are published or, without a suffix, unpacked."""
    images = _idx(folder / f"train-images-idx3-ubyte{suffix}")[..., None]
    labels = _idx(folder / f"train-labels-idx1-ubyte{suffix}")
    try:
        return Pack(images, labels.astype(np.int64), tuple("0123456789"))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _idx(path: Path) -> UInt8[np.ndarray, "..."]:
    # two zero bytes, 8 for unsigned bytes, the number of dimensions, each as a big-endian integer, the entries
    try:
        content = _unpacked(path) if path.suffix == ".gz" else path.read_bytes()
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin as one")
        shape = np.frombuffer(content, ">i4", content[3], 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (ValueError, IndexError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no idx file of bytes: {error}") from error


def _unpacked(path: Path) -> bytes:
    most = packs.FREE + packs.EXPANSION * path.stat().st_size
    with gzip.open(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it unpacks to more than {packs.EXPANSION} times its size")
    return content


def _synset(path: Path) -> str:
    found = SYNSET.search(path.name) or SYNSET.search(path.parent.name)
    if found is None:
        raise ValueError(f"{path}: neither its name nor its folder's carries a synset such as n01580077")
    return found.group()
