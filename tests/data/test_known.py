"""What is known of data sets before any is read: names, and where they are."""

import torch
from data_files import BUILT_IN, ON_DISK, random_pack

from spear import data
from spear.data import known, packs


def test_the_data_root_is_the_environments(tmp_path, monkeypatch):
    pack = random_pack(shape=(1, 28, 28), classes="0123456789")
    packs.write(pack, tmp_path / "mnist.npz")
    monkeypatch.setenv("SPEAR_DATA", str(tmp_path))
    assert known.available("mnist")
    assert not known.available("cifar10")
    assert torch.equal(data.load("mnist", count=6)[0], data.load("mnist", count=6, root=str(tmp_path))[0])


def test_names_are_listed_and_the_built_in_ones_always_there(tmp_path):
    assert set(BUILT_IN + ON_DISK) == set(known.names())
    assert [name for name in known.names() if known.available(name, tmp_path)] == list(BUILT_IN)
