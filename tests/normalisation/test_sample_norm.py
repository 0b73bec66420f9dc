"""LayerNorm, RMSNorm and GroupNorm of one group: whole batches, certified, and nothing that is wrong."""

import pytest
import torch
from normalised_problems import nothing_certified_if_changed, sent
from torch import Tensor, nn

import spear
from spear.metrics import evaluate
from spear.reconstruction import Refusal


class ByHand(nn.Module):
    """LayerNorm as a model's author may write it."""

    def __init__(self, m: int) -> None:
        super().__init__()
        self.gain, self.offset = nn.Parameter(torch.ones(m)), nn.Parameter(torch.zeros(m))

    def forward(self, z: Tensor) -> Tensor:
        centred = z - z.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.gain + self.offset


NORMS = {
    "layer": nn.LayerNorm,
    "rms": lambda m: nn.RMSNorm(m, eps=1e-6),
    "group": lambda m: nn.GroupNorm(1, m),
    "hand": ByHand,
    "bare": lambda m: nn.LayerNorm(m, elementwise_affine=False),
}


def back(result, case, error=1e-6):
    evaluation = evaluate(result, case.inputs, case.labels)
    assert evaluation.recall == evaluation.precision == evaluation.label_accuracy == 1, result.reason
    assert result.complete
    assert bool((evaluation.relative_error.sort().values < error).all())


@pytest.mark.parametrize(("classes", "seed"), [(10, 0), (10, 1), (150, 0)])
@pytest.mark.parametrize("norm", NORMS)
def test_the_whole_batch(norm, classes, seed):
    case = sent((200, 120, classes), 12, NORMS[norm], seed=seed, spread=0.2)
    back(spear.attack(case.model, case.update, method="network", time_limit=300), case)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_several_layers_and_auto(norm):
    case = sent((200, 150, 120, 10), 10, NORMS[norm], seed=2, spread=0.2)
    back(spear.attack(case.model, case.update, time_limit=300), case)


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "squared_error"])
def test_losses(loss):
    case = sent((60, 160, 10), 8, nn.LayerNorm, seed=1, loss=loss)
    back(spear.attack(case.model, case.update, method="network", time_limit=300), case)


def test_single_precision():
    case = sent((60, 160, 10), 8, nn.LayerNorm, seed=1)
    model = case.model.float()
    update = spear.federated.gradient(model, case.inputs.float(), case.labels)
    back(spear.attack(model, update, method="network", time_limit=300), case, 1e-3)


def test_negative_scales():
    case = sent((60, 160, 10), 8, nn.LayerNorm, seed=1)
    with torch.no_grad():
        case.model[1].weight[::2] *= -1
    update = spear.federated.gradient(case.model, case.inputs, case.labels)
    back(spear.attack(case.model, update, method="network", time_limit=300), case)


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight"])
@pytest.mark.parametrize("size", [1e-5])
def test_a_changed_update_is_not_certified(name, size):
    case = sent((30, 80, 5), 8, nn.LayerNorm, seed=6)
    nothing_certified_if_changed(case, name, size)


def test_a_length_that_nothing_tells():
    case = sent((30, 80, 5), 8, nn.LayerNorm, seed=1)
    bare = nn.Sequential(nn.Linear(30, 80, bias=False, dtype=torch.float64), *case.model[1:])
    update = spear.federated.gradient(bare, case.inputs, case.labels)
    with pytest.raises(Refusal, match="no bias in layer 1: nothing else that is used here tells the length"):
        spear.attack(bare, update, method="network")
