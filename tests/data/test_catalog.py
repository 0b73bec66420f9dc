"""Laws of real data by name: sampling, normalisation, packing; and every mistake refused."""

import numpy as np
import pytest
import torch
from data_files import BUILT_IN, ON_DISK, SEEDS, random_pack
from PIL import Image

from spear import data
from spear.data import catalog, packs


@pytest.fixture(params=BUILT_IN + ON_DISK)
def name(request):
    return request.param


@pytest.fixture
def root(name, request):
    if name in BUILT_IN:
        return None
    folder = request.getfixturevalue("real_data")
    if not data.available(name, folder):
        pytest.skip(f"no {name} under the data root")
    return folder


@pytest.mark.parametrize("seed", SEEDS)
def test_a_batch_has_the_shape_type_and_range_of_its_data_set(name, root, seed):
    inputs, labels = data.load(name, count=7, seed=seed, root=root, normalize=False)
    assert inputs.shape == (7, *data.shape(name))
    assert inputs.dtype == torch.float64
    assert inputs.is_contiguous()
    assert labels.shape == (7,)
    assert labels.dtype == torch.int64
    assert 0 <= labels.min() <= labels.max() < len(data.classes(name, root=root))
    assert inputs.isfinite().all()
    if name != "adult":
        assert inputs.min() >= 0
        assert inputs.max() <= 1


@pytest.mark.parametrize("seed", SEEDS)
def test_the_seed_decides_the_batch_and_a_larger_count_extends_it(name, root, seed):
    inputs, labels = data.load(name, count=7, seed=seed, root=root)
    again, labels_again = data.load(name, count=7, seed=seed, root=root)
    fewer, labels_fewer = data.load(name, count=3, seed=seed, root=root)
    other, _ = data.load(name, count=7, seed=seed + 1, root=root)
    assert torch.equal(inputs, again)
    assert torch.equal(labels, labels_again)
    assert torch.equal(inputs[:3], fewer)
    assert torch.equal(labels[:3], labels_fewer)
    assert not torch.equal(inputs, other)


@pytest.mark.parametrize("seed", SEEDS)
def test_normalising_is_undone(name, root, seed):
    plain, _ = data.load(name, count=5, seed=seed, root=root, normalize=False)
    normalised, _ = data.load(name, count=5, seed=seed, root=root)
    torch.testing.assert_close(data.unnormalize(normalised, name), plain, rtol=1e-12, atol=1e-12)
    assert not torch.equal(normalised, plain)
    by_hand = (plain.movedim(1, -1) - data.mean(name)) / data.std(name)
    torch.testing.assert_close(normalised.movedim(1, -1), by_hand, rtol=1e-12, atol=1e-12)
    one = data.unnormalize(normalised[0].float(), name)  # a single sample, another precision
    assert one.dtype == torch.float32
    torch.testing.assert_close(one.double(), plain[0], rtol=1e-5, atol=1e-5 * float(plain[0].abs().max()))


@pytest.mark.parametrize("name", ["digits", "photos", "photos64", "photos224"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_full_draw_is_the_data_set_in_another_order(name, seed):
    total = len(catalog.MAKERS[name]().labels)
    inputs, labels = data.load(name, count=total, seed=seed, normalize=False)
    whole, _ = catalog.MAKERS[name]().take(torch.arange(total)), None
    assert torch.equal(inputs.flatten(1).sum(1).sort().values, whole.flatten(1).sum(1).sort().values)
    assert labels.bincount().tolist() == np.bincount(catalog.MAKERS[name]().labels).tolist()


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_published_moments_are_about_those_of_a_sample(name, real_data):
    inputs, _ = data.load(name, count=1000, root=real_data)
    assert inputs.mean((0, 2, 3)).abs().max() < 0.1
    assert (inputs.std((0, 2, 3)) - 1).abs().max() < 0.1


@pytest.mark.parametrize("count", [0, -1, 1798])
def test_a_count_that_cannot_be_drawn_is_refused(count):
    with pytest.raises(ValueError, match=f"digits has 1797 samples here, so count must be 1 to 1797, not {count}"):
        data.load("digits", count=count)


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    for call in (data.available, data.fetch, lambda name, root: data.load(name, count=1, root=root)):
        with pytest.raises(ValueError, match="unknown data set 'minst'.*digits, photos.*adult"):
            call("minst", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "tinyimagenet", "adult"])
def test_an_absent_data_set_says_what_to_run(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{name} is not under .*: run `spear data fetch {name}`"):
        data.load(name, count=1, root=tmp_path)


def test_imagenet_says_where_to_put_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="put its JPEGs into .*imagenet, or run `spear data pack FOLDER imagenet`"
    ):
        data.load("imagenet", count=1, root=tmp_path)


def test_samples_of_another_shape_are_not_unnormalised():
    with pytest.raises(ValueError, match=r"samples of cifar10 have shape \(3, 32, 32\), not \(2, 3, 8, 8\)"):
        data.unnormalize(torch.zeros(2, 3, 8, 8), "cifar10")


def test_a_pack_of_another_shape_than_its_name_says_is_refused(tmp_path):
    packs.write(random_pack(), tmp_path / "cifar10.npz")
    with pytest.raises(
        ValueError, match=r"cifar10.npz: samples have shape \(3, 5, 4\), those of cifar10 \(3, 32, 32\)"
    ):
        data.load("cifar10", count=1, root=tmp_path)


def test_a_pack_that_changes_is_read_again(tmp_path):
    for seed in SEEDS:
        (tmp_path / "own.npz").unlink(missing_ok=True)
        data.pack(random_pack(seed, count=6 + seed), "own", tmp_path)
        inputs, _ = data.load("own", count=6 + seed, root=tmp_path, normalize=False)
        assert inputs.sum() == pytest.approx(random_pack(seed, count=6 + seed).images.sum() / 255)


def test_a_folder_becomes_a_pack_of_its_own(folder, tmp_path):
    path = data.pack(folder, "pets", tmp_path)
    assert path == tmp_path / "pets.npz"
    assert data.classes("pets", root=tmp_path) == ("cat", "dog")
    assert data.shape("pets", root=tmp_path) == (3, 6, 8)
    inputs, labels = data.load("pets", count=4, root=tmp_path)
    assert labels.bincount().tolist() == [2, 2]
    assert data.unnormalize(inputs, "pets", root=tmp_path).min() >= 0
    expected = np.asarray(Image.open(folder / "cat" / "0.PNG"))
    assert np.array_equal(packs.read(path).images[0], expected)


@pytest.mark.parametrize("known", ["mnist", "imagenet"])
def test_a_folder_packed_under_a_known_name_takes_its_shape(known, folder, tmp_path):
    data.pack(folder, known, tmp_path)
    inputs, _ = data.load(known, count=4, root=tmp_path)
    assert inputs.shape == (4, *data.shape(known))


def test_pictures_of_different_sizes_need_a_known_name(folder, tmp_path):
    Image.new("RGB", (5, 5)).save(folder / "dog" / "2.png")
    with pytest.raises(ValueError, match=r"2.png has shape \(5, 5, 3\), .*0.PNG has \(6, 8, 3\)"):
        data.pack(folder, "pets", tmp_path)
    assert not (tmp_path / "pets.npz").exists()


def test_an_unreadable_picture_is_named(folder, tmp_path):
    picture = folder / "dog" / "0.PNG"
    for content in (b"", b"no picture", picture.read_bytes()[:90]):
        picture.write_bytes(content)
        with pytest.raises(ValueError, match="dog/0.PNG is no readable picture"):
            data.pack(folder, "pets", tmp_path)


def test_what_cannot_be_packed_is_refused(folder, tmp_path):
    for bad in ("digits", "photos224", "adult", "../pets", "", "My pets"):
        with pytest.raises(ValueError, match="a pack cannot be named"):
            data.pack(folder, bad, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no pictures in sub-folders"):
        data.pack(tmp_path / "empty", "pets", tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.pack(tmp_path / "nowhere", "pets", tmp_path)
    with pytest.raises(ValueError, match="samples have shape"):
        data.pack(random_pack(), "mnist", tmp_path)
    data.pack(random_pack(), "pets", tmp_path)
    with pytest.raises(FileExistsError, match="pets.npz exists: remove it first"):
        data.pack(folder, "pets", tmp_path)
