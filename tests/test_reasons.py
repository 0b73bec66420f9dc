"""A table of causes: each is made, and the reason that the attack gives must name it, and no other."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import spear
from spear.federated import SharedUpdate, clients, defences, gradient
from spear.federated.update import each

N, WIDTH, CLASSES, BATCH = 40, 120, 5, 6
Made = tuple[nn.Module, SharedUpdate] | tuple[nn.Module, SharedUpdate, dict]


def model(seed: int = 0, **options: object) -> nn.Module:
    return spear.models.fcnn((N,), WIDTH, 3, CLASSES, seed=seed, **options)


def batch(count: int = BATCH) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, N, generator=Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.arange(count) % CLASSES


def plain(**changed: object) -> Made:
    net = model()
    return net, replace(gradient(net, *batch()), **changed)


def times(factor: float) -> Made:
    net, sent = plain()
    return net, each(sent, lambda g: factor * g)


def by(loss: Callable[[Tensor], Tensor], net: nn.Module | None = None, count: int | None = BATCH) -> Made:
    """The gradient of any function of the logits."""
    net = net or model()
    names, parameters = zip(*((n, p) for n, p in net.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(loss(net(batch()[0])), parameters)
    return net, SharedUpdate(dict(zip(names, found, strict=True)), count=count)


def without(*prefixes: str) -> Made:
    net, sent = plain()
    return net, replace(sent, gradients={n: g for n, g in sent.gradients.items() if not n.startswith(prefixes)})


def trained_with(module: nn.Module) -> Made:
    """The client's module in training mode stands behind the first ReLU, the server's is off."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(N, WIDTH), nn.ReLU(), module, nn.Linear(WIDTH, CLASSES)).double().train()
    _, sent = by(lambda z: F.cross_entropy(z, batch()[1]), net)
    return net.eval(), sent


def moved(size: float) -> Made:
    """The client has other weights than the server."""
    net, sent = plain()
    stale = copy.deepcopy(net)
    with torch.no_grad():
        for p in stale.parameters():
            p += size * torch.randn(p.shape, generator=Generator().manual_seed(2), dtype=p.dtype)
    return stale, sent


def mixed() -> Made:
    """Mixup: pairs of images, and of labels, at random shares."""
    net, (x, y) = model(), batch()
    share = torch.rand(BATCH, 1, generator=Generator().manual_seed(3), dtype=torch.float64)
    labels = share * F.one_hot(y, CLASSES) + (1 - share) * F.one_hot(y.flip(0), CLASSES)
    logits = net(share * x + (1 - share) * x.flip(0))
    names, parameters = zip(*net.named_parameters(), strict=True)
    found = torch.autograd.grad(F.cross_entropy(logits, labels), parameters)
    return net, SharedUpdate(dict(zip(names, found, strict=True)), count=BATCH)


def stepped(optimiser: Callable) -> Made:
    net, after = model(), model()
    step = optimiser(after.parameters())
    F.cross_entropy(after(batch()[0]), batch()[1]).backward()
    step.step()
    weights = dict(after.named_parameters())
    return net, SharedUpdate({n: (p - weights[n]).detach() for n, p in net.named_parameters()}, count=BATCH)


def locally(epochs: int, parts: int, **claimed: object) -> Made:
    net = model()
    sent = clients.local_training(net, *batch(), epochs=epochs, mini_batch=BATCH // parts, learning_rate=0.05)
    return net, replace(sent, **claimed)


def two_copies() -> Made:
    net, (x, y) = model(), batch()
    x[1], y[1] = x[0], y[0]
    return net, gradient(net, x, y)


def added(size: float) -> Made:
    """SCAFFOLD: the mean gradient of many other samples was added."""
    net, sent = plain()
    x = torch.randn(300, N, generator=Generator().manual_seed(4), dtype=torch.float64)
    other = gradient(net, x, torch.arange(300) % CLASSES).gradients
    return net, replace(sent, gradients={n: g + size * other[n] for n, g in sent.gradients.items()})


def noisy(sigma: float) -> Made:
    net, sent = plain()
    return net, replace(defences.noisy(sent, sigma, generator=Generator().manual_seed(5)), noise=None)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.site = nn.Linear(N, WIDTH), nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).relu()
        return self.kind(h), self.site(h)


def two_heads() -> Made:
    torch.manual_seed(0)
    y = batch()[1]
    return by(lambda z: F.cross_entropy(z[0], y) + F.cross_entropy(z[1], y % 3), TwoHeads().double())


def one_output() -> Made:
    net = spear.models.fcnn((N,), WIDTH, 3, 1)
    return by(lambda z: F.binary_cross_entropy_with_logits(z[:, 0], (batch()[1] > 1).double()), net)


def dead(layer: str) -> Made:
    net = model()
    with torch.no_grad():
        net.get_submodule(layer).bias.fill_(-1e3)
    return net, gradient(net, *batch())


def nan() -> Made:
    net, sent = plain()
    sent.gradients["fc2.weight"][3, 4] = torch.nan
    return net, sent


def frozen() -> Made:
    net = model()
    net.fc1.requires_grad_(False)
    return net, gradient(net, *batch())


def listed() -> Made:
    net, sent = plain()
    return net, SharedUpdate(list(sent.gradients.values()), count=BATCH)


def renamed(name: Callable[[str], str]) -> Made:
    net, sent = plain()
    return net, replace(sent, gradients={name(n): g for n, g in sent.gradients.items()})


Y = batch()[1]
FALSE = ("noise", "smoothed", "no rank", "pruning", "arrived", "copies", "opposite sign", "times their mean", "decay")
CAUSES: dict[str, tuple[Callable[[], Made], tuple[str, ...], tuple[str, ...]]] = {
    "nothing": (plain, ("the sum of the recovered samples'",), FALSE),
    "no count": (lambda: plain(count=None), ("the number of samples is not disclosed",), FALSE),
    "batch_size too small": (
        lambda: (*plain(count=None), {"batch_size": 3}),
        ("6 samples were found, 3 disclosed", "0.5 times their mean"),
        ("no rank", "noise", "smoothed"),
    ),
    "batch_size too large": (
        lambda: (*plain(count=None), {"batch_size": 9}),
        ("6 samples were found, 9 disclosed", "1.5 times their mean"),
        ("no rank", "noise", "smoothed"),
    ),
    "one layer, batch_size too small": (
        lambda: (*plain(count=None), {"batch_size": 3, "method": "layer"}),
        ("6 samples were found, 3 disclosed", "0.5 times their mean"),
        ("no rank", "noise", "smoothed"),
    ),
    "a data set's length": (lambda: plain(count=5000), ("6 samples were found, 5000 disclosed",), ("noise", "copies")),
    "a loader's length": (lambda: plain(count=1), ("6 samples were found, 1 disclosed",), ("noise", "copies")),
    "a sum": (lambda: times(BATCH), ("the update is 6 times their mean",), ("noise", "copies", "opposite")),
    "a loss scale": (lambda: times(65536.0), ("the update is 65536 times their mean",), ("noise", "copies")),
    "the sign": (lambda: times(-1.0), ("the opposite sign of their mean",), ("noise", "loss", "copies")),
    "sign and scale": (lambda: times(-0.25), ("the update is -0.25 times their mean",), ("noise", "loss")),
    "Poisson batches": (
        lambda: (times(BATCH / 8)[0], replace(times(BATCH / 8)[1], count=8)),
        ("6 samples were found, 8 disclosed",),
        ("noise", "times their mean"),
    ),
    "two copies": (two_copies, ("stand for several samples each: copies",), ("noise", "smoothed", "times their")),
    "label smoothing": (
        lambda: by(lambda z: F.cross_entropy(z, Y, label_smoothing=0.2)),
        ("the sum of the recovered samples'",),
        FALSE,
    ),
    "binary cross-entropy": (
        lambda: by(lambda z: F.binary_cross_entropy_with_logits(z, F.one_hot(Y, CLASSES).double())),
        ("the update fits the loss binary_cross_entropy, told was cross_entropy",),
        ("noise", "times their", "smoothed"),
    ),
    "squared error": (
        lambda: by(lambda z: F.mse_loss(z, F.one_hot(Y, CLASSES).double())),
        ("the update fits the loss squared_error, told was cross_entropy",),
        ("noise", "times their", "smoothed"),
    ),
    "class weights": (
        lambda: by(lambda z: F.cross_entropy(z, Y, weight=torch.arange(1.0, CLASSES + 1).double())),
        ("their weights in the loss differ",),
        ("noise", "smoothed", "opposite", "copies"),
    ),
    "focal loss": (
        lambda: by(lambda z: ((1 - z.softmax(1)) ** 2 * -z.log_softmax(1)).gather(1, Y[:, None]).mean()),
        ("their weights in the loss differ",),
        ("noise", "smoothed", "opposite", "copies"),
    ),
    "likelihood of probabilities": (
        lambda: by(lambda z: F.nll_loss(z.softmax(1), Y)),
        ("their weights in the loss differ",),
        ("noise", "smoothed", "opposite", "copies", "times their"),
    ),
    "mixup": (mixed, ("another loss than cross_entropy",), ("noise", "copies", "opposite", "times their")),
    "slightly stale weights": (lambda: moved(1e-3), ("older or newer weights",), ("noise", "loss", "smoothed")),
    "stale weights": (lambda: moved(1e-2), ("older or newer weights",), ("noise", "loss", "smoothed")),
    "dropout": (lambda: trained_with(nn.Dropout(0.5)), ("dropout 2 (p = 0.5)",), ("noise", "smoothed", "times")),
    "weight decay": (
        lambda: by(lambda z: F.cross_entropy(z, Y) + 5e-3 * sum(p.pow(2).sum() for p in DECAYED.parameters()), DECAYED),
        ("a weight decay of 0.01 was taken off",),
        ("noise", "smoothed", "times their"),
    ),
    "Adam": (lambda: stepped(torch.optim.Adam), ("a first step of Adam's kind",), ("noise", "smoothed", "decay")),
    "AdamW": (
        lambda: stepped(torch.optim.AdamW),
        ("a first step of Adam's kind", "with a decay of 0.01 times the weights"),
        ("noise", "smoothed"),
    ),
    "signs alone": (
        lambda: (plain()[0], each(plain()[1], torch.sign)),
        ("all entries have one size",),
        ("smoothed", "too large", "pruning"),
    ),
    "two steps, one told": (
        lambda: locally(2, 1, local_steps=1, mini_batch=None),
        ("is that of 2 steps on 6 samples each, told was 1",),
        ("noise", "loss", "copies"),
    ),
    "two mini-batches, one step told": (
        lambda: locally(1, 2, local_steps=1, mini_batch=None),
        ("is that of 2 steps on 3 samples each, told was 1",),
        ("noise", "loss", "copies"),
    ),
    "one step, four told": (
        lambda: locally(1, 1, local_steps=4, mini_batch=None),
        ("is that of one step, told were 4",),
        ("noise", "loss", "copies"),
    ),
    "the last mini-batch dropped": (
        lambda: locally(2, 2, count=7),
        ("6 of 7 samples fill whole mini-batches, the others were dropped",),
        ("noise", "loss", "copies"),
    ),
    "control variates": (lambda: added(1.0), ("control variates",), ("smoothed", "pruning", "copies")),
    "noise": (lambda: noisy(1e-4), ("stand out of noise of",), ("pruning", "arrived", "times their")),
    "half precision": (
        lambda: (plain()[0], defences.half_precision(plain()[1], torch.bfloat16)),
        ("stand out of noise",),
        ("pruning", "arrived", "times their"),
    ),
    "pruning": (
        lambda: (plain()[0], replace(defences.pruned_random(plain()[1], 0.7), pruning=None)),
        ("every entry that arrived",),
        ("noise", "smoothed", "times their"),
    ),
    "noise that is not there": (
        lambda: plain(noise=0.1),
        ("the client claims noise of 0.1 per entry: the update does not show it",),
        ("smoothed", "times their"),
    ),
    "pruning that is not there": (
        lambda: plain(pruning="top-k"),
        ("the client claims top-k pruning: the update does not show it",),
        ("smoothed", "noise"),
    ),
    "a private head": (lambda: without("fc3"), ("the whole batch of 6",), ("noise", "loss", "times their")),
    "all but the first layer private": (
        lambda: without("fc2", "fc3"),
        ("the whole batch of 6",),
        ("noise", "times their"),
    ),
    "no first layer": (
        lambda: without("fc1"),
        ("what enters fc2: the update has no gradient for fc1.weight",),
        ("noise", "loss", "times their"),
    ),
    "a frozen layer": (
        frozen,
        ("what enters fc2: the update has no gradient for fc1.weight (the layer is frozen)",),
        ("noise", "loss"),
    ),
    "no bias": (
        lambda: (plain()[0], SharedUpdate({"fc1.weight": plain()[1].gradients["fc1.weight"]}, count=BATCH)),
        ("the update has no gradient for fc1.bias",),
        ("noise", "loss", "rank"),
    ),
    "as many samples as units": (
        lambda: (model(), gradient(model(), *batch(WIDTH))),
        (f"a batch of rank {WIDTH} needs",),
        ("smoothed", "pruning", "arrived"),
    ),
    "two heads": (two_heads, ("2 outputs",), ("noise", "smoothed", "times their")),
    "one output": (one_output, ("the model has one output: binary cross-entropy was assumed",), ("noise", "smoothed")),
    "no active unit": (lambda: dead("fc1"), ("it is zero everywhere",), ("noise", "smoothed")),
    "no active unit above": (lambda: dead("fc2"), ("it is zero everywhere",), ("noise", "smoothed")),
    "NaN in an entry": (nan, ("every entry that arrived",), ("noise", "smoothed", "times their")),
    "a list": (listed, ("tensors without names were matched by shape and order",), FALSE),
    "a prefix": (lambda: renamed(lambda n: f"net.{n}"), ("the names came with the prefix 'net.'",), FALSE),
    "biases of shape (1, n)": (
        lambda: (plain()[0], each(plain()[1], lambda g: g[None] if g.ndim == 1 else g)),
        ("fc1.bias, fc2.bias, fc3.bias came in another shape",),
        FALSE,
    ),
    "weights as (inputs, outputs)": (
        lambda: (plain()[0], each(plain()[1], lambda g: g.mT if g.ndim == 2 else g)),
        ("fc1.weight, fc2.weight, fc3.weight came in another shape",),
        FALSE,
    ),
    "a name that is nobody's": (
        lambda: renamed(lambda n: n.replace("fc2", "other")),
        ("the update has a gradient for 'other.bias', which the model does not have",),
        FALSE,
    ),
}
DECAYED = model()


@pytest.mark.parametrize("cause", CAUSES)
def test_the_reason_names_the_cause(cause: str) -> None:
    make, wanted, others = CAUSES[cause]
    net, sent, *options = make()
    try:
        said = spear.attack(net, sent, **{"time_limit": 200} | (options[0] if options else {})).reason
    except ValueError as error:
        said = str(error)
    assert all(words in said for words in wanted), said
    assert not [words for words in others if words in said], said
