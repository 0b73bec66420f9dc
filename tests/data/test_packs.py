"""Sample packs come back as they were written; every kind of damage is refused."""

import contextlib
import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from data_files import SEEDS, random_pack, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from spear import data
from spear.data import packs


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
    "pickled classes": ({"classes": np.array(["a", "b"], object)}, "holds Python objects"),
    "pickled images": ({"images": np.array([1, "x"], object)}, "holds Python objects"),
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


def declaring(array, shape):
    """The bytes of an npy file whose header says another shape than that of its array."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, np.lib.format.header_data_from_array_1_0(array) | {"shape": shape})
    return content.getvalue() + array.tobytes()


def npz(path, compression=zipfile.ZIP_DEFLATED, **contents):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for key, content in contents.items():
            archive.writestr(f"{key}.npy", content)


def test_an_array_that_says_it_is_larger_than_its_entry_is_refused(tmp_path):
    """What a header says is compared with what is there, before memory of that size is asked for."""
    sizes = {key: array.shape for key, array in GOOD.items()} | {"images": (10**12, 2, 2, 3)}
    npz(tmp_path / "large.npz", **{key: declaring(GOOD[key], shape) for key, shape in sizes.items()})
    with pytest.raises(ValueError, match="images.npy says uint8 .1000000000000, 2, 2, 3., which are not its"):
        packs.read(tmp_path / "large.npz")


def test_a_pack_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(packs, "FREE", 0)
    even = GOOD | {"images": np.zeros((4, 200, 200, 3), np.uint8)}
    np.savez_compressed(tmp_path / "even.npz", **even)
    with pytest.raises(ValueError, match="more than 100 times its size"):
        packs.read(tmp_path / "even.npz")


def test_an_entry_compressed_in_another_way_is_refused(tmp_path):
    contents = {key: declaring(array, array.shape) for key, array in GOOD.items()}
    npz(tmp_path / "usual.npz", **contents)
    assert len(packs.read(tmp_path / "usual.npz").labels) == 4
    npz(tmp_path / "other.npz", zipfile.ZIP_BZIP2, **contents)
    with pytest.raises(ValueError, match="images is compressed in another way"):
        packs.read(tmp_path / "other.npz")


RAMP = np.linspace(0, 1, 64).reshape(8, 8)
DEEP = {
    "sixteen.png": (RAMP * 65535).astype(np.uint16),
    "sixteen.tif": (RAMP * 65535).astype(np.uint16),
    "twelve.png": (RAMP * 4095).astype(np.uint16),
    "real.tif": RAMP.astype(np.float32),
}


def picture(folder, name, values):
    (folder / "pictures" / "scan").mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(folder / "pictures" / "scan" / name)
    return folder / "pictures"


@pytest.mark.parametrize("name", DEEP)
def test_pictures_of_more_than_8_bits_keep_their_range(name, tmp_path):
    folder = picture(tmp_path, name, DEEP[name])
    data.pack(folder, "scans", tmp_path)
    inputs, _ = data.load("scans", count=1, root=tmp_path, normalize=False)
    expected = DEEP[name] if name == "real.tif" else DEEP[name] / 65535
    assert np.abs(inputs[0].numpy() - expected).max() < 1e-5
    data.pack(folder, "mnist", tmp_path)
    inputs, _ = data.load("mnist", count=1, root=tmp_path, normalize=False)
    assert inputs.shape == (1, 1, 28, 28)
    assert float(inputs.max()) == pytest.approx(expected.max(), rel=0.02)


def test_a_folder_of_8_and_16_bits_has_one_range(tmp_path):
    picture(tmp_path, "0.png", np.full((2, 2), 255, np.uint8))
    pack = packs.from_folder(picture(tmp_path, "1.png", np.full((2, 2), 65535, np.uint16)))
    assert (pack.images == 65535).all()


@pytest.mark.parametrize("values", [RAMP * 3000 - 1000, RAMP * 255, RAMP * np.nan])
def test_values_beyond_the_range_of_a_picture_are_refused_not_clipped(values, tmp_path):
    folder = picture(tmp_path, "scan.tif", values.astype(np.float32))
    with pytest.raises(ValueError, match="scan.tif is no readable picture: values from .* not within 0 and 1: scale"):
        packs.from_folder(folder)


def deep_png(values: np.ndarray, kind: int = 0) -> bytes:
    """A PNG of 16 bits in each of 3 or 4 channels, or grey with transparency, by one filter: Pillow writes none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    plain = values.astype(">u2").view(np.uint8).reshape(height, -1).astype(int)
    left, up = (np.zeros_like(plain) for _ in range(2))
    left[:, 2 * channels :], up[1:] = plain[:, : -2 * channels], plain[:-1]
    corner = np.zeros_like(plain)
    corner[1:, 2 * channels :] = plain[:-1, : -2 * channels]
    sides = np.stack([left, up, corner])
    paeth = np.take_along_axis(sides, np.abs(left + up - corner - sides).argmin(0)[None], 0)[0]
    filtered = plain - [0 * plain, left, up, (left + up) // 2, paeth][kind]
    rows = b"".join(bytes([kind]) + row.astype(np.uint8).tobytes() for row in filtered % 256)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits_keep_them(tmp_path, channels, kind):
    values = np.random.default_rng(0).integers(0, 65536, (6, 8, channels)).astype(np.uint16)
    path = tmp_path / "colours.png"
    path.write_bytes(deep_png(values, kind))
    kept = values[..., :3] if channels > 2 else np.repeat(values[..., :1], 3, 2)
    assert np.array_equal(packs.decode(path), kept)
    assert packs.decode(path, (3, 6, 8)).shape == (6, 8, 3)
    grey = packs.decode(path, (1, 6, 8))[..., 0].astype(float)
    assert np.abs(grey - kept @ [0.299, 0.587, 0.114]).max() < 3


def test_other_files_of_16_bits_in_each_colour_are_refused(tmp_path):
    path = tmp_path / "colours.ppm"
    path.write_bytes(b"P6 2 1 65535\n" + bytes(range(12)))
    with pytest.raises(ValueError, match=r"colours.ppm is no readable picture: a PPM of 16 bits in each colour"):
        packs.decode(path)
