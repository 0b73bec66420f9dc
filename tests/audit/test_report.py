"""The page and the JSON of an audit."""

import json
import re
from dataclasses import replace

import torch
from audited import CLASSES, SHAPE
from torch import Tensor, nn

from spear.audit import assessment, report


def test_the_page_needs_nothing_else_and_escapes_names(attacked: tuple) -> None:
    page = report.html(attacked[0])
    assert "<b>mine" not in page
    assert "&lt;b&gt;mine&lt;/b&gt;" in page
    assert page.count("data:image/png;base64,") == 1
    assert re.findall(r"(?:src|href)=\"(?!data:)", page) == []
    assert "5 samples were recovered from an update, a batch of 5; 0 of them are certified." in page
    assert "the number of samples is not disclosed" in page


def test_the_simulated_page_shows_what_was_sent(simulated: assessment.Audit) -> None:
    assert "4 of 4 exact, 4 recognisable" in report.html(simulated)


class Mixed(nn.Module):
    """A convolution, a layer that is attacked, one beside it, one without ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first = nn.Conv2d(1, 1, 1), nn.Linear(64, 40)
        self.second, self.last = nn.Linear(40, 40), nn.Linear(40, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(self.conv(x).flatten(1))))))


def test_nothing_recovered_says_what_was_not_attacked() -> None:
    found = assessment.audit(Mixed(), count=4, input_shape=SHAPE, time_limit=0, trial_limit=0)
    assert found.status == 0
    words = report.verdict(found)
    assert words.startswith("Nothing was recovered from a simulated update of 4 samples in the 0 s given")
    leaks = "conv (Conv2d: what it gives first leaks, the images often too)"
    expected = [leaks, "second (only first was attacked)", "last (no ReLU follows)"]
    assert words.endswith(f"Not attacked: {', '.join(expected)}.")
    assert json.loads(report.to_json(found))["attack"]["not_attacked"] == expected
    assert {risk.gives_away for risk in found.layers if not risk.relu} == {"not attacked by itself: no ReLU follows"}


def test_json(attacked: tuple, simulated: assessment.Audit) -> None:
    content = json.loads(report.to_json(attacked[0]))
    assert (content["schema"], content["status"]) == ("spear.Audit/1", 1)
    assert (content["attack"]["recovered"], content["attack"]["certified"]) == (5, 0)
    assert "the number of samples is not disclosed" in content["attack"]["reason"]
    assert sorted(content["attack"]["labels"]) == sorted(attacked[2].tolist())
    assert [layer["name"] for layer in content["model"]["layers"]] == ["fc1", "fc2", "fc3"]
    assert {entry["name"] for entry in content["defences"]} >= {"none", "float16", "DP-SGD"}
    assert content["peak_memory_bytes"] > 1e7
    assert json.loads(report.to_json(simulated))["attack"]["against_truth"]["exact"] == 4
    infinite = replace(simulated, seconds=float("inf"))
    assert json.loads(report.to_json(infinite))["seconds"] is None
