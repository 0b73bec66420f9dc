"""Whatever the client did and whichever method runs: options mean something or are refused, and results say who ran."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor, nn

import spear
from spear.descent.dictionary import Dictionary, l4_maximise
from spear.descent.layer import Coupled
from spear.federated import SharedUpdate, clients, defences, gradient
from spear.inversion import METHODS, Auto, Network
from spear.published.algorithm import Sampling
from spear.published.guided import Guided
from spear.reconstruction import Refusal

BATCH, SHAPE, CLASSES = 6, (40,), 5
BY_DISCLOSURE = ("noise", "pruning", "local training")


class Branched(nn.Module):
    """A layer that reads the data and is followed by ReLU, in a model that is no chain of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(40, 150), nn.Linear(150, 150), nn.Linear(150, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.last(y + torch.relu(self.second(y)))


def branched() -> nn.Module:
    torch.manual_seed(0)
    return Branched().double()


def chain() -> nn.Module:
    return spear.models.fcnn(SHAPE, 120, 3, CLASSES, seed=1)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, *SHAPE, generator=Generator().manual_seed(seed), dtype=torch.float64)
    return x, torch.arange(BATCH) % CLASSES


def send(model: nn.Module, how: str) -> SharedUpdate:
    """The update of a client that does `how`: a method's name stands for a plain gradient."""
    x, y = batch()
    if how == "local training":
        return clients.local_training(model, x, y, epochs=2, mini_batch=3, learning_rate=0.05)
    update, generator = gradient(model, x, y), Generator().manual_seed(1)
    if how == "noise":
        return defences.quantised(update, 12, generator=generator)
    return defences.pruned_random(update, 0.6, generator=generator) if how == "pruning" else update


def path(how: str) -> dict[str, str]:
    """The options of an attack that takes this path: a block that no tokens enter is found by name."""
    return {"method": "auto" if how in BY_DISCLOSURE else how} | ({"layer": "fc1"} if how == "block" else {})


@pytest.mark.parametrize("how", [*(m for m in METHODS if m != "auto"), *BY_DISCLOSURE])
def test_every_path_tells_progress_and_says_which_method_it_was(how):
    seen, model = [], chain()
    result = spear.attack(model, send(model, how), **path(how), progress=seen.append)
    assert len(result.inputs) == BATCH, result.reason
    assert result.method == how
    assert {state.method for state in seen} <= {how}
    assert all(0 <= state.found <= state.rank == BATCH for state in seen)
    assert [state.proposals for state in seen] == sorted(state.proposals for state in seen)
    assert seen or result.stats.rounds == 0


@pytest.mark.parametrize("limit", [{"time_limit": 0}, {"max_proposals": 0}])
@pytest.mark.parametrize("how", [*(m for m in METHODS if m not in ("auto", "network")), *BY_DISCLOSURE])
def test_every_path_keeps_its_budget_and_names_the_limit(how, limit):
    model = chain()
    result = spear.attack(model, send(model, how), **path(how), **limit)
    assert not result.complete
    assert not result.certified.any()
    words = "the time limit of 0 s was reached" if "time_limit" in limit else "the budget of 0 proposals was spent"
    assert result.reason.count(words) == 1


def test_a_batch_size_that_was_not_disclosed_is_told_to_local_training():
    model = chain()
    update = replace(send(model, "local training"), count=None)
    with pytest.raises(Refusal, match="its count is not disclosed"):
        spear.attack(model, update, method="network")
    result = spear.attack(model, update, batch_size=BATCH)
    assert result.complete, result.reason
    assert spear.metrics.evaluate(result, *batch()).recall == 1


def test_auto_on_a_model_that_is_no_chain_goes_on_with_one_layer():
    model = branched()
    result = spear.attack(model, send(model, "plain"))
    assert (result.method, result.complete) == ("layer", True), result.reason
    assert spear.metrics.evaluate(result, *batch()).recall == 1


@pytest.mark.parametrize("limit", [{}, {"time_limit": 0}])
@pytest.mark.parametrize("how", ["noise", "pruning"])
def test_auto_says_what_it_tried_where_the_update_is_inexact_and_the_model_no_chain(how, limit):
    model = branched()
    result = spear.attack(model, send(model, how), **limit)
    assert not result.certified.any()
    assert "network: the network method needs one chain" in result.reason
    assert result.reason.count("the time limit of 0 s was reached") == len(limit)
    if how == "noise" and not limit:
        assert spear.metrics.evaluate(result, *batch()).relative_error.max() < 0.1


CLAIMS = ({"noise": 1.0}, {"noise": 1e-300}, {"bits": 4}, {"pruning": "top-k"}, {"pruning": "random", "bits": 8})


@pytest.mark.parametrize("claimed", CLAIMS)
@pytest.mark.parametrize("method", ["auto", "network", "layer", "sampling"])
def test_what_a_client_claims_switches_no_attack_off(claimed, method):
    """An exact gradient whose client claims noise, rounding or gaps comes back as if nothing were claimed."""
    model = chain()
    result = spear.attack(model, replace(send(model, "plain"), **claimed), method=method)
    assert result.complete, result.reason
    assert re.search("the client claims .*: the update does not show it", result.reason)


def test_a_claim_that_cannot_be_seen_through_at_once_is_dropped_where_it_leads_nowhere():
    """Noise there is, of another size than claimed."""
    model = chain()
    noisy = defences.noisy(send(model, "plain"), 1e-5, generator=Generator().manual_seed(1))
    result = spear.attack(model, replace(noisy, noise=10.0), method="network")
    assert len(result.inputs) == BATCH, result.reason
    assert "the client claims noise of 10 per entry" in result.reason


def test_absurd_counts_take_no_memory_and_no_time():
    model = chain()
    update = replace(send(model, "plain"), count=2**39, mini_batch=3, learning_rate=0.1)
    with pytest.raises(Refusal, match="samples"):
        spear.attack(model, update, time_limit=5)
    result = spear.attack(model, replace(update, count=9, local_steps=2**39), time_limit=5)
    assert f"the update is that of one step, told were {2**39}" in result.reason
    assert len(result.inputs) == BATCH


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"time_limit": float("nan")}, "time_limit is a finite number"),
        ({"time_limit": float("inf")}, "time_limit is a finite number"),
        ({"time_limit": -1}, "time_limit is a finite number of at least 0"),
        ({"max_proposals": -1}, "max_proposals is a whole number of at least 0"),
        ({"batch_size": 0}, "batch_size is a whole number of at least 1"),
        ({"seed": -1}, "seed is a whole number of at least 0"),
    ],
)
def test_limits_that_are_none(options, words):
    model = chain()
    with pytest.raises(ValueError, match=words):
        spear.attack(model, send(model, "plain"), **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value):
    model = chain()
    update = send(model, "plain")
    with torch.no_grad():
        model[3].weight[0, 0] = value
    with pytest.raises(ValueError, match="weight of the model holds NaN or infinite values"):
        spear.attack(model, update)


def test_where_no_method_can_begin_each_says_why():
    model = branched()
    with pytest.raises(Refusal, match="network: the network method needs one chain.*layer: an update of 4 local steps"):
        spear.attack(model, send(model, "local training"))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (Sampling(false_rejection=1e-6), "sampling"),
        (Guided(approximate=torch.zeros(1, 40, dtype=torch.float64)), "guided"),
        (Dictionary(learner=l4_maximise), "dictionary"),
        (Coupled(), "layer"),
        (Network(), "network"),
    ],
)
def test_a_method_with_its_options_is_that_method(options, name):
    model = chain()
    result = spear.attack(model, send(model, "plain"), method=options)
    assert result.method == options.name == name
    assert spear.metrics.evaluate(result, *batch()).recall == 1, result.reason


@pytest.mark.parametrize("kind", [Auto, Sampling, Guided, Dictionary, Coupled, Network])
def test_an_option_that_a_method_does_not_have_is_a_type_error(kind):
    with pytest.raises(TypeError, match="patience"):
        kind(patience=3)
    with pytest.raises(TypeError, match="patience"):
        spear.attack(chain(), send(chain(), "plain"), method=kind(), patience=3)
