"""`spear audit`: what it prints and writes, its exit statuses, and one clear line for every mistake."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spear import federated, inversion, models
from spear.cli.app import main
from spear.federated import clients

SHAPE = (1, 8, 8)
QUICK = ["--trial-limit", "0.1", "--time-limit", "5"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an exported program, weights before and after a step, and its gradient."""
    monkeypatch.chdir(tmp_path)
    model = models.fcnn(SHAPE, 40, 2, 5, seed=0)
    inputs = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    update = federated.gradient(model, inputs, torch.tensor([0, 3, 1]))
    torch.export.save(torch.export.export(model, (inputs,)), tmp_path / "model.pt2")
    update.save(tmp_path / "update.safetensors")
    save_file(model.state_dict(), tmp_path / "before.safetensors")
    after = {name: (p - 0.1 * update.gradients[name]).detach() for name, p in model.named_parameters()}
    save_file(after, tmp_path / "after.safetensors")
    torch.save(model, tmp_path / "pickled.pt")
    (tmp_path / "truncated.pt2").write_bytes((tmp_path / "model.pt2").read_bytes()[:-3000])
    (tmp_path / "truncated.safetensors").write_bytes((tmp_path / "update.safetensors").read_bytes()[:-100])
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["audit", *arguments])
    return int(caught.value.code or 0)


def test_an_update(folder: Path, capsys: pytest.CaptureFixture) -> None:
    status = run("model.pt2", "update.safetensors", "--report", "page.html", "--json", "figures.json", *QUICK)
    output, parts = capsys.readouterr()
    assert status == 1
    reaches = [f"largest batch by {method}" for method in inversion.METHODS if method != "auto"]
    defences = [f"defence: {defence['name']}" for defence in json.loads(Path("figures.json").read_text())["defences"]]
    expected = ["loading model.pt2", "attack on the update", *reaches, *defences]
    assert parts.splitlines() == [f"spear audit: {words}" for words in expected]
    assert "3 samples were recovered from an update, the whole batch; 3 of them are certified." in output
    assert all(word in output for word in ("fc1", "sampling", "network", "DP-SGD"))
    assert (folder / "page.html").read_text().startswith("<!doctype html>")
    assert json.loads((folder / "figures.json").read_text())["attack"]["certified"] == 3


def test_the_difference_of_weights(folder: Path, capsys: pytest.CaptureFixture) -> None:
    files = [
        "--before",
        "before.safetensors",
        "--after",
        "after.safetensors",
        "--learning-rate",
        "0.1",
        "--samples",
        "3",
    ]
    assert run("model.pt2", *files, *QUICK) == 1
    assert "3 of them are certified" in capsys.readouterr().out


def test_local_training_that_was_disclosed(folder: Path, capsys: pytest.CaptureFixture) -> None:
    model = models.fcnn(SHAPE, 60, 3, 5, seed=0)
    inputs = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sent = clients.local_training(model, inputs, torch.tensor([0, 3, 1, 1]), mini_batch=2, epochs=2, momentum=0.5)
    torch.export.save(torch.export.export(model, (inputs,)), folder / "deep.pt2")
    save_file(model.state_dict(), folder / "before.safetensors")
    after = {name: (p - sent.gradients[name]).detach() for name, p in model.named_parameters()}
    save_file(after, folder / "after.safetensors")
    save_file(dict(sent.gradients), folder / "change.safetensors")
    told = ["--learning-rate", "0.1", "--local-steps", "4", "--mini-batch", "2", "--momentum", "0.5", "--samples", "4"]
    files = ["--before", "before.safetensors", "--after", "after.safetensors"]
    assert run("deep.pt2", *files, *told, *QUICK) == 1
    assert "4 samples were recovered from an update, the whole batch" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["attack", "deep.pt2", "change.safetensors", *told])
    assert caught.value.code == 1
    assert "certified  4" in capsys.readouterr().out


def test_nothing_recovered_is_status_0(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("model.pt2", "--count", "30", "--trial-limit", "0", "--time-limit", "0") == 0
    assert "Nothing was recovered" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pickled.pt"], "pickled.pt: a pickle, which could run code when it is loaded"),
        (["truncated.pt2"], "truncated.pt2: no exported program"),
        (["none.pt2"], "none.pt2: no such file"),
        (["nowhere:model", "--run-code"], "model nowhere:model: ModuleNotFoundError"),
        (["model.pt2", "truncated.safetensors"], "truncated.safetensors: not a complete safetensors file"),
        (["model.pt2", "pickled.pt"], "pickled.pt: not a complete safetensors file"),
        (["model.pt2", "update.safetensors", "--after", "after.safetensors"], "give UPDATE, or --before, --after"),
        (["model.pt2", "--after", "after.safetensors"], "needs --before, --after and --learning-rate"),
        (["model.pt2", "--local-steps", "2"], "what a client disclosed needs its update"),
        (["model.pt2", "update.safetensors", "--local-steps", "2"], "its learning rate is needed"),
        (["model.pt2", "update.safetensors", "--samples", "7"], "the update says count 3, not 7"),
        (
            ["model.pt2", "update.safetensors", "--learning-rate", "-1"],
            "learning_rate is a number from 1e-30 to 1e+30, not '-1.0'",
        ),
        (
            ["model.pt2", "update.safetensors", "--learning-rate", "1", "--mini-batch", "4"],
            "a mini-batch of 4 does not come from 3 samples",
        ),
        (
            ["model.pt2", "update.safetensors", "--learning-rate", "1", "--momentum", "1"],
            "momentum is a number from 0 to 0.999999, not '1.0'",
        ),
        (["model.pt2", "--input-shape", "8x8"], "--input-shape '8x8' is not of the form 3,32,32"),
        (["model.pt2", "--data", "photos"], "samples of photos have shape (3, 32, 32); the model takes (1, 8, 8)"),
        (["model.pt2", "--layer", "fc7"], "no linear layer named 'fc7'"),
        (["model.pt2", "--trial-limit", "nan"], "trial_limit is a finite number of at least 0, not nan"),
        (["model.pt2", "--time-limit", "inf"], "time_limit is a finite number of at least 0, not inf"),
        (["nowhere:model"], "a factory is code, which is not run"),
        (["model.pt2", "--report", "model.pt2"], "model.pt2: given twice"),
        (["model.pt2", "--report", "none/page.html"], "none/page.html: no such folder"),
        (["model.pt2", "--device", "abacus"], "device 'abacus' is not available here"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert run(*arguments) == 2
    *parts, line = capsys.readouterr().err.splitlines()
    assert all(part.startswith("spear audit: ") for part in parts)
    assert line.startswith("spear: error: ")
    assert message in line
