"""Laws of real data by name: sampling, normalisation, sample packs, tables; and every kind of damage refused."""

import contextlib
import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from spear import data
from spear.data import adult, builtin, catalog, downloads, packs
from spear.data.packs import Pack

BUILT_IN = ("digits", "photos", "photos64", "photos224")
ON_DISK = ("mnist", "cifar10", "tinyimagenet", "imagenet", "adult")
SEEDS = (0, 1, 2)


def random_pack(seed=0, count=6, shape=(3, 5, 4), classes=("a", "b", "c")):
    generator = np.random.default_rng(seed)
    channels, height, width = shape
    images = generator.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    return Pack(images, generator.integers(0, len(classes), count), tuple(classes))


def same(first, second):
    return (
        np.array_equal(first.images, second.images)
        and np.array_equal(first.labels, second.labels)
        and first.classes == second.classes
    )


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
    total = len(catalog._BUILT_IN[name]().labels)
    inputs, labels = data.load(name, count=total, seed=seed, normalize=False)
    whole, _ = catalog._BUILT_IN[name]().take(torch.arange(total)), None
    assert torch.equal(inputs.flatten(1).sum(1).sort().values, whole.flatten(1).sum(1).sort().values)
    assert labels.bincount().tolist() == np.bincount(catalog._BUILT_IN[name]().labels).tolist()


@pytest.mark.parametrize(("size", "least"), [(32, 500), (64, 300), (224, 80)])
def test_photo_crops_are_many_distinct_detailed_and_from_every_photograph(size, least):
    pack = builtin.photos(size)
    assert len(pack.images) >= least
    assert pack.images.shape[1:] == (size, size, 3)
    assert len({image.tobytes() for image in pack.images}) == len(pack.images)
    assert np.array_equal(np.unique(pack.labels), np.arange(len(builtin.PHOTOGRAPHS)))
    assert 2 * builtin.CUTS[size].stride >= size
    grey = pack.images.astype(float).mean(-1)
    across, down = (np.abs(np.diff(grey, axis=axis)).mean((1, 2)) for axis in (2, 1))
    assert (across + down).min() >= builtin.EDGES
    assert (np.ptp(pack.images.astype(int), axis=-1).mean((1, 2)) > 2).all()  # in colour


def test_digits_are_normalised_by_their_own_moments():
    inputs, _ = data.load("digits", count=1797)
    assert abs(inputs.mean()) < 1e-3
    assert abs(inputs.std() - 1) < 1e-3


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_published_moments_are_about_those_of_a_sample(name, real_data):
    inputs, _ = data.load(name, count=1000, root=real_data)
    assert inputs.mean((0, 2, 3)).abs().max() < 0.1
    assert (inputs.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_the_data_root_is_the_environments(tmp_path, monkeypatch):
    pack = random_pack(shape=(1, 28, 28), classes="0123456789")
    packs.write(pack, tmp_path / "mnist.npz")
    monkeypatch.setenv("SPEAR_DATA", str(tmp_path))
    assert data.available("mnist")
    assert not data.available("cifar10")
    assert torch.equal(data.load("mnist", count=6)[0], data.load("mnist", count=6, root=str(tmp_path))[0])


def test_names_are_listed_and_the_built_in_ones_always_there(tmp_path):
    assert set(BUILT_IN + ON_DISK) == set(data.names())
    assert [name for name in data.names() if data.available(name, tmp_path)] == list(BUILT_IN)


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


# Sample packs


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(3, 5, 4), (1, 1, 1), (1, 8, 8)])
def test_a_pack_comes_back_as_it_was_written(shape, seed, tmp_path):
    pack = random_pack(seed, shape=shape)
    packs.write(pack, tmp_path / "some.npz")
    assert same(packs.read(tmp_path / "some.npz"), pack)
    assert [entry.name for entry in tmp_path.iterdir()] == ["some.npz"]
    taken = pack.take(torch.tensor([2, 0]))
    by_hand = np.stack([pack.images[2], pack.images[0]]).transpose(0, 3, 1, 2) / 255
    assert np.array_equal(taken.numpy(), by_hand)


GOOD = {"images": np.zeros((4, 2, 2, 3), np.uint8), "labels": np.array([0, 1, 1, 0]), "classes": np.array(["a", "b"])}
BAD = {
    "no images": ({"images": None}, "images is not a file in the archive"),
    "no labels": ({"labels": None}, "labels is not a file in the archive"),
    "no classes": ({"classes": None}, "classes is not a file in the archive"),
    "float images": ({"images": np.zeros((4, 2, 2, 3))}, "images are float64"),
    "flat images": ({"images": np.zeros((4, 12), np.uint8)}, "images are uint8 (4, 12)"),
    "channels first": ({"images": np.zeros((4, 3, 2, 2), np.uint8)}, "images are uint8 (4, 3, 2, 2)"),
    "empty": ({"images": np.zeros((0, 2, 2, 3), np.uint8), "labels": np.zeros(0, np.int64)}, "images are uint8 (0,"),
    "short labels": ({"labels": np.array([0, 1, 1])}, "labels are int64 (3,), not int64 (4,)"),
    "int32 labels": ({"labels": np.array([0, 1, 1, 0], np.int32)}, "labels are int32"),
    "label too large": ({"labels": np.array([0, 1, 2, 0])}, "labels from 0 to 2 with 2 classes"),
    "negative label": ({"labels": np.array([0, 1, -1, 0])}, "labels from -1 to 1 with 2 classes"),
    "classes are numbers": ({"classes": np.array([1, 2])}, "classes are int64 (2,), not strings"),
    "classes in a square": ({"classes": np.array([["a"], ["b"]])}, "classes are <U1 (2, 1), not strings"),
    "pickled classes": ({"classes": np.array(["a", "b"], object)}, "allow_pickle=False"),
    "pickled images": ({"images": np.array([1, "x"], object)}, "allow_pickle=False"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_pack_with_a_wrong_array_is_refused_by_name(case, tmp_path):
    changes, reason = BAD[case]
    path = tmp_path / "cifar10.npz"
    np.savez(path, **{key: value for key, value in (GOOD | changes).items() if value is not None})
    with pytest.raises(ValueError, match="cifar10.npz is no sample pack: ") as refused:
        data.load("cifar10", count=1, root=tmp_path)
    assert reason in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"PK", b"some text", b"\x93NUMPY", b"PK\x05\x06" + bytes(18)])
def test_a_foreign_file_is_no_pack(content, tmp_path):
    (tmp_path / "mnist.npz").write_bytes(content)
    with pytest.raises(ValueError, match="mnist.npz is no sample pack: "):
        data.load("mnist", count=1, root=tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("packs") / "whole.npz"
    packs.write(random_pack(), path)
    return path, path.read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_a_truncated_pack_is_refused(share, written, tmp_path):
    (tmp_path / "cut.npz").write_bytes(written[1][: int(share * len(written[1]))])
    with pytest.raises(ValueError, match="cut.npz is no sample pack: "):
        packs.read(tmp_path / "cut.npz")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_pack_with_one_byte_changed_is_refused_or_unharmed(place, flip, written, tmp_path):
    content = bytearray(written[1])
    content[place % len(content)] ^= flip
    (tmp_path / "changed.npz").write_bytes(content)
    with contextlib.suppress(ValueError):
        assert same(packs.read(tmp_path / "changed.npz"), random_pack())


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


# Packs made from folders and arrays


@pytest.fixture
def folder(tmp_path):
    for label in ("dog", "cat"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / label / f"{i}.PNG")
    (tmp_path / "pictures" / "cat" / "notes.txt").write_text("not a picture")
    return tmp_path / "pictures"


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


# Data sets as their publishers lay them out


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


def idx(array):
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist_files():
    pack = random_pack(count=12, shape=(1, 28, 28), classes="0123456789")
    contents = {"images-idx3": idx(pack.images[..., 0]), "labels-idx1": idx(pack.labels.astype(np.uint8))}
    return pack, {f"train-{key}-ubyte": content for key, content in contents.items()}


def test_mnist_is_read_from_torchvisions_folder(mnist_files, tmp_path):
    pack, contents = mnist_files
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for file, content in contents.items():
        (tmp_path / "MNIST" / "raw" / file).write_bytes(content)
    assert same(downloads.read_mnist(tmp_path / "MNIST"), pack)
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


def test_cifar10_is_read_from_its_folder_and_refused_when_altered(cifar10_files):
    pack, folder = cifar10_files
    assert same(downloads.read_cifar10(folder), pack)
    assert len(data.load("cifar10", count=20, root=folder.parent)[0]) == 20
    with (folder / "data_batch_3").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="cifar-10-batches-py: CIFAR-10 is incomplete or altered"):
        downloads.read_cifar10(folder)


# The census table

ROW = (
    "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40, "
    "United-States, <=50K"
)


def test_an_encoded_row_tells_the_original(tmp_path):
    (tmp_path / "adult.csv").write_text(ROW + "\n" + ROW.replace("<=", ">").replace("State-gov", "?") + "\n\n")
    inputs, labels = data.load("adult", count=2, root=tmp_path)
    assert sorted(labels.tolist()) == [0, 1]
    raw = data.unnormalize(inputs, "adult")[labels == 0][0]
    fields = [
        column.categories[int(raw[column.start : column.stop].argmax())]
        if column.categories
        else f"{raw[column.start]:.0f}"
        for column in adult.COLUMNS
    ]
    assert fields == ROW.split(", ")[:-1]


def test_one_hot_entries_stay_and_numbers_are_scaled(real_data):
    if not data.available("adult", real_data):
        pytest.skip("no adult under the data root")
    inputs, labels = data.load("adult", count=2000, root=real_data)
    assert 0.1 < labels.double().mean() < 0.4
    for column in adult.COLUMNS:
        entries = inputs[:, column.start : column.stop]
        if column.categories:
            assert torch.equal(entries.sum(1), torch.ones(2000, dtype=torch.float64))
            assert set(entries.unique().tolist()) <= {0.0, 1.0}
        else:
            assert abs(entries.mean()) < 0.15
            assert 0.7 < entries.std() < 1.3


def test_columns_lie_side_by_side():
    assert [column.start for column in adult.COLUMNS[1:]] == [column.stop for column in adult.COLUMNS[:-1]]
    assert adult.COLUMNS[0].start == 0
    assert data.shape("adult") == (adult.COLUMNS[-1].stop,)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no rows"),
        (ROW + "\n" + ROW[:60], "line 2: 7 fields, not 15"),
        (ROW.replace("39", "old"), "line 1: could not convert string to float: 'old'"),
        (ROW.replace("39", "nan"), "line 1: 'nan' is no finite age"),
        (ROW.replace("Bachelors", "Bachelor"), "line 1: 'Bachelor' is no education"),
        (ROW.replace("<=50K", "<=50K."), "line 1: '<=50K.' is no income"),
        ("\x00\x89PNG", "line 1"),
    ],
)
def test_a_damaged_table_is_refused_by_file_and_line(content, reason, tmp_path):
    (tmp_path / "adult.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="adult.csv") as refused:
        data.load("adult", count=1, root=tmp_path)
    assert reason in str(refused.value)


def test_bytes_that_are_no_text_are_no_table(tmp_path):
    (tmp_path / "adult.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="adult.csv"):
        data.load("adult", count=1, root=tmp_path)
