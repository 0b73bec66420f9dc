"""Which tensor of an update belongs to which parameter: wrappers change names, and some clients send none."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

WRAPPERS = {"module", "_orig_mod", "_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
WRAPPING = ("torch", "opacus")  # packages whose wrappers compute what the module inside does
STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}  # of batch norm, whatever the model calls it


@dataclass(frozen=True)
class Match:
    """`names[p]` is the name under which the tensor of the model's parameter p came; `words` what was done for that.

    `others` came too, and are no parameter, buffer, counter or statistic.
    """

    names: Mapping[str, str]
    words: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, torch.compile and Opacus' GradSampleModule: they compute what it does.

    A wrapper of anybody else's is left as it is: it may compute more.
    """
    children = dict(model.named_children())
    (name, *others) = children or [""]
    known = type(model).__module__.split(".")[0] in WRAPPING
    return unwrapped(children[name]) if known and name in WRAPPERS and not others else model


def check_there(model: nn.Module) -> None:
    """Raises `ValueError` for parameters or buffers without a shape yet, of lazy layers, or without values."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{name} of the model has no shape yet: run a lazy layer on a batch first")
        if tensor.is_meta:
            raise ValueError(f"{name} of the model has no values: it is on the device meta")


def match(model: nn.Module, tensors: Mapping[str, Tensor]) -> Match:
    """Find the parameters' tensors by name, by name without what wrappers put before it, or by shape and order.

    Raises `ValueError` for tensors without names that do not fit.
    """
    parameters = dict(model.named_parameters())
    if all(name.isdecimal() for name in tensors) and not tensors.keys() & parameters.keys():
        return _by_order(model, tensors)
    own, received = _plain(parameters), _plain(tensors)
    prefix = _prefix(own, received)
    found = {name.removeprefix(prefix): name for name in received}
    names = {own[name]: received[found[name]] for name in own if name in found}
    left = {name: received[found[name]] for name in found if name not in own}
    others = tuple(came for name, came in left.items() if not _beside(model, name, tensors[came]))
    return Match(names, (f"the names came with the prefix {prefix!r}",) if prefix else (), others)


def statistics(model: nn.Module, tensors: Mapping[str, Tensor], *, change: bool = False) -> dict[str, Tensor]:
    """The model's running statistics after a step, by their names, of tensors under names that wrappers may have made.

    Those that are missing are left out. With `change` the tensors are changes, before - after. Raises `ValueError` for
    another shape than the model's, and for values that are no numbers.
    """
    buffers = {name: b for name, b in model.named_buffers() if name.split(".")[-1] in STATISTICS and b.ndim}
    own, received = _plain(buffers), _plain(tensors)
    prefix = _prefix(_plain(dict(model.named_parameters())) | own, received)
    found = {name.removeprefix(prefix): name for name in received}
    after = {}
    for name in own.keys() & found.keys():
        before, value = buffers[own[name]], tensors[received[found[name]]]
        if value.shape != before.shape:
            raise ValueError(f"{own[name]} has shape {tuple(value.shape)}, the model's buffer {tuple(before.shape)}")
        after[own[name]] = before.to(value.device) - value if change else value
        if not bool(after[own[name]].isfinite().all()):
            raise ValueError(f"{own[name]} of the update holds NaN or infinite values")
    return after


def _plain(names: Mapping[str, object]) -> dict[str, str]:
    """Each name by what is left of it without wrappers; as they are, where two would become one."""
    plain = {".".join(part for part in name.split(".") if part not in WRAPPERS): name for name in names}
    return plain if len(plain) == len(names) else {name: name for name in names}


def _prefix(own: Mapping[str, str], received: Mapping[str, str]) -> str:
    """What most of the received names have before a parameter's own; nothing where any of them is the model's."""
    if own.keys() & received.keys():
        return ""
    before = Counter(
        name.removesuffix(end) for name in received for end in own if name.endswith(f".{end}") and name != end
    )
    return before.most_common(1)[0][0] if before else ""


def _beside(model: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether it is a buffer, a counter or a statistic, as a model's state has them beside its parameters."""
    buffers = _plain(dict(model.named_buffers()))
    return name in buffers or name.split(".")[-1] in STATISTICS or not tensor.is_floating_point()


def _by_order(model: nn.Module, tensors: Mapping[str, Tensor]) -> Match:
    """Tensors without names: those of the trained parameters, of all of them, or of the whole state, in its order."""
    received = sorted(tensors, key=int)
    shapes = [tuple(tensors[name].shape) for name in received]
    parameters = dict(model.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    for state in (trained, parameters, model.state_dict()):
        if [tuple(tensor.shape) for tensor in state.values()] == shapes:
            pairs = zip(state, received, strict=True)
            words = "tensors without names were matched by shape and order"
            return Match({own: name for own, name in pairs if own in parameters}, (words,))
    expected = ", ".join(str(tuple(p.shape)) for p in parameters.values())
    raise ValueError(f"tensors without names have shapes {', '.join(map(str, shapes))}; the model's are {expected}")
