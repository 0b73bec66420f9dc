"""What a client sends, and what it discloses: a `SharedUpdate`. The plainest one is a FedSGD step on one batch.

Other clients are in `spear.clients`, what is done to an update before it is sent in `spear.defences`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "spear.SharedUpdate/1"
LOSSES = ("cross_entropy", "binary_cross_entropy", "squared_error")
TUPLES = {"input_shape", "clients"}  # lists, in a file's metadata
PRUNINGS = (None, "random", "top-k")
RANDOM_IN_TRAINING = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
)


@dataclass(frozen=True)
class Lazy(Mapping[str, Tensor]):
    """Tensors by name, each computed when it is asked for: together they may be too large."""

    names: tuple[str, ...]
    compute: Callable[[str], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class SharedUpdate:
    """The update that a client sends to the server, and what the client discloses beside it.

    `gradients` maps each parameter's name to the gradient of the loss, in the parameter's shape: tensors, or NumPy
    arrays (a gradient computed in another framework), which become tensors. `reduction` is how the loss joins the
    samples (`"mean"` or `"sum"`); `loss` is one of `LOSSES`: all but the first compare the outputs (through
    a sigmoid, or as they are) with the one-hot label, or with the label 0 or 1 where there is one output. `count` is
    the number of samples and `input_shape` the shape of one sample, each `None` where it is not disclosed.

    Local training (FedAvg): `learning_rate` is `None` for a gradient; where it is given, `gradients` holds the change
    of the weights, theta_before - theta_after, by `local_steps` steps of SGD with `momentum` on `mini_batch` samples
    each (the last of an epoch may have fewer). Aggregation: `clients` are the sample counts of the clients in the sum.
    Privacy: per-sample gradients were clipped to the norm `clip`, `noise` is the standard deviation of the noise in
    each entry, and `epsilon`, `delta` what an accountant says of the release. Compression: entries were dropped by
    `pruning` (`"random"` or `"top-k"`: an entry that is exactly zero may be missing), rounded at random to `bits` bits,
    or sent in a half-precision dtype as `loss_scale` times their value.
    """

    gradients: Mapping[str, Tensor | np.ndarray]
    reduction: str = "mean"
    count: int | None = None
    input_shape: tuple[int, ...] | None = None
    local_steps: int = 1
    learning_rate: float | int | None = None
    mini_batch: int | None = None
    momentum: float | int = 0.0
    clients: tuple[int, ...] | None = None
    clip: float | int | None = None
    noise: float | int | None = None
    epsilon: float | int | None = None
    delta: float | int | None = None
    pruning: str | None = None
    bits: int | None = None
    loss_scale: float | int = 1.0
    loss: str = "cross_entropy"

    def __post_init__(self) -> None:
        if not self.gradients:
            raise ValueError("an update needs at least one gradient")
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"unknown reduction {self.reduction!r}: use 'mean' or 'sum'")
        _check_loss(self.loss)
        if self.pruning not in PRUNINGS:
            raise ValueError(f"unknown pruning {self.pruning!r}: use 'random' or 'top-k'")
        if not self.loss_scale > 0:
            raise ValueError(f"a loss scale is positive, not {self.loss_scale}")
        if not isinstance(self.gradients, Lazy):
            tensors = {name: _tensor(name, value) for name, value in self.gradients.items()}
            object.__setattr__(self, "gradients", tensors)

    def telling(self, **told: float | int | None) -> "SharedUpdate":
        """The update with what is known from elsewhere of the client's training, `None` where nothing is.

        Raises `ValueError` where that contradicts what the update itself discloses, or itself.
        """
        usual = {f.name: f.default for f in fields(self)}
        given = {name: value for name, value in told.items() if value is not None}
        for name, value in given.items():
            own = getattr(self, name)
            if own not in (usual[name], value):
                raise ValueError(f"the update says {name} {own}, not {value}")
        update = replace(self, **given)
        _check_training(update)
        return update

    def save(self, path: str | Path) -> None:
        """Write the update as a safetensors file; nothing is pickled."""
        disclosed = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "gradients"}
        metadata = {"format": FORMAT, "disclosed": json.dumps(disclosed)}
        save_file({name: g.detach().cpu().contiguous() for name, g in self.gradients.items()}, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "SharedUpdate":
        """Read an update that `save` wrote, or any safetensors file of gradients by parameter name.

        Raises `FileNotFoundError` where there is no file, and `ValueError` for a truncated or foreign file.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("format", FORMAT) != FORMAT:
            raise ValueError(f"{path}: format {metadata['format']!r} is not {FORMAT!r}")
        try:
            disclosed = json.loads(metadata.get("disclosed", "{}"))
            for name in TUPLES & disclosed.keys():
                disclosed[name] = None if disclosed[name] is None else tuple(disclosed[name])
            return cls(tensors, **disclosed)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: not an update: {error}") from error


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, each problem an error that names the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error


def _check_training(update: SharedUpdate) -> None:
    """What a client may say of its local training, or a `ValueError` that names what is wrong."""
    steps, rate, size, count = update.local_steps, update.learning_rate, update.mini_batch, update.count
    if rate is not None and not rate > 0:
        raise ValueError(f"a learning rate is positive, not {rate}")
    if not 0 <= update.momentum < 1:
        raise ValueError(f"a momentum is at least 0 and under 1, not {update.momentum}")
    if min(steps, size or 1, count or 1) < 1:
        raise ValueError(f"local steps {steps}, mini-batch {size} and samples {count} are at least 1")
    if size and count and size > count:
        raise ValueError(f"a mini-batch of {size} does not come from {count} samples")
    if rate is None and (steps > 1 or size or update.momentum):
        raise ValueError("local steps, mini-batch and momentum are of a change of weights: its learning rate is needed")


def _tensor(name: str, value: Tensor | np.ndarray) -> Tensor:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value.copy())
    if not isinstance(value, Tensor):
        raise ValueError(f"the gradient of {name} is {type(value).__name__}, not a tensor or a NumPy array")
    return value.detach()


def gradient(
    model: nn.Module,
    inputs: Float[Tensor, "b *input_shape"],
    labels: Int[Tensor, " labels"],
    *,
    reduction: str = "mean",
    loss: str = "cross_entropy",
) -> SharedUpdate:
    """The update of a FedSGD client: gradients of the loss of one batch by every parameter.

    `inputs` holds one sample per row, in the dtype of the model; `labels` the class of each sample. The model is left
    unchanged, its `.grad` fields included.

    Raises `ValueError` for an unknown reduction or loss, for batch normalisation or dropout in training mode (the
    gradient of a sample would depend on the other samples, or on chance: call `model.eval()` first), for inputs and
    labels of unequal length, and for a label that the model has no output for.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"unknown reduction {reduction!r}: use 'mean' or 'sum'")
    _check_loss(loss)
    if len(inputs) != len(labels):
        raise ValueError(f"{len(inputs)} inputs but {len(labels)} labels")
    _refuse_training_mode(model)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    logits = model(inputs)
    most = 2 if logits.shape[1] == 1 and loss != "cross_entropy" else logits.shape[1]
    if int(labels.min()) < 0 or int(labels.max()) >= most:
        span = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"labels run from {span}; the model has {logits.shape[1]} outputs")
    value = batch_loss(logits, labels, loss, reduction)
    values = torch.autograd.grad(value, parameters, allow_unused=True)
    found = {n: g for n, g in zip(names, values, strict=True) if g is not None}
    return SharedUpdate(found, reduction, len(inputs), tuple(inputs.shape[1:]), loss=loss)


def batch_loss(
    logits: Float[Tensor, "b outputs"], labels: Int[Tensor, " b"], loss: str, reduction: str
) -> Float[Tensor, ""]:
    """One of `LOSSES` of a batch; "mean" is that over samples and, but for cross-entropy, over outputs."""
    if loss == "cross_entropy":
        return F.cross_entropy(logits, labels, reduction=reduction)
    outputs = logits.shape[1]
    wanted = F.one_hot(labels, max(outputs, 2))[:, -outputs:].to(logits)
    compare = F.mse_loss if loss == "squared_error" else F.binary_cross_entropy_with_logits
    return compare(logits, wanted, reduction=reduction)


def _check_loss(loss: str) -> None:
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}: use one of {', '.join(LOSSES)}")


def _refuse_training_mode(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training and isinstance(module, RANDOM_IN_TRAINING):
            kind = type(module).__name__
            why = "so the gradient of a sample is not its own: call model.eval()"
            raise ValueError(f"{name} ({kind}) is in training mode, {why}")
