"""`spear data`: lists and packs."""

import re
from pathlib import Path

import pytest
import torch
from command_line import run
from PIL import Image

from spear import data


def test_data_lists_and_packs(folder: Path, capsys: pytest.CaptureFixture) -> None:
    pixels = torch.arange(4 * 8 * 8 * 3, dtype=torch.uint8).reshape(4, 8, 8, 3).numpy()
    for number, image in enumerate(pixels):
        place = folder / "pictures" / f"class{number % 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
    assert run("data", "pack", "pictures", "mine", "--root", "packs") == 0
    assert capsys.readouterr().out.strip() == str(Path("packs") / "mine.npz")
    assert data.load("mine", count=4, root="packs")[0].shape == (4, 3, 8, 8)
    assert run("data", "pack", "pictures", "mine", "--root", "packs") == 2
    assert "mine.npz exists: remove it first" in capsys.readouterr().err
    assert run("data", "list") == 0
    listed = capsys.readouterr().out
    assert re.search(r"digits +│ yes", listed)
    assert re.search(r"mnist +│ no", listed)
