"""A device that is not there: tensors that lie on it are computed with on the host, but only among themselves.

PyTorch hands every operation on a tensor subclass to `__torch_dispatch__`, whatever device the tensor claims. What a
real accelerator would refuse is refused here: operands on two devices, a step through NumPy. What would make the host
wait for the device is counted, by the line of the package that asked for it: `.item()`, `bool(tensor)`, `nonzero` and
boolean masks, copies to the host, the error checks of factorisations.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("lazy", 0)  # a kind that no build computes on, and whose backward passes the host runs
PACKAGE = Path(__file__).resolve().parent.parent / "spear"
ATEN = torch.ops.aten
COPIES = {ATEN._to_copy.default, ATEN.copy_.default}
INDEXING = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default, ATEN._index_put_impl_.default}
MAKERS = (torch.tensor, torch.as_tensor, torch.asarray)
WAITS = {
    ATEN._local_scalar_dense.default,
    ATEN._linalg_check_errors.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN.equal.default,
    ATEN._unique2.default,
    ATEN.unique_dim.default,
    ATEN.unique_consecutive.default,
    ATEN.repeat_interleave.Tensor,
}


class MixedDevices(RuntimeError):
    """An operation on tensors of the host and of the device, as an accelerator refuses it."""


class OnDevice(Tensor):
    """A tensor that claims to lie on the device; `host` holds its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "OnDevice":
        new = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )
        new.host = host
        return new

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _perform(func, args, kwargs or {})


def _perform(func: Any, args: tuple, kwargs: dict) -> Any:
    """The operation on the values, its result where an accelerator would leave it."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on = any(isinstance(leaf, OnDevice) for leaf in tensors)
    asked = kwargs.get("device")
    goal = on if asked is None else torch.device(asked).type == DEVICE.type
    if on:
        _refuse_mixed(func, args, tensors)
        _count(func, args, goal)
    args, kwargs = tree_map_only(OnDevice, lambda tensor: tensor.host, (args, dict(kwargs)))
    if asked is not None:
        kwargs["device"] = "cpu"
    out = func(*args, **kwargs)
    return tree_map_only(Tensor, OnDevice, out) if goal else out


def _refuse_mixed(func: Any, args: tuple, tensors: list[Tensor]) -> None:
    """Raises `MixedDevices` where a tensor with dimensions lies on the host, but for copies and indices."""
    if func in COPIES:
        return
    if func in INDEXING:
        tensors = [args[0], *args[2:3]]
    if any(tensor.dim() and not isinstance(tensor, OnDevice) for tensor in tensors if isinstance(tensor, Tensor)):
        raise MixedDevices(f"{func} on tensors of two devices, at {_line()}")


def _count(func: Any, args: tuple, goal: bool) -> None:
    """Note an operation that the host waits for."""
    masked = func in INDEXING and any(getattr(index, "dtype", None) == torch.bool for index in args[1])
    down = func in COPIES and not (goal and isinstance(args[0], OnDevice))
    if _counter is not None and (func in WAITS or masked or down):
        _counter[_line()] += 1


def _line() -> str:
    """The line of the package that is at work, as `folder/file.py:12 function`."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside the package"


class _Dispatch(TorchDispatchMode):
    """Catches what makes a tensor on the device out of none: factories and copies to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _perform(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Catches what never reaches the dispatcher: `torch.tensor` with values of Python, and `.tolist()`."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist and isinstance(args[0], OnDevice):
            return args[0].cpu().tolist()
        if func is Tensor.new_tensor and isinstance(args[0], OnDevice):
            func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, "device": DEVICE} | kwargs
        if func in MAKERS and torch.device(kwargs.get("device") or "cpu").type == DEVICE.type:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


_counter: Counter[str] | None = None


@contextmanager
def accelerator() -> Iterator[tuple[str, Counter[str]]]:
    """Within: a device of this name, and how often each line of the package made the host wait for it."""
    global _counter
    _counter = Counter()
    try:
        with _Functions(), _Dispatch():
            yield str(DEVICE), _counter
    finally:
        _counter = None
