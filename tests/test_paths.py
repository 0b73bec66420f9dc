"""Where files are written: what could not be written in the end is an error before the work."""

import os
from pathlib import Path

import pytest

from spear import paths


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a folder, a pipe, a file and links to them."""
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    os.mkfifo("pipe")
    Path("input").write_text("read")
    Path("link").symlink_to("input")
    Path("astray").symlink_to("sub")
    return tmp_path


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["none/found"], "none/found: no such folder"),
        (["sub"], "sub: a folder: it cannot be written to"),
        (["astray"], "astray: a folder"),
        (["pipe"], "pipe: no regular file"),
        ([os.devnull], f"{os.devnull}: no regular file"),
        (["found", "found"], "found: given twice"),
        (["found", "sub/../found"], "sub/../found: given twice"),
        (["input"], "input: given twice"),
        (["link"], "link: given twice"),
        ([f"sub/../{'x' * 250}"], "cannot be written: File name too long"),
        (["/proc/found"], "/proc/found: "),
    ],
)
def test_outputs_that_could_not_be_written(folder: Path, outputs: list[str], message: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises((OSError, ValueError), match=message) as caught:
        paths.check_outputs(map(Path, outputs), [Path("input"), None])
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before


def test_outputs_that_can_be_written(folder: Path) -> None:
    Path("old").write_text("to be replaced")
    before = sorted(folder.rglob("*"))
    paths.check_outputs([Path("found"), None, Path("old"), Path("sub/found")], [Path("input")])
    assert sorted(folder.rglob("*")) == before
    assert Path("old").read_text() == "to be replaced"
