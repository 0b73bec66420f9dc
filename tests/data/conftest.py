"""Data sets on disk, as small as can be."""

import pickle

import numpy as np
import pytest
from data_files import idx, random_pack
from PIL import Image


@pytest.fixture
def folder(tmp_path):
    for label in ("dog", "cat"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / label / f"{i}.PNG")
    (tmp_path / "pictures" / "cat" / "notes.txt").write_text("not a picture")
    return tmp_path / "pictures"


@pytest.fixture
def mnist_files():
    pack = random_pack(count=12, shape=(1, 28, 28), classes="0123456789")
    contents = {"images-idx3": idx(pack.images[..., 0]), "labels-idx1": idx(pack.labels.astype(np.uint8))}
    return pack, {f"train-{key}-ubyte": content for key, content in contents.items()}


@pytest.fixture
def cifar10_files(tmp_path, monkeypatch):
    """A folder like CIFAR-10's with 20 images, and torchvision told its checksums."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import calculate_md5

    pack = random_pack(count=20, shape=(3, 32, 32), classes=[f"class {k}" for k in range(10)])
    folder = tmp_path / "source" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rows = pack.images.transpose(0, 3, 1, 2).reshape(20, -1)
    for k, (file, _) in enumerate(CIFAR10.train_list):
        part = slice(4 * k, 4 * k + 4)
        (folder / file).write_bytes(pickle.dumps({"data": rows[part], "labels": pack.labels[part].tolist()}))
    (folder / "test_batch").write_bytes(b"")
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(pack.classes)}))
    for table in ("train_list", "test_list"):
        sums = [[file, calculate_md5(folder / file)] for file, _ in getattr(CIFAR10, table)]
        monkeypatch.setattr(CIFAR10, table, sums)
    monkeypatch.setitem(CIFAR10.meta, "md5", calculate_md5(folder / "batches.meta"))
    return pack, folder
