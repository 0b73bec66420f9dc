"""The client's gradient, and the file that carries it."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import batch
from safetensors.torch import save_file
from torch import nn

from spear import models
from spear.federated import SharedUpdate, gradient
from spear.federated.received import is_finite
from spear.federated.update import Lazy


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_is_autograds(reduction, dtype):
    inputs, labels = batch(5, 12, dtype=dtype)
    model = models.fcnn((12,), 9, 3, 10, dtype=dtype)
    update = gradient(model, inputs, labels, reduction=reduction)
    assert all(p.grad is None for p in model.parameters())
    F.cross_entropy(model(inputs), labels, reduction=reduction).backward()
    assert set(update.gradients) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(update.gradients[name], parameter.grad)
        assert update.gradients[name].dtype == dtype
    assert (update.reduction, update.count, update.input_shape) == (reduction, 5, (12,))


def test_sum_is_count_times_mean():
    inputs, labels = batch(5, 12)
    model = models.fcnn((12,), 9, 2, 10)
    mean, total = (gradient(model, inputs, labels, reduction=r).gradients for r in ("mean", "sum"))
    for name in mean:
        torch.testing.assert_close(total[name], 5 * mean[name])


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["binary_cross_entropy", "squared_error"])
def test_losses_against_one_hot_labels(loss, reduction, outputs):
    inputs, labels = batch(5, 12, max(outputs, 2))
    model = models.fcnn((12,), 9, 2, outputs)
    update = gradient(model, inputs, labels, reduction=reduction, loss=loss)
    assert update.loss == loss
    found = model(inputs)
    wanted = labels[:, None].double() if outputs == 1 else F.one_hot(labels, outputs).double()
    if loss == "squared_error":
        each = (found - wanted) ** 2
    else:
        each = -wanted * found.sigmoid().log() - (1 - wanted) * (1 - found.sigmoid()).log()
    (each.mean() if reduction == "mean" else each.sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(update.gradients[name], parameter.grad)


def test_an_unknown_loss_lists_the_known_ones():
    inputs, labels = batch(5, 12)
    with pytest.raises(ValueError, match="unknown loss 'hinge': use 'cross_entropy', 'binary_cross_entropy'"):
        gradient(models.fcnn((12,), 9, 2, 10), inputs, labels, loss="hinge")
    with pytest.raises(ValueError, match="unknown loss 'hinge'"):
        SharedUpdate({"a": torch.ones(2)}, loss="hinge")


def test_any_module_and_frozen_parameters():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    model[0].weight.requires_grad_(False)
    inputs, labels = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 2])
    update = gradient(model, inputs, labels)
    assert "0.weight" not in update.gradients
    assert "2.weight" in update.gradients


def test_training_mode_is_the_clients_own():
    inputs, labels = batch(5, 9, 3)
    model = nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(1)
    update = gradient(model, inputs, labels)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    torch.manual_seed(1)
    F.cross_entropy(model(inputs), labels).backward()  # the model itself takes the step of its statistics
    assert all(torch.equal(p.grad, update.gradients[name]) for name, p in model.named_parameters())
    assert update.buffers.keys() == before.keys()
    assert all(torch.equal(buffer, update.buffers[name]) for name, buffer in model.named_buffers())
    assert gradient(model.eval(), inputs, labels).buffers is None


def test_statistics_travel_with_the_update(tmp_path):
    inputs, labels = batch(5, 9, 3)
    model = nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    update = gradient(model, inputs, labels)
    update.save(tmp_path / "update.safetensors")
    again = SharedUpdate.load(tmp_path / "update.safetensors")
    assert again.gradients.keys() == update.gradients.keys()
    assert again.buffers.keys() == update.buffers.keys()
    assert all(torch.equal(again.buffers[name], update.buffers[name]) for name in update.buffers)


@pytest.mark.parametrize("words", ['["b"]', '{"a": 1}', "3", '["a"'])
def test_buffers_that_a_file_does_not_hold(tmp_path, words):
    save_file({"a": torch.ones(2)}, tmp_path / "update.safetensors", {"buffers": words})
    with pytest.raises(ValueError, match="not an update"):
        SharedUpdate.load(tmp_path / "update.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "max"}, "unknown reduction 'max'"),
        ({"labels": torch.tensor([0, 1])}, "5 inputs but 2 labels"),
        ({"labels": torch.tensor([0, 1, 2, 3, 10])}, "labels run from 0 to 10; the model has 10 outputs"),
    ],
)
def test_bad_input(change, message):
    inputs, labels = batch(5, 9)
    arguments = {"inputs": inputs, "labels": labels, "reduction": "mean"} | change
    model = models.fcnn((9,), 8, 2, 10)
    with pytest.raises(ValueError, match=message):
        gradient(model, arguments["inputs"], arguments["labels"], reduction=arguments["reduction"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_file_round_trip(tmp_path, dtype):
    tensors = {"a.weight": torch.randn(3, 4).to(dtype), "b": torch.zeros(0)}
    update = SharedUpdate(tensors, "sum", 7, (1, 2, 2), 1, 0.1, loss="squared_error")
    update.save(tmp_path / "update.safetensors")
    again = SharedUpdate.load(tmp_path / "update.safetensors")
    assert again.gradients.keys() == update.gradients.keys()
    assert all(torch.equal(again.gradients[k], update.gradients[k]) for k in update.gradients)
    disclosed = ("reduction", "count", "input_shape", "local_steps", "learning_rate", "loss")
    assert [getattr(again, name) for name in disclosed] == ["sum", 7, (1, 2, 2), 1, 0.1, "squared_error"]


def test_arrays_of_another_framework():
    arrays = {"w": np.arange(6.0).reshape(2, 3)}
    update = SharedUpdate(arrays)
    arrays["w"][0, 0] = 9
    assert update.gradients["w"].dtype == torch.float64
    assert update.gradients["w"][0, 0] == 0


def test_sparse_gradients_are_those_that_they_stand_for():
    model = nn.Sequential(nn.Embedding(20, 3, sparse=True), nn.Flatten(), nn.Linear(12, 4)).double()
    F.cross_entropy(model(torch.tensor([[1, 2, 2, 7], [0, 1, 1, 1]])), torch.tensor([0, 3])).backward()
    sent = SharedUpdate({name: p.grad for name, p in model.named_parameters()}).gradients["0.weight"]
    assert torch.equal(sent, model[0].weight.grad.to_dense())
    assert sent.abs().sum(1).nonzero().flatten().tolist() == [0, 1, 2, 7]


def _answers(logits):
    other = logits[:, :1] + 1
    return {
        "by name": {"loss": None, "logits": logits, "hidden": other},
        "as an attribute": SimpleNamespace(logits=logits, hidden=other),
        "the only one": (logits, None),
    }


@pytest.mark.parametrize("kind", ["by name", "as an attribute", "the only one"])
def test_logits_among_other_outputs(kind):
    model, x, y = nn.Linear(6, 4).double(), torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    expected = gradient(model, x, y).gradients
    model.register_forward_hook(lambda _module, _inputs, logits: _answers(logits)[kind])
    found = gradient(model, x, y).gradients
    assert all(torch.equal(found[name], g) for name, g in expected.items())


def test_several_outputs_without_a_name():
    model, y = nn.Linear(6, 4).double(), torch.tensor([0, 1])
    model.register_forward_hook(lambda _module, _inputs, logits: (logits, 2 * logits))
    with pytest.raises(ValueError, match="returns 2 tensors, none of them called logits"):
        gradient(model, torch.randn(2, 6, dtype=torch.float64), y)


def test_not_an_update():
    with pytest.raises(ValueError, match="at least one gradient"):
        SharedUpdate({})


@pytest.mark.parametrize("keep", [0, 4, 9, 60, -1])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "update.safetensors"
    SharedUpdate({"w": torch.randn(20, 20)}).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="update.safetensors: not a complete safetensors file"):
        SharedUpdate.load(path)


def test_foreign_files(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="x.safetensors: no such file"):
        SharedUpdate.load(path)
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        SharedUpdate.load(path)
    save_file({"w": torch.zeros(3)}, path, {"format": "spear.SharedUpdate/2"})
    with pytest.raises(ValueError, match="format 'spear.SharedUpdate/2' is not"):
        SharedUpdate.load(path)
    save_file({"w": torch.zeros(3)}, path, {"format": "pt"})  # as most others write it
    assert SharedUpdate.load(path).count is None


HOSTILE = {
    "count": ("x", 2.5, [3], {}, True, 0, -1, 2**60),
    "input_shape": ("abc", [2**13, 2**13], [64.0], [-1, -64], [], 64, [1] * 70_000),
    "clients": ({"a": 1}, [0], [True]),
    "local_steps": ("x", None, 0, -3),
    "mini_batch": ("x", 0),
    "learning_rate": ("a", [1], -0.1, 0, True),
    "momentum": ("x", None, 1, -0.5),
    "noise": ("x", [1], True, -1),
    "bits": (99, -1, 2.5),
    "clip": ("x", 0),
    "delta": (2, "x"),
    "loss_scale": (None, 0, "x"),
    "reduction": ("max", None, [], 3),
    "loss": ("hinge", None),
    "pruning": ("half", 3),
    "surprise": (1,),
}
RAW = ("{", "[1]", '"x"', '{"count": NaN}', '{"noise": Infinity}', '{"learning_rate": -Infinity}', "[" * 10**5)


@pytest.mark.parametrize("words", [*RAW, *(json.dumps({name: v}) for name, vs in HOSTILE.items() for v in vs)])
def test_what_a_client_discloses_is_checked(tmp_path, words):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(3)}, path, {"disclosed": words})
    with pytest.raises(ValueError, match="x.safetensors: not an update: ") as caught:
        SharedUpdate.load(path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["learning_rate", "noise", "clip", "loss_scale"])
def test_no_number_of_an_update_is_nan_or_infinite(name):
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{name} is a number from"):
            SharedUpdate({"w": torch.ones(2)}, **{name: value})


def test_bare_safetensors_file_of_gradients(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "bare.safetensors")
    assert torch.equal(SharedUpdate.load(tmp_path / "bare.safetensors").gradients["w"], torch.ones(3))


def test_a_lazy_update_is_computed_when_asked_and_kept_as_it_is():
    asked = []
    lazy = Lazy(("a", "b"), lambda name: asked.append(name) or torch.ones(2))
    update = SharedUpdate(lazy)
    assert update.gradients is lazy
    assert (len(lazy), list(lazy), "c" in lazy) == (2, ["a", "b"], False)
    asked.clear()  # the type checker of the tests looks at one
    assert torch.equal(update.gradients["b"], torch.ones(2))
    assert asked == ["b"]
    with pytest.raises(KeyError):
        lazy["c"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_numbers_are_finite_though_their_sum_is_not(dtype, value):
    x = torch.full((300, 300), torch.finfo(dtype).max, dtype=dtype)
    x[0] = -x[0]
    if value is not None:
        x[7, 7] = value
    assert is_finite(x) == (value is None)
    assert not x.sum().isfinite()
