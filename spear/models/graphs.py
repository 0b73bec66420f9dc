"""A model's computation as a graph in one form, however it is written: nothing in place, every linear map a module."""

import copy
import inspect
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from spear.reconstruction import Refusal

ASSERTIONS = {"_assert", "_assert_is_none", "_assert_scalar", "_assert_async", "_assert_tensor_metadata"}
LINEAR = {"linear", "addmm", "mm", "matmul"}
TRANSPOSES = {"t", "transpose", "permute", "T", "mT", "numpy_T", "swapaxes"}
SIZES = {"size", "shape", "sym_size", "dim", "numel"}
ARITHMETIC = {"getitem", "mul", "add", "sub", "floordiv", "neg", "getattr"}
OUT_OF_PLACE = {getattr(operator, f"i{name}"): getattr(operator, name) for name in ("add", "sub", "mul", "truediv")}
EXAMPLE = 3  # samples of the batch with which a model is exported


@dataclass(frozen=True)
class Traced:
    """A model's graph, and how its parameters are called: `origin` names the model's own parameter of each that a
    linear module made here has, `turned` those of them that the model holds transposed. `training`: the model is in
    training mode (the graph is of evaluation mode)."""

    module: fx.GraphModule
    training: bool
    origin: dict[str, str] = field(default_factory=dict)
    turned: set[str] = field(default_factory=set)

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    @property
    def inputs(self) -> list[fx.Node]:
        """What the caller gives."""
        return [node for node in self.nodes if node.op == "placeholder"]

    def part(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return self.module.get_submodule(node.target) if node.op == "call_module" else None

    def is_linear(self, node: fx.Node) -> bool:
        return isinstance(self.part(node), nn.Linear)

    def value(self, node: fx.Node) -> Any:
        """The parameter, buffer or constant that a node gets."""
        return operator.attrgetter(node.target)(self.module)

    def is_parameter(self, node: Any, dimensions: int) -> bool:
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return False
        value = self.value(node)
        return isinstance(value, nn.Parameter) and value.ndim == dimensions

    def names(self) -> dict[str, str]:
        """The model's own name of every parameter of the graph that one module alone uses."""
        owners: dict[int | str, set[str]] = {}
        known = {}
        for target, name, parameter in self._used():
            own = self.origin.get(name, name)
            known[name] = own
            owners.setdefault(id(parameter), set()).add(target)
            owners.setdefault(own, set()).add(target)
        tensors = dict(self.module.named_parameters(remove_duplicate=False))
        alone = lambda name, own: len(owners[own]) == 1 and len(owners[id(tensors[name])]) == 1  # noqa: E731
        return {name: own for name, own in known.items() if alone(name, own)}

    def _used(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Every use of a parameter: what uses it, its name in the graph, the parameter."""
        for node in self.nodes:
            if node.op == "call_module":
                for name, parameter in self.part(node).named_parameters(remove_duplicate=False):
                    yield node.target, f"{node.target}.{name}", parameter
            elif node.op == "get_attr" and isinstance(self.value(node), nn.Parameter):
                yield f"={node.target}", node.target, self.value(node)


def trace(model: nn.Module, shapes: Sequence[tuple[int, ...]] = ()) -> Traced:
    """The graph of a model in evaluation mode, by `torch.fx`, or else by `torch.export` on a batch of one of `shapes`.

    Arguments with a default keep it. Raises `Refusal` where neither can (control flow that depends on the data).
    """
    with evaluating(model):
        try:
            module = _symbolic(model)
        except Exception as error:  # torch.fx raises many kinds, whatever the model's own code raises among them
            module = _exported(model, shapes, error)
    return _normalised(module, model.training)


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
    for shape in shapes:
        example = torch.zeros(EXAMPLE, *shape, dtype=like.dtype, device=like.device)
        try:
            dynamic = ({0: torch.export.Dim.DYNAMIC},)
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
    _drop_assertions(module)
    _leave_places(traced)
    module.graph.eliminate_dead_code()
    _make_linear(traced)
    module.graph.eliminate_dead_code()
    for node in traced.inputs:
        if not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return traced


def _drop_assertions(module: fx.GraphModule) -> None:
    for node in reversed(module.graph.nodes):
        if not node.users and (operation(node) in ASSERTIONS or node.target == "_guards_fn"):
            module.graph.erase_node(node)


def operation(node: fx.Node) -> str:
    """What a call does, by its name in torch; the overload of an operator does not matter."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "overloadpacket", node.target)
    return getattr(packet, "__name__", "")


def _leave_places(traced: Traced) -> None:
    """Every operation in place becomes one that is not, and what was computed from its argument after it follows."""
    order = {node: k for k, node in enumerate(traced.nodes)}
    for node in traced.nodes:
        if not _is_in_place(traced, node):
            continue
        _out_of_place(traced, node)
        given = node.args[0] if node.args else node.kwargs["input"]
        given.replace_all_uses_with(node, delete_user_cb=lambda user, k=order[node]: order[user] > k)


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


def _make_linear(traced: Traced) -> None:
    for node in traced.nodes:
        found = _product(traced, node)
        if found is not None:
            _replace(traced, node, *found)
    _add_biases(traced)


def name_layers(module: fx.GraphModule) -> None:
    """Make modules of the linear maps by function that have the parameters of one: its name.weight, its name.bias."""
    traced = Traced(module, training=False)
    for node in traced.nodes:
        found = _product(traced, node)
        if found is not None and _is_layer(traced, *found[1:]):
            _replace(traced, node, *found)
    module.graph.eliminate_dead_code()
    module.recompile()


def _is_layer(traced: Traced, weight: fx.Node, turned: bool, bias: fx.Node | None) -> bool:
    home, *_ = _homes(weight, bias)
    own = weight.target == f"{home}.weight" or _uses(traced, weight.target) > 1
    named = bias is None or bias.target == f"{home}.bias"
    return own and named and not turned and _is_free(traced, home, weight)


def _product(traced: Traced, node: fx.Node) -> tuple[fx.Node, fx.Node, bool, fx.Node | None] | None:
    """What a linear map by function is given: its input, its weight, whether that is transposed, and its bias."""
    kind, given = operation(node), [*node.args, *node.kwargs.values()]
    if node.op == "call_function" and kind == "linear":
        given += [None] * (3 - len(given))
        source, weight, bias = given
    elif kind == "addmm" and len(node.args) == 3 and not node.kwargs:
        bias, source, weight = given
    elif kind in LINEAR and len(given) == 2:
        (source, weight), bias = given, None
    else:
        return None
    stored, turned = _stored(traced, weight, turned=kind != "linear")
    plain = stored is not None and (bias is None or traced.is_parameter(bias, 1))
    return (source, stored, turned, bias) if plain else None


def _add_biases(traced: Traced) -> None:
    """A layer without a bias and the parameter that is added to its outputs become one layer."""
    for node in traced.nodes:
        if operation(node) != "add" or len(node.args) != 2 or node.kwargs:
            continue
        for product, bias in (node.args, node.args[::-1]):
            if _lacks_bias(traced, product) and traced.is_parameter(bias, 1):
                _give_bias(traced, node, product, bias)
                break


def _lacks_bias(traced: Traced, node: Any) -> bool:
    """Whether a node is the only call of a linear layer without a bias, and used once."""
    if not isinstance(node, fx.Node) or not traced.is_linear(node) or len(node.users) > 1:
        return False
    calls = [one for one in traced.nodes if one.op == "call_module" and one.target == node.target]
    return traced.part(node).bias is None and len(calls) == 1


def _give_bias(traced: Traced, node: fx.Node, product: fx.Node, bias: fx.Node) -> None:
    part, value = traced.part(product), traced.value(bias)
    if len(value) != part.out_features:
        return
    made = nn.Linear(part.in_features, part.out_features, device="meta")
    made.weight, made.bias = part.weight, value
    traced.module.set_submodule(product.target, made)
    traced.origin[f"{product.target}.bias"] = bias.target
    node.replace_all_uses_with(product)


def _stored(traced: Traced, node: Any, turned: bool) -> tuple[fx.Node | None, bool]:
    """The parameter behind a chain of transpositions; `turned` where it is (inputs, outputs)."""
    while isinstance(node, fx.Node) and node.op != "get_attr":
        kind = node.args[1] if operation(node) == "getattr" else operation(node)
        if kind not in TRANSPOSES or not isinstance(node.args[0], fx.Node):
            return None, turned
        node, turned = node.args[0], not turned
    return (node if isinstance(node, fx.Node) and traced.is_parameter(node, 2) else None), turned


def _replace(
    traced: Traced, node: fx.Node, source: fx.Node, weight: fx.Node, turned: bool, bias: fx.Node | None
) -> None:
    """A linear module in place of a linear map by function."""
    W = traced.value(weight)
    part = nn.Linear(*reversed(W.T.shape if turned else W.shape), bias=False, device="meta")
    part.weight = nn.Parameter(W.detach().T, W.requires_grad) if turned else W
    part.bias = None if bias is None else traced.value(bias)
    name = _place(traced, node, weight, bias, part)
    traced.origin[f"{name}.weight"] = weight.target
    if turned:
        traced.turned.add(f"{name}.weight")
    if bias is not None:
        traced.origin[f"{name}.bias"] = bias.target
    with traced.module.graph.inserting_before(node):
        made = traced.module.graph.call_module(name, (source,))
    node.replace_all_uses_with(made)
    traced.module.graph.erase_node(node)


def _place(traced: Traced, node: fx.Node, weight: fx.Node, bias: fx.Node | None, part: nn.Linear) -> str:
    """Put a linear module where its weight is, or its bias, or beside them, and say where."""
    name = next((n for n in _homes(weight, bias) if _is_free(traced, n, weight)), f"{weight.target}_{node.name}")
    parent, _, leaf = name.rpartition(".")
    owner = traced.module.get_submodule(parent)
    owner._parameters.pop(leaf, None)
    old = owner._modules.get(leaf)
    owner.add_module(leaf, part)
    if old is not None:  # what else it holds keeps its name
        for kind in ("_parameters", "_buffers", "_modules"):
            vars(part)[kind].update({n: v for n, v in vars(old)[kind].items() if n not in ("weight", "bias")})
    return name


def _homes(weight: fx.Node, bias: fx.Node | None) -> list[str]:
    """Names that a linear module may have, by those of its parameters, the best first."""
    names = [weight.target.removesuffix(".weight")]
    named = bias is not None and bias.target.endswith(".bias")
    return [bias.target.removesuffix(".bias"), *names] if named else names


def _is_free(traced: Traced, name: str, weight: fx.Node) -> bool:
    """Whether no other module has this name, and no parameter that is used otherwise."""
    if any(node.op == "call_module" and node.target == name for node in traced.nodes):
        return False
    return not (uses := _uses(traced, name)) or (uses == 1 and name == weight.target)


def _uses(traced: Traced, name: str) -> int:
    """How often a parameter is used by its name."""
    return sum(len(node.users) for node in traced.nodes if node.op == "get_attr" and node.target == name)


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
    return value if value.ndim == 2 else value.reshape(len(value), -1)


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
