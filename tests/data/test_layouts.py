"""Data sets as their publishers lay them out: read as they are, damage named."""

import gzip

import numpy as np
import pytest
from data_files import idx, random_pack, same
from PIL import Image

from spear import data
from spear.data import layouts, packs


def test_imagenet_takes_its_classes_from_names_and_folders(tmp_path):
    (tmp_path / "imagenet" / "val" / "n00000003").mkdir(parents=True)
    for place in ("n00000002_7.JPEG", "n00000001_dog.JPEG", "val/n00000003/ILSVRC2012_val_1.JPEG"):
        Image.new("RGB", (300, 260), "red").save(tmp_path / "imagenet" / place)
    assert data.classes("imagenet", root=tmp_path) == ("n00000001", "n00000002", "n00000003")
    inputs, labels = data.load("imagenet", count=3, root=tmp_path, normalize=False)
    assert inputs.shape == (3, 3, 224, 224)
    assert sorted(labels.tolist()) == [0, 1, 2]
    Image.new("RGB", (9, 9)).save(tmp_path / "imagenet" / "val" / "stray.png")
    with pytest.raises(ValueError, match="stray.png: neither its name nor its folder's carries a synset"):
        data.load("imagenet", count=1, root=tmp_path)


def test_a_damaged_or_empty_imagenet_folder_is_refused(tmp_path):
    (tmp_path / "imagenet").mkdir()
    with pytest.raises(ValueError, match="imagenet: no pictures"):
        data.load("imagenet", count=1, root=tmp_path)
    (tmp_path / "imagenet" / "n00000001_1.JPEG").write_bytes(b"\xff\xd8\xff cut")
    with pytest.raises(ValueError, match="n00000001_1.JPEG is no readable picture"):
        data.load("imagenet", count=1, root=tmp_path)


def test_mnist_is_read_from_torchvisions_folder(mnist_files, tmp_path):
    pack, contents = mnist_files
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for file, content in contents.items():
        (tmp_path / "MNIST" / "raw" / file).write_bytes(content)
    assert same(layouts.read_mnist(tmp_path / "MNIST"), pack)
    assert len(data.load("mnist", count=12, root=tmp_path)[0]) == 12
    packs.write(random_pack(count=5, shape=(1, 28, 28)), tmp_path / "mnist.npz")  # a sample pack comes first
    with pytest.raises(ValueError, match="mnist has 5 samples here"):
        data.load("mnist", count=12, root=tmp_path)


def test_a_damaged_mnist_file_is_named(mnist_files, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file, content in mnist_files[1].items():
        (raw / file).write_bytes(content)
    whole = (raw / "train-images-idx3-ubyte").read_bytes()
    for content in (whole[:-1], whole[:10], whole[:3], b"", b"\0\0\x08\x04" + whole[4:], gzip.compress(whole)):
        (raw / "train-images-idx3-ubyte").write_bytes(content)
        with pytest.raises(ValueError, match="train-images-idx3-ubyte is no idx file of bytes"):
            data.load("mnist", count=1, root=tmp_path)
    (raw / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((11, 28, 28), np.uint8)))
    with pytest.raises(ValueError, match=r"raw: labels are int64 \(12,\), not int64 \(11,\)"):
        data.load("mnist", count=1, root=tmp_path)


def test_cifar10_is_read_from_its_folder_and_refused_when_altered(cifar10_files):
    pack, folder = cifar10_files
    assert same(layouts.read_cifar10(folder), pack)
    assert len(data.load("cifar10", count=20, root=folder.parent)[0]) == 20
    with (folder / "data_batch_3").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="cifar-10-batches-py: CIFAR-10 is incomplete or altered"):
        layouts.read_cifar10(folder)
