"""The data sets known by name: how they are normalised, and where each one is. Nothing is read, no torch is loaded.

`spear.data.catalog` reads them.
"""

from dataclasses import dataclass
from pathlib import Path

from spear import paths
from spear.data import adult


@dataclass(frozen=True)
class DataSet:
    """Shape of one sample, and the mean and standard deviation that normalise it, for each channel (or table entry).

    `layout` is the folder or file, under the data root, where it is when it is no sample pack; `built_in` data sets are
    always there.
    """

    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: str | None = None
    built_in: bool = False


_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATA_SETS = {
    "digits": DataSet((1, 8, 8), (0.3053,), (0.3759,), built_in=True),
    "photos": DataSet((3, 32, 32), *_IMAGENET, built_in=True),
    "photos64": DataSet((3, 64, 64), *_IMAGENET, built_in=True),
    "photos224": DataSet((3, 224, 224), *_IMAGENET, built_in=True),
    "mnist": DataSet((1, 28, 28), (0.1307,), (0.3081,), "MNIST"),
    "cifar10": DataSet((3, 32, 32), (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261), "cifar-10-batches-py"),
    "tinyimagenet": DataSet((3, 64, 64), *_IMAGENET),
    "imagenet": DataSet((3, 224, 224), *_IMAGENET, "imagenet"),
    "adult": DataSet((adult.WIDTH,), *adult.moments(), "adult.csv"),
}
BUILT_IN = tuple(name for name, known in DATA_SETS.items() if known.built_in)


def names() -> tuple[str, ...]:
    """The data sets known by name; packs of your own images are not among them."""
    return tuple(DATA_SETS)


def available(name: str, root: Path | str | None = None) -> bool:
    """Whether `load` finds the data set (a damaged file counts). Raises `ValueError` for an unknown name."""
    return name in BUILT_IN or place(name, root) is not None


def place(name: str, root: Path | str | None = None) -> Path | None:
    """Where a data set that is not built in is: its sample pack, else its layout; None where neither is there.

    Raises `ValueError` for an unknown name: neither one of `DATA_SETS` nor that of a pack of your own.
    """
    pack, layout = pack_place(name, root), DATA_SETS[name].layout if name in DATA_SETS else None
    if pack.exists():
        return pack
    if name not in DATA_SETS:
        raise ValueError(f"unknown data set {name!r}: neither a pack {pack} nor one of {', '.join(DATA_SETS)}")
    found = None if layout is None else folder(root) / layout
    return found if found is not None and found.exists() else None


def pack_place(name: str, root: Path | str | None = None) -> Path:
    """Where the sample pack `name` is, or would be."""
    return folder(root) / f"{name}.npz"


def stamp(path: Path) -> list[int]:
    """What tells a change of a file, or of those in a folder: how many, their size, when the last was written."""
    found = [entry.stat() for entry in (path, *path.rglob("*"))]
    return [len(found), sum(entry.st_size for entry in found), max(entry.st_mtime_ns for entry in found)]


def folder(root: Path | str | None = None) -> Path:
    """The folder that data sets are in: `root`, by default the environment's (`spear.paths.data_root`)."""
    return paths.data_root() if root is None else Path(root)
