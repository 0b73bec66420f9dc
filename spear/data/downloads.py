"""Downloads that resume, are checked before anything reads them, and end as one file under the data root."""

import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spear.data import census, layouts, packs
from spear.data.packs import Pack

Progress = Callable[[int, int], None]
CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True)
class Archive:
    """A file to download, and the digest that its publisher or its users publish."""

    url: str
    algorithm: str
    digest: str

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.url.rsplit("/", 1)[-1]


# MNIST and CIFAR-10: addresses and digests as in torchvision. Tiny ImageNet and Adult: the publishers' addresses, and
# the digests that several independent libraries check (the publishers give none).
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_ADULT = "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d"
ARCHIVES = {
    "mnist": (
        Archive(_MNIST + "train-images-idx3-ubyte.gz", "md5", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        Archive(_MNIST + "train-labels-idx1-ubyte.gz", "md5", "d53e105ee54ea40749a09fcbcd1e9432"),
    ),
    "cifar10": (
        Archive("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "md5", "c58f30108f718f92721af3b95e74349a"),
    ),
    "tinyimagenet": (
        Archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "md5", "90528d7ca1a48142e341f4ef8d21d0de"),
    ),
    "adult": (Archive("https://archive.ics.uci.edu/ml/machine-learning-databases/adult/adult.data", "sha256", _ADULT),),
}


def fetch(name: str, root: Path, *, progress: Progress | None = None) -> Path:
    """Download the data set `name` (a key of `ARCHIVES`) and put it under `root` as one file, whose path it returns.

    `progress` is called with the bytes received and the bytes expected of each file (0: not told). Raises as `download`
    does; what arrived of an interrupted download stays in `root`/NAME.download, for the next call to resume.
    """
    folder = root / f"{name}.download"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for archive in ARCHIVES[name]:
            download(archive, folder, progress=progress)
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()
    if name == "adult":
        path = root / "adult.csv"
        census.read(folder / "adult.data")
        (folder / "adult.data").replace(path)
    else:
        path = root / f"{name}.npz"
        packs.write(CONVERSIONS[name](folder), path)
    shutil.rmtree(folder)
    return path


def download(archive: Archive, folder: Path, *, progress: Progress | None = None) -> Path:
    """Download `archive` into `folder` through NAME.part, resuming one that is there; NAME exists only when checked.

    Raises `OSError` where the server cannot be reached or the connection ends early (NAME.part stays), and `ValueError`
    for a wrong checksum (NAME.part is deleted).
    """
    path = folder / archive.name
    if not path.is_file():
        part = folder / f"{archive.name}.part"
        _receive(archive.url, part, progress or (lambda done, total: None))
        _check(archive, part)
        part.replace(path)
    return path


def _receive(url: str, part: Path, progress: Progress) -> None:
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            done = start if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
            total = done + int(response.headers.get("Content-Length", 0))
            with part.open("ab" if done else "wb") as file:
                while chunk := response.read(CHUNK):
                    done += file.write(chunk)
                    progress(done, total)
    except urllib.error.HTTPError as error:
        error.close()
        if not (start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):  # nothing is missing
            raise OSError(f"cannot download {url}: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"cannot download {url}: {error}; run the command again to resume") from error
    else:
        if done < total:
            raise OSError(f"{url} ended after {done} of {total} bytes: run the command again to resume")


def _check(archive: Archive, part: Path) -> None:
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, archive.algorithm).hexdigest()
    if digest != archive.digest:
        part.unlink()
        raise ValueError(f"{archive.name}: {archive.algorithm} is {digest}, not {archive.digest}; it was deleted")


def _cifar10(folder: Path) -> Pack:
    with tempfile.TemporaryDirectory(dir=folder) as extracted:
        with tarfile.open(folder / ARCHIVES["cifar10"][0].name) as archive:
            archive.extractall(extracted, filter="data")
        return layouts.read_cifar10(Path(extracted) / "cifar-10-batches-py")


def _tinyimagenet(folder: Path) -> Pack:
    """The 10,000 validation images: the test images carry no labels, and the training images take 1.2 GB decoded."""
    with zipfile.ZipFile(folder / ARCHIVES["tinyimagenet"][0].name) as archive:
        classes = archive.read("tiny-imagenet-200/wnids.txt").decode().split()
        lines = archive.read("tiny-imagenet-200/val/val_annotations.txt").decode().splitlines()
        images, labels = [], []
        for name, synset, *_ in map(str.split, lines):
            with archive.open(f"tiny-imagenet-200/val/images/{name}") as file:
                images.append(packs.decode(file, (3, 64, 64)))
            labels.append(classes.index(synset))
    return Pack(np.stack(images), np.array(labels, dtype=np.int64), tuple(classes))


CONVERSIONS = {"mnist": layouts.read_idx, "cifar10": _cifar10, "tinyimagenet": _tinyimagenet}
