"""Ablations: grids of attacks that vary one knob at a time, what is measured of each batch, and what a cell amounts to.

Like `spear.metrics` this is the judge's side: it plays the client, calls the attack, and compares. Notebook 08.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from spear import inversion, reconstruction
from spear.data import catalog
from spear.federated import clients
from spear.federated.update import SharedUpdate
from spear.metrics import evaluation
from spear.metrics.truth import Shape, layer_truth, shape_of
from spear.study.clients import Client, network

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "adam": partial(torch.optim.Adam, lr=1e-3, fused=True),
}  # common rates
TRAINING_BATCH = 16  # samples a step, well under half a pool
NETWORK = ("dataset", "width", "depth", "activation", "optimizer")  # cells alike in these share a network


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
    """What one attack may cost: kernels that sampling tests, starts of the network method, seconds.

    Proposals and starts decide, so that an ablation does not depend on the machine; `seconds` are a safety net. A batch
    that reaches a limit counts with what had come back by then.
    """

    proposals: int | None = None
    starts: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class CellResult:
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
    cells: Sequence[Cell],
    *,
    batches: int,
    seed: int = 0,
    pool: int = 512,
    limits: Limits = Limits(),
    networks: int | None = None,
) -> pd.DataFrame:
    """Attack `batches` batches in every cell: a row for each, with the fields of `Cell`, `CellResult` and `Shape`.

    Row `number` i of every cell has its samples from the same draw of `pool` samples, and its network from the same
    initialisation (seed + i), so that cells differ by nothing but what they vary. Clients take from the first half of
    the pool, training from the second. With fewer `networks` than batches, as training takes its time, numbers that
    leave the same remainder share one, and its pool, from which each takes a batch of its own.

    Raises `ValueError` for a batch that half the pool does not hold; what the attack raises is its outcome.
    """
    rows, networks = [], networks or batches
    for first in range(networks):
        for place, cell, model in _networks(cells, pool, seed + first):
            for number in range(first, batches, networks):
                inputs, labels = client_batch(cell, pool, seed + first, number // networks)
                sender = Client(model, inputs, labels, send(cell, model, inputs, labels))
                outcome, shape = measure(cell, sender, limits=limits)
                rows.append({"place": place, "number": number} | asdict(cell) | asdict(outcome) | asdict(shape))
    frame = pd.DataFrame(rows).sort_values(["place", "number"], ignore_index=True)
    return frame.drop(columns="place")


def feasible(cells: Sequence[Cell], *, batches: int, seed: int = 0, pool: int = 512) -> list[Cell]:
    """Those of the cells whose batches the data set can fill: a small one has few samples, fewer still of one class."""
    lacking = set()
    for kind in dict.fromkeys((cell.dataset, cell.labels, cell.batch) for cell in cells):
        client = Cell(dataset=kind[0], labels=kind[1], batch=kind[2])
        try:
            for number in range(batches):
                client_batch(client, pool, seed + number)
        except ValueError:
            lacking.add(kind)
    return [cell for cell in cells if (cell.dataset, cell.labels, cell.batch) not in lacking]


def client_batch(
    cell: Cell, pool: int, seed: int, client: int = 0
) -> tuple[Float[Tensor, "b *input_shape"], Int[Tensor, " b"]]:
    """The samples of client number `client`: the next of the pool, or the next of one class."""
    inputs, labels = (part[: pool // 2] for part in catalog.load(cell.dataset, count=pool, seed=seed))
    if cell.labels == "equal":
        same = labels == labels.mode().values
        inputs, labels = inputs[same], labels[same]
    inputs, labels = inputs[client * cell.batch :], labels[client * cell.batch :]
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
    activation = getattr(nn, cell.activation)
    return network(cell.dataset, width=cell.width, depth=cell.depth, seed=seed, activation=activation)


def _public(cell: Cell, pool: int, seed: int) -> tuple[Float[Tensor, "k *input_shape"], Int[Tensor, " k"]]:
    inputs, labels = catalog.load(cell.dataset, count=pool, seed=seed)
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


def measure(cell: Cell, sender: Client, *, limits: Limits = Limits()) -> tuple[CellResult, Shape]:
    """Attack a client's update as the cell says, and compare with the true inputs of the layer.

    The shape is that of the attacked layer; the network method begins with the last hidden one.
    """
    model, inputs, labels, update = sender
    truth = inputs if cell.layer == "fc1" else layer_truth(model, cell.layer, inputs, labels)[0].mT
    begun = f"fc{cell.depth - 1}" if cell.method == "network" else cell.layer
    X, G = layer_truth(model, begun, inputs, labels)
    shape = shape_of(G, X)
    budget = limits.starts if cell.method == "network" else limits.proposals
    layer = None if cell.layer == "fc1" else cell.layer
    options = {"method": cell.method, "layer": layer, "max_proposals": budget, "time_limit": limits.seconds}
    try:
        result = inversion.attack(model, update, **options)
    except ValueError as error:
        return _refused(error), shape
    report = evaluation.evaluate(result, truth if cell.sent == "float64" else truth.float(), labels)
    return _outcome(result, report), shape


def _refused(error: ValueError) -> CellResult:
    return CellResult(
        recall=0.0,
        precision=1.0,
        complete=False,
        label_accuracy=0.0,
        error=math.nan,
        psnr=0.0,
        seconds=0.0,
        proposals=0,
        rank=0,
        reason=f"refused: {error}",
    )


def _outcome(result: reconstruction.Reconstruction, report: evaluation.Evaluation) -> CellResult:
    returned = report.relative_error[report.match >= 0]
    return CellResult(
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
        return clients.gradient(model, inputs, labels)
    update = clients.gradient(copy.deepcopy(model).float(), inputs.float(), labels)
    gradients = {name: g.to(getattr(torch, cell.sent)) for name, g in update.gradients.items()}
    if cell.widened:
        gradients = {name: g.float() for name, g in gradients.items()}
    return replace(update, gradients=gradients)
