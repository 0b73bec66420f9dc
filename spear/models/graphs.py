"""A model's computation as a graph in one form, however it is written: nothing in place, every linear map a module."""

import copy
import inspect
import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from spear.models.linear_nodes import make_linear
from spear.models.traced import Traced, operation, source_of
from spear.reconstruction import Refusal

ASSERTIONS = {"_assert", "_assert_is_none", "_assert_scalar", "_assert_async", "_assert_tensor_metadata"}
SIZES = {"size", "shape", "sym_size", "dim", "numel"}
ARITHMETIC = {"getitem", "mul", "add", "sub", "floordiv", "neg", "getattr"}
OUT_OF_PLACE = {getattr(operator, f"i{name}"): getattr(operator, name) for name in ("add", "sub", "mul", "truediv")}
EXAMPLE = 3  # samples of the batch with which a model is exported


def trace(model: nn.Module, shapes: Sequence[tuple[int, ...]] = ()) -> Traced:
    """The graph of a model in evaluation mode, by `torch.fx`, or else by `torch.export` on a batch of one of `shapes`.

    Arguments with a default keep it. Raises `Refusal` where neither can (control flow that depends on the data).
    """
    with evaluating(model):
        try:
            module = _opened(model, _symbolic(model), shapes)
        except Exception as error:  # torch.fx raises many kinds, whatever the model's own code raises among them
            module = _exported(model, shapes, error)
    return _normalised(module, model.training)


def _opened(model: nn.Module, module: fx.GraphModule, shapes: Sequence[tuple[int, ...]]) -> fx.GraphModule:
    """The graph; by `torch.export` where `torch.fx` leaves a layer of torch closed that has linear layers inside."""
    called = [module.get_submodule(node.target) for node in module.graph.nodes if node.op == "call_module"]
    if not any(part is not one and isinstance(part, nn.Linear) for one in called for part in one.modules()):
        return module
    try:
        return _exported(model, shapes, Refusal("closed"))
    except Refusal:
        return module


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _symbolic(model: nn.Module) -> fx.GraphModule:
    parameters = inspect.signature(model.forward).parameters.values()
    usual = {p.name: p.default for p in parameters if p.default is not p.empty}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arguments that are bound here
        return fx.symbolic_trace(model, concrete_args=usual or None)


def _exported(model: nn.Module, shapes: Sequence[tuple[int, ...]], error: Exception) -> fx.GraphModule:
    like = next(model.parameters(), torch.zeros(0))
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it prints what a shape fails at
    for shape in shapes:
        example = torch.zeros(EXAMPLE, *shape, dtype=like.dtype, device=like.device)
        try:
            dynamic = ({0: torch.export.Dim.DYNAMIC},)
            with torch.enable_grad():  # without it torch has a closed way through a transformer's layer
                return torch.export.export(model, (example,), dynamic_shapes=dynamic).module()
        except Exception:  # another shape, or the model's own code: it may raise anything
            continue
    name = type(model).__name__
    tried = f"torch.export neither, for samples of shape {', '.join(map(str, shapes))}" if shapes else ""
    way = tried or "say which shape one sample has, and torch.export is tried"
    raise Refusal(f"torch.fx cannot trace {name}: {' '.join(str(error).split())}; {way}") from error


def _normalised(module: fx.GraphModule, training: bool) -> Traced:
    """The graph without assertions, operations in place and linear maps by function."""
    traced = Traced(module, training)
    _keep_logits(module)
    _drop_assertions(module)
    _leave_places(traced)
    _derive_twice(traced)
    module.graph.eliminate_dead_code()
    make_linear(traced)
    module.graph.eliminate_dead_code()
    for node in traced.inputs:
        if not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return traced


def _keep_logits(module: fx.GraphModule) -> None:
    """What a model returns in a class of its own becomes a dictionary, and one that has logits these alone."""
    end = next(node for node in module.graph.nodes if node.op == "output")
    given = end.args[0]
    if isinstance(given, fx.Node) and isinstance(given.target, type) and given.target.__module__ != "builtins":
        given = dict(inspect.signature(given.target).bind(*given.args, **given.kwargs).arguments)
    given = given._asdict() if hasattr(given, "_asdict") else given
    if isinstance(given, Mapping):
        logits = given.get("logits")
        end.args = (given if logits is None else logits,)


def _drop_assertions(module: fx.GraphModule) -> None:
    for node in reversed(module.graph.nodes):
        if not node.users and (operation(node) in ASSERTIONS or node.target == "_guards_fn"):
            module.graph.erase_node(node)


def _leave_places(traced: Traced) -> None:
    """Every operation in place becomes one that is not, and what was computed from its argument after it follows."""
    order = {node: k for k, node in enumerate(traced.nodes)}
    for node in traced.nodes:
        if not _is_in_place(traced, node):
            continue
        _out_of_place(traced, node)
        source_of(node).replace_all_uses_with(node, delete_user_cb=lambda user, k=order[node]: order[user] > k)


def _derive_twice(traced: Traced) -> None:
    """Every hard sigmoid becomes one that has a second derivative: torch's own, alone of its activations, has none."""
    for node in traced.nodes:
        if isinstance(traced.part(node), nn.Hardsigmoid) or operation(node) == "hardsigmoid":
            with traced.module.graph.inserting_before(node):
                node.replace_all_uses_with(traced.module.graph.call_function(hard_sigmoid, (source_of(node),)))


def hard_sigmoid(x: Tensor) -> Tensor:
    return (x / 6 + 0.5).clamp(0, 1)


def _is_in_place(traced: Traced, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(traced.part(node), "inplace", False))
    if node.op not in ("call_method", "call_function"):
        return False
    name = operation(node)
    return (name.endswith("_") and not name.endswith("__")) or node.target in OUT_OF_PLACE or _flag(node) is not None


def _flag(node: fx.Node) -> inspect.BoundArguments | None:
    """The arguments of a function that is told to work in place."""
    if node.op != "call_function" or not inspect.isfunction(node.target):
        return None
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    return bound if bound.arguments.get("inplace") is True else None


def _out_of_place(traced: Traced, node: fx.Node) -> None:
    if node.op == "call_module":
        part = copy.copy(traced.part(node))
        part.inplace = False
        traced.module.set_submodule(node.target, part)
    elif (bound := _flag(node)) is not None:
        bound.arguments["inplace"] = False
        node.args, node.kwargs = bound.args, bound.kwargs
    elif node.op == "call_method":
        node.target = node.target.removesuffix("_")
    elif node.target in OUT_OF_PLACE:
        node.target = OUT_OF_PLACE[node.target]
    else:
        node.target = _plain(node)


def _plain(node: fx.Node) -> Any:
    """The function that a function in place is named after."""
    name = operation(node).removesuffix("_")
    if isinstance(node.target, torch._ops.OpOverload):
        return getattr(getattr(torch.ops.aten, name), node.target._overloadname)
    return getattr(torch, name, None) or getattr(F, name)


def is_size(node: fx.Node) -> bool:
    """Whether a node computes with sizes of tensors alone."""
    kind = operation(node)
    if kind in SIZES or (kind == "getattr" and node.args[1] in ("shape", "ndim", "device", "dtype")):
        return True
    return kind in ARITHMETIC and bool(node.all_input_nodes) and all(is_size(n) for n in node.all_input_nodes)


def _is_batch_size(node: fx.Node) -> bool:
    """Whether a node is the number of samples: the first size of an input."""
    kind, given = operation(node), node.args
    if kind in ("size", "sym_size") and given[1:] == (0,):
        return given[0].op == "placeholder"
    if kind != "getitem" or given[1] != 0 or not is_size(given[0]):
        return False
    return len(given[0].all_input_nodes) == 1 and given[0].all_input_nodes[0].op == "placeholder"


def as_rows(value: Tensor) -> Tensor:
    """One row for each sample."""
    return value.reshape(value.shape[0], -1)  # traced again, it has no branch


def extract(
    traced: Traced, start: fx.Node, end: fx.Node, then: Callable[[Tensor], Tensor] | None = None
) -> fx.GraphModule | None:
    """The function from the value of one node to that of another, and `then`; `None` where it needs more of the input.

    It shares the parameters of the model.
    """
    graph = fx.Graph()
    copies = {start: graph.placeholder("z")}
    for node in _needed(start, end):
        if node in copies:
            continue
        if _is_batch_size(node) and any(n not in copies for n in node.all_input_nodes):
            copies[node] = graph.call_method("size", (copies[start], 0))
        elif node.op == "placeholder":
            continue
        elif all(n in copies for n in node.all_input_nodes):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    if end not in copies:
        return None
    graph.output(copies[end] if then is None else graph.call_function(then, (copies[end],)))
    module = fx.GraphModule(traced.module, graph)
    graph.eliminate_dead_code()
    module.recompile()
    return module


def _needed(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """What the value of `end` needs, but for what `start` needs, in the order of computation."""
    seen, waiting = {start}, [end]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    return [node for node in start.graph.nodes if node in seen]


def guesses(n: int) -> list[tuple[int, ...]]:
    """Shapes that samples of n entries are likely to have: a vector, or a square picture, grey or in colour."""
    found: list[tuple[int, ...]] = [(n,)]
    for channels in (1, 3):
        side = math.isqrt(n // channels)
        if channels * side * side == n:
            found += [(channels, side, side), (side, side, channels)]
    return found if math.isqrt(n) ** 2 != n else [*found, (math.isqrt(n), math.isqrt(n))]


def like(value: Tensor, module: nn.Module) -> Tensor:
    """A tensor in the precision of a module's parameters and buffers."""
    floats = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    return value.to(floats[0].dtype) if floats else value
