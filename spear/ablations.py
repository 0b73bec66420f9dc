"""Ablations: grids of attacks that vary one knob at a time, what is measured of each batch, and what a cell amounts to.

Like `spear.metrics` this is the judge's side: it plays the client, calls the attack, and compares.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor, nn

from spear import data, federated, inversion, metrics, models
from spear.federated import SharedUpdate

OPTIMIZERS = {"sgd": partial(torch.optim.SGD, lr=0.05), "adam": partial(torch.optim.Adam, lr=1e-3)}
TRAINING_BATCH = 16
NETWORK = ("dataset", "width", "depth", "activation", "optimizer")  # cells alike in these share a network
SHARES = ("recall", "precision", "complete", "label_accuracy")
MEANS = ("psnr", "proposals", "rank", "zero_share", "agreeing")
MAGNITUDES = ("error", "seconds", "condition", "spread")
FINITE = (1e-17, 1e17)  # magnitudes are held within: 0 and infinity have no logarithm


@dataclass(frozen=True)
class Cell:
    """One cell of a grid: the client's data and network, what it sends, and the attack on it.

    `activation` names a class of `torch.nn`. `labels` is "random", as the data come, or "equal", a batch of one class.
    The network was trained for `steps` of `optimizer` on other samples. `sent` is the precision of the gradient
    (float16 and bfloat16: computed in float32, then rounded), and `widened` whether it was turned into float32 on the
    way. `layer` is the attacked layer, `method` that of `spear.attack`.
    """

    dataset: str = "photos"
    batch: int = 8
    width: int = 200
    depth: int = 4
    activation: str = "ReLU"
    labels: str = "random"
    optimizer: str = "sgd"
    steps: int = 0
    sent: str = "float64"
    widened: bool = False
    layer: str = "fc1"
    method: str = "sampling"

    def __post_init__(self) -> None:
        known = {"labels": ("random", "equal"), "optimizer": tuple(OPTIMIZERS), "method": inversion.METHODS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: use one of {', '.join(values)}")


@dataclass(frozen=True)
class Limits:
    """What one attack may cost: `seconds`, kernels that sampling tests, starts of the network method."""

    seconds: float | int | None = None
    proposals: int | None = None
    starts: int | None = None


@dataclass(frozen=True)
class Shape:
    """What the true gradient G = dL/dZ (m, b) of a layer is like, and the layer's inputs X (n, b) with it.

    `zero_share` is the share of exact zeros in G, `agreeing` that of neurons that are zero for all samples or for none:
    these tell no sample from another. `condition` is the condition number of dL/dW = G X^T on its b directions,
    `spread` the ratio of the largest to the smallest column norm of G.
    """

    zero_share: float
    agreeing: float
    condition: float
    spread: float


@dataclass(frozen=True)
class Outcome:
    """What came back of one batch, and at what cost.

    `error` is the largest relative error of a returned sample (NaN where none is), `psnr` the mean over the batch in dB
    (0 for a sample that is missing), `rank` the batch size that the server saw, and `reason` the attack's own, or the
    message with which it refused.
    """

    recall: float
    precision: float
    complete: bool
    label_accuracy: float
    error: float
    psnr: float
    seconds: float
    proposals: int
    rank: int
    reason: str


def grid(cell: Cell = Cell(), **values: Sequence[object]) -> list[Cell]:
    """Every combination of the `values` of the named fields, the last one varying fastest; else as `cell`."""
    cells = [cell]
    for name, choices in values.items():
        cells = [replace(c, **{name: choice}) for c in cells for choice in choices]
    return cells


def run(
    cells: Sequence[Cell], *, batches: int, seed: int = 0, pool: int = 512, limits: Limits = Limits()
) -> pd.DataFrame:
    """Attack `batches` batches in every cell: a row for each, with the fields of `Cell`, `Outcome` and `Shape`.

    Row `number` i of every cell has its samples from the same draw of `pool` samples, and its network from the same
    initialisation (seed + i), so that cells differ by nothing but what they vary. Clients take from the first half of
    the pool, training from the second.

    Raises `ValueError` for a batch that half the pool does not hold; what the attack raises is its outcome.
    """
    rows = []
    for number in range(batches):
        for place, cell, model in _networks(cells, pool, seed + number):
            inputs, labels = client_batch(cell, pool, seed + number)
            outcome, shape = measure(cell, model, inputs, labels, limits=limits)
            rows.append({"place": place, "number": number} | asdict(cell) | asdict(outcome) | asdict(shape))
    frame = pd.DataFrame(rows).sort_values(["place", "number"], ignore_index=True)
    return frame.drop(columns="place")


def client_batch(cell: Cell, pool: int, seed: int) -> tuple[Float[Tensor, "b *input_shape"], Int[Tensor, " b"]]:
    """The client's samples: the first of the pool, or the first of one class."""
    inputs, labels = (part[: pool // 2] for part in data.load(cell.dataset, count=pool, seed=seed))
    if cell.labels == "equal":
        same = labels == labels.mode().values
        inputs, labels = inputs[same], labels[same]
    if len(labels) < cell.batch:
        raise ValueError(f"a pool of {pool} has {len(labels)} samples for a batch of {cell.batch}: enlarge the pool")
    return inputs[: cell.batch], labels[: cell.batch]


def _networks(cells: Sequence[Cell], pool: int, seed: int) -> Iterator[tuple[int, Cell, nn.Module]]:
    """Each cell with its place and its network; cells that differ in training steps alone share one, trained on."""
    order = sorted(enumerate(cells), key=lambda entry: entry[1].steps)
    for key in dict.fromkeys(_network(cell) for cell in cells):
        model, trained, optimizer = _build(key, seed), 0, None
        for place, cell in (entry for entry in order if _network(entry[1]) == key):
            if cell.steps > trained:
                optimizer = optimizer or OPTIMIZERS[cell.optimizer](model.parameters())
                train(model, optimizer, *_public(cell, pool, seed), steps=cell.steps - trained, seed=seed + trained)
                trained = cell.steps
            yield place, cell, model


def _network(cell: Cell) -> Cell:
    """The cell with only what its network depends on, training steps aside."""
    return Cell(**{name: getattr(cell, name) for name in NETWORK})


def _build(cell: Cell, seed: int) -> nn.Module:
    classes, activation = len(data.classes(cell.dataset)), getattr(nn, cell.activation)
    return models.fcnn(data.shape(cell.dataset), cell.width, cell.depth, classes, activation=activation, seed=seed)


def _public(cell: Cell, pool: int, seed: int) -> tuple[Float[Tensor, "k *input_shape"], Int[Tensor, " k"]]:
    inputs, labels = data.load(cell.dataset, count=pool, seed=seed)
    return inputs[pool // 2 :], labels[pool // 2 :]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Float[Tensor, "k *input_shape"],
    labels: Int[Tensor, " k"],
    *,
    steps: int,
    seed: int = 0,
) -> None:
    """Train in place on random mini-batches, in float32 as is usual; the model is float64 again afterwards."""
    generator = torch.Generator().manual_seed(seed)
    model.float()
    for _ in range(steps):
        picked = torch.randint(len(labels), (TRAINING_BATCH,), generator=generator)
        F.cross_entropy(model(inputs[picked].float()), labels[picked]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.double()


def measure(
    cell: Cell,
    model: nn.Module,
    inputs: Float[Tensor, "b *input_shape"],
    labels: Int[Tensor, " b"],
    *,
    limits: Limits = Limits(),
) -> tuple[Outcome, Shape]:
    """Send the update of one batch as the cell says, attack it, and compare with the true inputs of the layer.

    The shape is that of the attacked layer; the network method begins with the last hidden one.
    """
    truth = inputs if cell.layer == "fc1" else layer_truth(model, cell.layer, inputs, labels)[0].mT
    begun = f"fc{cell.depth - 1}" if cell.method == "network" else cell.layer
    X, G = layer_truth(model, begun, inputs, labels)
    shape = shape_of(G, X)
    budget = limits.starts if cell.method == "network" else limits.proposals
    layer = None if cell.layer == "fc1" else cell.layer
    options = {"method": cell.method, "layer": layer, "time_limit": limits.seconds, "max_proposals": budget}
    try:
        result = inversion.attack(model, send(cell, model, inputs, labels), **options)
    except ValueError as error:
        return Outcome(0.0, 1.0, False, 0.0, math.nan, 0.0, 0.0, 0, 0, f"refused: {error}"), shape
    report = metrics.evaluate(result, truth if cell.sent == "float64" else truth.float(), labels)
    return _outcome(result, report), shape


def _outcome(result: inversion.Reconstruction, report: metrics.Evaluation) -> Outcome:
    returned = report.relative_error[report.match >= 0]
    return Outcome(
        recall=report.recall,
        precision=report.precision,
        complete=result.complete,
        label_accuracy=report.label_accuracy,
        error=float(returned.max()) if len(returned) else math.nan,
        psnr=float(report.psnr.mean()),
        seconds=result.stats.seconds,
        proposals=result.stats.proposals,
        rank=result.rank,
        reason=result.reason,
    )


def send(
    cell: Cell, model: nn.Module, inputs: Float[Tensor, "b *input_shape"], labels: Int[Tensor, " b"]
) -> SharedUpdate:
    """The client's update in the precision in which it is sent, and turned into float32 where the cell says so."""
    if cell.sent == "float64":
        return federated.gradient(model, inputs, labels)
    update = federated.gradient(copy.deepcopy(model).float(), inputs.float(), labels)
    gradients = {name: g.to(getattr(torch, cell.sent)) for name, g in update.gradients.items()}
    if cell.widened:
        gradients = {name: g.float() for name, g in gradients.items()}
    return replace(update, gradients=gradients)


def layer_truth(
    model: nn.Module, layer: str, inputs: Float[Tensor, "b *input_shape"], labels: Int[Tensor, " b"]
) -> tuple[Float[Tensor, "n b"], Float[Tensor, "m b"]]:
    """What the server does not see of a linear layer: its inputs X and G = dL/dZ for the mean cross-entropy, by a hook.

    Raises `ValueError` for a name that is not a linear layer of the model.
    """
    linear = dict(model.named_modules()).get(layer)
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"no linear layer named {layer!r}")
    seen: list[tuple[Tensor, Tensor]] = []
    handle = linear.register_forward_hook(lambda _module, arguments, Z: seen.append((arguments[0], Z)))
    try:
        loss = F.cross_entropy(model(inputs), labels)
    finally:
        handle.remove()
    ((X, Z),) = seen
    return X.detach().mT, torch.autograd.grad(loss, Z)[0].mT


def shape_of(G: Float[Tensor, "m b"], X: Float[Tensor, "n b"]) -> Shape:
    """How sparse, how even and how well conditioned a layer's gradient is."""
    zero, norms = G == 0, torch.linalg.vector_norm(G, dim=0)
    agreeing = zero.all(1) | ~zero.any(1)
    triangles = [torch.linalg.qr(part, mode="r")[1] for part in (G, X)]
    s = torch.linalg.svdvals(triangles[0] @ triangles[1].mT)
    shares = float(zero.double().mean()), float(agreeing.double().mean())
    return Shape(*shares, float(s[0] / s[-1]), float(norms.max() / norms.min()))


def summarize(frame: pd.DataFrame, by: Sequence[str], *, confidence: float = 0.95) -> pd.DataFrame:
    """One row per cell, cells in order of appearance: `batches`, and each measure with `_low` and `_high` around it.

    Shares get a Wilson interval whose unit is the batch, as samples of one batch succeed and fail together; means a
    t interval; magnitudes (`error`, `seconds`, `condition`, `spread`) the geometric mean with a t interval of the
    logarithms. Values that are missing do not count.
    """
    rows = []
    for key, group in frame.groupby(list(by), sort=False):
        row = dict(zip(by, key, strict=True)) | {"batches": len(group)}
        for names, interval in ((SHARES, share_interval), (MEANS, mean_interval), (MAGNITUDES, magnitude_interval)):
            for name in names:
                values = group[name].dropna().to_numpy(float)
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), interval(values, confidence), strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def share_interval(values: Float[np.ndarray, " n"], confidence: float) -> tuple[float, float, float]:
    """Mean of shares in [0, 1] and its Wilson interval for n trials.

    Of all quantities in [0, 1] with a given mean, one that is 0 or 1 varies most, so the interval is wide enough for
    shares between; a number of successes that is no integer is rounded outwards.
    """
    if not len(values):
        return math.nan, math.nan, math.nan
    total = round(values.sum(), 9)
    low, high = (
        stats.binomtest(int(k), len(values)).proportion_ci(confidence, method="wilson")
        for k in (math.floor(total), math.ceil(total))
    )
    return float(values.mean()), float(low.low), float(high.high)


def mean_interval(values: Float[np.ndarray, " n"], confidence: float) -> tuple[float, float, float]:
    """Mean and its t interval; no interval (NaN) for fewer than two values."""
    if not len(values):
        return math.nan, math.nan, math.nan
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * pd.Series(values).sem()
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def magnitude_interval(values: Float[np.ndarray, " n"], confidence: float) -> tuple[float, float, float]:
    """Geometric mean and the t interval of the logarithms, with values held within `FINITE`."""
    log = mean_interval(np.log(values.clip(*FINITE)), confidence)
    return math.exp(log[0]), math.exp(log[1]), math.exp(log[2])
