"""The audit: what it says of layers, and of an update, holds; mistakes are named."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from audited import CLASSES, QUICK, SHAPE, WIDTH
from torch import nn

from spear import federated, inversion, metrics, models
from spear.audit import assessment, report
from spear.published import theory


def test_layers(model: nn.Module) -> None:
    first, second, last = assessment.assess(model)
    assert (first.name, first.inputs, first.width, first.from_data, first.limit) == ("fc1", 64, WIDTH, True, WIDTH - 1)
    assert (second.from_data, second.limit, second.gives_away) == (False, WIDTH - 1, "the features that enter it")
    assert (last.limit, last.sampling, last.gives_away) == (0, 0, "not attacked by itself: no ReLU follows")
    bare = assessment.assess(models.fcnn(SHAPE, 400, 2, CLASSES, bias=False))[0]
    assert (bare.limit, bare.gives_away) == (64, "the samples themselves, each up to a factor (no bias)")


@pytest.mark.parametrize("width", [30, 200])
def test_what_sampling_can_afford_is_theory(width: int) -> None:
    (risk, *_) = assessment.assess(models.fcnn((300,), width, 2, CLASSES))
    cost = [theory.expected_proposals(theory.half_rates(width, b)) for b in (risk.sampling, risk.sampling + 1)]
    assert cost[0] <= inversion.AFFORDABLE < cost[1]


def test_a_simulation_recovers_its_sample(simulated: assessment.Audit) -> None:
    assert simulated.status == 1
    assert (simulated.source, simulated.sample, simulated.count) == ("a simulated update", "digits", 4)
    assert simulated.result.complete
    assert metrics.evaluate(simulated.result, simulated.truth).recall == 1
    assert (simulated.outcome.exact, simulated.outcome.recognised, simulated.outcome.certified) == (4, 4, 4)


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


class Answering(nn.Module):
    """A model that returns its logits by name, as those of transformers do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.model(x)}


class Doubled(Answering):
    """A twin whose outputs count for nothing: no labels come back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.twin = copy.deepcopy(model).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) + 0 * self.twin(x)


def frozen(model: nn.Module) -> nn.Module:
    model.fc1.requires_grad_(False)
    return model


KINDS = {"logits by name": Answering, "no labels": Doubled, "frozen": frozen, "compiled": torch.compile}


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_other_people(model: nn.Module, kind: str) -> None:
    options = {"count": 3, "input_shape": SHAPE, **QUICK, "time_limit": 60}
    found = assessment.audit(KINDS[kind](copy.deepcopy(model)), **options)
    assert (found.outcome.exact, found.status) == (3, 1)
    assert found.layer == ("fc2" if kind == "frozen" else None)
    assert all(tested.outcome is not None for tested in found.defences if tested.name != "local training")
    json.loads(report.to_json(found))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(WIDTH), nn.ReLU(), nn.LazyLinear(CLASSES)), "no shape yet"),
        (lambda: models.fcnn(SHAPE, WIDTH, 3, CLASSES).to("meta"), "has no values"),
        (lambda: nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(64, 9), nn.ReLU()), "scalar types"),
    ],
)
def test_models_without_numbers(made: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assessment.audit(made(), input_shape=(8,), **QUICK)


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


def test_a_model_that_no_attack_reads() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.Softmax(1), nn.Linear(9, 4)).double()
    with pytest.raises(ValueError, match="no ReLU follows any linear layer"):
        assessment.audit(model)


@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh, nn.LeakyReLU])
def test_other_activations_hide_nothing_from_all_layers_together(activation: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 60), activation(), nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 10)]
    model = nn.Sequential(nn.Flatten(), *layers).double()
    first, second, last = assessment.assess(model, (1, 8, 8))
    assert first.gives_away == "the samples themselves, together with all other layers"
    assert (first.limit, first.sampling) == (49, 0)
    assert (second.gives_away, second.limit) == ("the features that enter it", 49)
    assert last.limit == 0
    found = assessment.audit(model, data="digits", count=6, trial_limit=0.5)
    assert (found.status, found.result.complete, found.not_attacked) == (1, True, ())
    assert "all layers together do" in report.html(found)


def test_an_update_that_does_not_fit(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="'other', which the model does not have"):
        assessment.audit(model, federated.SharedUpdate({"other": torch.ones(3)}))


def test_networks_that_normalise_are_attacked_and_their_buffers_named() -> None:
    parts = [nn.Flatten(), nn.Linear(64, 80), nn.BatchNorm1d(80), nn.ReLU(), nn.Dropout(0.2), nn.Linear(80, CLASSES)]
    model = nn.Sequential(*parts).double().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = assessment.audit(model, count=6, input_shape=SHAPE, trial_limit=0.1, time_limit=20)
    assert found.result.complete, found.result.reason
    assert found.not_attacked == ()
    (words,) = found.statistics
    assert words == "2: mean and variance of 80 features over the client's batch, and with them the mean sample"
    first = found.layers[0]
    assert first.gives_away == "the samples, up to one image common to all, together with all other layers"
    assert first.limit == (80 - CLASSES - 8) // 2 + 1
    assert words in report.html(found).replace("&#39;", "'")
    assert json.loads(report.to_json(found))["statistics"] == [words]
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_mean_that_is_lost_is_said() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, CLASSES)
    ).double()
    found = assessment.audit(model.train(), count=6, input_shape=SHAPE, trial_limit=0.1, time_limit=20)
    assert found.status == 1
    assert not found.result.complete
    assert "0 of them are certified, and of 6 the difference from their mean" in report.verdict(found)


@pytest.mark.parametrize(("channels", "images"), [(16, True), (2, False)])
def test_samples_are_read_through_a_front_where_its_features_determine_them(channels: int, images: bool) -> None:
    torch.manual_seed(0)
    front = [nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()]
    head = [nn.Linear(16 * channels, 60), nn.ReLU(), nn.Linear(60, 10)]
    model = nn.Sequential(*front, *head).double().eval()
    found = assessment.audit(model, data="digits", count=4, trial_limit=0.5, time_limit=30)
    assert (found.status, found.outcome.exact, found.outcome.certified) == (1, 4, 4)
    assert found.layer == (None if images else "3")
    assert found.truth[0].numel() == (64 if images else 16 * channels)
    assert ("numbers are missing" in found.result.reason) != images
