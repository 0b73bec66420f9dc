"""Real data by name: seeded batches of images (or rows of a table), normalised, with their labels.

`digits`, `photos`, `photos64` and `photos224` ship with scikit-learn and scikit-image and are always there. `mnist`,
`cifar10`, `tinyimagenet`, `imagenet` and `adult` are looked for under the data root (`spear.paths.data_root`): the
sample pack NAME.npz first, then the data set as its publisher or torchvision lays it out. A pack of your own images
(`spear data pack FOLDER NAME`) is loaded by its name too.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from spear.data import builtin, census, downloads, layouts, packs
from spear.data.census import Table
from spear.data.known import BUILT_IN, DATA_SETS, DataSet, folder, pack_place, place, stamp
from spear.data.layouts import Photographs
from spear.data.packs import Pack

Source = Pack | Photographs | Table

MAKERS: dict[str, Callable[[], Pack]] = {  # of the data sets that are built in
    "digits": builtin.digits,
    "photos": functools.partial(builtin.photos, 32),
    "photos64": functools.partial(builtin.photos, 64),
    "photos224": functools.partial(builtin.photos, 224),
}
READERS: dict[str, Callable[[Path], Source]] = {  # of what is no sample pack
    "mnist": layouts.read_mnist,
    "cifar10": layouts.read_cifar10,
    "imagenet": functools.partial(layouts.photographs, shape=DATA_SETS["imagenet"].shape),
    "adult": census.read,
}


def load(
    name: str, *, count: int, seed: int = 0, root: Path | str | None = None, normalize: bool = True
) -> tuple[Float64[Tensor, "count *shape"], Int64[Tensor, " count"]]:
    """`count` different samples of the data set `name` and their labels, drawn by `seed`.

    Images are (count, C, H, W), in [0, 1] or, by default, normalised by the data set's mean and standard deviation;
    `adult` gives rows laid out as in `spear.data.adult.COLUMNS`. A larger count extends the smaller one with the
    same seed.

    Raises `FileNotFoundError` with the command to run where the data set is absent; `ValueError` for an unknown name, a
    count outside 1..N, or a file that is damaged.
    """
    source = _source(name, root)
    total = len(source.labels)
    if not 1 <= count <= total:
        raise ValueError(f"{name} has {total} samples here, so count must be 1 to {total}, not {count}")
    index = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    inputs, labels = source.take(index), torch.from_numpy(source.labels)[index]
    if normalize:
        center, scale = _constants(name, root, inputs)
        inputs = (inputs - center) / scale
    return inputs, labels


def unnormalize(
    inputs: Float[Tensor, "*batch_shape"], name: str, *, root: Path | str | None = None
) -> Float[Tensor, "*batch_shape"]:
    """Samples as `load` normalised them, back to [0, 1] (`adult`: to the table's units); any leading dimensions."""
    center, scale = _constants(name, root, inputs)
    return inputs * scale + center


def shape(name: str, *, root: Path | str | None = None) -> tuple[int, ...]:
    """Shape of one sample: (C, H, W), or (n,) for a table. Raises `ValueError` for an unknown name."""
    return _data_set(name, root).shape


def classes(name: str, *, root: Path | str | None = None) -> tuple[str, ...]:
    """What each label means. Raises as `load` does."""
    return _source(name, root).classes


def count(name: str, *, root: Path | str | None = None) -> int:
    """How many samples of the data set are here. Raises as `load` does."""
    return len(_source(name, root).labels)


def mean(name: str) -> Float64[Tensor, " C"]:
    """Mean that normalisation subtracts, for each channel (or table entry), with pixels in [0, 1]."""
    return torch.tensor(_data_set(name, None).mean, dtype=torch.float64)


def std(name: str) -> Float64[Tensor, " C"]:
    """Standard deviation that normalisation divides by, for each channel (or table entry), with pixels in [0, 1]."""
    return torch.tensor(_data_set(name, None).std, dtype=torch.float64)


def fetch(name: str, root: Path | str | None = None, progress: downloads.Progress | None = None) -> Path:
    """Download a data set into the data root unless it is there already; return where it is.

    What is downloaded ends as one sample pack: MNIST's and CIFAR-10's training images, Tiny ImageNet's validation
    images (`adult`: its training table). `progress` is called with bytes done and expected, file by file.

    Raises `ValueError` for a name with nothing to download or a wrong checksum, `OSError` where the download fails.
    """
    if name in BUILT_IN:
        raise ValueError(f"{name} ships with scikit-learn and scikit-image: there is nothing to fetch")
    if path := place(name, root):
        _source(name, root)  # damaged: say so now
        return path
    if name not in downloads.ARCHIVES:
        raise ValueError(_absent(name, folder(root)))
    return downloads.fetch(name, folder(root), progress=progress)


def pack(source: Path | str | Pack, name: str, root: Path | str | None = None) -> Path:
    """Make the sample pack `name` under the data root from a folder of class sub-folders of pictures, or from arrays.

    Pictures of a known data set are scaled and cropped about their centre to its shape; with a name of your own they
    keep theirs, which must be one for all. Return the pack's path.

    Raises `ValueError` for a name that cannot be packed or a picture that cannot be read, `FileExistsError` for a pack
    that is there already.
    """
    if name in BUILT_IN or name == "adult" or not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        taken = ", ".join((*BUILT_IN, "adult"))
        raise ValueError(f"a pack cannot be named {name!r}: use a-z, 0-9, - and _, but none of {taken}")
    path = pack_place(name, root)
    if path.exists():
        raise FileExistsError(f"{path} exists: remove it first")
    known = DATA_SETS.get(name)
    made = source if isinstance(source, Pack) else packs.from_folder(Path(source), known.shape if known else None)
    packs.write(_shaped(made, name, path), path)
    return path


def _source(name: str, root: Path | str | None) -> Source:
    if name in BUILT_IN:
        return MAKERS[name]()
    path = place(name, root)
    if path is None:
        raise FileNotFoundError(_absent(name, folder(root)))
    reader = packs.read if path == pack_place(name, root) else READERS[name]
    return _shaped(_read(reader, path, tuple(stamp(path))), name, path)


@functools.lru_cache(maxsize=4)
def _read(reader: Callable[[Path], Source], path: Path, _stamp: tuple[int, ...]) -> Source:
    return reader(path)  # a file or folder that has changed has another stamp and is read again


def _data_set(name: str, root: Path | str | None) -> DataSet:
    if name in DATA_SETS:
        return DATA_SETS[name]
    own = _source(name, root)
    return DataSet(own.shape, (0.5,) * own.shape[0], (0.5,) * own.shape[0])


def _shaped(source: Source, name: str, path: Path) -> Source:
    if name in DATA_SETS and source.shape != DATA_SETS[name].shape:
        raise ValueError(f"{path}: samples have shape {source.shape}, those of {name} {DATA_SETS[name].shape}")
    return source


def _constants(name: str, root: Path | str | None, like: Tensor) -> tuple[Tensor, Tensor]:
    known = _data_set(name, root)
    sizes = [-1] + [1] * (len(known.shape) - 1)
    if like.shape[-len(known.shape) :] != known.shape:
        raise ValueError(f"samples of {name} have shape {known.shape}, not {tuple(like.shape)}")
    return like.new_tensor(known.mean).reshape(sizes), like.new_tensor(known.std).reshape(sizes)


def _absent(name: str, where: Path) -> str:
    if name in downloads.ARCHIVES:
        return f"{name} is not under {where}: run `spear data fetch {name}`"
    return (
        f"{name} is not under {where}, and its terms forbid a download without registration: put its JPEGs into "
        f"{where / name}, or run `spear data pack FOLDER {name}`"
    )
