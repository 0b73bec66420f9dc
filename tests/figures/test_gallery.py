"""The gallery shows what is in the figures folder, and each figure says itself what it was drawn with."""

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spear.figures import gallery
from spear.figures.gallery import Origin
from spear.figures.table import Run, load

ORIGIN = Origin("quick", {"dataset": "photos", "sizes": [1, 2], "rate": 1e-9}, ["photos"], "2026-01-31")


def _png(value: int = 0, **options: object) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (3, 2), (value, 9, 9)).save(content, "png", **options)
    return content.getvalue()


def test_the_committed_galleries_are_what_the_figures_say(repository: Path) -> None:
    folder = repository / "figures"
    for profile, place in (("quick", folder), ("paper", folder / "paper")):
        table = load(repository / "notebooks" / "runs.yaml", profile)
        page = (place / "README.md").read_text()
        assert page == gallery.render(table, place, page)
        names = {run.folder / f"{stem}.png" for run in table for stem in run.captions}
        assert {*place.glob("*.png")} <= names
        assert profile == "paper" or {*place.glob("*.png")} == names


def test_a_stamp_is_read_back_and_leaves_the_picture_as_it_is(tmp_path: Path) -> None:
    picture = _png(dpi=(110, 110))
    place = tmp_path / "a.png"
    place.write_bytes(gallery.stamped(picture, ORIGIN))
    assert gallery.origin(place) == ORIGIN
    before, after = Image.open(io.BytesIO(picture)), Image.open(place)
    assert np.array_equal(np.asarray(before), np.asarray(after))
    assert before.info["dpi"] == after.info["dpi"]
    other = replace(ORIGIN, date="2026-02-01")
    assert gallery.stamped(place.read_bytes(), other) == gallery.stamped(picture, other)
    place.write_bytes(picture)
    assert gallery.origin(place) is None


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of figures."""
    folder = tmp_path / "figures"
    (folder / "paper" / "mnist").mkdir(parents=True)
    monkeypatch.setenv("SPEAR_FIGURES", str(folder))
    return folder


def test_the_page_shows_what_is_there_in_the_tables_order(tmp_path: Path, figures: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    table = [
        Run(name, tmp_path / "notebooks" / f"{name}.ipynb", "quick", {}, {f"{name}-x": f"Caption of {name}."})
        for name in ("01_b", "00_a", "02_c")
    ]
    (figures / "00_a-x.png").write_bytes(gallery.stamped(_png(), ORIGIN))
    (figures / "01_b-x.png").write_bytes(_png())
    page = gallery.render(table, figures)
    assert re.findall(r"^## (.*)", page, re.M) == [f"[{name}](../notebooks/{name}.ipynb)" for name in ("01_b", "00_a")]
    first, second = page.split("## ")[1:]
    assert "![01_b-x](01_b-x.png)\n\nCaption of 01_b. *Small version.*\n\n[numbers](01_b-x.csv); drawn by hand" in first
    assert "[numbers](00_a-x.csv) of 2026-01-31; profile quick; data: photos; parameters: `dataset = " in second
    assert '`dataset = "photos", sizes = [1, 2], rate = 1e-09`' in second


def test_a_page_shows_each_data_set_of_a_run_and_what_it_took(tmp_path: Path, figures: Path) -> None:
    where, captions = tmp_path / "08_a.ipynb", {"08_a-x": "Caption."}
    runs = [Run("08_a", where, "paper", {}, captions, dataset) for dataset in ("mnist", None)]
    for run in runs:
        (run.folder / "08_a-x.png").write_bytes(gallery.stamped(_png(), ORIGIN))
    for run, seconds in zip(runs, (90.0, 30.0), strict=True):
        run.record.write_text(f'{{"seconds": {seconds}}}')
    times, first, second = gallery.render(runs, figures / "paper").split("## ")
    assert "| 08_a on mnist | 1.5 |\n| 08_a | 0.5 |\n| all 2, one after the other | 2.0 |\n" in times
    assert first.startswith("[08_a on mnist](../../08_a.ipynb)\n\n![08_a-x](mnist/08_a-x.png)")
    assert "[numbers](mnist/08_a-x.csv)" in first
    assert second.startswith("[08_a](../../08_a.ipynb)\n\n![08_a-x](08_a-x.png)")


def test_a_small_version_leads_to_the_figure_at_full_size(tmp_path: Path, figures: Path) -> None:
    run = Run("00_a", tmp_path / "00_a.ipynb", "quick", {}, {"00_a-x": "Caption."})
    (figures / "00_a-x.png").write_bytes(gallery.stamped(_png(), ORIGIN))
    large = gallery.stamped(_png(), replace(ORIGIN, profile="paper", parameters={"sizes": [400]}))
    for place in ("paper", "paper/mnist"):
        (figures / place / "00_a-x.png").write_bytes(large)
    links = "[full size](paper/00_a-x.png), [full size, mnist](paper/mnist/00_a-x.png)"
    assert f"\n\nCaption. *Small version*: {links}.\n\n" in gallery.render([run], figures)
    (figures / "paper" / "00_a-x.png").write_bytes(gallery.stamped(_png(), replace(ORIGIN, profile="paper")))
    assert "\n\nCaption.\n\n" in gallery.render([run], figures)


def test_parameters_are_told_again_only_where_they_change(tmp_path: Path, figures: Path) -> None:
    stems = ("00_a-w", "00_a-x", "00_a-y", "00_a-z")
    run = Run("00_a", tmp_path / "00_a.ipynb", "quick", {}, dict.fromkeys(stems, "Caption."))
    origins = (ORIGIN, None, ORIGIN, replace(ORIGIN, parameters={"rate": 2}))
    for stem, origin in zip(stems, origins, strict=True):
        picture = _png() if origin is None else gallery.stamped(_png(), origin)
        (figures / f"{stem}.png").write_bytes(picture)
    facts = re.findall(r"^\[numbers\].*(?:parameters: |drawn by )(\S+)", gallery.render([run], figures), re.M)
    assert facts == ["`dataset", "hand:", "as", "`rate"]


def test_what_stands_around_the_gallery_stays(tmp_path: Path) -> None:
    page = "Mine.\n<!-- gallery -->\nold\n<!-- end -->\nAlso mine.\n<!-- table a.csv -->\n<!-- end -->\n"
    new = gallery.render([], tmp_path, page)
    assert new == page.replace("old\n", "\n")
    assert gallery.render([], tmp_path, new) == new
    with pytest.raises(ValueError, match="has no lines '<!-- gallery -->' and '<!-- end -->'"):
        gallery.render([], tmp_path, "# Figures\n")


def test_no_picture_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    with pytest.raises(OSError, match="cannot identify image"):
        gallery.origin(tmp_path / "a.png")
