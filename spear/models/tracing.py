"""Where a linear layer stands in a model: found by tracing the computation and trying its pieces, never by a name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from spear.models.activations import RELU, recognise
from spear.models.entrywise import Entrywise, Piece, find, is_log_softmax, relu_then
from spear.models.graphs import as_rows, extract, guesses, is_size, trace
from spear.models.layers import Behind, Block, Layer, Path, Shape
from spear.models.memory import once
from spear.models.modes import modes, words
from spear.models.rows import row_counts
from spear.models.traced import Traced, operation, source_of
from spear.reconstruction import Refusal

LONGEST = 16  # cuts of the graph behind a layer within which its activation is looked for
MOST_ROWS = 64  # parts of a sample that are tried where its shape is not known
SPREADS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)  # before a layer: its inputs are features


def linear_layers(model: nn.Module, shape: Shape = None) -> list[Layer]:
    """Every linear layer of a model in the order of computation; `shape` is that of one sample, where it is known.

    Raises as `spear.models.graphs.trace` does.
    """
    return list(each_layer(model, shape))


def each_layer(model: nn.Module, shape: Shape = None) -> Iterator[Layer]:
    """The same one by one: to look at a layer takes a while, and the first is often enough."""
    traced = traced_model(model, shape)
    for node in traced.nodes:
        if traced.is_linear(node):
            yield _usual(traced, node, shape)


def chain(model: nn.Module, shape: Shape = None) -> list[Layer]:
    """The linear layers of a model that is data -> Linear -> activation -> ... -> Linear -> logits, in that order.

    Raises `Refusal` as `trace` does, and for a model of any other form, naming what is in the way.
    """
    traced = traced_model(model, shape)
    nodes = [node for node in traced.nodes if traced.is_linear(node)]
    behind = [_behind(traced, node) for node in nodes]
    layers = [_usual(traced, node, shape) for node in nodes]
    _check_modes(traced)
    _check_chain(traced, nodes, layers, behind)
    return [layers[0], *(_above(low, high) for low, high in pairwise(layers))]


def find_layer(model: nn.Module, name: str | None = None, shape: Shape = None) -> Layer:
    """The linear layer of that name; without a name, the first whose inputs are the samples themselves.

    Raises `Refusal` for a layer that does not exist, for one that no ReLU follows, and for one whose gradient the
    client's training left without ReLU's zeros.
    """
    layers = each_layer(model, shape)
    chosen = next((x for x in layers if (x.name == name if name is not None else x.from_data)), None)
    if chosen is None:
        known = ", ".join(layer.name for layer in linear_layers(model, shape)) or "none"
        wanted = f"no linear layer named {name!r}" if name is not None else _no_data(traced_model(model, shape), shape)
        raise Refusal(f"{wanted}; the model's linear layers: {known}")
    if not chosen.relu:
        none = f"no ReLU follows {chosen.name}: its gradient has no zeros to read the batch from"
        other = "; behind slopes that are never zero any batch fits one layer alone: method='network' reads all layers"
        raise Refusal(none + other * (chosen.activation is not None))
    if chosen.obstacle:
        raise Refusal(chosen.obstacle)
    return chosen


def find_block(model: nn.Module, name: str | None = None, shape: Shape = None) -> Block:
    """The feed-forward block that begins with the linear layer of that name, or else the first that tokens enter, gated
    or not.

    Raises `Refusal` where there is none.
    """
    layers = {layer.name: layer for layer in linear_layers(model, shape)}
    known = ", ".join(layers) or "none"
    if name is not None and name not in layers:
        raise Refusal(f"no linear layer named {name!r}; the model's linear layers: {known}")
    begins = [layer for layer in layers.values() if (layer.rows > 1 if name is None else layer.name == name)]
    found = blocks(model, shape)
    for layer in begins:
        if layer.name in found:
            return found[layer.name]
    why = "".join(f": {layer.obstacle}" for layer in begins if layer.obstacle)
    where = (
        f"behind {name}" if name else "that several tokens of a sample enter" if shape else "(a sample has no shape)"
    )
    raise Refusal(f"no activation and linear layer {where}{why}; the model's linear layers: {known}")


def blocks(model: nn.Module, shape: Shape = None) -> dict[str, Block]:
    """Every feed-forward block, gated or not, by the names of the layers that it begins with."""
    layers = {layer.name: layer for layer in linear_layers(model, shape)}
    begins = [one for one in layers.values() if one.readers and one.after.is_plain and not one.obstacle]
    found = {layer.name: Block(layer, layers[layer.readers[0]]) for layer in begins}
    return found | _gated(traced_model(model, shape), layers)


def _gated(traced: Traced, layers: Mapping[str, Layer]) -> dict[str, Block]:
    """Blocks whose activations another layer of the same inputs multiplies, by the names of both."""
    found, nodes = {}, [node for node in traced.nodes if traced.is_linear(node)]
    ends = {behind.end: node for node in nodes if (behind := _behind(traced, node)).after.is_plain}
    calls = [str(node.target) for node in nodes]
    for second in nodes:
        product = source_of(second)
        while isinstance(traced.part(product), nn.Dropout | nn.Identity) or operation(product) == "dropout":
            product = source_of(product)
        pair = [ends[one] for one in product.args[:2] if one in ends] if operation(product) == "mul" else []
        low = sorted((layers[str(node.target)] for node in pair), key=lambda layer: layer.activation is None)
        if [layer.activation is None for layer in low] != [False, True]:
            continue
        block = Block(low[0], layers[str(second.target)], low[1])
        names, alike = [part.name for part in (*block.begins, block.second)], source_of(pair[0]) is source_of(pair[1])
        biases = {layer.linear.bias is None for layer in low}
        if alike and len(biases) == 1 and not low[0].obstacle and all(calls.count(name) == 1 for name in names):
            found |= dict.fromkeys(names[:2], block)
    return found


def is_chain(model: nn.Module, shape: Shape = None) -> bool:
    """Whether one attack reads every layer."""
    try:
        chain(model, shape)
    except Refusal:
        return False
    return True


@dataclass(frozen=True)
class Sent:
    """The layer whose gradient there is to attack, `None` for the one that reads the data; and why it is another."""

    layer: str | None = None
    words: tuple[str, ...] = ()


def next_sent(model: nn.Module, received: Mapping[str, Tensor], shape: Shape = None) -> Sent:
    """The first layer behind the data's whose gradient was received, where that of the data's own was not."""
    first = ""
    try:
        for layer in each_layer(model, shape):
            missing = layer.missing(received)
            if not first and layer.from_data and not missing:
                return Sent()
            if first and layer.relu and not layer.obstacle and not missing:
                return Sent(layer.name, (f"what enters {layer.name}: the update has no gradient for {first}",))
            first = first or (missing if layer.from_data else "")
    except Refusal:  # a model that cannot be traced: each method says so
        pass
    return Sent()


def doubts(model: nn.Module, shape: Shape = None) -> str:
    """Dropout and batch normalisation that are off here, in words; empty where there are none."""
    traced = traced_model(model, shape)
    return words(modes(traced, traced.nodes, on=False))


def count_inputs(model: nn.Module, shape: Shape = None) -> int:
    """How many tensors the model takes, those that have a default left out."""
    return len(traced_model(model, shape).inputs)


def one_output(model: nn.Module, shape: Shape = None) -> bool:
    """Whether the model ends with a linear layer of one output."""
    traced = traced_model(model, shape)
    outputs = outputs_of(traced)
    while len(outputs) == 1 and not traced.is_linear(outputs[0]):
        outputs = [node for node in outputs[0].all_input_nodes if not is_size(node)]
    return len(outputs) == 1 and traced.part(outputs[0]).out_features == 1


def traced_model(model: nn.Module, shape: Shape) -> Traced:
    sizes = [p.shape[1] for p in model.parameters() if p.ndim == 2]
    likely = guesses(sizes[0]) if sizes else []
    return once((model, shape), lambda: trace(model, likely if shape is None else [shape]))


def _usual(traced: Traced, node: fx.Node, shape: Shape) -> Layer:
    return once(("layer", node, shape), lambda: layer_at(traced, node, shape, _behind(traced, node)))


def layer_at(traced: Traced, node: fx.Node, shape: Shape, behind: Behind) -> Layer:
    linear, before = traced.part(node), behind.before
    path = data_path(traced, node, linear.in_features, shape)
    rows = path.rows if path is not None else row_counts(traced, shape).get(node.name, 1)
    tail, unknown = _tail(traced, node, behind.start, rows)
    own, outer = traced.names(), _added_last(traced, behind.start) if linear.bias is None else ""
    if outer:
        own[f"{node.target}.bias"] = outer
    return Layer(
        name=str(node.target),
        linear=linear if before.is_plain else _folded(linear, before),
        from_data=path is not None,
        relu=behind.relu is not None,
        activation=behind.activation,
        tail=tail,
        unknown=unknown,
        path=path,
        before=before,
        after=behind.after,
        own=own,
        turned=frozenset(traced.turned),
        outer_bias=bool(outer),
        obstacle=_obstacle(traced, node, behind.relu),
        readers=_readers(traced, behind.end, linear.out_features) if behind.activation is not None else (),
        rows=rows,
    )


def _readers(traced: Traced, end: fx.Node, m: int) -> tuple[str, ...]:
    """The linear layers that read the value of a node, each once, one vector of m entries of each sample."""
    users = [str(user.target) for user in end.users if traced.is_linear(user) and traced.part(user).in_features == m]
    calls = [str(node.target) for node in traced.nodes if traced.is_linear(node)]
    return tuple(name for name in users if calls.count(name) == 1)


def _behind(traced: Traced, node: fx.Node) -> Behind:
    return once(("behind", node), lambda: _followed(traced, node))


def _followed(traced: Traced, node: fx.Node) -> Behind:
    """What follows a layer, up to the first node that is neither an activation nor a map of entries.

    Where one elementwise function follows another, they are one activation.
    """
    m = traced.part(node).out_features
    before = after = Entrywise.same(m)
    relu = activation = None
    start = end = node
    for cut, _ in zip(cuts(node), range(LONGEST), strict=False):
        piece = None if traced.is_linear(cut) else extract(traced, end, cut)
        if piece is None:
            break
        piece = Piece(piece)
        if (found := find(piece, (m,))) is not None:
            before, after = (before.then(found), after) if activation is None else (before, after.then(found))
            start, end = (cut if activation is None else start), cut
        elif activation is None and (found := relu_then(piece, m)) is not None:
            relu, activation, after, end = cut, RELU, found, cut
        elif (found := recognise(Piece(extract(traced, start, cut)).double, m)) is not None:
            activation, after, end = found, Entrywise.same(m), cut
    return Behind(before, relu, activation, after, start, end)


def cuts(start: fx.Node) -> Iterator[fx.Node]:
    """The nodes through which alone the output depends on the value of `start`, from there on."""
    order = {node: k for k, node in enumerate(start.graph.nodes)}
    last_use = lambda node: max((order[user] for user in node.users if not is_size(user)), default=-1)  # noqa: E731
    reached, last = {start}, last_use(start)
    for node in list(start.graph.nodes)[order[start] + 1 :]:
        if node.op == "output":
            return
        if is_size(node) or not any(given in reached for given in node.all_input_nodes):
            continue
        if last <= order[node]:
            yield node
        reached.add(node)
        last = max(last, last_use(node))


def ancestors(node: fx.Node) -> list[fx.Node]:
    """The node and all that its value depends on."""
    seen, waiting = set(), [node]
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            waiting.extend(one.all_input_nodes)
    return [one for one in node.graph.nodes if one in seen]


def data_path(traced: Traced, node: fx.Node, n: int, shape: Shape) -> Path | None:
    """How the data reach a layer; `None` where its inputs are no samples, nor parts of them."""
    way = ancestors(source_of(node))
    roots = [one for one in way if one.op == "placeholder"]
    if len(roots) != 1 or any(isinstance(traced.part(one), SPREADS) for one in way) or modes(traced, way, on=True):
        return None
    piece = Piece(extract(traced, roots[0], source_of(node)))
    shapes = [] if shape is None else [shape]
    likely = [guess for rows in range(1, MOST_ROWS + 1) for guess in guesses(n * rows)]
    fitting = next((one for one in [*shapes, *likely] if piece.feeds(one, n)), None)
    change = None if fitting is None else find(piece, fitting)
    if change is None:
        return None
    return Path(fitting, len(change.entries) // n, change, fitting != shape, words(modes(traced, way, on=False)))


def _no_data(traced: Traced, shape: Shape) -> str:
    """Why no layer reads the data, in words."""
    first = next((node for node in traced.nodes if traced.is_linear(node)), None)
    on = [] if first is None else modes(traced, ancestors(source_of(first)), on=True)
    if on:
        what = f"the client trained with {words(on)} on before {first.target}"
        return f"no linear layer reads the data directly: {what}, so what enters that is not the samples"
    if len(traced.inputs) > 1:
        return f"no linear layer reads the data directly: the model takes {len(traced.inputs)} inputs"
    return "no linear layer reads the data directly" + ("" if shape else " (the shape of a sample was not given)")


def outputs_of(traced: Traced) -> list[fx.Node]:
    """What the model returns that nothing else that it returns is computed from."""
    end = traced.nodes[-1]
    given = [node for node in end.all_input_nodes if node.op != "placeholder"]
    below = {inner for node in given for inner in ancestors(node) if inner is not node}
    return [node for node in given if node not in below]


def _tail(traced: Traced, node: fx.Node, start: fx.Node, rows: int) -> tuple[fx.GraphModule | None, str]:
    """The logits as a function of what enters the activation; or why there is none."""
    outputs = outputs_of(traced)
    if rows > 1:
        return None, f"{node.target} reads {rows} parts of each sample, and each comes back by itself"
    if len(outputs) != 1:
        names = ", ".join(output.name for output in outputs)
        return None, f"the model gives {len(outputs)} outputs ({names}): which of them the loss reads is not known"
    rest = [one for one in ancestors(outputs[0]) if node in ancestors(one)]
    if on := modes(traced, rest, on=True):
        return None, f"the client trained with {words(on)} on: what follows {node.target} is not known"
    tail = extract(traced, start, outputs[0], then=as_rows)
    return tail, "" if tail is not None else f"the outputs depend on more than {node.target}, by a branch around it"


def _obstacle(traced: Traced, node: fx.Node, relu: fx.Node | None) -> str:
    """What the client did in training mode between a layer and the next that leaves its gradient without zeros of
    ReLU alone; empty where that is nothing."""
    near, waiting, order = [], list(node.users), {one: k for k, one in enumerate(traced.nodes)}
    while waiting:
        one = waiting.pop()
        if one not in near and not traced.is_linear(one):
            near.append(one)
            waiting.extend(one.users)
    for one in near:
        for found in modes(traced, [one], on=True):
            where = f"the client trained with {found.words} on behind {node.target}"
            if not found.mixes:
                return f"{where}: the zeros of its gradient are not those of ReLU alone"
            if relu is None or order[one] < order[relu]:
                return f"{where}: it mixes the samples of a batch, and the gradient of {node.target} has no zeros"
    return ""


def _added_last(traced: Traced, start: fx.Node) -> str:
    """The parameter that a node adds to what it computes, one number for each entry; empty where there is none.

    The loss' gradient by it is that by the node's value, summed over the samples.
    """
    part = traced.part(start)
    if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.bias is not None:
        return f"{start.target}.bias"
    vectors = [one.target for one in start.all_input_nodes if traced.is_parameter(one, 1)]
    return vectors[-1] if vectors and operation(start) in ("add", "batch_norm") else ""


def _folded(linear: nn.Linear, before: Entrywise) -> nn.Linear:
    """The layer and the map behind it as one layer."""
    W = linear.weight.detach()
    factor, shift, entries = before.factor.to(W), before.shift.to(W), before.entries.to(W.device)
    bias = linear.bias is not None or bool(shift.any())
    made = nn.Linear(W.shape[1], W.shape[0], bias, device="meta")
    made.weight = nn.Parameter(factor[:, None] * W[entries], linear.weight.requires_grad)
    if bias:
        own = torch.zeros_like(shift) if linear.bias is None else linear.bias.detach()[entries]
        made.bias = nn.Parameter(factor * own + shift, linear.weight.requires_grad)
    return made


def _above(low: Layer, high: Layer) -> Layer:
    """A layer into whose weights the map between it and the ReLU below is folded."""
    below = low.after
    if below.is_plain:
        return high
    linear, W = high.linear, high.linear.weight.detach()
    if linear.bias is None and bool(below.shift.any()):
        raise Refusal(f"{high.name} has no bias, so what is added to its inputs cannot be undone")
    made = nn.Linear(W.shape[1], W.shape[0], linear.bias is not None, device="meta")
    columns = torch.empty_like(W)
    columns[:, below.entries.to(W.device)] = W * below.factor.to(W)
    made.weight = nn.Parameter(columns, linear.weight.requires_grad)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach() + W @ below.shift.to(W), linear.weight.requires_grad)
    return replace(high, linear=made, below=below)


def _check_modes(traced: Traced) -> None:
    if on := modes(traced, traced.nodes, on=True):
        raise Refusal(f"the client trained with {words(on)} on: its gradient is not that of the network as it is")


def _check_chain(traced: Traced, nodes: list[fx.Node], layers: list[Layer], behind: list[Behind]) -> None:
    """Raises `Refusal` where the layers are no chain from the data to the logits with activations between them."""
    names, outputs = [layer.name for layer in layers], outputs_of(traced)
    wanted = "the network method needs one chain of linear layers with elementwise activations between them"
    if not layers or layers[0].path is None or layers[0].rows > 1:
        why = f"{names[0]} reads parts of a sample" if layers and layers[0].rows > 1 else _no_data(traced, None)
        raise Refusal(f"{wanted}; {why}")
    if len(outputs) != 1:
        raise Refusal(f"{wanted}; the model gives {len(outputs)} outputs")
    shared = [name for name in names if f"{name}.weight" not in layers[0].own]
    if len(set(names)) < len(names) or shared:
        raise Refusal(f"{wanted}; {', '.join(sorted(set(shared or names)))} shares its weights")
    for k, layer in enumerate(layers[:-1]):
        if layer.activation is None or behind[k].end is not source_of(nodes[k + 1]):
            found = ", ".join(_called(traced, user) for user in behind[k].end.users)
            raise Refusal(f"{wanted}; behind {layer.name} comes {found}")
    if not ends_at(traced, behind[-1].end, outputs[0], layers[-1]):
        raise Refusal(f"{wanted}; something else follows {names[-1]}")


def _called(traced: Traced, node: fx.Node) -> str:
    """What the user knows a node by: a module's name and kind, or the function."""
    part = traced.part(node)
    return node.name if part is None else f"{node.target} ({type(part).__name__})"


def ends_at(traced: Traced, end: fx.Node, output: fx.Node, last: Layer) -> bool:
    """Whether a chain ends at the model's output, or at a log-softmax of it, which changes nothing for its loss."""
    if last.activation is not None:
        return False
    piece = None if end is output else extract(traced, end, output)
    return end is output or (piece is not None and is_log_softmax(Piece(piece), last.linear.out_features))
