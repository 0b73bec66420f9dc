"""`spear attack`: what it prints and writes."""

import re
from pathlib import Path

import pytest
import torch
from command_line import run
from safetensors import safe_open
from safetensors.torch import save_file

from spear import inversion, models


def test_attack_finds_the_batch(folder: Path, case: tuple, capsys: pytest.CaptureFixture) -> None:
    files = ["--output", "found.safetensors", "--picture", "found.png"]
    status = run(
        "attack", "--run-code", "factories:narrow", "update.safetensors", "--weights", "weights.safetensors", *files
    )
    output, told = (words.splitlines() for words in capsys.readouterr())
    begun = ["loading update.safetensors", "loading factories:narrow", "method auto", "method network"]
    assert told == [f"spear attack: {words}" for words in begun]
    assert (status, output[:3]) == (1, ["rank       4", "recovered  4", "certified  4"])
    with safe_open("found.safetensors", framework="pt") as found:
        assert found.metadata()["complete"] == "True"
        distances = torch.cdist(case[0].flatten(1), found.get_tensor("inputs").flatten(1))
        assert found.get_tensor("labels").tolist() == [int([0, 3, 3, 1][i]) for i in distances.argmin(0)]
    assert distances.min(1).values.max() < 1e-9
    assert (folder / "found.png").read_bytes().startswith(b"\x89PNG")


def test_images_take_the_shape_that_is_said(folder: Path, case: tuple, capsys: pytest.CaptureFixture) -> None:
    save_file(dict(case[1].gradients), "raw.safetensors")
    attack = ("attack", "--run-code", "factories:model", "raw.safetensors", "--picture", "found.png")
    assert run(*attack) == 1
    output, told = capsys.readouterr()
    assert "no picture: inputs of shape (4, 64) are no images" in told
    assert "certified  0" in output
    assert run(*attack, "--input-shape", "1,8,8", "--samples", "4") == 1
    assert "certified  4" in capsys.readouterr().out
    assert (folder / "found.png").read_bytes().startswith(b"\x89PNG")


def test_the_shape_of_an_exported_model_is_that_of_its_images(
    folder: Path, case: tuple, capsys: pytest.CaptureFixture
) -> None:
    model = models.fcnn(case[0].shape[1:], 60, 2, 5, seed=0)
    torch.export.save(torch.export.export(model, (case[0],)), "model.pt2")
    save_file(dict(case[1].gradients), "raw.safetensors")
    assert run("attack", "model.pt2", "raw.safetensors", "--samples", "4", "--picture", "found.png") == 1
    assert "certified  4" in capsys.readouterr().out
    assert (folder / "found.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "problem"),
    [("1;8;8", "--input-shape '1;8;8' is not of the form 3,32,32"), ("8,8", r"\(1, 8, 8\), not \(8, 8\)")],
)
def test_a_shape_of_another_form_or_size_is_refused(
    folder: Path, capsys: pytest.CaptureFixture, words: str, problem: str
) -> None:
    assert run("attack", "--run-code", "factories:model", "update.safetensors", "--input-shape", words) == 2
    assert re.search(problem, capsys.readouterr().err)


def test_nothing_recovered_is_status_0(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("attack", "--run-code", "factories:model", "update.safetensors", "--time-limit", "0") == 0
    output = capsys.readouterr().out
    assert "recovered  0" in output
    assert "time limit" in output


def test_the_help_names_every_method(capsys: pytest.CaptureFixture) -> None:
    assert run("attack", "--help") == 0
    words = capsys.readouterr().out
    assert [method for method in inversion.METHODS if not re.search(rf"\b{method}\b", words)] == []
