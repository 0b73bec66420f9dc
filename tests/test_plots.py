"""Laws of what figures share: pictures as they are, bands as a loop computes them, files both or neither."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from spear import data, plots

SEEDS = (0, 1, 2)
FRAME = pd.DataFrame({"batch": [1, 2], "error": [1 / 3, 2e-14], "what": ["a", "b"]})


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("SPEAR_FIGURES", str(tmp_path))
    with mpl.rc_context():
        mpl.use("Agg")
        yield
    plt.close("all")


def draw(seed=0):
    figure, axes = plt.subplots(figsize=(2, 2))
    axes.plot(np.random.default_rng(seed).normal(size=9))
    return figure


@pytest.mark.parametrize("seed", SEEDS)
def test_a_figure_is_saved_beside_its_numbers_and_always_the_same(tmp_path, seed):
    plots.save(draw(seed), "00_topic-what", FRAME)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00_topic-what.csv", "00_topic-what.png"]
    first = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert first[0] == b"batch,error,what\n1,0.333333,a\n2,2e-14,b\n"
    with Image.open(tmp_path / "00_topic-what.png") as picture:
        assert picture.size == (200, 200)
        assert "Software" not in picture.info
    plots.save(draw(seed), "00_topic-what", FRAME)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == first


def test_a_figure_that_cannot_be_saved_leaves_both_files_as_they_were(tmp_path, monkeypatch):
    plots.save(draw(), "some", FRAME)
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    figure = draw(1)
    figure.axes[0].set_title("$\\nonsense$")  # fails while it is drawn
    with pytest.raises(ValueError, match="nonsense"):
        plots.save(figure, "some", FRAME)
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plots.save(draw(1), "some", FRAME)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


@pytest.mark.parametrize("name", ["", "a/b", "../up", "a.b", "two words"])
def test_a_name_that_is_no_stem_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="a figure cannot be named"):
        plots.save(draw(), name, FRAME)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("frame", [pd.DataFrame(), FRAME.iloc[:0], FRAME.set_index("batch"), FRAME.iloc[::-1]])
def test_numbers_that_would_be_lost_are_refused(frame):
    with pytest.raises(ValueError, match="the numbers need rows, and an index of 0, 1"):
        plots.save(draw(), "some", frame)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [(1, 4), (10, 1), (31, 6)])
def test_a_band_is_what_a_loop_over_points_gives(seed, size):
    samples = np.random.default_rng(seed).normal(size=size)
    _, axes = plt.subplots()
    frame = plots.band(axes, np.arange(size[1]), samples, label="some")
    for x, row in frame.iterrows():
        column = np.sort(samples[:, x])
        assert row["median"] == pytest.approx(np.interp(0.5 * (size[0] - 1), np.arange(size[0]), column))
        assert row["p10"] == pytest.approx(np.interp(0.1 * (size[0] - 1), np.arange(size[0]), column))
        assert row["p90"] == pytest.approx(np.interp(0.9 * (size[0] - 1), np.arange(size[0]), column))
    assert np.array_equal(axes.lines[0].get_ydata(), frame["median"])
    assert np.array_equal(axes.lines[0].get_xdata(), frame["x"])


def pictures(figure):
    return [np.asarray(image.get_array()) for image in figure.axes[0].images]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["photos", "digits"])
def test_a_grid_shows_pixels_as_they_were(name, seed):
    inputs, _ = data.load(name, count=11, seed=seed)
    plain, _ = data.load(name, count=11, seed=seed, normalize=False)
    shown = pictures(plots.grid(inputs, name, columns=4))
    assert len(shown) == 11
    for drawn, image in zip(shown, plain, strict=True):
        expected = image.expand(3, -1, -1).movedim(0, -1)
        np.testing.assert_allclose(drawn, expected, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_without_a_name_each_picture_is_stretched(seed):
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 7 - 2
    for drawn in pictures(plots.grid(images)):
        assert drawn.min() == pytest.approx(0, abs=1e-6)
        assert drawn.max() == pytest.approx(1, abs=1e-6)


def test_rows_stand_above_each_other_with_titles_and_captions():
    images, _ = data.load("digits", count=5)
    figure = plots.grid({"original": images, "found": images}, "digits", captions={"found": list("vwxyz")}, columns=3)
    extents = [image.get_extent() for image in figure.axes[0].images]
    assert [left for left, *_ in extents] == [extents[i % 3][0] for i in (0, 1, 2, 0, 1, 2, 0, 1, 0, 1)]
    tops = [top for *_, top in extents]
    assert tops == sorted(tops)
    assert len(set(tops)) == 4
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words == ["original", "found", *"vwx", "original", "found", *"yz"]
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert min(box.x0 for box in boxes) >= 0  # nothing is cut off
    assert max(box.y1 for box in boxes) <= figure.bbox.height


def test_a_grid_is_drawn_twice_without_the_styles_layout(tmp_path):
    plots.style()
    figure = plots.grid(torch.rand(3, 1, 8, 8), "digits")
    for name in ("once.png", "twice.png"):
        figure.savefig(tmp_path / name)
    assert (tmp_path / "once.png").read_bytes() == (tmp_path / "twice.png").read_bytes()


def test_what_was_not_recovered_is_white():
    images, _ = data.load("photos", count=2)
    images[1] = torch.nan
    for name in ("photos", None):
        shown = pictures(plots.grid(images, name))
        assert (shown[1] == 1).all()
        assert not (shown[0] == 1).all()


BATCH = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("rows", "captions", "reason"),
    [
        ({}, None, "need one shape"),
        ({"a": BATCH, "b": BATCH[:1]}, None, "need one shape"),
        ({"a": BATCH[:0]}, None, "need one shape"),
        ({"a": BATCH[0]}, None, "need one shape"),
        ({"a": torch.zeros(2, 2, 4, 4)}, None, "need one shape"),
        ({"a": BATCH}, {"b": ["1", "2"]}, "2 captions for 'b', with rows a of 2 pictures"),
        ({"a": BATCH}, {"a": ["1"]}, "1 captions for 'a'"),
    ],
)
def test_rows_that_do_not_match_are_refused(rows, captions, reason):
    with pytest.raises(ValueError, match=reason):
        plots.grid(rows, captions=captions)


def test_the_style_is_set_and_its_colours_differ():
    plots.style()
    assert mpl.rcParams["axes.prop_cycle"].by_key()["color"] == list(plots.PALETTE)
    assert mpl.rcParams["figure.constrained_layout.use"]
    assert len(set(plots.PALETTE)) == len(plots.PALETTE)
    weights = np.array([0.2126, 0.7152, 0.0722])
    lightness = [weights @ mpl.colors.to_rgb(colour) for colour in plots.PALETTE]
    assert max(lightness) < 0.75  # legible on white


def test_shares_are_written_in_their_cells():
    table = pd.DataFrame([[0.0, 1.0], [0.25, 0.5], [1, 1]], index=["a", "b", "c"], columns=[0.1, 0.2])
    table.columns.name = "batch / width"
    _, axes = plt.subplots()
    plots.shares(axes, table)
    written = {(round(t.get_position()[1]), round(t.get_position()[0])): float(t.get_text()) for t in axes.texts}
    assert written == {(i, j): round(v, 2) for (i, j), v in np.ndenumerate(table.to_numpy())}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b", "c"]
    assert axes.get_xlabel() == "batch / width"
