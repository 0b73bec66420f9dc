"""Cut and missing entries: what the values show, what a client says, and that exact updates show nothing."""

import numpy as np
import pytest
import torch
from problems import batch

from spear import SharedUpdate, models
from spear.federated import gradient
from spear.federated.missing import cuts
from spear.federated.update import difference


def _change(seed: int = 0, *, dtype: torch.dtype = torch.float32, b: int = 5, binary: bool = False, step: bool = True):
    """Weights' names, the change of the weights by one step (or the gradient), and the weights before it."""
    inputs, labels = batch(b, 60, seed=seed, dtype=dtype)
    inputs = (inputs > 0.5).to(dtype) if binary else inputs
    model = models.fcnn((60,), 80, 3, 10, seed=seed, dtype=dtype)
    g = gradient(model, inputs, labels).gradients
    if not step:
        return dict(g)
    return {name: p.detach() - (p.detach() - 0.1 * g[name]) for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("b", [1, 2, 6])
@pytest.mark.parametrize("seed", range(4))
def test_an_exact_update_shows_no_cut(dtype, binary, step, b, seed):
    """Pictures of two grey levels, whose gradients repeat values along rows, included."""
    assert not cuts(_change(seed, dtype=dtype, b=b, binary=binary, step=step))


@pytest.mark.parametrize("rounded", [torch.half, torch.bfloat16])
def test_rounded_values_are_no_cuts(rounded):
    tensors = {name: g.to(rounded) for name, g in _change().items()}
    assert cuts(tensors).bound is None
    coarse = {name: (g / g.abs().max() * 7).round() for name, g in _change().items()}
    assert not cuts(coarse)


@pytest.mark.parametrize("count", [3, 50, 2000])
@pytest.mark.parametrize("seed", range(3))
def test_what_was_cut_at_a_bound_is_marked_and_nothing_else(count, seed):
    tensors = _change(seed)
    bound = float(torch.cat([g.abs().flatten() for g in tensors.values()]).sort().values[-count])
    sent = {name: g.clamp(-bound, bound) for name, g in tensors.items()}
    found = cuts(sent)
    assert found.bound == bound
    for name, g in sent.items():
        assert torch.equal(found.unknown(name, g), tensors[name].abs() >= bound)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_small_entries_that_were_set_to_zero_are_marked(share):
    tensors = _change()
    sizes = torch.cat([g.abs().flatten() for g in tensors.values()])
    least = float(sizes[sizes > 0].quantile(share))
    sent = {name: torch.where(g.abs() < least, 0, g) for name, g in tensors.items()}
    found = cuts(sent)
    assert found.gap
    assert all(torch.equal(found.unknown(name, g), g == 0) for name, g in sent.items())


def test_a_tensor_cut_at_bounds_of_its_own():
    sent = _change()
    g = sent["fc2.weight"]
    low, high = float(g.flatten().sort().values[20]), float(g.flatten().sort().values[-30])
    sent["fc2.weight"] = g.clamp(low, high)
    found = cuts(sent)
    assert torch.equal(found.unknown("fc2.weight", sent["fc2.weight"]), (g <= low) | (g >= high))
    assert not found.unknown("fc1.weight", sent["fc1.weight"]).any()


def test_weights_that_were_cut_leave_a_change_that_is_not_known():
    change, model = _change(), models.fcnn((60,), 80, 3, 10, seed=0, dtype=torch.float32)
    before = {name: p.detach() for name, p in model.named_parameters()}
    after = {name: before[name] - change[name] for name in before}
    assert not difference(model, before, after, learning_rate=0.1).has_unknown
    sent = {name: w.clamp(-0.06, 0.06) for name, w in after.items()}
    sent["fc2.weight"][3, :7] = 0
    update = difference(model, before, sent, learning_rate=0.1)
    assert update.has_unknown
    for name in before:
        unknown = (after[name].abs() >= 0.06) | ((sent[name] == 0) & (before[name] != 0))
        assert torch.equal(update.gradients[name].isnan(), unknown)
        assert torch.equal(update.gradients[name][~unknown], (before[name] - after[name])[~unknown])


@pytest.mark.parametrize("levels", [2**9, 2**11])
@pytest.mark.parametrize("seed", range(3))
def test_zeros_of_weights_that_were_rounded_to_a_grid_are_known(levels, seed):
    """Secure aggregation sums whole numbers; zeros set without a grid, or far more than its own, are not known."""
    model = models.fcnn((60,), 80, 3, 10, seed=seed)
    before = {name: p.detach() for name, p in model.named_parameters()}
    after = {name: ((p + 1e-4) * levels).round() / levels for name, p in before.items()}
    change = difference(model, before, after, learning_rate=0.1).gradients
    for name in ("fc1.weight", "fc2.weight"):
        assert bool((after[name] == 0).any())
        assert torch.equal(change[name], before[name] - after[name])
    dropped = {name: p + 1e-4 for name, p in before.items()}
    dropped["fc1.weight"][0, :3] = 0.0
    change = difference(model, before, dropped, learning_rate=0.1).gradients
    assert int(change["fc1.weight"].isnan().sum()) == 3
    pruned = {name: torch.where(p.abs() < p.abs().median(), 0.0, p) for name, p in after.items()}
    change = difference(model, before, pruned, learning_rate=0.1).gradients
    assert torch.equal(change["fc2.weight"].isnan(), (pruned["fc2.weight"] == 0) & (before["fc2.weight"] != 0))


def test_a_mask_is_held_and_saved_as_nan(tmp_path):
    tensors = _change()
    known = torch.rand(80, 80, generator=torch.Generator().manual_seed(0)) < 0.7
    for mask in (known, known.numpy()):
        update = SharedUpdate(tensors, count=5, learning_rate=0.1, known={"fc2.weight": mask})
        assert update.has_unknown
        update.save(tmp_path / "update.safetensors")
        again = SharedUpdate.load(tmp_path / "update.safetensors")
        assert again.count == 5
        for name, g in tensors.items():
            expected = torch.where(known, g, torch.nan) if name == "fc2.weight" else g
            torch.testing.assert_close(again.gradients[name], expected, equal_nan=True, rtol=0, atol=0)
    whole = SharedUpdate(tensors, known={name: torch.ones_like(g).bool() for name, g in tensors.items()})
    assert not whole.has_unknown


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"fc9.weight": np.ones((2, 2), bool)}, "of which there is no gradient"),
        ({"fc2.weight": torch.ones(80, 79).bool()}, "a boolean tensor of its shape"),
        ({"fc2.weight": torch.ones(80, 80)}, "a boolean tensor of its shape"),
    ],
)
def test_a_mask_that_does_not_fit_is_an_error(known, words):
    with pytest.raises(ValueError, match=words):
        SharedUpdate(_change(), known=known)


def test_a_file_cannot_say_which_entries_are_known_in_words(tmp_path):
    from safetensors.torch import save_file

    metadata = {"disclosed": '{"known": {"fc2.weight": [1]}}'}
    save_file(_change(), tmp_path / "update.safetensors", metadata)
    with pytest.raises(ValueError, match="it discloses 'known'"):
        SharedUpdate.load(tmp_path / "update.safetensors")
