"""What a client sends, and what it discloses: a `SharedUpdate`. The plainest one is a FedSGD step on one batch.

Clients are in `spear.federated.clients`, what is done to an update before it is sent in `spear.federated.defences`.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from spear.federated import missing, naming
from spear.models.streaming import CHUNK
from spear.models.tensors import read_tensors

FORMAT = "spear.SharedUpdate/1"
LOSSES = ("cross_entropy", "binary_cross_entropy", "squared_error")
LARGEST_SAMPLE = 2**24  # entries: samples of that size are made to try a model
TINY, LARGE = 1e-30, 1e30  # of rates, norms and scales: beyond, no number of the update would be left
OURS = "spear."  # what the format begins with where this package wrote the file
TENSORS = {"gradients", "buffers", "known"}  # what of an update is no number or word
TUPLES = {"input_shape", "clients"}  # lists, in a file's metadata
CHOICES = {"reduction": ("mean", "sum"), "loss": LOSSES, "pruning": (None, "random", "top-k")}
MOST, MOST_SIZES = 2**40, 2**16  # of samples, pixels or steps; of clients or dimensions: more is no honest update
RANGES = {  # of the values that a client discloses: type, least and greatest
    "count": (int, 1, MOST),
    "local_steps": (int, 1, MOST),
    "mini_batch": (int, 1, MOST),
    "bits": (int, 1, 64),
    "learning_rate": (float, TINY, LARGE),
    "momentum": (float, 0, 0.999999),
    "weight_decay": (float, 0, LARGE),
    "clip": (float, TINY, LARGE),
    "noise": (float, 0, LARGE),
    "epsilon": (float, 0, math.inf),
    "delta": (float, 0, 1),
    "loss_scale": (float, TINY, LARGE),
}
NEEDED = {"local_steps", "momentum", "weight_decay", "loss_scale"}  # never None
HALVES = (torch.float16, torch.bfloat16)
LOOKED_AT, FEWEST, MOSTLY = 2**16, 64, 0.9  # entries of each tensor; of all at least; the share that a type must hold


@dataclass(frozen=True)
class Lazy(Mapping[str, Tensor]):
    """Tensors by name, each computed when it is asked for: together they may be too large.

    `rounding` is the share of each that what they were computed from had lost, where that is more than their spacing,
    `noise` the standard deviation of what that leaves in an entry, where it is more than rounding.
    """

    names: tuple[str, ...]
    compute: Callable[[str], Tensor]
    rounding: float = 0.0
    noise: float = 0.0

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
    arrays (a gradient computed in another framework), which become tensors; or it lists them without names, in the
    order of the model's parameters, and the names are then "0", "1", and so on. `reduction` is how the loss joins the
    samples (`"mean"` or `"sum"`); `loss` is one of `LOSSES`: all but the first compare the outputs (through
    a sigmoid, or as they are) with the one-hot label, or with the label 0 or 1 where there is one output, or with any
    numbers. `count` is the number of samples and `input_shape` the shape of one sample, each `None` where it is not
    disclosed.

    Local training (FedAvg): `learning_rate` is `None` for a gradient; where it is given, `gradients` holds the change
    of the weights, theta_before - theta_after, by `local_steps` steps of SGD with `momentum` on `mini_batch` samples
    each (the last of an epoch may have fewer). `weight_decay` times the weights was added to the gradient of one step,
    with or without that on the biases. Aggregation: `clients` are the sample counts of the clients in the sum.
    Privacy: per-sample gradients were clipped to the norm `clip`, in the unit of a gradient, `noise` is the standard
    deviation of the noise in each entry as it is sent, of a change of weights that of the weights, and `epsilon`,
    `delta` what an accountant says of the release. Compression: entries were dropped by
    `pruning` (`"random"` or `"top-k"`: an entry that is exactly zero may be missing), rounded at random to `bits` bits,
    or sent in a half-precision dtype as `loss_scale` times their value. `known` says by name which entries arrived,
    by a boolean tensor for each parameter of which some did not; the others are held, and saved, as NaN, and may be
    given so.
    Batch normalisation: `buffers` holds its running statistics after the step, by the model's own names, as clients
    send them that return their whole state.
    """

    gradients: Mapping[str, Tensor | np.ndarray] | Sequence[Tensor | np.ndarray]
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
    weight_decay: float | int = 0.0
    buffers: Mapping[str, Tensor | np.ndarray] | None = None
    known: Mapping[str, Tensor | np.ndarray] | None = None

    def __post_init__(self) -> None:
        if not len(self.gradients):
            raise ValueError("an update needs at least one gradient")
        check_told({f.name: getattr(self, f.name) for f in fields(self)[1:]})
        if not isinstance(self.gradients, Lazy):
            named = self.gradients if isinstance(self.gradients, Mapping) else dict(_numbered(self.gradients))
            tensors = {name: _tensor(name, value) for name, value in named.items()}
            object.__setattr__(self, "gradients", tensors)
        if self.known is not None:
            object.__setattr__(self, "gradients", _only_known(self.gradients, self.known))
            object.__setattr__(self, "known", None)
        if self.buffers is not None and not isinstance(self.buffers, Lazy):
            object.__setattr__(self, "buffers", {name: _tensor(name, value) for name, value in self.buffers.items()})

    @property
    def has_unknown(self) -> bool:
        """Whether entries of it are not known, NaN, but of no tensor all."""
        shares = [_nan(g) for g in self.gradients.values() if g.is_floating_point()]
        return any(shares) and max(shares) < 1

    def disclosing(self, **told: float | int | str | None) -> "SharedUpdate":
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
        disclosed = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in TENSORS}
        buffers = self.buffers or {}
        metadata = {"format": FORMAT, "disclosed": json.dumps(disclosed), "buffers": json.dumps([*buffers])}
        tensors = (*self.gradients.items(), *buffers.items())
        save_file({name: g.detach().cpu().contiguous() for name, g in tensors}, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "SharedUpdate":
        """Read an update that `save` wrote, or any safetensors file of gradients by parameter name.

        Raises `FileNotFoundError` where there is no file, and `ValueError` for a truncated or foreign file.
        """
        tensors, metadata = read_tensors(path)
        own = metadata.get("format", FORMAT)
        if own.startswith(OURS) and own != FORMAT:
            raise ValueError(f"{path}: format {own!r} is not {FORMAT!r}")
        try:
            known = [f.name for f in fields(cls) if f.name not in TENSORS]
            buffers = _taken(tensors, metadata.get("buffers", "[]"))
            return cls(tensors, **_disclosed(metadata.get("disclosed", "{}"), known), buffers=buffers)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not an update: {error}") from error


def _taken(tensors: dict[str, Tensor], words: str) -> dict[str, Tensor] | None:
    """The tensors that a file's metadata name as buffers, taken from the others; None where there are none."""
    names = json.loads(words)
    if not isinstance(names, list) or not all(isinstance(name, str) and name in tensors for name in names):
        raise ValueError(f"its buffers are not names of its tensors: {_brief(names)}")
    return {name: tensors.pop(name) for name in dict.fromkeys(names)} or None


def _nan(tensor: Tensor) -> float:
    """The share of entries that are NaN; looked at in parts."""
    return sum(int(part.isnan().sum()) for part in tensor.flatten().split(CHUNK)) / max(tensor.numel(), 1)


def _only_known(gradients: Mapping[str, Tensor], known: Mapping[str, Tensor | np.ndarray]) -> Mapping[str, Tensor]:
    """The gradients with NaN where entries did not arrive. Raises `ValueError` for masks that do not fit."""
    masks = {name: torch.as_tensor(mask) for name, mask in known.items()}
    for name, mask in masks.items():
        if name not in gradients:
            raise ValueError(f"it is said which entries of {_brief(name)} are known, of which there is no gradient")
        if mask.dtype != torch.bool or mask.shape != gradients[name].shape:
            shape = tuple(gradients[name].shape)
            raise ValueError(f"which entries of {name} are known is said by a boolean tensor of its shape {shape}")

    def partly(name: str) -> Tensor:
        g = gradients[name]
        return torch.where(masks[name].to(g.device), g, torch.nan) if name in masks else g

    return Lazy(tuple(gradients), partly) if isinstance(gradients, Lazy) else {name: partly(name) for name in gradients}


def _disclosed(words: str, known: Sequence[str]) -> dict[str, Any]:
    """What a file's metadata say of the update, checked: a client may write anything."""
    told = json.loads(words)
    if not isinstance(told, dict):
        raise ValueError(f"what it discloses is {type(told).__name__}, not named values")
    if unknown := told.keys() - set(known):
        raise ValueError(f"it discloses {_brief(min(unknown))}; known are {', '.join(known)}")
    told = {name: tuple(v) if name in TUPLES and isinstance(v, list) else v for name, v in told.items()}
    check_told(told)
    return told


def check_told(told: Mapping[str, Any]) -> None:
    """Raises `ValueError`, by name, for a disclosed value of another type than its own, or out of its range."""
    for name, value in told.items():
        if name in CHOICES and value not in CHOICES[name]:
            known = ", ".join(repr(choice) for choice in CHOICES[name] if choice)
            raise ValueError(f"unknown {name} {_brief(value)}: use {known}")
        if name in RANGES and not (value is None and name not in NEEDED):
            _check_range(name, value, *RANGES[name])
        if name in TUPLES and value is not None:
            if not isinstance(value, tuple) or not 0 < len(value) <= MOST_SIZES:
                raise ValueError(f"{name} is a list of 1 to {MOST_SIZES:,} whole numbers, not {_brief(value)}")
            for size in value:
                _check_range(f"an entry of {name}", size, int, 1, MOST)
            if name == "input_shape" and math.prod(value) > LARGEST_SAMPLE:
                raise ValueError(f"input_shape {_brief(value)} has more than {LARGEST_SAMPLE:,} entries")


def _brief(value: Any) -> str:
    """What somebody else wrote, cut short."""
    return repr(str(value)[:40])


def _check_range(name: str, value: Any, kind: type, low: float | int, high: float | int) -> None:
    is_number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not (is_number and low <= value <= high):
        words = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} is {words} from {low:g} to {high:g}, not {_brief(value)}")


def _check_training(update: SharedUpdate) -> None:
    """What a client may say of its local training, or a `ValueError` that names what is wrong."""
    steps, rate, size, count = update.local_steps, update.learning_rate, update.mini_batch, update.count
    if size and count and size > count:
        raise ValueError(f"a mini-batch of {size} does not come from {count} samples")
    if rate is None and (steps > 1 or size or update.momentum):
        raise ValueError("local steps, mini-batch and momentum are of a change of weights: its learning rate is needed")


def _numbered(values: Sequence[Tensor | np.ndarray]) -> Iterator[tuple[str, Tensor | np.ndarray]]:
    return ((str(number), value) for number, value in enumerate(values))


def _tensor(name: str, value: Tensor | np.ndarray) -> Tensor:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value.copy())
    if not isinstance(value, Tensor):
        raise ValueError(f"the gradient of {name} is {type(value).__name__}, not a tensor or a NumPy array")
    if isinstance(whole := getattr(value, "full_tensor", None), Callable):  # FSDP2: a DTensor, of which this is a part
        value = whole()
    if value.is_complex():
        raise ValueError(f"the gradient of {name} holds complex numbers")
    if value.layout is not torch.strided:  # sparse, as nn.Embedding(sparse=True) makes it
        value = value.to_dense()
    return value.detach()


def under_names_of(model: nn.Module, update: SharedUpdate) -> tuple[SharedUpdate, tuple[str, ...]]:
    """The update with its tensors under the names of the model's parameters, and what was done for that, in words.

    Running statistics among them become its `buffers`; counters are left out. Raises `ValueError` as `naming` does, and
    for what belongs to nothing.
    """
    naming.check_there(model)
    found, received = naming.match(model, update.gradients), update.gradients
    if found.others:
        raise ValueError(f"the update has a gradient for {min(found.others)!r}, which the model does not have")
    change = update.buffers is None and update.learning_rate is not None
    after = naming.statistics(model, received if update.buffers is None else update.buffers, change=change)
    update = replace(update, buffers=after or None)
    if not found.names:
        return update, ()
    parameters = dict(model.named_parameters())
    shapes = {own: (received[name].shape, parameters[own].shape) for own, name in found.names.items()}
    matrices = [pair for pair in shapes.values() if [len(set(shape)) for shape in pair] == [2, 2]]
    turned = bool(matrices) and all(tuple(came) == tuple(reversed(wanted)) for came, wanted in matrices)
    fit = {own: _fitting(*pair, turned) for own, pair in shapes.items()}
    changed = sorted(own for own, change in fit.items() if change is not _as_it_is)
    words = found.words
    if changed:
        words += (f"{', '.join(changed)} came in another shape than the parameter's, with as many entries",)
    if found.names.keys() == received.keys() and not changed:
        return update, words
    named = Lazy(tuple(found.names), lambda own: fit[own](received[found.names[own]]))
    return replace(update, gradients=named), words


def _as_it_is(g: Tensor) -> Tensor:
    return g


def _fitting(came: torch.Size, wanted: torch.Size, turned: bool) -> Callable[[Tensor], Tensor]:
    """What gives a tensor the shape that is wanted: flat, with sides of 1, or as (inputs, outputs); or nothing does.

    `turned` says that the other matrices came so: then a square one did.
    """
    if len(wanted) == 2 and tuple(came) == tuple(reversed(wanted)) and (turned or came != wanted):
        return lambda g: g.T
    if came == wanted or came.numel() != wanted.numel():
        return _as_it_is
    without = [size for size in came if size != 1] == [size for size in wanted if size != 1]
    return (lambda g: g.reshape(wanted)) if without or len(came) == 1 else _as_it_is


def computed_in(update: SharedUpdate) -> torch.dtype:
    """The coarsest type that holds nearly every value of the update: arrays, JSON and averages are wider than it.

    A part of each tensor answers for the whole; an update of a few numbers is taken for what it is stored in, and so is
    a change of weights: the smaller the step, the fewer digits are left of it, whatever the weights are.
    """
    kinds = {g.dtype for g in update.gradients.values() if g.is_floating_point()}
    stored = max(kinds, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)
    if update.learning_rate is not None:
        return stored
    for dtype in (*HALVES[::-1], torch.float32):
        if torch.finfo(dtype).eps > torch.finfo(stored).eps and _fits(update, dtype):
            return dtype
    return stored


def _fits(update: SharedUpdate, dtype: torch.dtype) -> bool:
    exact = seen = 0
    for g in update.gradients.values():
        part = g.flatten()[:LOOKED_AT]
        part = part[(part != 0) & part.isfinite()]
        exact, seen = exact + int((part.to(dtype).to(part.dtype) == part).sum()), seen + len(part)
        if exact < MOSTLY * seen:
            return False
    return seen >= FEWEST


def is_perturbed(update: SharedUpdate) -> bool:
    """Whether what the client disclosed leaves no exact gradient: noise, rounding or half precision."""
    halves = any(g.dtype in HALVES for g in update.gradients.values()) or computed_in(update) in HALVES
    return halves or bool(update.noise) or update.bits is not None


def as_gradient(update: SharedUpdate) -> SharedUpdate:
    """The same in float64, without the loss scale."""
    return replace(each(update, lambda g: g.double() / update.loss_scale), loss_scale=1.0)


def each(update: SharedUpdate, change: Callable[[Tensor], Tensor]) -> SharedUpdate:
    return replace(update, gradients={name: change(g) for name, g in update.gradients.items()})


def difference(
    model: nn.Module,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    learning_rate: float | int,
    count: int | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> SharedUpdate:
    """The change of a client's weights by name, before - after, by a step of SGD with `learning_rate`.

    Each is computed when it is asked for. Where the weights after the step show that they were cut at a bound, or set
    to zero, the change is not known: NaN (`missing.cuts`); zeros of weights that were rounded to a grid are known. The
    names may be those that wrappers make (`naming.match`); running statistics are the update's `buffers`, other entries
    that are no parameters of the model are left out.
    `count` and `input_shape` are what the client discloses; of several steps, see `SharedUpdate.disclosing`.
    Raises `ValueError` for a learning rate that is not positive, and for a parameter that is missing or of another
    shape on one side.
    """
    names = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    old, new = (naming.match(model, weights).names for weights in (before, after))
    for name in names:
        sides = (before, old), (after, new)
        shapes = [tuple(weights[own[name]].shape) if name in own else None for weights, own in sides]
        if None in shapes or shapes[0] != shapes[1]:
            raise ValueError(f"{name} has shape {shapes[0]} before the step and {shapes[1]} after it")
    cut = missing.cuts(Lazy(names, lambda name: after[new[name]]))

    def changed(name: str) -> Tensor:
        earlier, later = before[old[name]].detach(), after[new[name]].detach()
        dropped = (later == 0) & (not missing.is_rounding(later))
        unknown = (dropped | cut.unknown(name, later)) & (earlier != later)
        alike = int(unknown.sum()) > 1 and len(earlier[unknown].unique()) == 1  # and so they are where nothing was cut
        return earlier - later if alike else torch.where(unknown, torch.nan, earlier - later)

    change = Lazy(names, changed)
    buffers = naming.statistics(model, after)
    return SharedUpdate(change, input_shape=input_shape, buffers=buffers or None).disclosing(
        learning_rate=learning_rate, count=count
    )
