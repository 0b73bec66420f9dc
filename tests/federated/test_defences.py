"""What is done to an update before it is sent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear.federated import SharedUpdate, defences


def _update(seed: int = 0, scale: float = 1e-4) -> SharedUpdate:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: scale * torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return SharedUpdate({"w": draw(60, 80), "b": draw(60), "zero": torch.zeros(3, dtype=torch.float64)}, count=4)


def _flat(update: SharedUpdate) -> torch.Tensor:
    return torch.cat([g.double().flatten() for g in update.gradients.values()])


@given(seed=st.integers(0, 99), scale=st.sampled_from((1e-12, 1e-4, 1.0, 1e6)))
@settings(max_examples=20, deadline=None)
def test_half_precision_rounds_relative_to_each_entry(seed, scale):
    update = _update(seed, scale)
    for dtype in (torch.float16, torch.bfloat16):
        sent = defences.half_precision(update, dtype)
        assert {g.dtype for g in sent.gradients.values()} == {dtype}
        error = (_flat(sent) / sent.loss_scale - _flat(update)).abs()
        assert (error <= torch.finfo(dtype).eps / 2 * _flat(update).abs() + 6e-8 / sent.loss_scale).all()
    assert defences.half_precision(update, torch.bfloat16).loss_scale == 1


@given(seed=st.integers(0, 99), bits=st.sampled_from((2, 4, 8, 16)), scale=st.sampled_from((1e-12, 1e-4, 1e6)))
@settings(max_examples=20, deadline=None)
def test_quantisation_has_its_levels_and_is_off_by_less_than_one(seed, bits, scale):
    update = _update(seed, scale)
    sent = defences.quantised(update, bits, generator=torch.Generator().manual_seed(seed))
    for name, g in update.gradients.items():
        step = g.abs().max() / (2 ** (bits - 1) - 1)
        assert ((sent.gradients[name] - g).abs() <= step * (1 + 1e-9)).all()
        assert len(sent.gradients[name].unique()) <= 2**bits
    assert sent.bits == bits


def test_quantisation_is_unbiased():
    update = _update()
    generator = torch.Generator().manual_seed(1)
    mean = sum(_flat(defences.quantised(update, 3, generator=generator)) for _ in range(400)) / 400
    step = update.gradients["w"].abs().max() / 3
    assert (mean - _flat(update)).abs().max() < 5 * step / 2 / 400**0.5


@pytest.mark.parametrize("keep", [0.1, 0.25, 1.0])
def test_pruning_keeps_its_share(keep):
    update = _update()
    drawn = defences.pruned_random(update, keep, generator=torch.Generator().manual_seed(0))
    largest = defences.pruned_top_k(update, keep)
    for sent, mode in ((drawn, "random"), (largest, "top-k")):
        kept = _flat(sent) != 0
        assert torch.equal(_flat(sent)[kept], _flat(update)[kept])
        assert float(kept.sum()) == pytest.approx(keep * 4860, rel=0.1)
        assert sent.pruning == mode
    sizes = _flat(update).abs()
    assert int((_flat(largest) != 0).sum()) == min(round(keep * len(sizes)), 4860)
    assert sizes[_flat(largest) != 0].min() >= sizes[_flat(largest) == 0].max()


def test_noise_has_its_level_and_is_disclosed():
    update = _update()
    sent = defences.noisy(update, 0.1, generator=torch.Generator().manual_seed(0))
    assert float((_flat(sent) - _flat(update)).std()) == pytest.approx(0.1, rel=0.05)
    assert defences.noisy(sent, 0.2).noise == pytest.approx((0.1**2 + 0.2**2) ** 0.5)
    relative = defences.noisy(update, 0.1, relative=True, generator=torch.Generator().manual_seed(0))
    added = relative.gradients["w"] - update.gradients["w"]
    assert float(added.std()) == pytest.approx(0.1 * float(update.gradients["w"].pow(2).mean().sqrt()), rel=0.05)
    assert relative.noise is None
    assert not relative.gradients["zero"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u: defences.half_precision(u, torch.float32), "torch.float32 is not a half precision"),
        (lambda u: defences.quantised(u, 1), "2 to 16 bits an entry, not 1"),
        (lambda u: defences.pruned_random(u, 0), r"in \(0, 1\], not 0"),
        (lambda u: defences.pruned_top_k(u, 1.5), r"in \(0, 1\], not 1.5"),
        (lambda u: defences.noisy(u, -1), "at least 0, not -1"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        change(_update())


def test_every_record_survives_a_file(tmp_path):
    update = defences.pruned_top_k(defences.quantised(defences.noisy(_update(), 1e-5), 8), 0.5)
    sent = defences.half_precision(update)
    sent.save(tmp_path / "u.safetensors")
    again = SharedUpdate.load(tmp_path / "u.safetensors")
    for name in ("noise", "bits", "pruning", "loss_scale", "count"):
        assert getattr(again, name) == getattr(sent, name)
