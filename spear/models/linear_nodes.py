"""Every linear map of a graph as a module: products with parameters, biases added later, names as the parameters'."""

from typing import Any

from torch import fx, nn

from spear.models.traced import Traced, operation

LINEAR = {"linear", "addmm", "mm", "matmul"}
TRANSPOSES = {"t", "transpose", "permute", "T", "mT", "numpy_T", "swapaxes"}


def make_linear(traced: Traced) -> None:
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
