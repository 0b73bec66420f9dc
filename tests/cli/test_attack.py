"""`spear attack`: what it prints and writes."""

import re
from pathlib import Path

import pytest
import torch
from command_line import run
from safetensors import safe_open

from spear import inversion


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


def test_nothing_recovered_is_status_0(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("attack", "--run-code", "factories:model", "update.safetensors", "--time-limit", "0") == 0
    output = capsys.readouterr().out
    assert "recovered  0" in output
    assert "time limit" in output


def test_the_help_names_every_method(capsys: pytest.CaptureFixture) -> None:
    assert run("attack", "--help") == 0
    words = capsys.readouterr().out
    assert [method for method in inversion.METHODS if not re.search(rf"\b{method}\b", words)] == []
