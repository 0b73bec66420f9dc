"""Models as their owners write them: what they compute decides, and samples come back as the model takes them."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import spear
from spear.federated import SharedUpdate, clients, defences
from spear.metrics import evaluate
from spear.models import tracing
from spear.reconstruction import Reconstruction, Refusal

SHAPE, WIDTH, CLASSES, BATCH = (2, 4, 5), 90, 5, 5
N = 40


class Net(nn.Module):
    """Two hidden layers; what happens before the first, in place of ReLU, and to the logits, is told."""

    def __init__(
        self,
        before: Callable = lambda x: x,
        act: Callable = torch.relu,
        after: Callable = lambda z: z,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(N, WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH, bias=bias)
        self.fc3, self.before, self.act, self.after = nn.Linear(WIDTH, CLASSES), before, act, after

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc1(self.before(x).flatten(1)))
        return self.after(self.fc3(self.act(self.fc2(h))))


def statement(z: Tensor) -> Tensor:
    z.relu_()
    return z


def masked(z: Tensor) -> Tensor:
    return z * (z > 0)


def normalised(width: int) -> nn.BatchNorm1d:
    """Batch normalisation that has seen data, with factors of both signs."""
    norm = nn.BatchNorm1d(width)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(width)), norm.bias.copy_(torch.randn(width) / 4)
        norm.running_mean.copy_(torch.randn(width) / 4), norm.running_var.copy_(1 + torch.rand(width))
    return norm


class Decided(Net):
    """Control flow that depends on shapes."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == SHAPE[0]
        if x.dim() > 2:
            x = x.reshape(x.size(0), -1)
        return super().forward(x)


class Optional(Net):
    def forward(self, x: Tensor, labels: Tensor | None = None, scale: float = 1.0) -> Tensor:
        logits = super().forward(x) * scale
        return logits if labels is None else F.cross_entropy(logits, labels)


class Functional(nn.Module):
    """Weights of its own, some as (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(WIDTH, N) / 6), nn.Parameter(torch.randn(WIDTH) / 6)
        self.w2, self.b2 = nn.Parameter(torch.randn(WIDTH, WIDTH) / 9), nn.Parameter(torch.randn(WIDTH) / 9)
        self.w3, self.b3 = nn.Parameter(torch.randn(CLASSES, WIDTH) / 9), nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x.flatten(1), self.w1, self.b1).relu()
        return torch.addmm(self.b3, (h @ self.w2 + self.b2).relu(), self.w3.t())


class WithFeatures(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.fc1(x.flatten(1)).relu()
        return {"features": features, "logits": self.fc3(self.fc2(features).relu())}


RELUS = {
    "clamp": lambda z: z.clamp(min=0),
    "clamp_min": lambda z: torch.clamp_min(z, 0),
    "maximum": lambda z: torch.maximum(z, torch.zeros_like(z)),
    "threshold": nn.Threshold(0, 0),
    "F.threshold": lambda z: F.threshold(z, 0, 0, True),
    "statement": statement,
    "inplace": nn.ReLU(inplace=True),
    "masked": masked,
    "half": lambda z: (z + z.abs()) / 2,
    "where": lambda z: torch.where(z > 0, z, 0.0),
    "dropout off": lambda z: F.dropout(z, 0.3, False).relu(),
    "identity": nn.Sequential(nn.Identity(), nn.ReLU(), nn.Identity()),
}
PATHS = {
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "channels last": lambda x: x.to(memory_format=torch.channels_last).permute(0, 3, 1, 2),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "cast": lambda x: x.to(torch.float64),
    "flip": lambda x: x.flip(2),
    "units": lambda x: (x - 0.3) / 0.2,
    "channels": lambda x: (x - torch.tensor([0.3, 0.1]).view(1, 2, 1, 1)) / torch.tensor([0.5, 2.0]).view(1, 2, 1, 1),
    "normalised": lambda: nn.Sequential(nn.Flatten(), normalised(N)),
}


def made(model: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return model().double().eval()


def written(form: Callable) -> Callable:
    """A form that must be made anew for each model is a function without arguments."""
    fresh = not isinstance(form, nn.Module) and form.__code__.co_argcount == 0
    return form() if fresh else form


MODELS = {
    f"relu: {name}": lambda form=form: Net(act=written(form)) for name, form in RELUS.items() if "norm" not in name
}
MODELS |= {f"path: {name}": lambda form=form: Net(before=written(form)) for name, form in PATHS.items()}
MODELS |= {
    "log softmax": lambda: Net(after=lambda z: z.log_softmax(1)),
    "temperature": lambda: Net(after=lambda z: z / 2.5),
    "control flow": Decided,
    "optional": Optional,
    "functional": Functional,
}


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(seed)
    x = torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (BATCH,), generator=generator)


def all_back(result: Reconstruction, x: Tensor, y: Tensor, *, labels: bool = True) -> None:
    report = evaluate(result, x, y)
    assert result.inputs.shape == x.shape
    assert report.recall == 1, (result.reason, report.relative_error)
    assert report.precision == 1
    assert bool(result.certified.all()), result.reason
    assert not labels or report.label_accuracy == 1


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_layer(model: Callable, seed: int) -> None:
    x, y = normal(seed)
    model = made(model, seed)
    update = spear.federated.gradient(model, x, y)
    all_back(spear.attack(model, update, method="network", seed=seed, time_limit=60), x, y)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_one_layer(model: Callable) -> None:
    x, y = normal(3)
    model = made(model, 3)
    all_back(spear.attack(model, spear.federated.gradient(model, x, y), method="layer", time_limit=60), x, y)


class Normalised(nn.Module):
    """Batch normalisation behind the first layer or its ReLU, the layer with or without a bias of its own."""

    def __init__(self, behind: bool, bias: bool) -> None:
        super().__init__()
        norms = [nn.Sequential(nn.ReLU(), normalised(WIDTH)) if behind else nn.Sequential(normalised(WIDTH), nn.ReLU())]
        norms += [nn.ReLU()]
        layers = [nn.Linear(N, WIDTH, bias=bias or behind), nn.Linear(WIDTH, WIDTH)]
        self.body = nn.Sequential(nn.Flatten(), *(part for pair in zip(layers, norms, strict=True) for part in pair))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("method", ["network", "layer"])
@pytest.mark.parametrize(("behind", "bias"), [(False, True), (False, False), (True, True)])
def test_normalisation_between_layers(method: str, behind: bool, bias: bool) -> None:
    x, y = normal(1)
    model = made(lambda: Normalised(behind, bias), 1)
    all_back(spear.attack(model, spear.federated.gradient(model, x, y), method=method, time_limit=60), x, y)


def test_what_is_folded_is_not_attacked_under_noise() -> None:
    x, y = normal(1)
    model = made(lambda: Normalised(False, True), 1)
    update = defences.half_precision(spear.federated.gradient(model, x, y))
    with pytest.raises(Refusal, match="between the layers stands a normalisation"):
        spear.attack(model, update, method="network", time_limit=5)
    steps = clients.local_training(model, x, y, epochs=2, learning_rate=0.1)
    with pytest.raises(Refusal, match="between the layers stands a normalisation"):
        spear.attack(model, steps, method="network", time_limit=5)


OTHERS = [F.gelu, F.leaky_relu, F.relu6, lambda z: z.clamp(min=-0.01), lambda z: z.clamp(0, 6), lambda z: z.abs()]


@pytest.mark.parametrize("act", [*OTHERS, lambda z: z.relu() + z, lambda z: F.layer_norm(z, (WIDTH,)).relu()])
def test_what_is_no_relu(act: Callable) -> None:
    assert not tracing.linear_layers(made(lambda: Net(act=act), 0), SHAPE)[0].relu


@pytest.mark.parametrize("before", [torch.sigmoid, lambda x: x.clamp(0, 1), lambda x: x - x.mean(), lambda x: x[:, :1]])
def test_what_is_no_path_of_data(before: Callable) -> None:
    assert not any(layer.from_data for layer in tracing.linear_layers(made(lambda: Net(before=before), 0), SHAPE))


def test_two_heads_and_features() -> None:
    class TwoHeads(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.fc1(x.flatten(1)).relu()
            return self.fc3(h), self.fc2(h)

    x, y = normal(0)
    model = made(TwoHeads, 0)
    first, second = model(x)
    loss = F.cross_entropy(first, y) + F.cross_entropy(second, y)
    result = spear.attack(model, sent(model, loss, count=BATCH), method="layer", time_limit=60)
    assert len(result.inputs) == BATCH
    assert "the model gives 2 outputs" in result.reason
    model = made(WithFeatures, 0)
    update = sent(model, F.cross_entropy(model(x)["logits"], y), count=BATCH, input_shape=SHAPE)
    all_back(spear.attack(model, update, method="network", time_limit=60), x, y)


class Named(NamedTuple):
    logits: Tensor
    other: Tensor


@dataclass
class Plain:
    loss: Tensor | None = None
    logits: Tensor | None = None
    other: Tensor | None = None


class Ordered(OrderedDict):
    pass


@pytest.mark.parametrize(
    "output",
    [
        Named,
        lambda logits, other: Plain(None, logits, other),
        lambda logits, other: Plain(logits=logits, other=other),
        lambda logits, other: Plain(other=logits),
        lambda logits, other: Ordered(logits=logits, other=other),
        lambda logits, other: {"other": other, "logits": logits},
    ],
)
def test_outputs_in_a_class_of_ones_own(output: Callable) -> None:
    """A second head that the loss does not read, beside what is called logits."""

    class Two(Net):
        def forward(self, x: Tensor) -> object:
            h = self.fc2(self.fc1(x.flatten(1)).relu()).relu()
            return output(self.fc3(h), 2 * h[:, :2])

    x, y = normal(0)
    model = made(Two, 0)
    all_back(spear.attack(model, clients.gradient(model, x, y), method="network", time_limit=60), x, y)


def test_numbers_of_words_are_no_pixels() -> None:
    """What computes the features looks up a table: they come back, and why no more does."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc1, self.fc2 = nn.Embedding(7, 4), nn.Linear(N + 3, WIDTH), nn.Linear(WIDTH, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            both = torch.cat([self.table(x[:, 0].long()), x[:, 1:]], 1)
            return self.fc2(self.fc1(both).relu())

    x, y = normal(0)
    x = x.flatten(1)
    x[:, 0] = torch.arange(BATCH)
    model = made(Mixed, 0)
    result = spear.attack(model, clients.gradient(model, x, y), time_limit=60)
    assert result.features_of == "fc1"
    assert "what computes them does not take real numbers" in result.reason
    features = torch.cat([model.table(x[:, 0].long()).detach(), x[:, 1:]], 1)
    assert evaluate(result, features, y).recall == 1


@pytest.mark.parametrize(
    ("kind", "act"),
    [
        ("convolution", nn.ReLU),
        ("chain", nn.LeakyReLU),
        ("chain", nn.GELU),
        ("normalised", nn.ReLU),
        ("normalised", nn.GELU),
    ],
)
def test_torchs_default_type_does_not_matter(act: type[nn.Module], kind: str) -> None:
    heads = [nn.Linear(N, WIDTH), act(), nn.Linear(WIDTH, CLASSES)]
    if kind == "normalised":
        heads[1:1] = [nn.LayerNorm(WIDTH)]
    elif kind == "convolution":
        heads = [nn.Conv2d(2, 16, 3), act(), nn.Flatten(), nn.Linear(96, WIDTH), *heads[1:]]
    x, y = (both[:3] for both in normal(1))
    model = made(lambda: nn.Sequential(*([] if kind == "convolution" else [nn.Flatten()]), *heads), 1)
    update = clients.gradient(model, x, y)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        result = spear.attack(model, update, time_limit=60)
    finally:
        torch.set_default_dtype(usual)
    expected = spear.attack(model, update, time_limit=60)
    assert len(result.inputs) == len(expected.inputs) > 0, (result.reason, expected.reason)
    assert bool(result.certified.all()) == bool(expected.certified.all())
    assert torch.cdist(result.inputs.flatten(1), expected.inputs.flatten(1)).amin(1).max() < 1e-5


def sent(model: nn.Module, loss: Tensor, **disclosed: object) -> SharedUpdate:
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return SharedUpdate({n: g for n, g in zip(names, gradients, strict=True) if g is not None}, **disclosed)


@pytest.mark.parametrize("squeezed", [False, True])
def test_one_output(squeezed: bool) -> None:
    x, _ = normal(4)
    y = torch.tensor([0, 1, 1, 0, 1])
    model = made(lambda: Net(after=lambda z: z[:, 0] if squeezed else z), 4)
    model.fc3 = nn.Linear(WIDTH, 1).double()
    loss = F.binary_cross_entropy_with_logits(model(x).flatten(), y.double())
    result = spear.attack(model, sent(model, loss, count=BATCH, input_shape=SHAPE), time_limit=60)
    all_back(result, x, y)
    assert "binary cross-entropy was assumed" in result.reason


@pytest.mark.parametrize("rows", [2, 5])
def test_parts_of_a_sample(rows: int) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(N // rows, 150), nn.Linear(150, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x.reshape(-1, rows, N // rows)).relu().mean(1))

    x, y = normal(0)
    model = made(Parts, 0)
    assert tracing.linear_layers(model)[0].rows == rows
    if rows == 2:  # with 5 parts of 8 entries there are more directions than entries
        result = spear.attack(model, spear.federated.gradient(model, x, y), method="layer", time_limit=60)
        apart = torch.cdist(x.reshape(-1, N // rows), result.inputs).amin(1)
        assert result.inputs.shape == (rows * BATCH, N // rows)
        assert bool((apart < 1e-6).all()) or not result.certified.any()
        assert f"each is one of the {rows} parts of a sample" in result.reason


def test_a_frozen_first_layer() -> None:
    x, y = normal(0)
    model = made(Net, 0)
    model.fc1.requires_grad_(False)
    update = spear.federated.gradient(model, x, y)
    with pytest.raises(Refusal, match=r"no gradient for fc1.weight \(the layer is frozen\)"):
        spear.attack(model, update, layer="fc1", time_limit=5)
    result = spear.attack(model, update, time_limit=30)
    features = model.fc1(x.flatten(1)).relu().detach()
    assert float(torch.cdist(features, result.inputs).amin(1).max()) < 1e-6
    assert "what enters fc2: the update has no gradient for fc1.weight (the layer is frozen)" in result.reason


def test_what_the_client_did_in_training_mode() -> None:
    x, y = normal(0)
    hidden = made(lambda: Net(act=nn.Sequential(nn.ReLU(), nn.Dropout(0.5))), 0).train()
    torch.manual_seed(0)
    update = sent(hidden, F.cross_entropy(hidden(x), y), count=BATCH)
    all_back(spear.attack(hidden, update, time_limit=60), x.flatten(1), y)
    with pytest.raises(Refusal, match=r"the client trained with dropout act.1 \(p = 0.5\) on behind fc1"):
        spear.attack(hidden, update, method="layer", time_limit=5)
    mixed = made(lambda: Normalised(False, True), 0).train()
    update = sent(mixed, F.cross_entropy(mixed(x), y), count=BATCH)
    result = spear.attack(mixed, update, time_limit=60)
    assert len(result.inputs) == BATCH
    assert bool(result.differences.all()), result.reason
    first = made(lambda: Net(before=nn.Dropout(0.2)), 0).train()
    update = sent(first, F.cross_entropy(first(x), y), count=BATCH)
    result = spear.attack(first, update, time_limit=60)
    assert not result.certified.any()
    assert "dropout before (p = 0.2) took entries of the samples" in result.reason
    assert first.training


def test_dropout_that_is_off_leaves_a_doubt() -> None:
    x, y = normal(0)
    model = made(lambda: Net(before=nn.Dropout(0.2)), 0)
    all_back(spear.attack(model, spear.federated.gradient(model, x, y), time_limit=60), x, y)
    update = sent(model.train(), F.cross_entropy(model(x), y), count=BATCH)
    result = spear.attack(model.eval(), update, time_limit=60)
    assert not result.certified.any()
    assert "dropout before (p = 0.2) stands before fc1: zeros may be what it dropped" in result.reason


def test_shared_weights_are_named() -> None:
    model = made(Net, 0)
    model.fc3 = nn.Linear(WIDTH, WIDTH).double()
    model.fc3.weight = model.fc2.weight
    x, y = normal(0)
    with pytest.raises(Refusal, match="fc2, fc3 shares its weights"):
        spear.attack(model, spear.federated.gradient(model, x, y), method="network", time_limit=5)
    assert (
        len(spear.attack(model, spear.federated.gradient(model, x, y), method="layer", time_limit=60).inputs) == BATCH
    )
