"""What reads a layer tells the lengths of its inputs, whatever the loss, the heads and their weights."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import batch, judged
from torch import Tensor, nn

import spear
from spear import models
from spear.certificate import length_by_reader
from spear.federated import SharedUpdate, gradient
from spear.metrics import evaluate
from spear.models.streaming import Blocks

N, WIDTH, BATCH = 30, 120, 6
seeds = st.integers(0, 10**6)


class Heads(nn.Module):
    """Two heads on one layer, given back as a tuple or by name."""

    def __init__(self, bias: bool, named: bool) -> None:
        super().__init__()
        self.body, self.named = nn.Linear(N, WIDTH), named
        self.kind, self.site = nn.Linear(WIDTH, 5, bias=bias), nn.Linear(WIDTH, 3, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        h = self.body(x).relu()
        return {"kind": self.kind(h), "site": self.site(h)} if self.named else (self.kind(h), self.site(h))


def heads(seed: int, *, bias: bool = True, named: bool = False, dtype: torch.dtype = torch.float64):
    torch.manual_seed(seed)
    model = Heads(bias, named).to(dtype)
    x, y = batch(BATCH, N, 5, seed=seed, dtype=dtype)
    kind, site = model(x).values() if named else model(x)
    loss = F.cross_entropy(kind, y) + F.cross_entropy(site, y % 3)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return model, x, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("bias", "named"), [(True, False), (True, True), (False, False)])
def test_two_heads_are_certified_without_labels(bias: bool, named: bool, dtype: torch.dtype, seed: int) -> None:
    model, x, sent = heads(seed, bias=bias, named=named, dtype=dtype)
    result = spear.attack(model, SharedUpdate(sent, count=BATCH), time_limit=30)
    assert result.complete, result.reason
    assert evaluate(result, x).recall == 1
    assert result.labels is None
    assert "what kind, site reads" in result.reason
    assert not spear.attack(model, SharedUpdate(sent), time_limit=30).certified.any()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cubic": lambda z, y: F.cross_entropy(z, y) + z.pow(3).sum(),
    "hinge": F.multi_margin_loss,
    "softmax likelihood": lambda z, y: F.nll_loss(z.softmax(1), y),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weights", ["the client's", "others"])
def test_any_loss_and_any_weights_of_the_rest(loss: str, weights: str) -> None:
    x, y = batch(BATCH, N, 5)
    model, server = (models.fcnn((N,), WIDTH, 3, 5, seed=seed) for seed in (0, weights == "others"))
    server.fc1.load_state_dict(model.fc1.state_dict())
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(LOSSES[loss](model(x), y), parameters)
    sent = SharedUpdate(dict(zip(names, found, strict=True)), count=BATCH)
    result = spear.attack(server, sent, method="layer", time_limit=30)
    assert result.complete, result.reason
    assert evaluate(result, x).recall == 1
    assert result.labels is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.0, 1e-6, 1e-3])
def test_lengths_are_measured(share: float, seed: int) -> None:
    """One input is longer by a share: it is found, and nothing is said of the others."""
    generator = torch.Generator().manual_seed(seed)
    x, _ = batch(BATCH, N, seed=seed)
    W, beta, C = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((WIDTH, N), (WIDTH,), (BATCH, 9))
    )
    J = C.mT @ torch.cat([(x @ W.mT + beta).relu(), torch.ones(BATCH, 1, dtype=torch.float64)], 1)
    x = x.clone()
    x[2] *= 1 + share
    z = x @ W.mT + beta
    rows = torch.cat([z.relu(), torch.ones(BATCH, 1, dtype=torch.float64)], 1)
    slopes = torch.cat([(z > 0) * (z - beta), torch.zeros(BATCH, 1, dtype=torch.float64)], 1)
    shares, left = length_by_reader(rows, slopes, Blocks(J, None, J[:0]), 2e-16)
    assert float((shares[2] - share).abs()) <= 2 * share**2 + 1e-12
    assert float(shares[torch.arange(BATCH) != 2].max()) <= 2 * share**2 + 1e-12
    assert left <= 2 * share**2 + 1e-12


def test_a_reader_that_tells_nothing() -> None:
    """Fewer outputs of the loss than samples is no matter; a gradient of zeros is."""
    rows = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares, _ = length_by_reader(rows, rows.flip(1), Blocks(torch.zeros(4, 9).double(), None, rows[:0]), 2e-16)
    assert not shares.isfinite().any()


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["body.bias", "kind.weight", "kind.bias", "site.weight"]),
    st.sampled_from(["factor", "noise", "another batch", "permuted", "missing"]),
    st.floats(-14, 0),
    st.sampled_from([torch.float64, torch.float32]),
    st.booleans(),
    seeds,
)
def test_what_is_certified_is_true(
    name: str, kind: str, exponent: float, dtype: torch.dtype, both: bool, seed: int
) -> None:
    model, x, sent = heads(seed, dtype=dtype)
    generator, size = torch.Generator().manual_seed(seed), 10**exponent
    changes: dict[str, Callable[[str, Tensor], Tensor | None]] = {
        "factor": lambda n, g: g * (1 + size),
        "noise": lambda n, g: g + size * g.abs().max() * torch.randn(g.shape, generator=generator, dtype=dtype),
        "another batch": lambda n, g: heads(seed + 1, dtype=dtype)[2][n],
        "permuted": lambda n, g: g[torch.randperm(len(g), generator=generator)],
        "missing": lambda n, g: None,
    }
    for one in {name, "body.bias"} if both else {name}:
        sent[one] = changes[kind](one, sent[one])
    sent = {n: g for n, g in sent.items() if g is not None}
    judged(model, SharedUpdate(sent, count=BATCH), x, torch.zeros(BATCH).long(), method="layer", max_proposals=32)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 6), st.floats(-12, 0), st.floats(-12, 0), seeds)
def test_wrong_weights_and_factors(b: int, weights: float, factor: float, seed: int) -> None:
    x, y = batch(b, N, 5, seed=seed)
    client, server = (models.fcnn((N,), 60, 3, 5, seed=seed) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in server.parameters():
            p += 10**weights * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    sent = dict(gradient(client, x, y).gradients)
    sent["fc1.bias"] = sent["fc1.bias"] * (1 + 10**factor)
    judged(server, SharedUpdate(sent, count=b), x, y, method="layer", max_proposals=32)
