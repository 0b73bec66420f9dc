"""The audit: what it says of layers, reach and defences holds in the simulations it rests on; its page and its JSON."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from spear import federated, inversion, metrics, models, reconstruction
from spear.audit import assessment, report, simulation
from spear.audit.sample import choose, input_shape, outputs
from spear.published import one_layer, theory

SHAPE, CLASSES, WIDTH = (1, 8, 8), 5, 40
QUICK = {"trial_limit": 0.2, "time_limit": 5}


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    return models.fcnn(SHAPE, WIDTH, 3, CLASSES, seed=0)


@pytest.fixture(scope="module")
def simulated(model: nn.Module) -> assessment.Audit:
    return assessment.audit(model, count=4, **QUICK)


@pytest.fixture(scope="module")
def attacked(model: nn.Module) -> tuple[assessment.Audit, torch.Tensor, torch.Tensor]:
    inputs, labels = choose("digits", SHAPE, CLASSES, most=5, seed=7).take(5)
    update = replace(federated.gradient(model, inputs, labels), count=None)
    return assessment.audit(model, update, name="<b>mine</b>", **QUICK), inputs, labels


def test_layers(model: nn.Module) -> None:
    first, second, last = assessment.assess(model)
    assert (first.name, first.inputs, first.width, first.from_data, first.limit) == ("fc1", 64, WIDTH, True, WIDTH - 1)
    assert (second.from_data, second.limit, second.gives_away) == (False, WIDTH - 1, "the features that enter it")
    assert (last.limit, last.sampling, last.gives_away) == (0, 0, "nothing by this attack: no ReLU follows")
    bare = assessment.assess(models.fcnn(SHAPE, 400, 2, CLASSES, bias=False))[0]
    assert (bare.limit, bare.gives_away) == (64, "the samples themselves, each up to a factor (no bias)")


@pytest.mark.parametrize("width", [30, 200])
def test_what_sampling_can_afford_is_theory(width: int) -> None:
    (risk, *_) = assessment.assess(models.fcnn((300,), width, 2, CLASSES))
    cost = [theory.expected_proposals(theory.half_rates(width, b)) for b in (risk.sampling, risk.sampling + 1)]
    assert cost[0] <= one_layer.AFFORDABLE < cost[1]


def test_a_simulation_recovers_its_sample(simulated: assessment.Audit) -> None:
    assert simulated.status == 1
    assert (simulated.source, simulated.sample, simulated.count) == ("a simulated update", "digits", 4)
    assert simulated.result.complete
    assert metrics.evaluate(simulated.result, simulated.truth).recall == 1
    assert (simulated.outcome.exact, simulated.outcome.recognised, simulated.outcome.certified) == (4, 4, 4)


def test_the_reach_is_a_batch_that_came_back_whole(model: nn.Module, simulated: assessment.Audit) -> None:
    assert [reach.method for reach in simulated.reaches] == [m for m in inversion.METHODS if m != "auto"]
    sample = choose(None, SHAPE, CLASSES, most=WIDTH)
    for reach in simulated.reaches:
        assert 0 <= reach.largest < reach.most == WIDTH - 1
        assert reach.largest < reach.failed <= reach.most
        assert reach.reason
        if reach.largest:
            update = federated.gradient(model, *sample.take(reach.largest))
            assert inversion.attack(model, update, method=reach.method, time_limit=10).complete
    assert max(reach.largest for reach in simulated.reaches) >= 4  # what the outcome says of four


def test_reach_without_a_failure(model: nn.Module) -> None:
    sample = choose("digits", SHAPE, CLASSES, most=6)
    reach = simulation.reach(model, sample, "sampling", most=3)
    assert (reach.largest, reach.failed, reach.reason, reach.most) == (3, None, "", 3)


def test_defences(simulated: assessment.Audit) -> None:
    tested = {entry.name: entry for entry in simulated.defences}
    assert tested["none"].verdict == "does not stop it"
    assert tested["none"].outcome.exact == 4
    assert tested["DP-SGD"].verdict in ("stops this attack", "not in the time given")
    for entry in simulated.defences:
        assert (entry.outcome is None) == (entry.verdict == "not attacked") == bool(entry.reason)
        assert entry.advice
        if entry.outcome:
            assert 0 <= entry.outcome.exact <= entry.outcome.recognised <= entry.outcome.sent == 4


def test_what_only_rounding_hides_is_no_protection(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = choose("digits", SHAPE, CLASSES, most=4)
    single = replace(sample, inputs=sample.inputs.float())

    def attack(now: nn.Module, update: federated.SharedUpdate, **options) -> reconstruction.Reconstruction:
        result = whole(now, update, **options)
        if next(now.parameters()).dtype == torch.float64:
            return result
        held = {name: value for name, value in vars(result).items() if isinstance(value, torch.Tensor)}
        nothing = {name: value[:0] for name, value in held.items()}
        return replace(result, **nothing, complete=False)

    whole = inversion.attack
    monkeypatch.setattr(inversion, "attack", attack)
    options = simulation.Options(time_limit=20)
    everyone = choose("digits", SHAPE, CLASSES, most=40)
    others = replace(everyone, inputs=everyone.inputs.float())
    tested = simulation.try_defences(copy.deepcopy(model).float(), single, 4, others=others, options=options)
    assert {t.name for t in tested if t.verdict == "only rounding hides it"} == {"local training"}


def test_an_update_is_attacked_and_defended(attacked: tuple) -> None:
    found, inputs, labels = attacked
    evaluation = metrics.evaluate(found.result, inputs, labels)
    assert (evaluation.recall, evaluation.precision, evaluation.label_accuracy) == (1, 1, 1)
    assert (found.status, found.count, found.truth, found.outcome) == (1, 5, None, None)
    assert {entry.outcome.sent for entry in found.defences if entry.outcome} == {5}


def test_a_deeper_layer_gives_features(model: nn.Module) -> None:
    found = assessment.audit(model, layer="fc2", count=3, **QUICK)
    assert (found.layer, found.result.inputs.shape, found.picture) == ("fc2", (3, WIDTH), (WIDTH,))
    assert found.outcome.exact == 3
    assert "What came out of" not in report.verdict(found)


def test_a_convolution_before_the_layer() -> None:
    torch.manual_seed(0)
    front = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(front, nn.Linear(72, 30), nn.ReLU(), nn.Linear(30, CLASSES)).double()
    found = assessment.audit(model, count=3, input_shape=SHAPE, **QUICK)
    assert (found.layer, found.outcome.exact, found.sample) == ("1", 3, "digits")
    network = next(reach for reach in found.reaches if reach.method == "network")
    assert (network.largest, network.failed) == (0, 1)


def test_nothing_recovered_is_status_0(model: nn.Module) -> None:
    found = assessment.audit(model, count=39, trial_limit=0, time_limit=0)
    assert (found.status, len(found.result.inputs)) == (0, 0)
    assert report.verdict(found) == (
        "Nothing was recovered from a simulated update of 39 samples in the 0 s given: more time may find more."
    )
    assert json.loads(report.to_json(found))["attack"]["in_time"] is False
    assert report.certificate(found) == "none"
    assert "<img" not in report.html(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "fc9"}, "no linear layer named 'fc9'; the model's linear layers: fc1, fc2, fc3"),
        ({"layer": "fc3"}, "no ReLU follows fc3"),
        ({"data": "photos"}, r"samples of photos have shape \(3, 32, 32\); the model takes \(1, 8, 8\)"),
        ({"input_shape": (3, 3)}, r"the model gives no logits for samples of shape \(3, 3\)"),
        ({"count": 4000}, "digits has 1797 samples: a batch cannot have 4000"),
        ({"data": "nowhere"}, "unknown data set 'nowhere'"),
    ],
)
def test_mistakes(model: nn.Module, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assessment.audit(model, **options)


def test_a_model_without_relu() -> None:
    with pytest.raises(ValueError, match="no ReLU follows any linear layer"):
        assessment.audit(nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.GELU(), nn.Linear(9, 4)).double())


def test_an_update_that_does_not_fit(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="'other', which the model does not have"):
        assessment.audit(model, federated.SharedUpdate({"other": torch.ones(3)}))


def test_the_page_needs_nothing_else_and_escapes_names(attacked: tuple) -> None:
    page = report.html(attacked[0])
    assert "<b>mine" not in page
    assert "&lt;b&gt;mine&lt;/b&gt;" in page
    assert page.count("data:image/png;base64,") == 1
    assert re.findall(r"(?:src|href)=\"(?!data:)", page) == []
    assert "5 samples were recovered from an update, the whole batch; 5 of them are certified." in page


def test_the_simulated_page_shows_what_was_sent(simulated: assessment.Audit) -> None:
    assert "4 of 4 exact, 4 recognisable" in report.html(simulated)


def test_json(attacked: tuple, simulated: assessment.Audit) -> None:
    content = json.loads(report.to_json(attacked[0]))
    assert (content["schema"], content["status"]) == ("spear.Audit/1", 1)
    assert content["attack"]["recovered"] == content["attack"]["certified"] == 5
    assert sorted(content["attack"]["labels"]) == sorted(attacked[2].tolist())
    assert [layer["name"] for layer in content["model"]["layers"]] == ["fc1", "fc2", "fc3"]
    assert {entry["name"] for entry in content["defences"]} >= {"none", "float16", "DP-SGD"}
    assert content["peak_memory_bytes"] > 1e7
    assert json.loads(report.to_json(simulated))["attack"]["against_truth"]["exact"] == 4
    infinite = replace(simulated, seconds=float("inf"))
    assert json.loads(report.to_json(infinite))["seconds"] is None


def test_what_simulated_clients_hold(tmp_path: Path) -> None:
    noise = choose(None, (7,), 3, most=6, seed=1)
    assert (noise.words, noise.inputs.shape, int(noise.labels.max()) < 3) == ("standard normal inputs", (6, 7), True)
    flat = choose(None, (64,), 3, most=6)
    assert (flat.words, flat.inputs.shape, flat.picture) == ("digits", (6, 64), SHAPE)
    for number in range(4):
        place = tmp_path / f"class{number % 2}" / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (40 * number, 0, 255)).save(place)
    own = choose(str(tmp_path), (3, 8, 8), 5, most=3)
    assert (own.inputs.shape, own.words) == ((3, 3, 8, 8), str(tmp_path))
    assert float(own.inputs.min()) == -1
    assert float(own.inputs.max()) == 1


@pytest.mark.parametrize(("front", "shape"), [(nn.Flatten(), SHAPE), (nn.Identity(), (64,))])
def test_the_input_shape_is_found_by_trying(front: nn.Module, shape: tuple) -> None:
    model = nn.Sequential(front, nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 4))
    assert input_shape(model) == shape
    assert outputs(model, shape) == 4
    assert outputs(model, (65,)) == 0
    with pytest.raises(ValueError, match="say which shape one sample has"):
        input_shape(nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(30, 9), nn.ReLU()))
