"""The monitor: it says which updates can be read, warns, and keeps what it saw."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spear import federated, inversion, metrics, models
from spear.audit.monitor import Finding, Monitor
from spear.federated.update import difference

SHAPE, RATE = (1, 8, 8), 0.25


@pytest.fixture
def model() -> nn.Sequential:
    return models.fcnn(SHAPE, 40, 2, 5, seed=0)


def batch(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64), torch.arange(count) % 5


def stepped(model: nn.Module, count: int) -> dict[str, Tensor]:
    """A client's weights after one step on `count` samples."""
    update = federated.gradient(model, *batch(count))
    return {name: (p - RATE * update.gradients[name]).detach() for name, p in model.named_parameters()}


def test_the_difference_of_weights_is_the_gradient(model: nn.Module) -> None:
    update = federated.gradient(model, *batch(3))
    before = {**model.state_dict(), "running": torch.zeros(2)}
    found = difference(model, before, before | stepped(model, 3), learning_rate=RATE, count=3, input_shape=SHAPE)
    assert (found.count, found.input_shape) == (3, SHAPE)
    assert found.gradients.keys() == update.gradients.keys()
    assert found.learning_rate == RATE
    for name, change in found.gradients.items():
        torch.testing.assert_close(change / RATE, update.gradients[name], atol=1e-15, rtol=0)


def test_weights_that_do_not_fit(model: nn.Module) -> None:
    before, after = model.state_dict(), stepped(model, 3)
    with pytest.raises(ValueError, match="learning_rate is a number from 1e-30 to 1e[+]30, not '0'"):
        difference(model, before, after, learning_rate=0)
    del after["fc1.bias"]
    with pytest.raises(ValueError, match=r"fc1.bias has shape \(40,\) before the step and None after it"):
        difference(model, before, after, learning_rate=1)
    with pytest.raises(ValueError, match=r"fc1.bias has shape \(40,\) before the step and \(3,\) after it"):
        difference(model, before, after | {"fc1.bias": torch.zeros(3)}, learning_rate=1)


def test_an_invertible_update_is_a_warning(model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Finding] = []
    monitor = Monitor(model, RATE, input_shape=SHAPE, on_finding=seen.append, folder=tmp_path)
    finding = monitor.look(model.state_dict(), stepped(model, 3), client="7", round=2, count=3)
    assert seen == [finding]
    assert finding.leaks
    assert metrics.evaluate(finding.result, *batch(3)).recall == 1
    (record,) = caplog.records
    assert (record.name, record.levelno, record.getMessage()) == ("spear.monitor", logging.WARNING, finding.words)
    expected = "round 2, client 7: the update is invertible, 3 of 3 samples read back, 3 certified"
    assert finding.words == expected
    kept = federated.SharedUpdate.load(tmp_path / "2-7.safetensors")
    assert torch.equal(kept.gradients["fc1.weight"], finding.update.gradients["fc1.weight"])


def test_the_weights_that_were_sent_count_not_the_monitors(model: nn.Module) -> None:
    trained = models.fcnn(SHAPE, 40, 2, 5, seed=1)
    finding = Monitor(model, RATE).look(trained.state_dict(), stepped(trained, 3), client="a")
    assert finding.leaks
    assert torch.equal(
        model.state_dict()["fc1.weight"], models.fcnn(SHAPE, 40, 2, 5, seed=0).state_dict()["fc1.weight"]
    )


def test_what_cannot_be_read_is_no_warning(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "spear.monitor")
    generator = torch.Generator().manual_seed(0)
    noise = {
        n: w + 0.01 * torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in stepped(model, 3).items()
    }
    finding = Monitor(model, RATE, time_limit=1).look(model.state_dict(), noise, client="a")
    assert not finding.leaks
    assert finding.words.startswith("round 1, client a: no sample could be read back (")
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_a_client_that_sends_rubbish_stops_nothing(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    rubbish = {name: torch.full_like(weight, torch.nan) for name, weight in model.state_dict().items()}
    finding = Monitor(model, RATE).look(model.state_dict(), rubbish, client="a")
    assert (finding.leaks, finding.result) == (False, None)
    assert "holds NaN or infinite values" in finding.reason
    assert finding.words.startswith("round 1, client a: the update could not be attacked (")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_fault_of_the_attack_ends_no_round(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(inversion, "attack", fails)
    finding = Monitor(model, RATE).look(model.state_dict(), stepped(model, 3), client="a")
    assert (finding.result, finding.reason) == (None, "ZeroDivisionError: division by zero")


def test_a_clients_name_leads_nowhere_else(model: nn.Module, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    Monitor(model, RATE, time_limit=0, folder=kept).look(model.state_dict(), stepped(model, 3), client="../b/c")
    assert [entry.name for entry in kept.iterdir()] == ["1-..%2Fb%2Fc.safetensors"]


def test_weights_without_running_statistics_do_not_end_the_round() -> None:
    torch.manual_seed(0)
    layers = nn.Linear(20, 60), nn.BatchNorm1d(60), nn.ReLU(), nn.Linear(60, 5)
    model = nn.Sequential(*layers).double().eval()
    before = {name: p.detach() for name, p in model.named_parameters()}
    finding = Monitor(model, RATE, time_limit=1).look(before, before, client="7")
    assert finding.update is not None
    assert "zero" in finding.reason


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_tensor_that_is_cut_is_a_finding(model: nn.Module, side: str) -> None:
    sent = {"before": model.state_dict(), "after": stepped(model, 3)}
    sent[side] = sent[side] | {"fc1.bias": torch.zeros(3)}
    seen: list[Finding] = []
    finding = Monitor(model, RATE, on_finding=seen.append).look(**sent, client="7", round=2)
    assert seen == [finding]
    assert finding.update is None
    assert not finding.leaks
    assert "fc1.bias" in finding.reason
